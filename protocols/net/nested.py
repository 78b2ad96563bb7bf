"""TLS inside TLS, for a server behind a proxy that itself uses TLS: Python's TLS sockets can't be nested."""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Any

READ_BYTES = 65_536
WRITE_BYTES = 1 << 20  # of plain bytes that are encrypted before the outer socket has taken what came before


class NestedTls:
    """A non-blocking TLS socket on top of another one, with the methods of `ssl.SSLSocket`."""

    def __init__(self, outer: ssl.SSLSocket, context: ssl.SSLContext, host: str) -> None:
        self._outer = outer
        self._came, self._goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._inner = context.wrap_bio(self._came, self._goes, server_hostname=host)
        self._left = memoryview(b"")  # encrypted, and not yet taken by the outer socket

    def do_handshake(self) -> None:
        self._reading(self._inner.do_handshake)

    def recv_into(self, buffer: memoryview) -> int:
        return int(self._reading(self._inner.read, READ_BYTES if not len(buffer) else len(buffer), buffer))

    def send(self, data: memoryview) -> int:
        self._flush()
        count = self._inner.write(data[:WRITE_BYTES])
        with suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self._flush()
        return count

    def pending(self) -> int:
        """Return a lower bound of the bytes that can be read without waiting."""
        return self._inner.pending() or self._came.pending or self._outer.pending()

    def _reading(self, operation: Any, *arguments: Any) -> Any:
        """Do an operation that may have to read first; SSLWantReadError and SSLWantWriteError mean: call it again."""
        while True:
            try:
                result = operation(*arguments)
            except ssl.SSLWantReadError:
                self._flush()
                data = self._outer.recv(READ_BYTES)
                if data:
                    self._came.write(data)
                else:
                    self._came.write_eof()
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        while self._left or self._goes.pending:
            if not self._left:
                self._left = memoryview(self._goes.read())
            self._left = self._left[self._outer.send(self._left) :]

    def __getattr__(self, name: str) -> Any:
        """Answer for the inner connection where it has the attribute; file descriptor and closing are the outer's."""
        return getattr(self._inner if name in ("version", "cipher", "getpeercert") else self._outer, name)
