"""Heads: the status line and the fields of an answer, and the fields of a part of one (RFC 9112 sections 4 and 5).

Parsed in one pass; http.client needs ten times as long. Tolerant, because real servers and proxies deviate: bare LF, no
reason, folded lines, any byte in a value, lines that are not fields (these are skipped).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import NamedTuple, overload

MAX_FIELDS = 256  # lines of a head that are read
# Answers that mean "later": RFC 9110 section 15, RFC 6585 (429), RFC 8470 (425), RFC 4918 (507).
BUSY_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504, 507))
MAX_RETRY_AFTER_S = 86_400.0  # longest wait that is honoured: a day
_BLANKS = " \t"
_PROTOCOL = re.compile(
    r"(?:SSH-[0-9.]{1,5}-[A-Za-z]{1,12}_?[0-9.p]{0,8}"
    r"|(?:HTTP|RTSP|SIP|ICY|AMQP|RFB)[-/ ]?[0-9.]{0,5}(?: [1-5][0-9]{2})?)(?!\S)"
)


class Fields:
    """Header fields in their order; names in any case, the first of several of one name counts.

    Args:
        lines: the fields as they came, each on one line; a line that is not a field is skipped.
    """

    __slots__ = ("_first", "_lines")

    def __init__(self, lines: Sequence[str] = ()) -> None:
        self._lines = lines
        first: dict[str, str] = {}  # what follows the colon, as it came
        for line in reversed(lines):
            name, colon, value = line.partition(":")
            if colon:
                first[name.lower()] = value
        self._first = first

    @overload
    def get(self, name: str) -> str | None: ...
    @overload
    def get(self, name: str, default: str) -> str: ...
    def get(self, name: str, default: str | None = None) -> str | None:
        value = self._first.get(name.lower())
        return default if value is None else value.strip(_BLANKS)

    def get_all(self, name: str, default: Sequence[str] = ()) -> Sequence[str]:
        """Return the values of all fields with a name."""
        return [value for key, value in self.items() if key.lower() == name.lower()] or default

    def items(self) -> list[tuple[str, str]]:
        parts = (line.partition(":") for line in self._lines)
        return [(name, value.strip(_BLANKS)) for name, colon, value in parts if colon and name]

    @property
    def repeats(self) -> bool:
        """Whether some field may be there more than once."""
        return len(self._first) < len(self._lines)

    @property
    def media_type(self) -> str:
        """The Content-Type without its parameters, in lower case; "" if there is none."""
        return self.get("Content-Type", "").split(";")[0].strip().lower()

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._first

    def __getitem__(self, name: str) -> str:
        return self._first[name.lower()].strip(_BLANKS)


class Head(NamedTuple):
    """The head of an answer. `modern`: its version is after HTTP/1.0, so that connections are kept."""

    status: int
    reason: str
    modern: bool
    fields: Fields


def status_line(line: str) -> tuple[int, str, bool]:
    """Return the parts of a status line: status, reason, and whether the version is after HTTP/1.0.

    Raises:
        ValueError: it is not a status line.
    """
    version, _, rest = line.partition(" ")
    code, _, reason = rest.partition(" ")
    if not version.startswith("HTTP/1.") or len(code) != 3 or not (code.isascii() and code.isdigit()):
        # Nothing else of it: it may be data, cut where no one would know a name again.
        named = _PROTOCOL.match(line)
        shown = repr(named[0] if named else "") if named or not line else "other bytes"
        raise ValueError(f"it begins with {shown}")
    return int(code), reason.strip(), version != "HTTP/1.0"


def head(block: str) -> Head:
    """Parse the head of an answer: its lines, without the blank one at the end.

    Raises:
        ValueError: it is not HTTP/1.x, or has too many lines.
    """
    first, _, rest = block.partition("\n")
    return Head(*status_line(first.removesuffix("\r")), fields(rest))


def fields(block: str) -> Fields:
    """Parse header fields.

    Raises:
        ValueError: there are too many lines.
    """
    ends = block.count("\n")
    if ends >= MAX_FIELDS:
        raise ValueError("its head has no end")
    lines = block.split("\r\n")
    even = len(lines) - 1 == ends == block.count("\r")
    if not even or "\n " in block or "\n\t" in block or " :" in block or block.startswith((" ", "\t")):
        lines = _plain(block.split("\n"))
    return Fields(lines)


def _plain(lines: list[str]) -> list[str]:
    """Join folded lines with a blank, as RFC 9112 section 5.2 says, and drop blanks before colons.

    A CR alone becomes a blank (section 2.2).
    """
    plain: list[str] = []
    for line in lines:
        continued = line[:1] in (" ", "\t")
        line = line.removesuffix("\r").replace("\r", " ").strip(_BLANKS)
        if not continued:
            name, colon, value = line.partition(":")
            plain.append(name.rstrip(_BLANKS) + colon + value)
        elif plain and line:
            plain[-1] += f" {line}"
    return plain


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After field asks to wait, whether it names them or a date (RFC 9110 10.2.3).

    None if there is no such field, or its value is not valid.
    """
    text = (value or "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            when = parsedate_to_datetime(text)
        except (TypeError, ValueError, OverflowError):
            return None
        seconds = when.replace(tzinfo=when.tzinfo or UTC).timestamp() - time.time()
    return None if math.isnan(seconds) else min(max(0.0, seconds), MAX_RETRY_AFTER_S)
