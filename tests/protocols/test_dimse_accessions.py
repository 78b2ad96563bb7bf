"""Two thousand accession numbers: how many queries they cost at what kind of peer, and that none is wrongly missing."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from protocols.dimse.accessions import Accessions
from transfer.errors import Misconfigured

THERE = [f"ACC{number:06}" for number in range(0, 4000, 2)]
IS_THERE = frozenset(THERE)
ABSENT = ["ACC000001", "ACC002501", "XYZ"]
WANTED = [*THERE[:1200], *ABSENT, *THERE[1200:]]

Answers = Callable[[str], list[str]]


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
    asked: list[str] = []

    def ask(keys: Mapping[str, str], limit: int) -> Iterator[tuple[Mapping[str, str], dict[str, Any]]]:
        asked.append(keys["AccessionNumber"])
        for number in answers(keys["AccessionNumber"])[: limit or None]:
            yield keys, {"AccessionNumber": number}

    found = {one["AccessionNumber"] for _, one in Accessions(ask).find(list(WANTED))}
    assert found >= set(THERE) and not found & set(ABSENT)
    assert set(ABSENT) <= set(asked)
    assert len(asked) <= most


@pytest.mark.parametrize("takes_list", [True, False])
@pytest.mark.parametrize("cap", [25, 50, 100])
def test_no_study_is_lost_at_a_peer_that_stops_without_a_word(takes_list: bool, cap: int) -> None:
    """Each number has two studies, and those of the first day come first: a number is found before all of it is."""
    numbers, asked = THERE[:400], list[str]()

    def ask(keys: Mapping[str, str], limit: int) -> Iterator[tuple[Mapping[str, str], dict[str, Any]]]:
        value = keys["AccessionNumber"]
        asked.append(value)
        matching = (takes_lists if takes_list and "*" not in value else takes_one_value)(value)
        every = [(number, day) for day in (1, 2) for number in matching]
        for number, day in every[: min(cap, limit or cap)]:
            yield keys, {"AccessionNumber": number, "StudyDate": f"2024010{day}"}

    found = {(one["AccessionNumber"], one["StudyDate"]) for _, one in Accessions(ask).find([*numbers, "XYZ"])}
    assert {number for number, _ in found} >= {*numbers}
    assert all((number, f"2024010{day}") in found for number in numbers for day in (1, 2))
    assert len(asked) < len(numbers)
