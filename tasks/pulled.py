"""Compares what a retrieval brought with what the source announced, for drivers that fetch series from servers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

from imaging.query import Match, Query, count
from transfer.plan import Plan
from transfer.query import series_tests
from transfer.receipt import Receipt


class Announced(Protocol):
    """A series, and the number of instances that the source announces; None if it announces none."""

    @property
    def study(self) -> str: ...

    @property
    def uid(self) -> str: ...

    @property
    def announced(self) -> int | None: ...


def of_studies(query: Query, matches: Iterable[Match]) -> dict[str, int | None]:
    """Return what is announced for studies that were asked for whole; none where the query selects series."""
    if series_tests(query):
        return {}
    return {one.StudyInstanceUID: count(one.attributes.get("NumberOfStudyRelatedInstances")) for one in matches}


def compared(
    receipt: Receipt,
    plan: Plan,
    series: Iterable[Announced],
    studies: Mapping[str, int | None],
    unproven: Collection[str] = (),
    elsewhere: Mapping[str, int] = MappingProxyType({}),
) -> Receipt:
    """Return a receipt in which instances that were announced and did not come count as missing.

    Args:
        plan: every instance that is listed, whether it came or not.
        studies: as `of_studies` returns it.
        unproven: series that nothing shows to be whole.
        elsewhere: how many instances of a series came in another one, which has them as well.
    """
    seen = Counter(item.shared.SeriesInstanceUID for item in plan.items if item.shared) + Counter(elsewhere)
    short, notes = 0, []
    known: Counter[str] = Counter()  # instances by study that came, or are missed already
    for one in series:
        known[one.study] += max(one.announced or 0, seen[one.uid])
        if one.announced is not None and seen[one.uid] < one.announced:
            short += one.announced - seen[one.uid]
            notes.append(f"series {one.uid}: {one.announced} instances are announced, {seen[one.uid]} can be retrieved")
        elif not seen[one.uid]:
            short += 1
            notes.append(f"series {one.uid}: nothing came")
        elif one.uid in unproven:
            short += 1  # how many are missing is not known
    for study, number in studies.items():
        if number is not None and known[study] < number:  # a series is not listed
            short += number - known[study]
            notes.append(f"study {study}: {number} instances are announced, {known[study]} of them in its series")
    return replace(receipt, missing=receipt.missing + short, notes=(*receipt.notes, *notes))
