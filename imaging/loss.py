"""Values that are shown with fewer letters than they have, in a character set that lacks the others.

Orthanc leaves such letters out of its answers, other archives write `?` for them. So a study can be found by a name
that its answer doesn't show.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from imaging import match
from imaging.charset import lacking
from imaging.match import trimmed
from imaging.query import Query

WANTED = ("PatientName", "PatientID", "AccessionNumber", "StudyDescription", "SeriesDescription")
PATTERNS: dict[str, Callable[[str], match.Test]] = {
    "PatientName": match.named,
    "PatientID": match.like,
}  # keys with wild cards
CASED = ("StudyDescription", "SeriesDescription")
_REPLACEMENTS = re.compile("[?\ufffd]")
# For letters that are lacking: some of each length in UTF-8 that no name is likely to hold together.
_OTHERS = "ЖΨЮΞŊĦЪΘ鬱贔龘齉ゑヱぢヂ뷁쀍쫣뮯"


def wanted(query: Query) -> dict[str, tuple[str, ...]]:
    """Return the values of a query's keys that may hold any letter, by keyword; of a pattern, it alone."""
    given = {keyword: getattr(query, keyword) for keyword in WANTED}
    return {keyword: (value,) if isinstance(value, str) else value for keyword, value in given.items() if value}


def may_be(keyword: str, values: Sequence[str], shown: str, charset: str) -> list[str]:
    """Return the wanted values that a shown value may be, with letters of its own that are not shown.

    A wanted value must have letters that the character set lacks, or a `?` where one of them may stand. What is left of
    it must show, or, where that is nothing, the shown value must have a part without any letters.

    Args:
        values: those of a query's key.
        charset: Specific Character Set of the answer.
    """
    found = []
    for value in values:
        lost = frozenset() if value.isascii() else lacking(value, charset)
        if not lost and not (is_hazy(keyword, value) and charset and lacking(_OTHERS, charset)):
            continue
        left = "".join(letter for letter in value if letter not in lost)
        telling = any(map(str.isalnum, left)) or shows_loss(keyword, shown)
        if telling and _matches(keyword, left, _REPLACEMENTS.sub("", shown)):
            found.append(value)
    return found


def is_hazy(keyword: str, value: str) -> bool:
    """Return True if a wanted value is a pattern in which `?` may stand for a letter that is not shown."""
    return keyword in PATTERNS and "?" in value


def shape(shown: str) -> str:
    """Return a pattern for as many letters as are shown, which finds no value that has more of them.

    It is empty where a sign that stands for a letter is shown: there as many letters don't mean the same ones.
    """
    return "" if _REPLACEMENTS.search(shown) else re.sub(r"[^\^=]", "?", shown.strip())


def shows_loss(keyword: str, shown: str) -> bool:
    """Return True if a shown value has a part without letters, or a sign that stands for a letter."""
    parts = shown.split("=") if keyword == "PatientName" else [shown]
    return bool(_REPLACEMENTS.search(shown)) or any(not part.strip("^ ") for part in parts)


def others(value: str, lost: frozenset[str], codec: str) -> list[str]:
    """Return up to two values that differ in the lost letters only: who finds the same by them looks at none of these.

    They are as long in the encoding, for peers to which each letter, or byte, is a wild card.
    """
    found = []
    for pool in (_OTHERS, _OTHERS[::-1]):
        swapped = {letter: _other(letter, value, codec, pool) for letter in lost}
        if all(swapped.values()):
            found.append("".join(swapped.get(letter, letter) for letter in value))
    return list(dict.fromkeys(found))


def _other(letter: str, value: str, codec: str, pool: str) -> str:
    """Return a letter that a value doesn't have, as long as one that it has; "" if there is none."""
    length, present = len(letter.encode(codec, "replace")), value.casefold()
    near = [chr(ord(letter) + step) for step in range(2, 64) if ord(letter) + step < 0x110000]
    candidates: list[str] = [*pool, *near]
    for other in candidates:
        try:
            if other.isalpha() and len(other.encode(codec)) == length and other.casefold() not in present:
                return other
        except UnicodeEncodeError:
            continue
    return ""


def _matches(keyword: str, left: str, shown: str) -> bool:
    if keyword in PATTERNS:
        parts = {shown, *(shown.split("=") if keyword == "PatientName" else ())}
        return any(_may_show(trimmed(left).strip().casefold(), trimmed(part).strip().casefold()) for part in parts)
    left, shown = left.strip(), shown.strip()
    return left == shown if keyword in CASED else left.casefold() == shown.casefold()


def _may_show(pattern: str, shown: str) -> bool:
    """Return True if a value that a pattern matches can be shown so: each `?` may be a letter that is left out."""
    places = _skipping(pattern, {0})
    for letter in shown:
        passed = {at for at in places if at < len(pattern) and pattern[at] in ("*", "?", letter)}
        places = _skipping(pattern, {at if pattern[at] == "*" else at + 1 for at in passed})
    return len(pattern) in places


def _skipping(pattern: str, places: set[int]) -> set[int]:
    for at in sorted(places):
        while at < len(pattern) and pattern[at] in "*?":
            at += 1
            places.add(at)
    return places
