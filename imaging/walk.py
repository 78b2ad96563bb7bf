"""Steps over a data set by element lengths, without reading what is not wanted.

Source: PS3.5 sections 7.1 (data elements), 7.5 (sequences) and Annex A.4 (encapsulated pixel data).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from functools import lru_cache

from imaging.shapes import Shapes

WINDOW_BYTES = 16_384  # one read holds the header of most images
MAX_DEPTH = 64  # nested sequences; real objects stay below 12
MAX_VALUE_BYTES = 65_536  # no value that is wanted comes near; a damaged length must not fill the memory
UNDEFINED = 0xFFFFFFFF
_BLANK = frozenset((b"  ", b"\0\0", b"??"))
_PIXEL_DATA = 0x7FE00010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
# VRs whose length field has 32 bits, PS3.5 table 7.1-1.
LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())


class Damaged(Exception):
    """The file is DICOM, or was meant to be, but can't be sent as such; the text says why."""


class FileWindow:
    """A file read in pieces: the piece that holds the bytes asked for is kept; a jump out of it reads another one."""

    def __init__(self, fd: int, size: int, data: bytes | None = None) -> None:
        self.fd, self.size = fd, size
        self.start = 0
        self.data = os.pread(fd, WINDOW_BYTES, 0) if data is None else data

    def at(self, offset: int, length: int) -> bytes:
        begin = offset - self.start
        if begin < 0 or begin + length > len(self.data):
            if offset + length > self.size:
                raise Damaged(f"truncated: byte {offset + length} is needed, the file ends at {self.size}")
            self.start, begin = offset, 0
            self.data = os.pread(self.fd, max(length, WINDOW_BYTES), offset)
            if len(self.data) < length:
                raise Damaged("truncated while it was being read")
        return self.data[begin : begin + length]


class Walk:
    """Steps over the elements of a data set, keeping the few values that are wanted.

    Args:
        strict: whether the encoding is only a guess: then tags must ascend.

    Attributes:
        odd: whether a value or a fragment that was stepped over has an odd length.
        encapsulated: whether the pixel data is compressed.
    """

    def __init__(
        self, window: FileWindow, endian: str, explicit: bool, wanted: frozenset[int], *, strict: bool = False
    ) -> None:
        self.window = window
        self.explicit = explicit
        self.endian = endian
        self.wanted = wanted
        self.strict = strict
        self.odd = self.encapsulated = False
        self.tag = struct.Struct(endian + "HH")
        self.short = struct.Struct(endian + "HH2sH")
        self.long = struct.Struct(endian + "I")
        self.implicit = struct.Struct(endian + "HHI")
        self.fast = _fast(endian, wanted)

    def element(self, pos: int, explicit: bool) -> tuple[int, bytes, int, int]:
        """Return tag, VR, value length and position of the value of the element at `pos`."""
        raw = self.window.at(pos, 8)
        if not explicit:
            group, number, length = self.implicit.unpack(raw)
            return group << 16 | number, b"", length, pos + 8
        group, number, vr, length = self.short.unpack(raw)
        tag = group << 16 | number
        if group == 0xFFFE:  # items and delimiters carry no VR, PS3.5 section 7.5
            return tag, b"", self.long.unpack(raw[4:])[0], pos + 8
        if vr in SHORT_VRS:
            return tag, vr, length, pos + 8
        if vr in LONG_VRS or (vr.isalpha() and vr.isupper()):  # a VR of the future has a long length field
            return tag, vr, self.long.unpack(self.window.at(pos + 8, 4))[0], pos + 12
        if vr in _BLANK:
            return self.blank(pos, tag, length)
        raise Damaged(f"element ({group:04X},{number:04X}) at byte {pos} has no valid VR")

    def blank(self, pos: int, tag: int, length: int) -> tuple[int, bytes, int, int]:
        """Return where the value of an element begins whose VR some writer left blank.

        Tries a length of 16 bits, one of 32 bits after two reserved bytes, and none of the bytes of a VR; the first
        that leads to another element, or to the end, holds.
        """
        forms = [(b"UN", length, pos + 8)]
        if length == 0 and pos + 12 <= self.window.size:
            forms.append((b"UN", self.long.unpack(self.window.at(pos + 8, 4))[0], pos + 12))
        forms.append((b"UN", self.long.unpack(self.window.at(pos + 4, 4))[0], pos + 8))
        for vr, count, start in forms:
            if self.follows(start + count, tag):
                return tag, vr, count, start
        raise Damaged(f"element ({tag >> 16:04X},{tag & 0xFFFF:04X}) at byte {pos} has no valid VR")

    def follows(self, pos: int, tag: int) -> bool:
        """Return True if the data set ends at `pos`, or an element that may come after this tag begins there."""
        if pos + 8 > self.window.size:
            return pos == self.window.size
        group, number, vr, _ = self.short.unpack(self.window.at(pos, 8))
        after = group << 16 | number
        return group == 0xFFFE or (after > tag and (vr in _BLANK or vr in SHORT_VRS or vr in LONG_VRS))

    def top(self, pos: int, found: dict[int, bytes]) -> None:
        """Step over the whole data set; put the wanted values into `found`."""
        size, tag = self.window.size, 0
        self.fast[-1].earn()
        while pos < size:
            if self.explicit and not self.strict:
                pos, tag = self.short_ones(pos, tag, found)
                if pos == size:
                    break
            if size - pos < 8 or not any(self.window.at(pos, 8)):
                self.padding(pos, after=tag)
                break
            before = tag
            tag, vr, length, start = self.element(pos, self.explicit)
            if self.strict and tag <= before:
                raise Damaged(f"the elements at byte {pos} are not in order")
            if length == UNDEFINED:
                self.encapsulated |= tag == _PIXEL_DATA
                pos = self.fragments(start) if tag == _PIXEL_DATA else self.sequence(start, self.nested(vr), 0)
                continue
            self.odd |= length & 1 == 1
            pos = start + length
            if pos > size:
                raise Damaged(
                    f"truncated: element ({tag >> 16:04X},{tag & 0xFFFF:04X}) ends at byte {pos}, the file at {size}"
                )
            if tag in self.wanted and length <= MAX_VALUE_BYTES:
                found[tag] = self.window.at(start, length)

    def short_ones(self, pos: int, tag: int, found: dict[int, bytes]) -> tuple[int, int]:
        """Step over elements with 16-bit lengths, which most have, to the end of the window; many times as fast.

        Returns:
            where the next element begins, and the tag of the one before it.
        """
        data, start, (unpack, wanted, vrs, shapes) = self.window.data, self.window.start, self.fast
        at, end = pos - start, len(data)
        last, number, lengths = end - 8, -1, 0
        if at < 0:
            return pos, tag
        known = shapes.known
        heads: list[bytes] = []
        while at <= last:
            head = data[at : at + 8]
            shape = known.get(head)
            if shape is not None and at + shape.size <= end:
                read = shape.unpack(data, at)
                if read == shape.heads:
                    for offset, length, one in shape.wanted:
                        found[one] = data[at + offset : at + offset + length]
                    at, number, lengths = at + shape.size, shape.last, lengths | shape.lengths
                    shapes.learn(heads)
                    heads = []
                    continue
                shapes.cut(shape, read)
                continue  # with what is left of it, if anything
            now, vr, length = unpack(head, 0)
            after = at + 8 + length
            if vr not in vrs or after > end:
                break
            if now in wanted:
                found[wanted[now]] = data[at + 8 : after]
            at, number, lengths = after, now, lengths | length
            heads.append(head)
        shapes.learn(heads)
        self.odd |= lengths & 1 == 1
        return start + at, tag if number < 0 else _ordered(number, self.endian)

    def padding(self, pos: int, after: int) -> None:
        """Accept the zeros with which some writers fill up a file; a few may also be the start of a group's number."""
        rest = self.window.size - pos
        if any(self.window.at(pos, min(rest, MAX_VALUE_BYTES))) or (rest < 8 and after < _PIXEL_DATA):
            raise Damaged(
                f"truncated: the file ends at byte {self.window.size}, within an element that begins at {pos}"
            )

    def nested(self, vr: bytes) -> bool:
        """Return True if the items of a sequence have explicit VRs: those of UN never do (PS3.5 section 6.2.2)."""
        return self.explicit and vr != b"UN"

    def sequence(self, pos: int, explicit: bool, depth: int) -> int:
        """Step over a sequence of undefined length; return where it ends."""
        if depth > MAX_DEPTH:
            raise Damaged(f"sequences nested deeper than {MAX_DEPTH}")
        while True:
            tag, _, length, pos = self.element(pos, explicit)
            if tag == _SEQUENCE_END:
                return pos
            if tag != _ITEM:
                raise Damaged(f"an item was expected at byte {pos}")
            pos = self.item(pos, explicit, depth) if length == UNDEFINED else self.skip(pos, length)

    def item(self, pos: int, explicit: bool, depth: int) -> int:
        while True:
            tag, vr, length, pos = self.element(pos, explicit)
            if tag == _ITEM_END:
                return pos
            if length != UNDEFINED:
                pos = self.skip(pos, length)
            elif tag == _PIXEL_DATA:
                pos = self.fragments(pos)
            else:
                pos = self.sequence(pos, explicit and vr != b"UN", depth + 1)

    def fragments(self, pos: int) -> int:
        """Step over encapsulated pixel data."""
        while True:
            tag, _, length, pos = self.element(pos, explicit=False)
            if tag == _SEQUENCE_END:
                return pos
            if tag != _ITEM:
                raise Damaged(f"a fragment was expected at byte {pos}")
            pos = self.skip(pos, length)

    def skip(self, pos: int, length: int) -> int:
        self.odd |= length & 1 == 1
        if pos + length > self.window.size:
            raise Damaged(f"truncated: a value ends at byte {pos + length}, the file at {self.window.size}")
        return pos + length


@lru_cache(maxsize=16)
def _fast(
    endian: str, wanted: frozenset[int]
) -> tuple[Callable[[bytes, int], tuple[int, int, int]], dict[int, int], frozenset[int], Shapes]:
    """Return how to read tag and VR as one number each, which is faster; wanted tags, VRs and shapes in that form."""
    unpack: Callable[[bytes, int], tuple[int, int, int]] = struct.Struct(endian + "IHH").unpack_from
    vrs = frozenset(unpack(b"tag." + vr + b"..", 0)[1] for vr in SHORT_VRS)
    tags = {_ordered(tag, endian): tag for tag in wanted}
    return unpack, tags, vrs, Shapes(unpack, tags)


def _ordered(number: int, endian: str) -> int:
    """Turn a tag that was read as one number into 0xGGGGEEEE, or back: little endian swaps its halves."""
    return number if endian == ">" else (number & 0xFFFF) << 16 | number >> 16
