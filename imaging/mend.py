"""Gives every value, fragment and data set the even length that the standard asks for (PS3.5 sections 6.2, A.4, A.5).

Receivers that rely on it abort the association, or stop answering, at an odd one. Values stay as they are apart from
one byte of padding; an offset table of encapsulated pixel data is corrected.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO

from imaging.header import DEFLATED_SYNTAXES, EXPLICIT_BIG, Header
from imaging.pixels import Reader
from imaging.recode import EXPLICIT_BIG as BIG
from imaging.recode import (
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    ITEM,
    PIECE_BYTES,
    PIXELS,
    UNDEFINED,
    Element,
    EncodedSource,
    Encoding,
    Recoder,
    scan,
)
from imaging.transcode import Converted, deflate, inflate, room
from imaging.walk import FileWindow, Walk

NOTE = "odd lengths were padded (PS3.5 section 6.2)"
EXTENDED_OFFSETS = 0x7FE00001


@contextmanager
def mended(fd: int, header: Header, check: Callable[[], None] = lambda: None) -> Iterator[Converted]:
    """Make a copy of an open file's data set, in the same transfer syntax, in which nothing has an odd length.

    Args:
        check: called between pieces; may raise to stop.

    Raises:
        Damaged: it is not a sequence of elements. NoRoom: no room for the copy.
    """
    source = Reader(fd, header.dataset_offset)
    with tempfile.TemporaryFile() as out:
        with room():
            if header.TransferSyntaxUID in DEFLATED_SYNTAXES:
                _mend_deflated(source, out, check)
            else:
                _mend(source, _encoding(header), out, check)
            if out.tell() % 2:
                out.write(b"\0")
            out.flush()
        yield Converted(out.fileno(), os.fstat(out.fileno()).st_size, header.TransferSyntaxUID)


def _encoding(header: Header) -> Encoding:
    if not header.explicit:
        return IMPLICIT_LITTLE
    return BIG if header.TransferSyntaxUID == EXPLICIT_BIG else EXPLICIT_LITTLE


def _mend_deflated(source: Reader, out: IO[bytes], check: Callable[[], None]) -> None:
    """Mend a deflated data set; if only the deflated length is odd, keep the deflated bytes and pad them."""
    with tempfile.TemporaryFile() as plain, tempfile.TemporaryFile() as even:
        inflate(source, plain, check)
        plain.flush()
        walk = Walk(FileWindow(plain.fileno(), plain.tell()), "<", True, frozenset())
        walk.top(0, {})
        if walk.odd:
            _mend(Reader(plain.fileno(), 0), EXPLICIT_LITTLE, even, check)
            even.flush()
            deflate(Reader(even.fileno(), 0), out, check)
            return
    source.seek(0)
    while piece := source.read(PIECE_BYTES):
        check()
        out.write(piece)


def _mend(source: Reader, encoding: Encoding, out: IO[bytes], check: Callable[[], None]) -> None:
    found = scan(source, encoding, source.skip, frozenset((EXTENDED_OFFSETS,)))
    pixels = found.get(PIXELS)
    lengths: list[int] = []
    if pixels is not None and pixels.element.length == UNDEFINED:
        source.seek(pixels.position)
        lengths = _fragments(source)
    moved = _moved(lengths)
    changes: dict[int, tuple[str, bytes] | None] = {}
    if EXTENDED_OFFSETS in found:
        changes[EXTENDED_OFFSETS] = ("OV", _table(found[EXTENDED_OFFSETS].value, "Q", moved))
    source.seek(0)
    recoder = Recoder(EncodedSource(source, encoding), out, encoding, changes=changes, encapsulated=True, check=check)
    if lengths:

        def write(element: Element) -> None:
            recoder.copy_fragments(element, partial(_table, width="I", moved=moved))

        recoder.pixels = write
    recoder.run()


def _fragments(source: Reader) -> list[int]:
    """Return the lengths of the fragments that begin at the reader's position, the offset table's first."""
    found = []
    while len(head := source.read(8)) == 8:
        group, number, length = struct.unpack("<HHI", head)
        if group << 16 | number != ITEM:
            break
        found.append(length)
        source.skip(length)
    return found


def _moved(lengths: Sequence[int]) -> dict[int, int]:
    """Return where fragments begin after padding, by where they begin now, both counted from the end of the table."""
    made, before, after = {}, 0, 0
    for length in lengths[1:]:
        made[before] = after
        before, after = before + 8 + length, after + 8 + length + length % 2
    return made


def _table(value: bytes, width: str, moved: dict[int, int]) -> bytes:
    """Return the offset table for fragments that have moved; a table that doesn't fit them stays as it is."""
    count = len(value) // struct.calcsize(width)
    offsets = struct.unpack_from(f"<{count}{width}", value)
    if not all(offset in moved for offset in offsets):
        return value
    return struct.pack(f"<{count}{width}", *(moved[offset] for offset in offsets))
