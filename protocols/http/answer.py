"""An HTTP/1.1 answer, whose body is read as it comes (RFC 9112 sections 6 and 7, RFC 9110 section 10.2.3)."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator

from protocols.http.head import MAX_FIELDS, head, retry_after, status_line
from protocols.net.connection import Connection
from transfer.errors import Interrupted, TimedOut

BODY_BYTES = 16 << 20  # of an answer that is read into memory: a STOW answer has some 500 bytes per instance
INFLATED_BYTES = 1 << 20  # of a compressed answer, one piece
EXTENSION_BYTES = 65_536  # of all chunks together, beside as many as the chunks have
TRAILER_S = 120.0  # for all of them
LENGTH_DIGITS = 20  # of the longest body that anybody could send: Python reads no number of thousands of digits
MEMBER = b"\x1f\x8b"  # how a member of gzip begins (RFC 1952 section 2.3.1)


_HEX = re.compile(rb"[ \t]*[0-9A-Fa-f]{1,16}[ \t]*")


class Answer:
    """An answer, whose body is read as it comes.

    Attributes:
        early: whether it came before the whole request was sent; the rest was not sent then.
        keeps: whether it says that the connection is kept, as HTTP/1.1 implies anyway.
    """

    def __init__(self, connection: Connection, method: str, where: str) -> None:
        self.connection = connection
        self.where = where
        try:
            self.status, self.reason, modern, self.headers = head(connection.head(status_line))
        except ValueError as exc:
            raise Interrupted(f"{where}: the answer is not HTTP/1.1: {exc}") from exc
        self.early = False
        coding = self.headers.get("Transfer-Encoding", "").lower()
        self._chunked = "chunked" in coding
        length = self.headers.get("Content-Length", "").split(",")[0].strip()
        if length and not (length.isdecimal() and len(length) <= LENGTH_DIGITS) and not coding:
            raise Interrupted(f"{where}: the answer's Content-Length is not valid, so its end is not known")
        self._length = int(length) if length and not coding else None
        if method == "HEAD" or self.status in (204, 304):
            self._chunked, self._length = False, 0
        options = self.headers.get("Connection", "").lower()
        self.keeps = "keep-alive" in options
        self._keep = "close" not in options and (modern or self.keeps)
        if self.headers.repeats and len(set(self.headers.get_all("Content-Length"))) > 1:
            self._keep = False  # what comes after it may be of this answer still
        self._done = self._length == 0
        self._body: Iterator[memoryview] | None = None

    @property
    def media_type(self) -> str:
        """The Content-Type without its parameters, in lower case."""
        return self.headers.media_type

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asks to wait (Retry-After, as a number or a date); None if it doesn't."""
        return retry_after(self.headers.get("Retry-After"))

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another request."""
        return self._done and self._keep and not self.early and not self.connection.ahead

    @property
    def framed(self) -> bool:
        """Whether the answer itself shows where it ends; if not, the end of the connection does."""
        return self._chunked or self._length is not None

    def close(self) -> None:
        """Leave the rest unread, and close the connection."""
        self.connection.close()

    def chunks(self) -> Iterator[memoryview]:
        """Yield the rest of the body in pieces as they arrive; a piece is valid until the next one is requested.

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
        """Return the whole body.

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
        """RFC 9112 section 7.1; extensions and trailers are skipped, within bounds."""
        extra = taken = 0
        try:
            while True:
                size, _, extension = self.connection.line().partition(b";")
                if not _HEX.fullmatch(size):
                    raise ValueError("no size")  # noqa: TRY301
                if not (count := int(size, 16)):
                    break
                taken, extra = taken + count, extra + len(extension)
                if extra > EXTENSION_BYTES + taken:
                    raise ValueError("too many extensions")  # noqa: TRY301
                yield from self._exactly(count)
                self.connection.line()
            end_s = time.monotonic() + TRAILER_S
            for _ in range(MAX_FIELDS):  # trailer fields
                if not self.connection.line():
                    return
                if time.monotonic() > end_s:
                    raise TimedOut(f"{self.where}: the trailers of its answer did not end within {TRAILER_S:g} s")
            raise ValueError("too many trailers")  # noqa: TRY301
        except ValueError as exc:
            raise Interrupted(f"{self.where}: the answer's chunks are damaged: {exc}") from exc

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
    """Return zlib's `wbits` for data that begin like this: gzip, zlib, or "deflate" as some servers mistake it."""
    is_zlib = data[0] & 15 == 8 and (len(data) < 2 or int.from_bytes(data[:2]) % 31 == 0)  # RFC 1950 section 2.2
    return 47 if data[0] == 0x1F or is_zlib else -15
