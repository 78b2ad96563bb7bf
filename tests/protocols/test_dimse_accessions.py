"""Two thousand accession numbers: how many queries they cost at what kind of peer, and that none is wrongly missing."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pytest

from protocols.dimse.accessions import Accessions, Ask
from transfer.errors import Busy, Misconfigured

THERE = [f"ACC{number:06}" for number in range(0, 4000, 2)]
IS_THERE = frozenset(THERE)
ABSENT = ["ACC000001", "ACC002501", "XYZ"]
WANTED = [*THERE[:1200], *ABSENT, *THERE[1200:]]

Answers = Callable[[str], list[str]]
T = TypeVar("T")
R = TypeVar("R")


class OneAfterAnother:
    """Asks a peer that holds studies, of a number and a day each, for one thing after another; keeps what was asked."""

    def __init__(self, matching: Callable[[str], list[tuple[str, int]]], cap: int = 0, status: int = 0) -> None:
        self.asked: list[str] = []
        self._matching, self._cap, self._status = matching, cap, status

    def __call__(self, work: Callable[[Ask, T], R], values: Sequence[T]) -> list[R]:
        return [work(self._ask, value) for value in values]

    def _ask(self, keys: Mapping[str, str], limit: int) -> Iterator[tuple[Mapping[str, str], dict[str, Any]]]:
        self.asked.append(keys["AccessionNumber"])
        every = self._matching(keys["AccessionNumber"])
        for number, day in every[: min(limit or len(every), self._cap or len(every))]:
            yield keys, {"AccessionNumber": number, "StudyInstanceUID": f"{number}.{day}"}
        if self._status and self._cap < len(every) and not 0 < limit <= self._cap:
            raise Busy("status A700")


def takes_lists(value: str) -> list[str]:
    wanted = set(value.split("\\"))
    return [number for number in THERE if number in wanted]


def takes_one_value(value: str) -> list[str]:
    """As DCMTK's: a list is one value that nothing has, and answered with success and nothing."""
    if "*" not in value:
        return [value] * (value in IS_THERE)
    return [number for number in THERE if fnmatch.fnmatchcase(number, value)]


def takes_the_first(value: str) -> list[str]:
    return takes_one_value(value.partition("\\")[0])


def refuses_lists(value: str) -> list[str]:
    if "\\" in value:
        raise Misconfigured("status C320")
    return takes_one_value(value)


def refuses_all_but_one(value: str) -> list[str]:
    if "*" in value:
        raise Misconfigured("status C320")
    return refuses_lists(value)


def looks_at_no_wild_card(value: str) -> list[str]:
    return [value] * (value in IS_THERE)


def answers_all_to_lists(value: str) -> list[str]:
    return THERE if "\\" in value else takes_one_value(value)


@pytest.mark.parametrize(
    ("answers", "most"),
    [
        (takes_lists, 30),
        (takes_one_value, 60),
        (takes_the_first, 60),
        (refuses_lists, 60),
        (answers_all_to_lists, 60),
        (refuses_all_but_one, 2010),
        (looks_at_no_wild_card, 2010),
    ],
)
def test_two_thousand_numbers_cost_few_queries_and_what_is_missing_was_asked_for_alone(
    answers: Answers, most: int
) -> None:
    peer = OneAfterAnother(lambda value: [(number, 1) for number in answers(value)])
    found = {one["AccessionNumber"] for _, one in Accessions(peer).find(list(WANTED))}
    assert found >= set(THERE) and not found & set(ABSENT)
    assert set(ABSENT) <= set(peer.asked)
    assert len(peer.asked) <= most


@pytest.mark.parametrize("status", [0, 0xA700])
@pytest.mark.parametrize("takes_list", [True, False])
@pytest.mark.parametrize("cap", [7, 25, 37, 50, 89, 90, 91, 100, 137, 178, 179])
def test_no_study_is_lost_at_a_peer_that_stops_at_a_limit(takes_list: bool, cap: int, status: int) -> None:
    """Each number has two studies, and those of the first day come first: a number is found before all of it is."""
    numbers = THERE[:400]

    def matching(value: str) -> list[tuple[str, int]]:
        some = (takes_lists if takes_list and "*" not in value else takes_one_value)(value)
        return [(number, day) for day in (1, 2) for number in some]

    peer = OneAfterAnother(matching, cap, status)
    found = {one["StudyInstanceUID"] for _, one in Accessions(peer).find([*numbers, "XYZ"])}
    assert found >= {f"{number}.{day}" for day in (1, 2) for number in numbers}
    assert "XYZ" in peer.asked
    assert len(peer.asked) < (len(numbers) if cap > 7 else 2 * len(numbers))


@pytest.mark.parametrize("cap", [37, 89, 90, 91, 137, 1234])
def test_a_number_with_many_studies_hides_none_of_the_others_behind_a_limit(cap: int) -> None:
    """One number of the list has thirty studies, which come first, and the last has two."""

    def matching(value: str) -> list[tuple[str, int]]:
        days = {THERE[5]: 30, THERE[59]: 2}
        return [(one, day) for day in range(30) for one in takes_lists(value) if day < days.get(one, 1)]

    peer = OneAfterAnother(matching, cap)
    found = {one["StudyInstanceUID"] for _, one in Accessions(peer).find(THERE[:60])}
    assert len(found) == 60 + 29 + 1
    assert len(peer.asked) <= (4 if cap > 91 else 60)


def test_a_peer_that_gives_all_costs_one_query_more_to_show_it() -> None:
    peer = OneAfterAnother(lambda value: [(number, 1) for number in takes_lists(value)])
    assert len(list(Accessions(peer).find(THERE[: 1 + 89 * 5]))) == 1 + 89 * 5
    assert len(peer.asked) == 1 + 5 + 1


def test_numbers_in_another_case_are_found_by_lists_too() -> None:
    peer = OneAfterAnother(lambda value: [(number, 1) for number in takes_lists(value.upper())])
    assert len(list(Accessions(peer).find([one.lower() for one in THERE[:300]]))) == 300
    assert len(peer.asked) < 8
