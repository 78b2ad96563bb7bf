"""All patients that a query matches, of a peer that knows studies below a patient only, though it may stop at a number.

What may be cut short is asked for again by what the patients' IDs begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from imaging.query import text
from protocols.dimse.parts import by_prefix, outside
from protocols.dimse.whole import LEAST, Answer, HasMore, Keys
from transfer.errors import Busy, Misconfigured

MOST_ASKED = 3000  # queries for the patients of one search

_parts = by_prefix("PatientID")


class Patients:
    """The patients of one peer, as one search needs them.

    Args:
        ask: asks for patients, in a character set.
        where: the peer, for messages.
    """

    def __init__(self, ask: Callable[[Keys, str], Iterable[Answer]], where: str) -> None:
        self._ask, self._where = ask, where
        self._known: dict[tuple[tuple[tuple[str, str], ...], str], list[str]] = {}  # a search asks in parts, by date
        self._asked = 0

    def ids(self, keys: Keys, charset: str) -> list[str]:
        """Return the IDs of the patients that match.

        Raises:
            HasMore: there are more than the peer gives, and no way to ask for them.
            Others: as `ask`.
        """
        what = tuple(sorted(keys.items())), charset
        if what not in self._known:
            self._known[what] = list(self._all(keys, charset, LEAST))
        return self._known[what]

    def _all(self, keys: Keys, charset: str, least: int) -> dict[str, None]:
        """Return all patients that match.

        Args:
            least: number of answers below which they are taken for all that there are.
        """
        found: dict[str, None] = {}
        busy: Busy | None = None
        self._asked += 1
        try:
            for one in self._ask(keys, charset):
                found.setdefault(text(one.get("PatientID")))
        except Busy as exc:
            busy = exc
        found.pop("", None)
        if busy is None and len(found) < least:
            return found
        parts = self._in_parts(keys, charset, len(found))
        if parts is not None and found.keys() <= parts.keys():
            return parts
        if busy is not None and not found:
            raise busy
        if busy is not None or (parts is not None and parts.keys() - found.keys()):
            raise HasMore(f"{self._where}: the peer gives {len(found)} patients and has more: narrow the query")
        return found  # nothing shows that it stops there

    def _in_parts(self, keys: Keys, charset: str, given: int) -> dict[str, None] | None:
        """Return what all parts of a query bring; None if the peer doesn't look at what IDs begin with."""
        found: dict[str, None] = {}
        for part in _parts(keys, []):
            if self._asked > MOST_ASKED:
                return None
            try:
                some = self._all(part, charset, max(given, 1))
            except HasMore:
                raise
            except Misconfigured:
                return None
            if outside(part, keys, [{"PatientID": one} for one in some]):
                return None
            found |= some
        return found or None
