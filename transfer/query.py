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


class AskedNumbers:
    """The accession numbers of a query, and which studies were shown under which: a study of two orders has both.

    Peers show it under the number that they are asked for.
    """

    def __init__(self, query: Query) -> None:
        self._asked = {_folded(one) for one in query.AccessionNumber} if query.level == "study" else set()
        self._shown: set[tuple[str, str]] = set()

    def is_another(self, uid: str, number: str) -> bool:
        """Return True if a study that is known by now is shown under a number that it was not shown under."""
        number = _folded(number)
        return number in self._asked and (uid, number) not in self._shown

    def show(self, uid: str, number: str) -> None:
        """Note that a study was shown under a number."""
        self._shown.add((uid, _folded(number)))


def _folded(number: str) -> str:
    return number.strip().casefold()
