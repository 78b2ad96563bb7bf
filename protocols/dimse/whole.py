"""All studies that a query matches, though a peer stops at a number of answers, with a status or without a word.

What may be cut short is asked for again in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from imaging.query import text
from protocols.dimse.parts import BY_UID, PREFIXED, SPLITTERS, Splitter, by_prefix, by_time, date_text, day_of, outside
from protocols.dimse.probes import Probes
from transfer.errors import Busy, Misconfigured

Answer = dict[str, Any]
Keys = dict[str, str]
Ask = Callable[[Mapping[str, str], str, int], Iterator[Answer]]  # keys, their character set, answers at most (0: all)

LEAST = 5  # answers at which a peer may stop without a word
UID = "StudyInstanceUID"
MAX_DEPTH = 70  # of parts of parts
MOST_DOUBTED = 300  # queries for what nothing but the number of answers makes doubtful
MOST_UNDATED = 3000  # queries for one identifier, in search of studies without a date


class HasMore(Misconfigured):
    """The peer has more than it gives."""


class _Ignored(Exception):
    """A part of a query was answered like the whole."""


class WholeSearch:
    """Asks one peer for all that matches.

    Args:
        ask: asks for studies.
        where: the peer, for messages.
        stops: whether `ask` heeds a number of answers.
    """

    def __init__(self, ask: Ask, where: str, *, stops: bool) -> None:
        self._ask, self._where, self._stops = ask, where, stops
        self._limit = 0  # number of answers at which this peer was seen to stop without a word
        self._gave = 0  # the most answers that it has given to one query
        self._doubted = 0  # queries that were spent on answers which only their number makes doubtful

    def answers(self, keys: Keys, charset: str, *, narrow: bool = False) -> list[Answer]:
        """Return all answers to a query, asked in parts if the peer doesn't give them at once.

        Args:
            narrow: whether few answers are expected, so that these are not worth a look whether there are more.

        Raises:
            HasMore: there is more than the peer gives, and no way to ask for it.
            Misconfigured: it doesn't take the query. Busy: it answers nothing now.
        """
        return self._parted(keys, charset, (*SPLITTERS, BY_UID), least=max(LEAST, self._gave) if narrow else 0)

    def _parted(
        self,
        keys: Keys,
        charset: str,
        splitters: tuple[Splitter, ...],
        above: Keys | None = None,
        depth: int = 0,
        least: int = 0,
    ) -> list[Answer]:
        """Return all answers to a query.

        Args:
            above: the query of which this is a part.
            least: number of answers below which they are taken for all that there are.

        Raises:
            _Ignored: the peer answers the part like the whole.
        """
        found: list[Answer] = []
        busy: Busy | None = None
        try:
            found.extend(self._ask(keys, charset, 0))
        except Busy as exc:
            # It gave some and then had enough, or it says at once that there are too many.
            busy = exc
        uids = frozenset(str(one.get("StudyInstanceUID", "")) for one in found)
        if above is not None and outside(keys, above, found):
            raise _Ignored
        suspected = False
        if busy is None:
            self._gave = max(self._gave, len(found))
            if len(found) < least:
                return found
            probes = self._probes(keys, charset, found)
            more = probes.show_more()
            if more:
                self._limit = min(self._limit or len(found), len(found))
            else:
                suspected = more is None and len(found) >= max(self._limit or self._gave, LEAST if depth == 0 else 2)
                if not suspected or not (self._limit or self._is_doubtful(charset, found)):
                    return found
                days = probes.values("StudyDate")
                if len(days) == 1 and all(one.get("StudyDate") for one in found):
                    keys = keys | {"StudyDate": days[0]}
                if len(probes.values("StudyTime")) < 2:
                    splitters = tuple(one for one in splitters if one is not by_time)
        for place, splitter in enumerate(splitters):
            parts = splitter(keys, found)
            if not parts or depth >= MAX_DEPTH or (splitter is BY_UID and suspected and not self._limit):
                continue
            self._doubted += len(parts) if suspected else 0
            try:
                rest = splitters[place:], keys, depth + 1
                got = [one for part in parts for one in self._parted(part, charset, *rest)]
            except _Ignored:
                continue
            except Misconfigured as exc:
                if isinstance(exc, HasMore):
                    raise
                continue  # it doesn't take this key, or no range or wild card in it
            came = {str(one.get("StudyInstanceUID", "")) for one in got}
            if suspected and not self._limit and came > uids:
                self._limit = len(found)  # it does stop there: now parts that bring as many are looked into to the end
                return self._parted(keys, charset, splitters, above, depth)
            if suspected and not self._limit and came == uids:
                return found  # nothing shows that it stops there
            if uids <= came:
                by_date = "StudyDate" in parts[0] and "StudyDate" not in keys
                return got + self._undated(keys, charset, got) if by_date else got
        if suspected and not self._limit:
            return found
        if busy is not None and not found:
            raise busy
        raise HasMore(f"{self._where}: the peer gives {len(found)} answers and has more: narrow the query")

    def _is_doubtful(self, charset: str, found: list[Answer]) -> bool:
        """Return True unless the peer was seen to give more answers than these, also for the days around theirs."""
        if self._doubted >= MOST_DOUBTED:
            return False
        days = sorted(str(one.get("StudyDate", "")) for one in found)
        first, last = day_of(days[0]), day_of(days[-1])
        if self._stops and first and first == last and 1 < first.year < 9999:
            around = f"{date_text(first - timedelta(1))}-{date_text(first + timedelta(1))}"
            try:
                given = len(list(self._ask({"StudyDate": around}, charset, len(found) + 1)))
            except (Busy, Misconfigured):
                given = 0
            self._gave = max(self._gave, given)
        return len(found) >= self._gave

    def _undated(self, keys: Keys, charset: str, dated: list[Answer]) -> list[Answer]:
        """Return the studies without a date, which are in no period and can't be asked for.

        Everything is asked for again by what one identifier begins with, to the end, and roughly by what the others do:
        one of them may be empty. Where none brings all that is known, UIDs may do.

        Args:
            dated: all others.

        Raises:
            HasMore: the peer doesn't look at what identifiers begin with, or that takes too many queries.
        """
        found: list[Answer] = []
        whole = False
        for key in PREFIXED:
            whole = self._undated_by(key, keys, charset, found, dated, roughly=whole) or whole
        whole = whole or self._undated_by(UID, keys, charset, found, dated, roughly=False)
        if not whole:
            raise HasMore(
                f"{self._where}: the peer doesn't give all answers at once, and whether it has studies without a date "
                "can't be found out: give a study date, or a period"
            )
        return found

    def _undated_by(
        self, first: str, keys: Keys, charset: str, found: list[Answer], dated: list[Answer], *, roughly: bool
    ) -> bool:
        """Add the studies without a date, by what an identifier begins with; return True if these are all.

        Args:
            dated: what must come again, as far as it has that identifier: else the peer finds nothing by it.
            roughly: look only into those parts of the answers further in which there are such studies.
        """
        order = [by_prefix(key) for key in (first, *(key for key in PREFIXED if key != first)) if key != UID]
        order = [BY_UID] if first == UID else [*order, BY_UID]
        lost = {str(one.get(UID, "")) for one in dated if text(one.get(first))}
        if dated and not lost and not roughly:
            return False  # nothing would show that the peer looks at it
        left = [(keys, part) for part in order[0](keys, [])]
        asked = 0
        while left:
            above, part = left.pop()
            answers: list[Answer] = []
            try:
                answers.extend(self._ask(part, charset, 0))
                cut = 0 < self._limit <= len(answers) or bool(self._probes(part, charset, answers).show_more())
            except Busy:
                cut = True
            except Misconfigured:  # it takes no wild cards
                return False
            asked += 1
            undated = [one for one in answers if not one.get("StudyDate")]
            found += undated
            if outside(part, above, answers) or asked > MOST_UNDATED:
                return False
            if cut and (undated or not roughly):
                smaller = next(filter(None, (split(part, answers) for split in order)), [])
                if not smaller:
                    return False
                left += [(part, one) for one in smaller]
            elif not cut:
                lost.difference_update(str(one.get(UID, "")) for one in answers)
        return asked > 0 and (roughly or not lost)

    def _probes(self, keys: Keys, charset: str, found: list[Answer]) -> Probes:
        return Probes(lambda part: self._ask(part, charset, 0), keys, found)
