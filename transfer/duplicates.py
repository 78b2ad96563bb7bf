"""Files of one plan that share a SOP Instance UID: a target that keeps instances by UID can hold only one of them.

    duplicates = Duplicates(plan, report)
    items = duplicates.begin()
    while items:
        send(items)  # reports the outcome of each, or raises
        items = duplicates.settle()

The first file of a UID is sent; the others get their outcome from its own, once that is known:

    it arrived    same data set: already; another one: rejected
    it did not    same data set: rejected for the same reason; another one: sent in the next round
"""

from __future__ import annotations

from collections.abc import Iterable

from transfer.content import read_here
from transfer.errors import Rejected
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport

PIECE_BYTES = 1 << 20  # that are compared at a time


class Duplicates:
    """Sends each SOP Instance UID of a plan once, and reports what becomes of the files that share one.

    Files without a DICOM header are not duplicates of anything.
    """

    def __init__(self, plan: Plan, report: PushReport) -> None:
        self._plan, self._report = plan, report
        groups: dict[str, list[Item]] = {}
        for item in plan.items:
            if item.shared is not None:
                groups.setdefault(item.sop_instance_uid, []).append(item)
        self._groups = [group for group in groups.values() if len(group) > 1]
        self._held: set[str] = set()

    def begin(self) -> tuple[Item, ...]:
        """Return the pending items to send first: all but the duplicates of others.

        What an earlier attempt found out about a UID settles its other files at once, without sending anything.
        """
        self._held = {item.path for group in self._groups for item in group}
        chosen = {item.path for item in self.settle()}
        return tuple(item for item in self._plan.pending if item.path not in self._held or item.path in chosen)

    def settle(self) -> tuple[Item, ...]:
        """Report the duplicates of items that have an outcome; return the items to send now, none at the end."""
        chosen: list[Item] = []
        for group in self._groups:
            chosen += self._settle(group)
        return tuple(chosen)

    def _settle(self, group: list[Item]) -> Iterable[Item]:
        arrived = next((item for item in group if self._report.arrived(self._plan, item)), None)
        refused = {item: outcome for item in group if (outcome := self._refusal(item))}
        for item in group:
            if item is arrived or item in refused or self._report.arrived(self._plan, item):
                continue
            self._report.check()
            if arrived is not None:
                self._report(item, self._beside(arrived, item))
                continue
            reason = next((outcome for other, outcome in refused.items() if self._equal(other, item)), None)
            if reason is None:
                return [item]
            self._report(item, reason)
        return []

    def _refusal(self, item: Item) -> Outcome | None:
        outcome = self._report.outcomes.get(item.path) or self._plan.rejected.get(item.path)
        return None if outcome is None or outcome.arrived else outcome

    def _beside(self, first: Item, item: Item) -> Outcome:
        try:
            if self._equal(first, item):
                return Outcome(Kind.ALREADY, f"the same instance as {first.shown}")
        except Rejected as exc:
            return Outcome(Kind.REJECTED, exc.message)
        return Outcome(
            Kind.REJECTED,
            f"it has the SOP Instance UID of {first.shown}, which was sent, and other content: one of both needs a "
            "UID of its own",
        )

    def _equal(self, one: Item, other: Item) -> bool:
        try:
            return same_instance(self._plan, one, other)
        except Rejected:
            if self._report.arrived(self._plan, one):
                raise
            return False  # whoever sends it finds out as well


def same_instance(plan: Plan, one: Item, other: Item) -> bool:
    """Return True if two files hold the same data set in the same transfer syntax.

    File meta information and preamble are not compared: they say how the file came about.

    Raises:
        Rejected: one of them can't be read, or has changed.
    """
    a, b = one.header, other.header
    if a is None or b is None or a.TransferSyntaxUID != b.TransferSyntaxUID:
        return False
    if one.size - a.dataset_offset != other.size - b.dataset_offset:
        return False
    with plan.open(one) as first, plan.open(other) as second:
        left, at, beside = one.size - a.dataset_offset, a.dataset_offset, b.dataset_offset
        while left > 0:
            piece = read_here(first, min(left, PIECE_BYTES), at)
            if not piece or piece != read_here(second, len(piece), beside):
                return False
            at, beside, left = at + len(piece), beside + len(piece), left - len(piece)
    return True
