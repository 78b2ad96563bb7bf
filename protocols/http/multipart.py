"""Splits a multipart answer while it arrives (RFC 2046 section 5.1): no part is ever in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from email.message import Message
from email.utils import collapse_rfc2231_value

from protocols.http.head import Fields, fields
from transfer.errors import Interrupted

HEAD_BYTES = 65_536  # of one part's head, at most


def parameters(content_type: str) -> tuple[str, dict[str, str]]:
    """Split a Content-Type into the media type, in lower case, and its parameters."""
    message = Message()
    message["Content-Type"] = content_type
    found = message.get_params() or []
    return (found[0][0].lower() if found else ""), {
        name.lower(): collapse_rfc2231_value(value) for name, value in found[1:]
    }


class Parts:
    """The parts of a body; each must be read to its end, or left, before the next.

    Args:
        pieces: the body as it comes; a piece is copied before the next one is asked for.
        where: the server, for messages.
    """

    def __init__(self, pieces: Iterator[memoryview], boundary: str, where: str) -> None:
        self._pieces, self._where = pieces, where
        self._dashed = b"--" + boundary.encode("latin-1")
        self._line_end = b""  # CR LF; some servers write LF alone: the first line shows which
        self._delimiter = b"\n" + self._dashed
        self._data = b"\n"  # the first delimiter has no line end before it
        self._at = 0  # position in it
        self._within = True  # before the first delimiter there may be a preamble

    def __iter__(self) -> Iterator[Fields]:
        """Yield the head of each part; its content comes from `content`.

        Raises:
            Interrupted: the body ends before its closing delimiter.
        """
        while True:
            for _ in self.content():
                pass
            while len(self._data) - self._at < 2:
                self._more()
            if self._data.startswith(b"--", self._at):
                for _ in self._pieces:  # an epilogue
                    pass
                return
            yield self._head()

    def content(self) -> Iterator[memoryview]:
        """Yield the rest of the current part."""
        keep = len(self._delimiter) - 1  # bytes at the end that may be the delimiter's beginning
        while self._within:
            begin, end = self._at, self._data.find(self._delimiter, self._at)
            if end >= 0:
                self._within = False
                self._at = end + len(self._delimiter)
            else:
                end = self._at = max(begin, len(self._data) - keep)
            if begin < end:
                yield memoryview(self._data)[begin:end]
            if self._within:
                self._more()

    def _head(self) -> Fields:
        """Read a part's head; the current position is behind its delimiter."""
        if not self._line_end:
            end = self._find(b"\n")
            self._line_end = b"\r\n" if self._data[end - 1 : end] == b"\r" else b"\n"
            self._delimiter = self._line_end + self._dashed
        blank_line = self._line_end * 2
        end = self._find(blank_line)
        # The first line is what follows the delimiter: nothing, or blanks.
        head = self._data[self._at : end].partition(self._line_end)[2]
        self._at = end + len(blank_line)
        self._within = True
        try:
            return fields(head.decode("latin-1"))
        except ValueError as exc:
            raise Interrupted(f"{self._where}: a part of the answer has too long a head") from exc

    def _find(self, sign: bytes) -> int:
        """Return the position of what must occur within a part's head."""
        while (end := self._data.find(sign, self._at)) < 0:
            if len(self._data) - self._at > HEAD_BYTES:
                raise Interrupted(f"{self._where}: a part of the answer has a head without end")
            self._more()
        return end

    def _more(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            raise Interrupted(f"{self._where}: the answer was cut short in the middle of its parts")
        self._data = b"".join((memoryview(self._data)[self._at :], piece))
        self._at = 0
