"""The tests that a query makes of studies and series; a key that can't be read is an error of a dispatch here."""

from __future__ import annotations

from imaging import match
from imaging.match import Test
from imaging.query import Query
from transfer.errors import Misconfigured


def study_tests(query: Query) -> list[tuple[str, Test]]:
    """Return the tests that a study's attributes must pass, by keyword.

    Raises:
        Misconfigured: a date that is none.
    """
    try:
        return list(match.of_study(query))
    except ValueError as exc:
        raise Misconfigured(str(exc)) from exc


def series_tests(query: Query) -> list[tuple[str, Test]]:
    """Return the tests that the attributes of one and the same series must pass, by keyword."""
    return list(match.of_series(query))
