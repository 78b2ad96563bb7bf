"""Decodes the text of a DICOM data set by its Specific Character Set (0008,0005).

Never fails and never warns. Bytes that a character set doesn't define become U+FFFD, and an unknown character set is
read as Latin-1, because both are common in files that are otherwise sound.

Source: PS3.3 section C.12.1.1.2 (the terms), PS3.5 section 6.1.2 (code extensions, ISO 2022).
"""

from __future__ import annotations

import re
from functools import partial

ESC = b"\x1b"
LATIN = "latin-1"

# Character sets that are used alone: all of the value is in this encoding.
_ALONE = {"ISO_IR 192": "utf-8", "GB18030": "gb18030", "GBK": "gbk"}
# What code area G1 (bytes from 0x80) holds at first, by the number in `ISO_IR n` and `ISO 2022 IR n`.
_G1 = {
    "6": LATIN,  # ASCII has no G1; senders put Latin-1 there
    "13": "shift_jis",  # its one-byte half is JIS X 0201, katakana
    "58": "gb2312",
    "100": LATIN,
    "101": "iso8859-2",
    "109": "iso8859-3",
    "110": "iso8859-4",
    "126": "iso8859-7",
    "127": "iso8859-6",
    "138": "iso8859-8",
    "144": "iso8859-5",
    "148": "iso8859-9",
    "149": "euc_kr",
    "166": "iso8859-11",
    "203": "iso8859-15",
}
# Escape sequences: the code area that they fill (0 or 1), and with what.
_ESCAPES = {
    b"(B": (0, "ascii"),
    b"(J": (0, "ascii"),  # JIS X 0201 romaji: ASCII but for the yen sign and the overline
    b"$B": (0, "$B"),
    b"$(D": (0, "$(D"),
    b")I": (1, "shift_jis"),
    b"$)A": (1, "gb2312"),
    b"$)C": (1, "euc_kr"),
    b"-A": (1, LATIN),
    b"-B": (1, "iso8859-2"),
    b"-C": (1, "iso8859-3"),
    b"-D": (1, "iso8859-4"),
    b"-F": (1, "iso8859-7"),
    b"-G": (1, "iso8859-6"),
    b"-H": (1, "iso8859-8"),
    b"-L": (1, "iso8859-5"),
    b"-M": (1, "iso8859-9"),
    b"-T": (1, "iso8859-11"),
    b"-b": (1, "iso8859-15"),
}
# What text can be written in, by the same number: ASCII where the term names no more, all of what code extensions add.
_HELD = _G1 | {"": "ascii", "6": "ascii", "87": "iso2022_jp", "159": "iso2022_jp_2"}
_PARTS = re.compile(rb"(\x1b(?:\$[()][A-D]|\$B|[()][BIJ]|-[A-Zb]))|([\x80-\xff]+)|([^\x1b\x80-\xff]+)|(\x1b)")
NAME_DELIMITERS = frozenset(b"\\^=\t\n\f\r")
TEXT_DELIMITERS = frozenset(b"\\\t\n\f\r")


def decoded(raw: bytes, charset: bytes, delimiters: frozenset[int] = TEXT_DELIMITERS) -> str:
    """Return the text of a value, its blanks included.

    Args:
        charset: the undecoded value of Specific Character Set, empty if there is none.
        delimiters: characters after which the first character set holds again (PS3.5 section 6.1.2.5.3).
    """
    if raw.isascii() and ESC not in raw:
        return raw.decode("ascii")
    term = charset.split(b"\\")[0].strip(b" \0").decode(LATIN)
    if term in _ALONE:
        return raw.decode(_ALONE[term], "replace")
    first = _G1.get(term.rpartition(" ")[2], LATIN)
    if ESC not in raw:
        return raw.decode(first, "replace")
    return _extended(raw, first, delimiters)


def _extended(raw: bytes, first: str, delimiters: frozenset[int]) -> str:
    """Decode a value with escape sequences: bytes below 0x80 by code area G0, the others by G1."""
    g0, g1 = "ascii", first
    text = []
    for escape, high, low, _ in _PARTS.findall(raw):
        if escape:
            area, codec = _ESCAPES.get(escape[1:], (0, "ascii"))
            g0, g1 = (codec, g1) if area == 0 else (g0, codec)
        elif high:
            text.append(high.decode(g1, "replace"))
        elif g0 != "ascii":
            text.append((ESC + g0.encode() + low).decode("iso2022_jp_2", "replace"))
        else:
            text.append(low.decode("ascii"))
            if not delimiters.isdisjoint(low):
                g1 = first
    return "".join(text)


def lacking(text: str, charset: str) -> frozenset[str]:
    """Return the letters of a text that a character set doesn't have; none if the character set is not known.

    Args:
        charset: the value of Specific Character Set, several terms with a backslash between them.
    """
    terms = [term.strip(" \0") for term in charset.split("\\")]
    codecs = {_ALONE.get(term) or _HELD.get(term.rpartition(" ")[2], "utf-8") for term in terms}
    return frozenset(letter for letter in text if not any(map(partial(_has, letter), codecs)))


def _has(letter: str, codec: str) -> bool:
    try:
        letter.encode(codec)
    except UnicodeEncodeError:
        return False
    return True
