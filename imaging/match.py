"""What a query's keys match: as PS3.4 section C.2.2.2 says but, as in Orthanc, without regard to upper and lower case.

Descriptions are filters, and match exactly as they are given.

Blanks around a value don't count, nor do empty components at the end of a person's name. A name with several
component groups (alphabetic, ideographic, phonetic) matches as a whole or by one of them.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import date

from imaging.query import Query, listed

Test = Callable[[str], bool]

_DATE = re.compile(r"(\d{4}(?:\d{2}){0,2})?(-)?(\d{4}(?:\d{2}){0,2})?", re.ASCII)


def of_study(query: Query) -> Iterator[tuple[str, Test]]:
    """Yield the tests that a study's attributes must pass, by keyword.

    Raises:
        ValueError: a date is not valid.
    """
    if query.AccessionNumber:
        yield "AccessionNumber", one_of(query.AccessionNumber)
    if query.StudyDescription:
        yield "StudyDescription", exactly(query.StudyDescription)
    if not is_universal(query.PatientID):
        yield "PatientID", like(query.PatientID)
    if not is_universal(query.PatientName):
        yield "PatientName", named(query.PatientName)
    if query.StudyDate.strip():
        yield "StudyDate", between(query.StudyDate)
    if query.StudyInstanceUID.strip():
        yield "StudyInstanceUID", one_of(listed(query.StudyInstanceUID))


def of_series(query: Query) -> Iterator[tuple[str, Test]]:
    """Yield the tests that the attributes of a single series must all pass, by keyword."""
    if query.Modality.strip():
        tests = [like(modality) for modality in listed(query.Modality)]
        yield "Modality", lambda value: any(test(value) for test in tests)
    if query.SeriesDescription:
        yield "SeriesDescription", exactly(query.SeriesDescription)
    if query.SeriesInstanceUID.strip():
        yield "SeriesInstanceUID", one_of(listed(query.SeriesInstanceUID))


def is_universal(pattern: str) -> bool:
    """Return True if a pattern matches everything, even an empty value (PS3.4 sections C.2.2.2.3 and C.2.2.2.4)."""
    return not pattern.strip().strip("*")


def has_wild_cards(pattern: str) -> bool:
    """Return True if a pattern holds a wild card."""
    return "*" in pattern or "?" in pattern


def _plain(value: str) -> str:
    return value.strip().casefold()


def one_of(values: Iterable[str]) -> Test:
    """Return a test for exact values, any of which may match; an empty one matches nothing."""
    wanted = frozenset(_plain(value) for value in values) - {""}
    return lambda value: _plain(value) in wanted


def exactly(values: Iterable[str]) -> Test:
    """Values in upper and lower case as given, any of which matches; an empty one matches nothing."""
    wanted = frozenset(value.strip() for value in values) - {""}
    return lambda value: value.strip() in wanted


def like(pattern: str) -> Test:
    """Return a test in which `*` stands for any number of characters, also none, and `?` for exactly one."""
    folded = _plain(pattern)
    if not has_wild_cards(folded):
        return lambda value: _plain(value) == folded
    first, *rest = [re.escape(part).replace(r"\?", ".") for part in re.split(r"\*+", folded)]
    # What stands between two stars is looked for once, from the left, and never again: the groups are atomic, so
    # no value, however long, takes more than a moment.
    middle = "".join(f"(?>.*?{part})" for part in rest[:-1])
    last = f".*{rest[-1]}" if rest else ""
    regex = re.compile(first + middle + last, re.DOTALL)
    return lambda value: regex.fullmatch(_plain(value)) is not None


def named(pattern: str) -> Test:
    """Return a test for a person's name, with wild cards."""
    test = like(trimmed(pattern))

    def matches(value: str) -> bool:
        names = [trimmed(name) for name in value.split("\\")]
        return any(test(name) or ("=" in name and any(map(test, map(trimmed, name.split("="))))) for name in names)

    return matches


def trimmed(name: str) -> str:
    """Return a name without the delimiters at the end of its groups, and without empty groups at its end."""
    return "=".join(group.strip().rstrip("^ ") for group in name.split("=")).rstrip("=")


def in_days(period: str) -> str:
    """Return a date or range with whole days at its ends: servers know no months and years (PS3.5 table 6.2-1).

    Raises:
        ValueError: it is neither.
    """
    first, last = _ends(period)
    if first == last and len(first) == 8:
        return first
    if last:
        month = last[4:6] or "12"
        last = last[:4] + month + (last[6:] or _last_day(last[:4], month))
    return f"{first + '0101'[len(first) - 4 :] if first else ''}-{last}"


def _last_day(year: str, month: str) -> str:
    return f"{calendar.monthrange(int(year), int(month))[1]:02}"


def _ends(period: str) -> tuple[str, str]:
    parsed = _DATE.fullmatch(period.strip())
    if not parsed or not (parsed[1] or parsed[3]) or (not parsed[2] and len(parsed[1] or "") != 8):
        raise ValueError(
            f"study date {period!r}: must be YYYYMMDD, or a range such as 20240101-20240131, -20240131 or 20240101-"
        )
    for end in filter(None, (parsed[1], parsed[3])):
        try:
            date(int(end[:4]), int(end[4:6] or 1), int(end[6:] or 1))
        except ValueError as exc:
            raise ValueError(f"study date {period!r}: {end} is not a date, as in YYYYMMDD") from exc
    first = parsed[1] or ""
    last = (parsed[3] or "") if parsed[2] else first
    if last and first.ljust(8, "0") > last.ljust(8, "9"):
        raise ValueError(f"study date {period!r}: the range ends before it begins")
    return first, last


def between(period: str) -> Test:
    """Return a test for a date, or a range with both ends; an end may be left out, and may be a month or a year.

    Raises:
        ValueError: it is neither.
    """
    first, last = _ends(period)

    def matches(value: str) -> bool:
        day = value.strip().replace(".", "")  # ACR-NEMA wrote 2024.01.31
        return bool(day) and day >= first and day[: len(last)] <= last

    return matches
