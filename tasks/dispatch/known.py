"""What the ledger knows of a delivery's items: what this dispatch recorded, and what the place confirmed to others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from functools import cached_property

from blocks.base import Target
from tasks.driver import Facts
from transfer import confirmed
from transfer.confirmed import SECOND, Confirmation, Spot
from transfer.content import sha256
from transfer.errors import Cancelled, Rejected
from transfer.layout import names
from transfer.ledger import Ledger
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan

MARK_CHARS = 24  # hexadecimal, of a place, whose name may be a patient's
OWN = "{dispatch_id}"  # in the template of a place
CHUNK = 1000  # items that are looked up at once: ten times as many would take 4 MB
SUMS = 500  # that are saved with one commit


class Known:
    """The ledger, as one delivery sees it.

    Args:
        key: dispatch, destination, and its endpoint.
        check: called between items and between pieces of files that are read; may raise to stop.
    """

    def __init__(
        self,
        ledger: Ledger,
        key: tuple[str, str, str],
        target: Target,
        facts: Facts,
        plan: Plan,
        check: Callable[[], None],
    ) -> None:
        self._ledger, self._key, self._plan, self._check = ledger, key, plan, check
        self._template = _template(target, facts)
        self._by_path = facts.keeps_names
        self._place = _mark(self._template) if self._template else ""
        self._sums: dict[str, str] = {}  # by path, of what was read
        self._found: dict[str, Confirmation] = {}  # by path, of what others have sent
        self._summed: set[str] = set()  # paths of what others have sent, and summed up
        # What a source moves or deletes must be what was confirmed: whoever writes to it may restore its time.
        self._ours = bool(plan.copied) or (plan.in_place is not None and plan.in_place.untouched)
        self._unread: list[Item] = []  # confirmed by this delivery, and not yet summed up

    @property
    def _is_own_place(self) -> bool:
        """Whether the place is this dispatch's own, so that it takes nothing that others have sent for its own."""
        return OWN in self._template

    @cached_property
    def _places(self) -> dict[str, str]:
        """The marks of the folders that items get at the target, by path."""
        folders = names(self._plan, self._template)
        marks = {folder: _mark(folder) for folder in set(folders.values())}
        return {path: marks[folder] for path, folder in folders.items()}

    def _spot(self, item: Item) -> Spot | None:
        """Return where an item belongs; None if no other dispatch touches what is there."""
        if self._by_path:
            if self._is_own_place:
                return None
            return Spot(self._places[item.path], item.shown) if item.path in self._places else None
        return Spot(self._place, item.sop_instance_uid) if item.shared else None

    def begin(self, *, force: bool) -> None:
        """Prepare a run: forget what may be tried again; with `force`, everything about these items."""
        self._ledger.begin(*self._key, force=force, spots=self._spots(self._plan.items))

    def look(self, settled: Container[str]) -> dict[str, Outcome]:
        """Return the outcomes, by path, of the items that are at the place, or were rejected by it in this run.

        What others have sent is noted as this dispatch's as well, and what is not there any more is forgotten.

        Args:
            settled: paths of items that this run has reported.

        Raises:
            LedgerAway: what is sent now could not be noted.
        """
        self._ledger.check_room()
        own = self._own()
        known = self._compared(own, settled, self._sum)
        new, old = known.keys() - own.keys(), own.keys() - known.keys()
        adopted = [(item, spot) for item in self._plan.items if item.path in new and (spot := self._spot(item))]
        gone = [item for item in self._plan.items if item.path in old]
        if adopted or gone:
            there = ((item, known[item.path], spot, self._found[item.path]) for item, spot in adopted)
            for path in self._ledger.settle(*self._key, there, gone):  # files were read since it was found
                del known[path]
            self._unread += (item for item, _ in adopted if item.path in known and item.path not in self._summed)
        self._found.clear()
        return known

    def glance(self) -> dict[str, Outcome]:
        """Return the same without reading a file or writing a row: what is likely to be there."""
        return self._compared(self._own(), (), lambda item: iter(()))

    def _own(self) -> dict[str, Outcome]:
        return self._ledger.outcomes(*self._key[:2], self._plan.items, self._key[2], is_touched=self._is_touched)

    def _is_touched(self, item: Item, since: float) -> bool:
        """Return True if something has happened to a source's file, as far as its ctime says, since a time.

        A ctime that is yet to come is of a file server whose clock is ahead, and says nothing.
        """
        if not self._ours:
            return False
        return since < self._plan.copied.get(item.path, item.ctime_ns) / SECOND <= self._ledger.now()

    def _compared(
        self, own: dict[str, Outcome], settled: Container[str], sums: Callable[[Item], Iterator[str]]
    ) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        for start in range(0, len(self._plan.items), CHUNK):
            items = self._plan.items[start : start + CHUNK]
            held = {} if self._is_own_place else self._ledger.confirmed(self._key[2], self._spots(items))
            for item in items:
                mine, spot = own.get(item.path), self._spot(item)
                there = held.get(spot) if spot else None
                if mine and (not mine.arrived or item.path in settled or not there):
                    found[item.path] = mine
                elif there and (one := self._same(there, item, sums, mine is not None)):
                    if one.sha256 and item.path not in self._sums:
                        self._summed.add(item.path)
                    if not mine:
                        self._found[item.path] = one
                    found[item.path] = mine or one.outcome.again
        return found

    def _spots(self, items: Iterable[Item]) -> Iterator[Spot]:
        return (spot for item in items if (spot := self._spot(item)))

    def _same(
        self, there: list[Confirmation], item: Item, sums: Callable[[Item], Iterator[str]], is_mine: bool
    ) -> Confirmation | None:
        def is_doubtful(one: Confirmation) -> bool:
            return self._is_touched(item, one.time)

        unread = (one for one in there if is_mine and not one.sha256 and one.is_file(item) and not is_doubtful(one))
        return next(unread, None) or confirmed.same(there, item, sums(item), is_doubtful)

    def _sum(self, item: Item, *, in_memory: bool = False) -> Iterator[str]:
        """Yield the SHA-256 of an item's file; nothing if it can't be read, or would have to be read from the disk."""
        if item.path not in self._sums:
            try:
                with self._plan.open(item) as fd:
                    value = sha256(fd, self._check, in_memory=in_memory)
                    self._plan.check(item, fd)
            except (Rejected, OSError):
                return
            if not value:
                return
            self._sums[item.path] = value
        yield self._sums[item.path]

    def _sum_once(self, item: Item) -> Iterator[str]:
        """Yield the same for what nobody will ask for again: of 100,000 files the sums would be 20 MB."""
        yield from self._sum(item, in_memory=True)
        self._sums.pop(item.path, None)

    def record(self, item: Item, outcome: Outcome, since: float) -> None:
        """Save an item's outcome; return when it is committed."""
        # What the target is not to get says nothing about what it has.
        spot = None if outcome.kind is Kind.SKIPPED or item.problem else self._spot(item)
        self._ledger.record(*self._key, item, outcome, spot, since, by_uid=not self._by_path)
        if spot and outcome.arrived:
            self._unread.append(item)

    def sum_up(self) -> None:
        """Save the SHA-256 of what has been confirmed, as far as it is still in memory.

        By that a copy of a file, which has another time, is known again.
        """
        unread, self._unread = self._unread, []
        with suppress(Cancelled):  # what has arrived, has
            for start in range(0, len(unread), SUMS):
                self._ledger.sum_up(self._key[2], self._key[0], list(self._with_sums(unread[start : start + SUMS])))

    def _with_sums(self, items: Iterable[Item]) -> Iterator[tuple[Spot, Item, str]]:
        for item in items:
            self._check()
            if spot := self._spot(item):
                for value in self._sum_once(item):
                    yield spot, item, value


def is_own_place(target: Target, facts: Facts) -> bool:
    """Return True if each dispatch has a place of its own at a target, where no other one replaces anything."""
    return facts.keeps_names and OWN in _template(target, facts)


def _template(target: Target, facts: Facts) -> str:
    return target.place_template or (OWN if facts.keeps_names else "")


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:MARK_CHARS]
