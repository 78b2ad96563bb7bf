"""Identifiers of C-FIND, C-GET and C-MOVE: small data sets as bytes, and as values by DICOM keyword.

pydicom's reader takes 50 times as long for an answer of ten values.

Sources: PS3.5 sections 6.1.2 (character sets), 6.2 (value representations) and 7.1 (data elements).
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from pydicom.charset import convert_encodings, encode_string
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.valuerep import PersonName

from imaging.charset import NAME_DELIMITERS, TEXT_DELIMITERS, decoded

EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
CHARSET = 0x00080005
UNDEFINED = 0xFFFFFFFF
MAX_DEPTH = 32  # nested sequences
MOST_KEPT = 4096  # values of a query's answers that are kept for the next

_TEXT = frozenset(("LO", "SH", "ST", "LT", "UT", "UC", "PN"))
_SINGLE = frozenset(("ST", "LT", "UT", "UR"))  # a backslash is a character
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "SV": "q", "UV": "Q"}
_SKIPPED = frozenset(("SQ", "OB", "OD", "OF", "OL", "OV", "OW", "UN"))
_IMPLICIT, _EXPLICIT = struct.Struct("<HHI"), struct.Struct("<HH2sH")
_ITEM_END, _SEQUENCE_END = 0xFFFEE00D, 0xFFFEE0DD
# Latin-1 and UTF-8 are what archives answer in, whatever they say that it is.
_MISTAKEN = frozenset((b"", b"ISO_IR 6", b"ISO_IR 100", b"ISO 2022 IR 6", b"ISO 2022 IR 100"))

_ASCII, _ROMAJI, _KANA = b"\x1b(B", b"\x1b(J", b"\x1b)I"
_CHANGE = re.compile(rb"\x1b(?:\([BJ]|\)I|\$B)")  # of what bytes are: ASCII, JIS X 0201, JIS X 0208
_ENDS = re.compile(rb"\x1b(?:\([BJ]|\$\)C)")  # back to ASCII or JIS X 0201; to KS X 1001, whose bytes are 0x80 and more
_BEGINS = re.compile(rb"\*(\x1b\$B)")
_KATAKANA = re.compile("[\uff61-\uff9f]")  # of JIS X 0201

# What a query may be written in, in the order in which it is tried: terms as in PS3.3 section C.12.1.1.2, and Python's
# codecs, which for code extensions (PS3.5 section 6.1.2.5) say what there is beside ASCII.
LATIN = "ISO_IR 100"
ENCODINGS = {
    "ISO_IR 192": "utf-8",
    LATIN: "latin-1",
    "\\ISO 2022 IR 87": "iso2022_jp",
    "ISO 2022 IR 13\\ISO 2022 IR 87": "iso2022_jp_ext",  # for half-width katakana, beside others
    "\\ISO 2022 IR 149": "euc_kr",
    "GB18030": "gb18030",
    "ISO_IR 13": "shift_jis",  # of whose letters those of a single byte alone are meant
    "ISO_IR 144": "iso8859-5",
    "ISO_IR 126": "iso8859-7",
    "ISO_IR 101": "iso8859-2",
    "ISO_IR 148": "iso8859-9",
    "ISO_IR 127": "iso8859-6",
    "ISO_IR 138": "iso8859-8",
    "ISO_IR 166": "iso8859-11",
}


def encodings(text: str) -> list[str]:
    """Return the character sets that have all characters of a text, the most likely first; [""] for plain ASCII."""
    if text.isascii():
        return [""]
    found = []
    for term in ENCODINGS:
        if term.startswith("ISO 2022 IR 13") and not _KATAKANA.search(text):
            continue
        try:
            raw = _encoded(text, "PN", term)
        except (UnicodeError, ValueError):
            continue
        if decoded(raw, term.encode(), NAME_DELIMITERS) == text:
            found.append(term)
    return found


def _encoded(value: str, vr: str, charset: str) -> bytes:
    if vr not in _TEXT or value.isascii():
        return value.encode("ascii")
    raw = value.encode(ENCODINGS[charset])  # also shows whether it can be
    if charset == "ISO_IR 13" and len(raw) > len(value):
        raise ValueError("not all letters are in JIS X 0201")
    if "2022" not in charset:
        return raw
    python = convert_encodings(charset.split("\\"))
    plain = _ROMAJI if charset.startswith("ISO 2022 IR 13") else _ASCII
    return _plainly(PersonName(value).encode(tuple(python)) if vr == "PN" else encode_string(value, python), plain)


def _plainly(raw: bytes, plain: bytes) -> bytes:
    """Return a value without changes to what holds already, which peers that compare bytes look for.

    So pydicom begins each value that has ASCII before other letters, as `*` is in a pattern.

    Args:
        plain: the change to what holds at first.
    """
    now = plain

    def kept(found: re.Match[bytes]) -> bytes:
        nonlocal now
        if found[0] == _KANA:  # in the upper half, where it is from the beginning
            return b""
        before, now = now, found[0]
        return b"" if before == now == plain else now

    return _CHANGE.sub(kept, raw)


def loosened(keyword: str, value: str, charset: str) -> str:
    """Return a pattern for the bytes that a pattern may stand for in a character set with code extensions, in Latin-1.

    A peer that compares bytes finds nothing that begins within a word, or ends there, as the change of the character
    set is where the word begins. What it finds by this may be too much.
    """
    raw = _ENDS.sub(b"*", _encoded(value, _tag_and_vr(keyword)[1], charset))
    raw = _BEGINS.sub(rb"*\1*", raw).replace(b"\\", b"?")  # half of a letter, which would separate values
    return re.sub(rb"\*+", b"*", raw).decode("latin-1")


def built(keys: Mapping[str, str], charset: str, syntax: str) -> bytes:
    """Return an identifier of these keys, values by keyword, in order of their tags.

    Args:
        charset: Specific Character Set of the values; "" for the most likely one, if they are not ASCII.
        syntax: explicit or implicit VR little endian.

    Raises:
        UnicodeError, ValueError: the character set doesn't have a character.
    """
    values = dict(keys)
    charset = charset or encodings("".join(value for value in values.values() if not value.isascii()))[0]
    if charset:
        values["SpecificCharacterSet"] = charset
    explicit = syntax == EXPLICIT_LITTLE
    made = []
    for tag, vr, value in sorted((*_tag_and_vr(keyword), value) for keyword, value in values.items()):
        raw = _encoded(value, vr, charset)
        if len(raw) % 2:
            raw += b"\0" if vr == "UI" else b" "
        head = (
            _EXPLICIT.pack(tag >> 16, tag & 0xFFFF, vr.encode(), len(raw))
            if explicit
            else _IMPLICIT.pack(tag >> 16, tag & 0xFFFF, len(raw))
        )
        made += [head, raw]
    return b"".join(made)


@functools.lru_cache(maxsize=512)
def _tag_and_vr(keyword: str) -> tuple[int, str]:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise ValueError(f"{keyword} is not a DICOM keyword")
    return tag, dictionary_VR(tag)


@functools.lru_cache(maxsize=4096)
def _known(tag: int) -> tuple[str, str]:
    """Return keyword and VR of a tag; "" and UN if it is private or unknown."""
    try:
        return keyword_for_tag(tag), dictionary_VR(tag)
    except KeyError:
        return "", "UN"


def read(data: bytes, syntax: str, asked_in: str = "") -> dict[str, Any]:
    """Return the values of a data set by keyword: one value as it is, several as a list, none as "".

    Sequences and binary values are left out. A truncated element and everything after it are left out.

    Args:
        asked_in: the character set of the request, for answers that don't name theirs.
    """
    raw = list(_elements(data, syntax == EXPLICIT_LITTLE))
    charset = next((value for tag, _, value in raw if tag == CHARSET), b"").strip(b" \0")
    found: dict[str, Any] = {}
    for tag, vr, value in raw:
        keyword, known = _known(tag)
        if keyword:
            vr = vr or known
            if vr not in _SKIPPED:
                found[keyword] = _value(value, vr, charset, asked_in)
    return found


class Answers:
    """Reads the answers to one query; decodes each value once, because most values repeat.

    Args:
        asked_in: the character set of the request, for answers that don't name theirs.
    """

    def __init__(self, syntax: str, asked_in: str = "") -> None:
        self._syntax, self._asked_in = syntax, asked_in
        self._explicit = syntax == EXPLICIT_LITTLE
        self._decoded: dict[bytes, dict[bytes, tuple[str, Any]]] = {}  # keyword and value by element, by character set

    def read(self, data: bytes) -> dict[str, Any]:
        """Return the values of a data set, as the function `read` does."""
        charset = b""
        decoded = self._decoded.setdefault(charset, {})
        found: dict[str, Any] = {}
        pos, end = 0, len(data)
        while pos + 8 <= end:
            if self._explicit:
                group, number, vr, length = _EXPLICIT.unpack_from(data, pos)
                if group == 0xFFFE or vr in _LONG:
                    return read(data, self._syntax, self._asked_in)
            else:
                group, number, length = _IMPLICIT.unpack_from(data, pos)
                vr = b""
                if length == UNDEFINED:
                    return read(data, self._syntax, self._asked_in)
            after = pos + 8 + length
            if after > end:
                break
            element = data[pos:after]
            known = decoded.get(element)
            if known is None:
                tag = group << 16 | number
                if tag == CHARSET:
                    if found:  # it holds for what stands before it too
                        return read(data, self._syntax, self._asked_in)
                    charset = element[8:].strip(b" \0")
                    decoded = self._decoded.setdefault(charset, {})
                known = self._element(tag, vr.decode("latin-1"), element[8:], charset)
                if len(decoded) < MOST_KEPT and tag != CHARSET:
                    decoded[element] = known
            if known[0]:
                found[known[0]] = known[1]
            pos = after
        return found

    def _element(self, tag: int, vr: str, raw: bytes, charset: bytes) -> tuple[str, Any]:
        keyword, usual = _known(tag)
        vr = vr or usual
        if not keyword or vr in _SKIPPED:
            return "", None
        return keyword, _value(raw, vr, charset, self._asked_in)


def _value(raw: bytes, vr: str, charset: bytes, asked_in: str) -> Any:
    if vr in _NUMBERS:
        return _numbers(raw, _NUMBERS[vr])
    if vr in _TEXT:
        text = raw.decode("ascii") if raw.isascii() and b"\x1b" not in raw else _text(raw, vr, charset, asked_in)
    else:
        text = raw.decode("latin-1")
    text = text.strip(" \0")
    if "\\" in text and vr not in _SINGLE:
        return [_plain(part.strip(" \0"), vr) for part in text.split("\\")]
    return _plain(text, vr)


def _text(raw: bytes, vr: str, charset: bytes, asked_in: str) -> str:
    """Decode a value, with the request's character set if the named one can't be meant."""
    term = charset or asked_in.encode()
    if charset in _MISTAKEN and b"\x1b" not in raw:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            term = charset if charset or asked_in == "ISO_IR 192" else term
    elif term == b"ISO_IR 192":
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            term = b""
    return decoded(raw, term, NAME_DELIMITERS if vr == "PN" else TEXT_DELIMITERS)


def _plain(text: str, vr: str) -> str | int:
    if vr == "IS" and text:
        try:
            return int(text)
        except ValueError:
            return text
    return text


def _numbers(raw: bytes, form: str) -> Any:
    size = struct.calcsize(form)
    count = len(raw) // size
    found = list(struct.unpack(f"<{count}{form}", raw[: count * size]))
    return found[0] if count == 1 else found or ""


def _elements(data: bytes, explicit: bool) -> Iterator[tuple[int, str, bytes]]:
    """Yield tag, VR ("" where the dictionary has it) and value of each top-level element."""
    pos, end = 0, len(data)
    while pos + 8 <= end:
        tag, vr, length, pos = _head(data, pos, explicit)
        if length == UNDEFINED:
            pos = _after_sequence(data, pos, explicit, 0)
            continue
        if pos + length > end:
            return
        if vr != "SQ":
            yield tag, vr, data[pos : pos + length]
        pos += length


def _head(data: bytes, pos: int, explicit: bool) -> tuple[int, str, int, int]:
    if not explicit:
        group, element, length = _IMPLICIT.unpack_from(data, pos)
        return group << 16 | element, "", length, pos + 8
    group, element, vr, length = _EXPLICIT.unpack_from(data, pos)
    if group == 0xFFFE:
        return group << 16 | element, "", _IMPLICIT.unpack_from(data, pos)[2], pos + 8
    if vr in _LONG:
        length = int.from_bytes(data[pos + 8 : pos + 12], "little")
        return group << 16 | element, vr.decode("latin-1"), length, pos + 12
    return group << 16 | element, vr.decode("latin-1"), length, pos + 8


def _after_sequence(data: bytes, pos: int, explicit: bool, depth: int) -> int:
    """Return the position after a sequence or item of undefined length; the end of the data if it has no end."""
    while pos + 8 <= len(data) and depth < MAX_DEPTH:
        tag, _, length, pos = _head(data, pos, explicit)
        if tag in (_ITEM_END, _SEQUENCE_END):
            return pos
        pos = _after_sequence(data, pos, explicit, depth + 1) if length == UNDEFINED else pos + length
    return len(data)
