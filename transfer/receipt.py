"""What a driver reports while it pushes, and the receipt of a delivery to one target.

`PushReport` is a driver's only way out while it pushes: outcomes, bytes moved, and the question whether to stop.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from itertools import islice
from typing import Any

from transfer import lines
from transfer.errors import Cancelled
from transfer.lines import ItemResult as ItemResult
from transfer.lines import Lines as Lines
from transfer.outcome import ARRIVED, UNSENT, Kind, Outcome
from transfer.plan import Item, Plan

PIECE_ITEMS = 500  # of a receipt that is written piece by piece


class Level(StrEnum):
    """How a delivery was verified; each level includes the ones before it."""

    ACCEPTED = "accepted"  # the peer confirmed each item
    LISTED = "listed"  # the peer was asked afterwards what it has
    PROVEN = "proven"  # storage commitment, or a checksum taken at the other side


class State(StrEnum):
    """How a delivery to one target, or a whole dispatch, ended."""

    DELIVERED = "delivered"
    PARTIAL = "partial"
    FAILED = "failed"
    CANCELLED = "cancelled"
    WAITING = "waiting"


@dataclass(frozen=True)
class Receipt:
    """What became of a plan at one target.

    Attributes:
        target: the target's name.
        items: every item of the plan, in order.
        bytes: bytes of the items that were delivered in this run (without `already`).
        seconds: from the first attempt's begin to the end, waits included.
        verified: the verification level that was reached, which may be lower than the one asked for.
        attempts: how often the push was begun in this run.
        hook: `none`, `done` or `failed`.
        error: why the push as a whole did not succeed; None if it did.
        notes: sentences for people, e.g. why a level was not reached.
    """

    target: str
    items: Sequence[ItemResult] = field(repr=False)
    bytes: int = 0
    seconds: float = 0.0
    verified: Level = Level.ACCEPTED
    attempts: int = 1
    hook: str = "none"
    error: str | None = None
    notes: tuple[str, ...] = ()
    stopped: State | None = None  # CANCELLED or WAITING, where that is why items have no outcome
    missing: int = 0  # announced, and not come: known by their number only
    doubt: str = ""  # of a retrieval: why more may belong to it all the same, which nothing shows

    @property
    def unsent(self) -> int:
        """How many items have no confirmation yet."""
        return self.counts[Kind.UNSENT] + self.missing

    @property
    def counts(self) -> dict[Kind, int]:
        """The number of items by kind of outcome."""
        return self._counts if not isinstance(self.items, lines.Packed) else self._counted()

    @cached_property
    def _counts(self) -> dict[Kind, int]:
        return self._counted()

    def _counted(self) -> dict[Kind, int]:
        seen = lines.counts(self.items)
        return {kind: seen[kind] for kind in Kind}

    @property
    def words(self) -> str:
        """How many items had which outcome, for people; "" if there are none."""
        counts = self.counts | {Kind.UNSENT: self.unsent}
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)

    def of(self, *kinds: Kind) -> Iterator[ItemResult]:
        """Yield the items whose outcome is of one of these kinds."""
        return lines.of(self.items, kinds)

    @property
    def packed(self) -> Receipt:
        """The same, as small as it can be, where there are many of them."""
        return replace(self, items=lines.Packed(self.items))

    @property
    def odd(self) -> Iterator[ItemResult]:
        """The items that were not plainly delivered."""
        return self.of(*(kind for kind in Kind if kind is not Kind.DELIVERED))

    @property
    def state(self) -> State:
        """Delivered if every item that is for this target arrived and its hook did not fail."""
        if self.stopped:
            return self.stopped
        counts = self.counts
        arrived = sum(counts[kind] for kind in ARRIVED)
        if counts[Kind.REJECTED] == 0 and self.unsent == 0 and self.error is None:
            return State.PARTIAL if self.hook == "failed" else State.DELIVERED
        return State.PARTIAL if arrived else State.FAILED

    @classmethod
    def from_json(cls, target: str, document: dict[str, Any]) -> Receipt:
        """Return the receipt that `to_json` made this of, with all items."""
        items = lines.read(document["items"])
        stopped = State(document["state"]) if document["state"] in (State.CANCELLED, State.WAITING) else None
        return cls(
            target,
            items,
            document["bytes"],
            document["seconds"],
            Level(document["verified"]),
            document["attempts"],
            document["hook"],
            document["error"],
            tuple(document["notes"]),
            stopped,
            document["unsent"] - lines.counts(items)[Kind.UNSENT],
        )

    def to_json(self, all_items: bool = False) -> dict[str, Any]:
        """Return the JSON of one target in `send --json`: keys as documented in docs/cli.md."""
        items = [item.to_json() for item in (self.items if all_items else self.odd)]
        return self.facts() | {"items": items}

    def facts(self) -> dict[str, Any]:
        """Return the JSON of one target without its items."""
        counts = self.counts
        return {
            "state": str(self.state),
            "delivered": counts[Kind.DELIVERED],
            "warnings": counts[Kind.WARNING],
            "already": counts[Kind.ALREADY],
            "rejected": counts[Kind.REJECTED],
            "skipped": counts[Kind.SKIPPED],
            "unsent": self.unsent,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "attempts": self.attempts,
            "verified": str(self.verified),
            "hook": self.hook,
            "error": self.error,
            "notes": list(self.notes),
        }


def pieces(receipt: Receipt) -> Iterator[bytes]:
    """Yield the JSON of `Receipt.to_json` with all items, piece by piece."""
    yield json.dumps(receipt.facts())[:-1].encode() + b', "items": [\n'
    every, before = iter(receipt.items), ""
    while piece := [*islice(every, PIECE_ITEMS)]:
        yield (before + ",\n".join(map(_line, piece))).encode()
        before = ",\n"
    yield b"]}"


_text = json.JSONEncoder().encode


def _line(item: ItemResult) -> str:
    """Return the JSON of an item; a fifth of what it costs to write a dictionary."""
    uid, outcome, detail = _text(item.sop_instance_uid), _text(item.outcome.value), _text(item.detail)
    return f'{{"path": {_text(item.path)}, "sop_instance_uid": {uid}, "outcome": {outcome}, "detail": {detail}}}'


def overall(states: list[State]) -> State:
    """Return the state of a dispatch, from those of its targets."""
    if all(state is State.DELIVERED for state in states):
        return State.DELIVERED
    if State.CANCELLED in states:
        return State.CANCELLED
    if any(state in (State.DELIVERED, State.PARTIAL) for state in states):
        return State.PARTIAL
    return State.WAITING if all(state is State.WAITING for state in states) else State.FAILED


class PushReport:
    """What a driver calls while it pushes; safe to call from several threads.

    Args:
        record: keeps an outcome for good (the ledger) before it counts.
        cancelled: set to stop the push.
        pausing: set to end a retrieval after the current series. With `cancelled`: somebody will go on
            with what has come, so a push keeps what it has begun.
        between: set to stop the push between items: those that are under way come to their end first.
        moved: called with each count of bytes that went out, for progress.
        unanswered: how often items, by path, were sent in this run without an answer; outlives an attempt. If such an
            item is found at the target, it counts as delivered, not as already there.
        tries: in how many attempts of this run an item, by path, failed alone.
        together: makes a block in which many outcomes are kept at once.
        put_off: the peer's last words, by path, about items that it refused for the time being; outlives an attempt.
    """

    def __init__(
        self,
        record: Callable[[Item, Outcome], None] = lambda item, outcome: None,
        cancelled: threading.Event | None = None,
        moved: Callable[[int], None] = lambda count: None,
        unanswered: Counter[str] | None = None,
        pausing: threading.Event | None = None,
        put_off: dict[str, str] | None = None,
        tries: Counter[str] | None = None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
        between: threading.Event | None = None,
    ) -> None:
        self.put_off: dict[str, str] = {} if put_off is None else put_off
        self.unanswered: Counter[str] = Counter() if unanswered is None else unanswered
        self.tries: Counter[str] = Counter() if tries is None else tries
        self._record, self.together = record, together
        self._lock = threading.Lock()
        self._moved = moved
        self._begun = time.monotonic()
        self.cancelled = cancelled or threading.Event()
        self.pausing = pausing or threading.Event()
        self._between, self._thread, self._threads = between or threading.Event(), threading.local(), 0
        self.outcomes: dict[str, Outcome] = {}
        self.revoked: set[str] = set()  # paths of what had been confirmed, and is not there

    def __call__(self, item: Item, outcome: Outcome) -> None:
        """Report an item's outcome: once per item, after the peer's confirmation."""
        if outcome.kind is Kind.ALREADY and item.path in self.unanswered:
            outcome = Outcome(Kind.DELIVERED, outcome.detail, found=True)
        with self._lock:
            if item.path in self.outcomes:
                raise RuntimeError(f"second outcome for {item.shown}")
            self._record(item, outcome)
            self.outcomes[item.path] = outcome

    def outcome(self, plan: Plan, item: Item) -> Outcome | None:
        """Return an item's outcome, reported in this push or before it; None if there is none yet."""
        return self.outcomes.get(item.path) or plan.done.get(item.path)

    def arrived(self, plan: Plan, item: Item) -> bool:
        """Return True if the item is at the target: confirmed in this push, or before it."""
        outcome = self.outcome(plan, item)
        return outcome is not None and outcome.arrived

    def elsewhere(self, plan: Plan, item: Item) -> bool:
        """Return True if the item is at the target under another UID than its own."""
        outcome = self.outcome(plan, item)
        return outcome is not None and outcome.elsewhere

    def revoke(self, item: Item, detail: str) -> None:
        """Withdraw a confirmed delivery: verification found that the peer doesn't have the item."""
        outcome = Outcome(Kind.REJECTED, detail)
        with self._lock:
            self._record(item, outcome)
            self.outcomes[item.path] = outcome
            self.revoked.add(item.path)

    def moved(self, count: int) -> None:
        """Report that `count` more bytes went out."""
        self._moved(count)

    def check(self) -> None:
        """Raise Cancelled if the dispatch is to stop; call this between items and between pieces of large ones."""
        if self.cancelled.is_set() or (self.begins_no_more and not getattr(self._thread, "under_way", False)):
            raise Cancelled(f"the dispatch was {'paused' if self.pausing.is_set() else 'cancelled'}")

    @property
    def begins_no_more(self) -> bool:
        """Whether no other item is to be begun; those that are under way come to their end."""
        return self._between.is_set()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Let items that this thread sends come to their end, also where no other one is to be begun.

        What can be gone on with at the byte where it was left, or is seen by nobody until it is whole, needs no end.
        """
        with self._lock:
            self._threads += 1
        self._thread.under_way = True
        try:
            yield
        finally:
            self._thread.under_way = False
            with self._lock:
                self._threads -= 1

    @property
    def is_under_way(self) -> bool:
        """Whether some thread sends items that are to come to their end."""
        return self._threads > 0

    def receipt(
        self, target: str, plan: Plan, verified: Level = Level.ACCEPTED, notes: tuple[str, ...] = ()
    ) -> Receipt:
        """Return the receipt of this push: outcomes reported here, those of earlier attempts for the others."""
        outcomes, size = [], 0
        for item in plan.items:
            outcome = self.outcomes.get(item.path)
            if outcome is None and item.path in plan.done:
                outcome = plan.done[item.path].again
            if outcome is None:
                outcome = plan.rejected.get(item.path)
            if outcome is None:
                outcome = UNSENT
            if outcome.kind in (Kind.DELIVERED, Kind.WARNING):
                size += item.size
            outcomes.append(outcome)
        seconds = time.monotonic() - self._begun
        return Receipt(target, Lines(plan.items, outcomes), size, seconds, verified, notes=notes)


def trimmed(document: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of receipts without the items that are plainly delivered; what is of no dispatch as it is."""
    if "dispatch_id" not in document:
        return document
    document = document | {"targets": _trimmed(document["targets"])}
    if document.get("studies"):
        document["studies"] = [row | {"targets": _trimmed(row["targets"])} for row in document["studies"]]
    return document


def _trimmed(targets: dict[str, Any]) -> dict[str, Any]:
    return {
        name: one | {"items": [item for item in one["items"] if item["outcome"] != str(Kind.DELIVERED)]}
        for name, one in targets.items()
    }
