"""Rewrites a data set in another uncompressed transfer syntax, element by element, in one pass and flat memory.

Values are copied as bytes, never parsed into text or numbers and back, so that private and unknown elements, odd
values and every character set arrive as they were. What changes: value representations are added or left out, bytes
swapped where the byte order changes, group lengths dropped, and sequences written with undefined lengths.

Sources: PS3.5 sections 7.1 (elements), 7.5 (sequences), 6.2.2 (UN), 7.3 (byte order) and Annex A.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pydicom.datadict import dictionary_VR

from imaging.header import Damaged

PIECE_BYTES = 1 << 20  # large values are copied in pieces of this
UNDEFINED = 0xFFFFFFFF
MAX_SHORT_BYTES = 0xFFFF  # of a value whose length field has 16 bits
MAX_DEPTH = 64  # nested sequences; real objects stay below 12
FLOAT_PIXELS, DOUBLE_PIXELS, PIXELS = 0x7FE00008, 0x7FE00009, 0x7FE00010
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD

# VRs whose length field has 32 bits, and those with 16, PS3.5 tables 7.1-1 and 7.1-2.
LONG = frozenset(("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"))
SHORT = frozenset(
    (
        "AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "PN", "SH", "SL", "SS", "ST", "TM",
        "UI", "UL", "US",
    )
)  # fmt: skip
# Character strings, which are padded with a blank; UI and bytes are with zero (PS3.5 section 6.2).
TEXT = frozenset(("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UR", "UT"))
# Bytes that are swapped together, PS3.5 section 7.3. AT is a pair of 16-bit numbers.
WIDTHS = {"US": 2, "SS": 2, "AT": 2, "OW": 2, "UL": 4, "SL": 4, "FL": 4, "OF": 4, "OL": 4} | dict.fromkeys(
    ("FD", "OD", "OV", "SV", "UV"), 8
)
_ARRAYS = {2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True)
class Encoding:
    """How the elements of a data set are encoded."""

    explicit: bool
    little: bool = True

    @property
    def order(self) -> str:
        """For `struct`."""
        return "<" if self.little else ">"


IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG = Encoding(False), Encoding(True), Encoding(True, little=False)


class Reads(Protocol):
    """What a data set is read from, front to back."""

    def read(self, count: int, /) -> bytes: ...


class Sink(Protocol):
    """What a data set is written to, front to back."""

    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True)
class Element:
    """The head of an element; `vr` is as in the source, "" if the source has none."""

    tag: int
    vr: str
    length: int

    def __str__(self) -> str:
        return f"({self.tag >> 16:04X},{self.tag & 0xFFFF:04X})"


class EncodedSource:
    """A data set that is read front to back.

    Args:
        stream: positioned where the data set begins; `read` may return less than it was asked for.
    """

    def __init__(self, stream: Reads, encoding: Encoding) -> None:
        self.stream, self.encoding = stream, encoding
        self.position = 0  # bytes from where the data set begins
        order = encoding.order
        self._tag, self._long = struct.Struct(order + "HH"), struct.Struct(order + "I")
        self._short = struct.Struct(order + "H")

    def take(self, count: int) -> bytes:
        """Read exactly so many bytes."""
        data = self.some(count)
        while len(data) < count:
            more = self.some(count - len(data))
            if not more:
                raise Damaged("truncated")
            data += more
        return data

    def some(self, count: int) -> bytes:
        """Read up to so many bytes; none at the end."""
        data = self.stream.read(count)
        self.position += len(data)
        return data

    def element(self, explicit: bool | None = None) -> Element | None:
        """Read the head of an element; None at the end of the data."""
        first = self.some(8)
        while 0 < len(first) < 8:
            more = self.some(8 - len(first))
            if not more:
                if not any(first):
                    return None  # padding at the end of the file
                raise Damaged("truncated")
            first += more
        if not first:
            return None
        group, number = self._tag.unpack_from(first)
        tag = group << 16 | number
        if group == 0xFFFE or not (self.encoding.explicit if explicit is None else explicit):
            return Element(tag, "", self._long.unpack_from(first, 4)[0])
        vr = first[4:6].decode("latin-1")
        if vr in SHORT:
            return Element(tag, vr, self._short.unpack_from(first, 6)[0])
        if vr not in LONG and not (vr.isascii() and vr.isalpha() and vr.isupper()):
            raise Damaged(f"element ({group:04X},{number:04X}) has no valid VR")
        return Element(tag, vr, self._long.unpack(self.take(4))[0])

    def skip(self, count: int) -> None:
        """Skip a number of bytes."""
        while count:
            count -= len(self.take(min(count, PIECE_BYTES)))


class Recoder:
    """One rewriting of a data set.

    Args:
        source, out: from where, and to where; the encodings say how.
        pixel_representation, bits_allocated: of the data set's pixels: they decide between value representations
            that the dictionary leaves open (PS3.5 section 8 and Annex A.1).
        changes: new values of top-level elements, as VR and bytes in the target's order; None leaves one out.
        pixels: writes the element of the pixel data in place of the source's, which it must skip.
        encapsulated: whether pixel data that is compressed stays so.
        icon: decodes encapsulated pixel data within a sequence (an icon) to native bytes; None if there can be none.
        check: called between pieces; may raise to stop.
    """

    def __init__(
        self,
        source: EncodedSource,
        out: Sink,
        target: Encoding,
        *,
        pixel_representation: int = 0,
        bits_allocated: int = 16,
        changes: Mapping[int, tuple[str, bytes] | None] | None = None,
        pixels: Callable[[Element], None] | None = None,
        icon: Callable[[dict[int, bytes], bytes], bytes] | None = None,
        encapsulated: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.source, self.out, self.target, self.encapsulated = source, out, target, encapsulated
        self.signed, self.bits_allocated = pixel_representation == 1, bits_allocated
        self.changes, self.pixels, self.icon, self.check = dict(changes or {}), pixels, icon, check
        self.swap = source.encoding.little != target.little
        self._tag, self._long = struct.Struct(target.order + "HH"), struct.Struct(target.order + "I")
        self._short = struct.Struct(target.order + "H")

    def run(self) -> None:
        """Rewrite the whole data set.

        Raises:
            Damaged: it ends too early, or is not a sequence of elements.
        """
        while (element := self.source.element()) is not None:
            self.check()
            self._insert(before=element.tag)
            if element.tag & 0xFFFF == 0:
                self.source.skip(element.length)
            elif element.tag in self.changes:
                self._replace(element)
            elif element.tag == PIXELS and self.pixels:
                self.pixels(element)
            else:
                self._copy(element, {}, 0)
        self._insert(before=1 << 32)

    def _insert(self, before: int) -> None:
        """Write, in their place, the new elements that the source doesn't have."""
        for tag in sorted(tag for tag in self.changes if tag < before):
            change = self.changes.pop(tag)
            if change is not None:
                self.head(tag, change[0], len(change[1]))
                self.out.write(change[1])

    def _replace(self, element: Element) -> None:
        if element.length == UNDEFINED:
            raise Damaged(f"element {element} has an undefined length")
        self.source.skip(element.length)
        self._insert(before=element.tag + 1)

    def _copy(self, element: Element, beside: dict[int, bytes], depth: int) -> None:
        """Rewrite one element. `beside` has the short values of its item, for what depends on them."""
        vr = element.vr or self._lookup(element, beside)
        if vr == "UN" and element.length == UNDEFINED:
            self._copy_unknown_sequence(element)
        elif vr == "SQ" or (element.length == UNDEFINED and element.tag != PIXELS):
            self._copy_sequence(element, depth)
        elif element.length == UNDEFINED and self.encapsulated:
            self.copy_fragments(element)
        elif element.length == UNDEFINED:
            self._copy_icon(element, beside)
        else:
            self._copy_value(element, vr)

    def _padding(self, vr: str, length: int) -> bytes:
        """Return the padding that makes the length of a value even (PS3.5 section 6.2)."""
        if length % 2 == 0:
            return b""
        return b" " if vr in TEXT else b"\0"

    def _copy_value(self, element: Element, vr: str) -> None:
        padding = self._padding(vr, element.length)
        self.head(element.tag, vr, element.length + len(padding))
        width = self._width(element.tag, vr) if self.swap else 1
        left = element.length
        while left:
            piece = self.source.take(min(left, PIECE_BYTES))
            left -= len(piece)
            self.out.write(swapped(piece, width) if width > 1 else piece)
            self.check()
        self.out.write(padding)

    def _width(self, tag: int, vr: str) -> int:
        # Pixels of more than 16 bits are numbers of their own size to whoever wrote them big-endian.
        if tag == PIXELS and vr == "OW" and self.bits_allocated in (32, 64):
            return self.bits_allocated // 8
        return WIDTHS.get(vr, 1)

    def _copy_sequence(self, element: Element, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise Damaged(f"sequences nested deeper than {MAX_DEPTH}")
        self.head(element.tag, "SQ", UNDEFINED)
        end = None if element.length == UNDEFINED else self.source.position + element.length
        while end is None or self.source.position < end:
            item = self._inner()
            if item.tag == SEQUENCE_END and end is None:
                break
            if item.tag != ITEM:
                raise Damaged(f"an item was expected in the sequence {element}")
            self._copy_item(item, depth)
        self._mark(SEQUENCE_END)

    def _copy_item(self, item: Element, depth: int) -> None:
        self._mark(ITEM, UNDEFINED)
        beside: dict[int, bytes] = {}
        end = None if item.length == UNDEFINED else self.source.position + item.length
        while end is None or self.source.position < end:
            element = self._inner()
            if element.tag == ITEM_END:
                break
            if element.tag & 0xFFFF == 0:
                self.source.skip(element.length)
            elif element.tag >> 16 in (0x0028, 0x5400) and element.length <= 64:
                self._copy_remembered(element, beside)
            else:
                self._copy(element, beside, depth + 1)
        self._mark(ITEM_END)

    def _copy_remembered(self, element: Element, beside: dict[int, bytes]) -> None:
        """Rewrite a short value, and keep it: later elements of the item may depend on it."""
        vr = element.vr or self._lookup(element, beside)
        if vr == "SQ":
            self._copy_sequence(element, 1)
            return
        value = self.source.take(element.length)
        other = swapped(value, WIDTHS.get(vr, 1))
        padding = self._padding(vr, len(value))
        self.head(element.tag, vr, len(value) + len(padding))
        self.out.write((other if self.swap else value) + padding)
        beside[element.tag] = value if self.source.encoding.little else other

    def _inner(self, explicit: bool | None = None) -> Element:
        element = self.source.element(explicit)
        if element is None:
            raise Damaged("truncated within a sequence")
        return element

    def _copy_unknown_sequence(self, element: Element) -> None:
        """Copy a sequence of unknown elements as it is: implicit little endian everywhere (PS3.5 section 6.2.2)."""
        self.head(element.tag, "UN", UNDEFINED)
        plain = EncodedSource(self.source.stream, IMPLICIT_LITTLE)
        copy = Recoder(plain, self.out, IMPLICIT_LITTLE, check=self.check)
        before = self.source.position
        copy.verbatim_sequence(0)
        self.source.position = before + plain.position

    def verbatim_sequence(self, depth: int) -> None:
        """Copy items of a sequence up to its delimiter, unchanged."""
        if depth > MAX_DEPTH:
            raise Damaged(f"sequences nested deeper than {MAX_DEPTH}")
        while True:
            item = self._inner()
            self._mark(item.tag, item.length)
            if item.tag == SEQUENCE_END:
                return
            if item.length != UNDEFINED:
                self._pass(item.length)
                continue
            while (element := self._inner()).tag != ITEM_END:
                self.head(element.tag, "", element.length)
                if element.length == UNDEFINED:
                    self.verbatim_sequence(depth + 1)
                else:
                    self._pass(element.length)
            self._mark(ITEM_END)

    def _pass(self, count: int) -> None:
        while count:
            piece = self.source.take(min(count, PIECE_BYTES))
            self.out.write(piece)
            count -= len(piece)

    def copy_fragments(self, element: Element, table: Callable[[bytes], bytes] = lambda value: value) -> None:
        """Copy encapsulated pixel data, and make the lengths of its fragments even (PS3.5 section A.4).

        Args:
            table: returns the Basic Offset Table for the fragments as they are written.
        """
        self.head(element.tag, element.vr or "OB", UNDEFINED)
        first = True
        while (item := self._inner(False)).tag == ITEM:
            if first:
                value = table(self.source.take(item.length))
                self._mark(ITEM, len(value))
                self.out.write(value)
            else:
                self._mark(ITEM, item.length + item.length % 2)
                self._pass(item.length)
                self.out.write(b"\0" * (item.length % 2))
            first = False
        if item.tag != SEQUENCE_END:
            raise Damaged("a fragment was expected in the pixel data")
        self._mark(SEQUENCE_END)

    def _copy_icon(self, element: Element, beside: dict[int, bytes]) -> None:
        """Write the encapsulated pixel data of an item as native pixel data."""
        fragments = []
        while (item := self._inner()).tag == ITEM:
            fragments.append(self.source.take(item.length))
        if item.tag != SEQUENCE_END or self.icon is None:
            raise Damaged("encapsulated pixel data where there can be none")
        value = self.icon(beside, b"".join(fragments[1:]))
        value += b"\0" * (len(value) % 2)
        vr = "OW" if not self.target.explicit or _us(beside.get(0x00280100), 8) > 8 else "OB"
        self.head(element.tag, vr, len(value))
        self.out.write(value)

    def head(self, tag: int, vr: str, length: int) -> None:
        """Write tag, value representation and length of an element."""
        tag_bytes = self._tag.pack(tag >> 16, tag & 0xFFFF)
        if not self.target.explicit:
            self.out.write(tag_bytes + self._long.pack(length))
            return
        if vr in SHORT and length > MAX_SHORT_BYTES:
            vr = "UN"  # PS3.5 section 6.2.2: too long for its own VR
        if vr in SHORT:
            self.out.write(tag_bytes + vr.encode() + self._short.pack(length))
        else:
            self.out.write(tag_bytes + vr.encode() + b"\0\0" + self._long.pack(length))

    def _mark(self, tag: int, length: int = 0) -> None:
        self.out.write(self._tag.pack(tag >> 16, tag & 0xFFFF) + self._long.pack(length))

    def _lookup(self, element: Element, beside: Mapping[int, bytes]) -> str:
        """Return the value representation of an element whose source has none."""
        group, number = element.tag >> 16, element.tag & 0xFFFF
        if group % 2:
            return "LO" if 0x10 <= number <= 0xFF else "UN"  # a private creator, or what only its creator knows
        try:
            vr: str = dictionary_VR(element.tag)
        except KeyError:
            return "UN"
        if " " not in vr:
            return vr if vr in SHORT or vr in LONG else "UN"
        if vr == "US or SS":
            return "SS" if self.signed else "US"
        if element.tag == PIXELS:
            bits = _us(beside.get(0x00280100), self.bits_allocated)
            return "OW" if bits > 8 else "OB"
        if group == 0x5400:  # waveforms, PS3.5 section 8.3
            return "OB" if _us(beside.get(0x54001004), 16) == 8 else "OW"
        return "OW"


def _us(value: bytes | None, default: int) -> int:
    return int(struct.unpack_from("<H", value)[0]) if value and len(value) >= 2 else default


def swapped(data: bytes, width: int) -> bytes:
    """Reverse the bytes within each group of `width`; an incomplete group at the end stays as it is."""
    if width == 1:
        return data
    whole = len(data) // width * width
    numbers = array(_ARRAYS[width], data[:whole])
    numbers.byteswap()
    return numbers.tobytes() + data[whole:]


@dataclass(frozen=True)
class Found:
    """A top-level element: where its value begins (bytes from the start of the data set), and the value if short."""

    element: Element
    position: int
    value: bytes


def scan(stream: Reads, encoding: Encoding, skip: Callable[[int], None], wanted: frozenset[int]) -> dict[int, Found]:
    """Find top-level elements up to and including the pixel data, without reading large values.

    Args:
        stream: positioned where the data set begins.
        skip: moves the stream forward by so many bytes.
    """
    source = EncodedSource(stream, encoding)
    found: dict[int, Found] = {}
    while (element := source.element()) is not None:
        position = source.position
        if element.tag in (PIXELS, FLOAT_PIXELS, DOUBLE_PIXELS):
            found[element.tag] = Found(element, position, b"")
            break
        if element.length == UNDEFINED:
            _skip_sequence(source, encoding.explicit and element.vr != "UN", 0)
        elif element.tag in wanted:
            found[element.tag] = Found(element, position, source.take(element.length))
        else:
            skip(element.length)
            source.position += element.length
    return found


def _skip_sequence(source: EncodedSource, explicit: bool, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Damaged(f"sequences nested deeper than {MAX_DEPTH}")
    while True:
        item = source.element(explicit)
        if item is None:
            raise Damaged("truncated within a sequence")
        if item.tag == SEQUENCE_END:
            return
        if item.length != UNDEFINED:
            source.skip(item.length)
            continue
        while True:
            element = source.element(explicit)
            if element is None:
                raise Damaged("truncated within a sequence")
            if element.tag == ITEM_END:
                break
            if element.length == UNDEFINED:
                _skip_sequence(source, explicit and element.vr != "UN", depth + 1)
            else:
                source.skip(element.length)
