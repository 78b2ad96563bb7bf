"""An HTTP/1.1 answer, whose body is read as it comes (RFC 9112 sections 6 and 7, RFC 9110 section 10.2.3)."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from email.message import Message
from http.client import HTTPException, parse_headers

from protocols.http.head import retry_after
from protocols.net.connection import Connection
from transfer.errors import Interrupted

HEAD_LINES = 256  # lines of an answer's head that are read
BODY_BYTES = 16 << 20  # of an answer that is read into memory: a STOW answer has some 500 bytes per instance
INFLATED_BYTES = 1 << 20  # of a compressed answer, one piece
MEMBER = b"\x1f\x8b"  # how a member of gzip begins (RFC 1952 section 2.3.1)


class Answer:
    """An answer, whose body is read as it comes.

    Attributes:
        early: it came before the whole request was sent, which was then broken off.
    """

    def __init__(self, connection: Connection, method: str, where: str) -> None:
        self.connection = connection
        self.where = where
        try:
            self.status, self.reason, self.headers, http11 = _head(connection)
        except (ValueError, HTTPException) as exc:
            raise Interrupted(f"{where}: the answer is not HTTP/1.1: {exc}") from exc
        self.early = False
        coding = self.headers.get("Transfer-Encoding", "").lower()
        self._chunked = "chunked" in coding
        length = self.headers.get("Content-Length", "").split(",")[0].strip()
        if length and not length.isdecimal() and not coding:
            raise Interrupted(f"{where}: the answer has no sensible Content-Length: its end can't be told")
        self._length = int(length) if length and not coding else None
        if method == "HEAD" or self.status in (204, 304):
            self._chunked, self._length = False, 0
        options = self.headers.get("Connection", "").lower()
        self._keep = "close" not in options and (http11 or "keep-alive" in options)
        self._done = self._length == 0
        self._body: Iterator[memoryview] | None = None

    @property
    def media_type(self) -> str:
        """The Content-Type without its parameters, in lower case."""
        return self.headers.get("Content-Type", "").split(";")[0].strip().lower()

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asks to wait (Retry-After), whether it names them or a date; None if it doesn't."""
        return retry_after(self.headers.get("Retry-After"))

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another request."""
        return self._done and self._keep and not self.early and not self.connection.ahead

    @property
    def framed(self) -> bool:
        """Whether the answer itself tells where it ends; else the end of the connection does."""
        return self._chunked or self._length is not None

    def close(self) -> None:
        """Leave the rest of it unread, and give its connection up."""
        self.connection.close()

    def chunks(self) -> Iterator[memoryview]:
        """What is left of the body, in pieces as they come; a piece holds until the next one is asked for.

        Raises:
            Interrupted: it ended before its announced end. TimedOut.
        """
        if self._body is None:
            self._body = self._decoded(self._raw())
        return self._body

    def _decoded(self, raw: Iterator[memoryview]) -> Iterator[memoryview]:
        coding = self.headers.get("Content-Encoding", "").strip().lower()
        if coding in ("gzip", "x-gzip", "deflate"):  # we ask for none, but some proxies know better
            return self._inflated(raw)
        return raw

    def read(self, limit: int = BODY_BYTES) -> bytes:
        """The whole body.

        Raises:
            Interrupted: it is cut short, or longer than `limit` bytes.
        """
        data = bytearray()
        for piece in self.chunks():
            data += piece
            if len(data) > limit:
                raise Interrupted(f"{self.where}: an answer of more than {limit} bytes")
        return bytes(data)

    def _raw(self) -> Iterator[memoryview]:
        if self._done:
            return
        if self._chunked:
            yield from self._chunks()
        elif self._length is None:
            while piece := self.connection.take(1 << 62):
                yield piece
            self._keep = False
        else:
            yield from self._exactly(self._length)
        self._done = True

    def _exactly(self, count: int) -> Iterator[memoryview]:
        left = count
        while left:
            piece = self.connection.take(left)
            if not piece:
                raise Interrupted(f"{self.where}: the answer was cut short: {count - left} of {count} bytes came")
            left -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[memoryview]:
        try:
            while size := int(self.connection.line().split(b";")[0], 16):
                yield from self._exactly(size)
                self.connection.line()
            while self.connection.line():  # trailer fields
                pass
        except ValueError as exc:
            raise Interrupted(f"{self.where}: the answer's chunks are damaged") from exc

    def _inflated(self, raw: Iterator[memoryview]) -> Iterator[memoryview]:
        unzip, behind = None, b""
        try:
            for piece in raw:
                data, behind = behind + bytes(piece), b""
                while data:
                    if unzip is not None and unzip.eof:  # gzip may have several members (RFC 1952 section 2.2)
                        if not MEMBER.startswith(data[:2]):  # padding, which gzip(1) ignores as well
                            for _ in raw:
                                pass
                            return
                        if len(data) < len(MEMBER):
                            behind = data
                            break
                        unzip = None
                    unzip = unzip or zlib.decompressobj(_window_bits(data))
                    yield memoryview(unzip.decompress(data, INFLATED_BYTES))
                    data = unzip.unused_data if unzip.eof else unzip.unconsumed_tail
        except zlib.error as exc:
            raise Interrupted(f"{self.where}: the answer's compression is damaged") from exc
        if unzip is not None and not unzip.eof:
            raise Interrupted(f"{self.where}: the compressed answer was cut short")


def _window_bits(data: bytes) -> int:
    """What zlib must be told of compressed data that begin like this: gzip or zlib, or "deflate" as some mistake it."""
    is_zlib = data[0] & 15 == 8 and (len(data) < 2 or int.from_bytes(data[:2]) % 31 == 0)  # RFC 1950 section 2.2
    return 47 if data[0] == 0x1F or is_zlib else -15


def _head(connection: Connection) -> tuple[int, str, Message, bool]:
    """Read an answer's head: status, reason, fields, and whether it is HTTP/1.1."""
    line = connection.line()
    version, _, rest = line.partition(b" ")
    code, _, reason = rest.partition(b" ")
    if not version.startswith(b"HTTP/1.") or len(code) != 3 or not code.isdigit():
        raise ValueError(f"it begins with {line[:40]!r}" if line.isascii() else "it begins with other bytes")
    block = bytearray()
    for _ in range(HEAD_LINES):
        line = connection.line()
        if line and b":" not in line and line[:1] not in (b" ", b"\t"):
            continue  # no field; the parser would take it, and all that follows, for the body
        block += line + b"\r\n"
        if not line:
            return int(code), reason.decode("latin-1").strip(), parse_headers(io.BytesIO(block)), version != b"HTTP/1.0"
    raise ValueError("its head has no end")
