"""One TCP connection, with TLS or without, that can be stopped at any time and notices the peer's answer while sending.

The socket never blocks: every wait is a short `poll`, after which the caller's `check` may raise. Nothing from the
environment (proxies, certificates) is used.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import cast

from protocols.net import tls
from protocols.net.nested import NestedTls
from transfer.errors import Interrupted, TimedOut, Unreachable

SLICE_S = 0.2  # the longest wait between two looks at `check`
READ_BYTES = 262_144  # one read; larger ones are not faster on loopback
LINE_BYTES = 65_536  # the longest line that is read
LINE_S = 120.0  # from the first byte of a line, or of a head, to its end: a peer may drop one byte a minute
HEAD_BYTES = READ_BYTES - 65_536  # of a head that is read; one has room in the buffer

_AGAIN_READ = (BlockingIOError, ssl.SSLWantReadError)


def host_of(address: Sequence[object]) -> str:
    """Return the host of a socket's address: an address of IPv4 as such, also where a socket of IPv6 gives it."""
    return str(address[0]).removeprefix("::ffff:")


def resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    """Return the addresses of a host, in the system's order.

    Raises:
        Unreachable: its name is not known.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise Unreachable(f"{host}: the name can't be resolved: {reason}") from exc
    return [(family, address) for family, _, _, _, address in found]


def shown(found: Iterable[tuple[socket.AddressFamily, tuple[object, ...]]]) -> str:
    """Return addresses for people, each once."""
    return ", ".join(dict.fromkeys(str(address[0]) for _, address in found))


def resolve_within(
    host: str, port: int, timeout_s: float, check: Callable[[], None]
) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    """Resolve a name as `resolve` does, in a thread: the system's resolver can't be stopped, and has its own timeouts.

    Raises:
        Unreachable: the name is not known, or not within `timeout_s`.
    """
    with suppress(ValueError):
        ip_address(host.partition("%")[0])
        return resolve(host, port)  # nobody has to be asked
    found: list[list[tuple[socket.AddressFamily, tuple[object, ...]]]] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(resolve(host, port))
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=work, name="resolve", daemon=True)
    thread.start()
    end = time.monotonic() + timeout_s
    while thread.is_alive() and (left := end - time.monotonic()) > 0:
        check()
        thread.join(min(left, SLICE_S))
    if failed:
        raise failed[0]
    if not found:
        raise Unreachable(f"{host}: the name was not resolved within {timeout_s:g} s")
    return found[0]


def place(host: str, port: int) -> str:
    """Return a host and its port for messages."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connect(host: str, port: int, timeout_s: float, check: Callable[[], None] = lambda: None) -> socket.socket:
    """Connect to the first address of a host that answers, each within `timeout_s`.

    Args:
        check: called several times a second while waiting; may raise to stop.

    Raises:
        Unreachable: none does; the message has the reason of the last one.
    """
    failure: OSError = OSError("it has no address")
    for family, address in resolve_within(host, port, timeout_s, check):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            code = sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                if not _ready(sock, select.POLLOUT, timeout_s, check):
                    raise TimeoutError(f"no answer within {timeout_s:g} s")  # noqa: TRY301
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))  # noqa: TRY301
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as exc:
            failure = exc
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise Unreachable(f"{place(host, port)}: {_no_connection(failure)}") from failure


def _no_connection(exc: OSError) -> str:
    if exc.errno == errno.ECONNREFUSED:
        return "connection refused: nothing listens on this port"
    return exc.strerror or str(exc)


def handshake(
    sock: socket.socket, host: str, where: str, settings: tls.Tls, timeout_s: float, check: Callable[[], None]
) -> ssl.SSLSocket:
    """Shake hands on a connected socket, which is closed if that fails.

    Raises:
        NotTrusted, Denied, Misconfigured, Interrupted: as `tls.classify` says. TimedOut: no answer.
    """
    try:
        if isinstance(sock, ssl.SSLSocket):
            wrapped = cast(ssl.SSLSocket, NestedTls(sock, settings.client(), host))
        else:
            wrapped = settings.client().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    except BaseException:
        sock.close()
        raise
    try:
        wrapped.setblocking(False)
        while True:
            try:
                wrapped.do_handshake()
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            else:
                return wrapped
            if not _ready(wrapped, events, timeout_s, check):
                raise TimedOut(f"{where}: no answer to the TLS handshake within {timeout_s:g} s")  # noqa: TRY301
    except OSError as exc:
        wrapped.close()
        raise tls.classify(exc, where, has_cert=bool(settings.cert)) from exc
    except BaseException:
        wrapped.close()
        raise


def _ready(sock: socket.socket, events: int, timeout_s: float, check: Callable[[], None]) -> bool:
    """Wait until the socket can be read or written; False if it can't within `timeout_s`."""
    poll = select.poll()
    poll.register(sock, events)
    end = time.monotonic() + timeout_s
    while True:
        check()
        left = end - time.monotonic()
        if left <= 0:
            return False
        if poll.poll(max(1, int(min(left, SLICE_S) * 1000))):
            return True


class Connection:
    """An established connection, with a buffer of what was read from it.

    Args:
        where: the peer, for messages.
        idle_timeout_s: how long the peer may neither accept nor send a byte.
        check: called several times a second while waiting, and between pieces; may raise to stop.
    """

    def __init__(
        self,
        sock: socket.socket,
        where: str,
        idle_timeout_s: float,
        check: Callable[[], None],
        *,
        has_cert: bool = False,
    ) -> None:
        self.sock, self.where, self.idle_timeout_s, self.check = sock, where, idle_timeout_s, check
        self.idle_since = time.monotonic()
        self.used = 0  # requests that were answered on it
        self._has_cert = has_cert
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # of what was read and not yet taken
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)

    def close(self) -> None:
        with suppress(OSError):
            self.sock.close()

    # ---- sending

    def send(
        self,
        data: memoryview,
        sent: Callable[[int], None] = lambda count: None,
        *,
        deaf: bool = False,
        quiet: bool = False,
    ) -> int:
        """Send all bytes, unless the peer sends something first; return how many were sent.

        Args:
            deaf: whether to continue although the peer sends something.
            quiet: whether it was just checked that the peer has sent nothing.

        Raises:
            Interrupted: the connection is gone, and the peer sent no answer.
            TimedOut: it accepts no more bytes.
        """
        done = 0
        while done < len(data):
            self.check()
            try:
                if not deaf and not quiet and self.heard():
                    break
                quiet = False
                count = self.sock.send(data[done:])
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._wait(select.POLLOUT | select.POLLIN)
            except OSError as exc:
                # What the peer said before it closed is still in our own buffer.
                if not deaf and self._last_words():
                    break
                raise self._broken(exc, "while the request was being sent") from exc
            else:
                done += count
                sent(count)
        return done

    def listen(self, timeout_s: float) -> bool:
        """Return True if the peer sends something within this time.

        Raises:
            Interrupted: the connection is gone.
        """
        end = time.monotonic() + timeout_s
        try:
            while not self.heard():
                if not _ready(self.sock, select.POLLIN, end - time.monotonic(), self.check):
                    return False
        except OSError as exc:
            raise self._broken(exc, "before its answer") from exc
        return True

    def heard(self) -> bool:
        """Return True if the peer has sent something, without waiting.

        Raises:
            OSError: the connection is gone.
        """
        if self._start < self._end:
            return True
        pending = self.sock.pending() if isinstance(self.sock, ssl.SSLSocket | NestedTls) else 0
        if not pending and not self._readable.poll(0):
            return False
        try:
            count = self._receive()
        except _AGAIN_READ:  # a part of a TLS record, or a session ticket
            return False
        if count == 0:
            raise ConnectionResetError(errno.ECONNRESET, "closed by the peer")
        return True

    def _last_words(self) -> bool:
        """Return True if a peer that accepts no more bytes has sent an answer.

        Raises:
            NotTrusted, Denied, Misconfigured: the last thing it sent is a TLS alert.
        """
        try:
            return self.heard()
        except ssl.SSLError as exc:
            if _is_alert(exc):
                raise self._broken(exc, "") from exc
        except OSError:
            pass
        return False

    # ---- receiving

    def fill(self) -> bool:
        """Wait for bytes; False if the peer has closed the connection.

        Raises:
            Interrupted: the connection broke. TimedOut: nothing came.
        """
        while True:
            self.check()
            try:
                return self._receive() > 0
            except _AGAIN_READ:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
            except OSError as exc:
                raise self._broken(exc, "while its answer was awaited") from exc

    def line(self) -> bytes:
        """Return one line, without its end.

        Raises:
            Interrupted: the connection ended within it; ValueError: it is too long. TimedOut: it takes too long.
        """
        searched, end_s = self._start, 0.0
        while True:
            end = self._buffer.find(b"\n", searched, self._end)
            if end >= 0:
                taken = bytes(self._view[self._start : end])
                self._start = end + 1
                return taken.removesuffix(b"\r")
            if self._end - self._start > LINE_BYTES:
                raise ValueError("a line without end")
            end_s = self._in_time(end_s)
            self._make_room()
            searched = self._end
            if not self.fill():
                raise Interrupted(f"{self.where}: the connection was closed in the middle of an answer")

    def head(self, begins: Callable[[str], object]) -> str:
        """Return lines with their ends, up to a blank one, which is consumed too.

        Args:
            begins: called with the first line if it arrives alone; may raise.

        Raises:
            Interrupted: the connection ended within it; ValueError: it is too long. TimedOut: it takes too long.
        """
        searched, first, end_s = self._start, True, 0.0
        while True:
            end = self._buffer.find(b"\n\r\n", searched, self._end)
            bare = self._buffer.find(b"\n\n", searched, self._end if end < 0 else end)
            if (found := end if bare < 0 else bare) >= 0:
                taken = str(self._view[self._start : found], "latin-1")
                self._start = found + (3 if bare < 0 else 2)
                return taken.removesuffix("\r")
            if first and (line_end := self._buffer.find(b"\n", self._start, self._end)) >= 0:
                begins(str(self._view[self._start : line_end], "latin-1").removesuffix("\r"))
                first = False
            length = self._end - self._start
            if length >= HEAD_BYTES or (first and length > LINE_BYTES):
                raise ValueError("a line without end" if first else "its head has no end")
            end_s = self._in_time(end_s)
            self._make_room()
            searched = max(self._start, self._end - 2)
            if not self.fill():
                raise Interrupted(f"{self.where}: the connection was closed in the middle of an answer")

    def _in_time(self, end_s: float) -> float:
        """Return when what is being read must be whole; 0 as long as nothing of it has come.

        Raises:
            TimedOut: that has passed.
        """
        if self._start == self._end:
            return 0.0
        if end_s and time.monotonic() > end_s:
            raise TimedOut(f"{self.where}: a line of its answer did not end within {LINE_S:g} s")
        return end_s or time.monotonic() + LINE_S

    def take(self, limit: int) -> memoryview:
        """Return what has arrived, at least one byte, at most `limit`; empty if the peer has closed.

        The view is valid until the next call.
        """
        if self._start == self._end and not self.fill():
            return self._view[:0]
        count = min(limit, self._end - self._start)
        taken = self._view[self._start : self._start + count]
        self._start += count
        return taken

    @property
    def ahead(self) -> bool:
        """Whether there are unread bytes in the buffer."""
        return self._start < self._end

    def _receive(self) -> int:
        if self._start == self._end:
            self._start = self._end = 0
        try:
            count = self.sock.recv_into(self._view[self._end :])
        except ssl.SSLZeroReturnError:
            return 0
        self._end += count
        return count

    def _make_room(self) -> None:
        """Move the unread bytes to the beginning."""
        if self._start:
            left = bytes(self._view[self._start : self._end])
            self._view[: len(left)] = left
            self._start, self._end = 0, len(left)

    def _wait(self, events: int) -> None:
        if not _ready(self.sock, events, self.idle_timeout_s, self.check):
            raise TimedOut(f"{self.where}: silent for {self.idle_timeout_s:g} s")

    def _broken(self, exc: OSError, when: str) -> Exception:
        if _is_alert(exc):
            # With TLS 1.3 a peer refuses our certificate only after the handshake.
            return tls.classify(exc, self.where, has_cert=self._has_cert)
        return Interrupted(f"{self.where}: the connection broke {when}: {exc.strerror or exc}")


def _is_alert(exc: OSError) -> bool:
    return isinstance(exc, ssl.SSLError) and not isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError)
