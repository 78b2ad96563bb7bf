"""A zip that is never a file: stored entries with sizes known beforehand, written piece by piece while it is sent.

Every local header holds the entry's size and CRC-32, so the reader needs no data descriptor: Java's `ZipInputStream`,
with which XNAT unpacks, refuses a stored entry that has one ("only DEFLATED entries can have EXT descriptor"). The
price is a pass over each file before it is sent, which also brings it into the page cache.

Source: APPNOTE.TXT 6.3.10 sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14-16 (end records) and
4.5.3 (ZIP64 extended information).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LIMIT_32 = 0xFFFFFFFF  # a field that can't hold the value, or would hold just this, refers to the ZIP64 record
LIMIT_16 = 0xFFFF
NEEDS_20 = 20  # version 2.0: stored entries in folders
NEEDS_45 = 45  # version 4.5: ZIP64
MADE_ON_UNIX = 3 << 8
MODE = 0o100644 << 16  # of the unpacked file, in the upper half of the external attributes
UTF8 = 1 << 11  # general purpose bit: the name is UTF-8
NO_TIME = 0x0000
NO_DATE = 0x0021  # 1 January 1980, the first day that the format knows: the same plan makes the same bytes

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<IIQI")


@dataclass(slots=True)
class ZipEntry:
    """One file of the zip. `crc` must be known before its header is made; the length doesn't depend on it."""

    name: bytes
    size: int
    crc: int = 0
    offset: int = 0  # of the local header, set when it is written

    @classmethod
    def of(cls, name: str, size: int) -> ZipEntry:
        return cls(name.encode("utf-8"), size)

    @property
    def big(self) -> bool:
        """Whether the local header needs the ZIP64 record."""
        return self.size >= LIMIT_32

    @property
    def local_size(self) -> int:
        """Bytes of the local header."""
        return _LOCAL.size + len(self.name) + (20 if self.big else 0)

    @property
    def central_size(self) -> int:
        """Bytes of the entry in the central directory; the offset must be set."""
        wide = 8 * (2 * self.big + (self.offset >= LIMIT_32))
        return _CENTRAL.size + len(self.name) + (4 + wide if wide else 0)

    def local(self) -> bytes:
        """Return the local header. In it the ZIP64 record always holds both sizes (section 4.5.3)."""
        extra = struct.pack("<HHQQ", 1, 16, self.size, self.size) if self.big else b""
        size = LIMIT_32 if self.big else self.size
        needs = NEEDS_45 if self.big else NEEDS_20
        head = _LOCAL.pack(
            0x04034B50, needs, UTF8, 0, NO_TIME, NO_DATE, self.crc, size, size, len(self.name), len(extra)
        )
        return head + self.name + extra

    def central(self) -> bytes:
        """Return the entry in the central directory, where the ZIP64 record holds only what doesn't fit."""
        wide = [self.size, self.size] if self.big else []
        if self.offset >= LIMIT_32:
            wide.append(self.offset)
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size = LIMIT_32 if self.big else self.size
        needs = NEEDS_45 if wide else NEEDS_20
        head = _CENTRAL.pack(
            0x02014B50, MADE_ON_UNIX | needs, needs, UTF8, 0, NO_TIME, NO_DATE, self.crc, size, size,
            len(self.name), len(extra), 0, 0, 0, MODE, min(self.offset, LIMIT_32),
        )  # fmt: skip
        return head + self.name + extra


def length(entries: Iterable[ZipEntry]) -> int:
    """Return the exact number of bytes of the zip of these entries; set their offsets."""
    position = directory = count = 0
    for entry in entries:
        entry.offset = position
        position += entry.local_size + entry.size
        directory += entry.central_size
        count += 1
    return position + directory + len(_end(count, position, directory))


def directory(entries: Iterable[ZipEntry]) -> Iterator[bytes]:
    """Yield what follows the last file: the central directory, in pieces, and the end records. Set offsets before."""
    start = size = count = 0
    for entry in entries:
        start = entry.offset + entry.local_size + entry.size
        piece = entry.central()
        size += len(piece)
        count += 1
        yield piece
    yield _end(count, start, size)


def _end(count: int, start: int, size: int) -> bytes:
    """Return the end of the central directory, with its ZIP64 forms before it where they are needed."""
    wide = b""
    if count >= LIMIT_16 or start >= LIMIT_32 or size >= LIMIT_32:
        wide = _END_64.pack(
            0x06064B50, _END_64.size - 12, MADE_ON_UNIX | NEEDS_45, NEEDS_45, 0, 0, count, count, size, start
        ) + _LOCATOR_64.pack(0x07064B50, 0, start + size, 1)
    short = min(count, LIMIT_16)
    return wide + _END.pack(0x06054B50, 0, 0, short, short, min(size, LIMIT_32), min(start, LIMIT_32), 0)
