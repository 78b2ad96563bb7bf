"""The tests of a query's keys on studies and series; a key that is not valid raises an error that a dispatch knows."""

from __future__ import annotations

from imaging import match
from imaging.match import Test
from imaging.query import Query
from transfer.errors import Misconfigured


def study_tests(query: Query) -> list[tuple[str, Test]]:
    """Return the tests that a study's attributes must pass, by keyword.

    Raises:
        Misconfigured: a date is not valid.
    """
    try:
        return list(match.of_study(query))
    except ValueError as exc:
        raise Misconfigured(str(exc)) from exc


def series_tests(query: Query) -> list[tuple[str, Test]]:
    """Return the tests that the attributes of a single series must all pass, by keyword."""
    return list(match.of_series(query))
