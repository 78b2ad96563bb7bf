"""Reads a zip as it comes, by its local headers, with the refusals of Java's `ZipInputStream`, which XNAT uses."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

LOCAL, DESCRIPTOR, CENTRAL, END, END_64 = 0x04034B50, 0x08074B50, 0x02014B50, 0x06054B50, 0x06064B50
STORED, DEFLATED = 0, 8
ENCRYPTED, HAS_DESCRIPTOR = 1, 8
WIDE = 0xFFFFFFFF
PIECE = 1 << 20

Read = Callable[[int], bytes]  # up to so many bytes, b"" at the end


class ZipError(Exception):
    """java.util.zip.ZipException, in its words."""


class EntryReader:
    """The entry that the reader stands at: its name, and its bytes, checked at their end."""

    def __init__(self, owner: ZipInput, name: str, method: int, crc: int, packed: int, size: int, later: bool) -> None:
        self.owner, self.name = owner, name
        self.method, self.crc, self.packed, self.size, self.later = method, crc, packed, size, later

    def pieces(self, *, sums: bool = True) -> Iterator[bytes]:
        """The content; `sums=False` takes the CRC for granted."""
        crc = count = 0
        for piece in self._stored() if self.method == STORED else self._inflated():
            if sums:
                crc = zlib.crc32(piece, crc)
            count += len(piece)
            yield piece
        if self.later:
            self._descriptor(count)
        if count != self.size:
            raise ZipError(f"invalid entry size (expected {self.size} but got {count} bytes)")
        if sums and crc != self.crc:
            raise ZipError(f"invalid entry CRC (expected 0x{self.crc:x} but got 0x{crc:x})")

    def _stored(self) -> Iterator[bytes]:
        left = self.packed
        while left:
            piece = self.owner.some(min(left, PIECE))
            left -= len(piece)
            yield piece

    def _inflated(self) -> Iterator[bytes]:
        inflate = zlib.decompressobj(-15)
        while not inflate.eof:
            raw = self.owner.some(PIECE)
            piece = inflate.decompress(raw)
            if inflate.eof:
                self.owner.push_back(inflate.unused_data)
            if piece:
                yield piece

    def _descriptor(self, count: int) -> None:
        head = self.owner.exactly(4)
        if struct.unpack("<I", head)[0] == DESCRIPTOR:
            head = self.owner.exactly(4)
        self.crc = struct.unpack("<I", head)[0]
        form = "<QQ" if count > WIDE else "<II"
        self.packed, self.size = struct.unpack(form, self.owner.exactly(struct.calcsize(form)))


class ZipInput:
    """A zip from a stream, entry by entry; the content of each must be read before the next is asked for.

    Raises:
        ZipError: it isn't one, or one that Java would refuse. EOFError: it ends too early.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._ahead = b""

    def push_back(self, data: bytes) -> None:
        self._ahead = data + self._ahead

    def some(self, count: int) -> bytes:
        if self._ahead:
            piece, self._ahead = self._ahead[:count], self._ahead[count:]
            return piece
        piece = self._read(count)
        if not piece:
            raise EOFError("Unexpected end of ZLIB input stream")
        return piece

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += self.some(count - len(data))
        return data

    def entries(self) -> Iterator[EntryReader]:
        while True:
            (mark,) = struct.unpack("<I", self.exactly(4))
            if mark in (CENTRAL, END, END_64):
                return
            if mark != LOCAL:
                raise ZipError("not a zip: no local header where one is expected")
            yield self._entry()

    def _entry(self) -> EntryReader:
        head = struct.unpack("<HHHHHIIIHH", self.exactly(26))
        flags, method, crc, packed, size = head[1], head[2], head[5], head[6], head[7]
        name = self.exactly(head[8]).decode("utf-8" if flags & 1 << 11 else "cp437")
        extra = self.exactly(head[9])
        if flags & ENCRYPTED:
            raise ZipError("encrypted ZIP entry not supported")
        later = bool(flags & HAS_DESCRIPTOR)
        if later and method != DEFLATED:
            raise ZipError("only DEFLATED entries can have EXT descriptor")
        if method not in (STORED, DEFLATED):
            raise ZipError("invalid compression method")
        packed, size = self._wide(extra, packed, size)
        return EntryReader(self, name, method, crc, packed, size, later)

    @staticmethod
    def _wide(extra: bytes, packed: int, size: int) -> tuple[int, int]:
        at = 0
        while at + 4 <= len(extra):
            kind, count = struct.unpack_from("<HH", extra, at)
            if kind == 1 and WIDE in (packed, size):
                # In a local header both must be there (APPNOTE 4.5.3).
                if count < 16:
                    raise ZipError("invalid zip64 extra length in the local header")
                size, packed = struct.unpack_from("<QQ", extra, at + 4)
                return packed, size
            at += 4 + count
        return packed, size
