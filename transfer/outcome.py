"""What became of an item at a target: the peer's last word on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache


class Kind(StrEnum):
    """What became of an item at a target."""

    DELIVERED = "delivered"
    WARNING = "warning"  # delivered, and the peer has something to say
    ALREADY = "already"  # the target had it before
    REJECTED = "rejected"
    SKIPPED = "skipped"  # not for this target: excluded, or not DICOM
    UNSENT = "unsent"  # no confirmation yet; only in receipts, never in the ledger


# How details begin that say that an item is at the target, where nobody can ask for it by its own UID.
ELSEWHERE, NAMELESS = "stored under another UID", "accepted without its UID"
ARRIVED = frozenset((Kind.DELIVERED, Kind.WARNING, Kind.ALREADY))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The peer's last word on one item.

    Attributes:
        detail: its reason, free of patients' data.
        found: whether it is taken for delivered because the peer says that it has it, after a try without an answer.
    """

    kind: Kind
    detail: str = ""
    found: bool = field(default=False, compare=False)

    @property
    def arrived(self) -> bool:
        return self.kind in ARRIVED

    @property
    def again(self) -> Outcome:
        """What is said of an item that arrived so before; its detail may say that it has another UID there."""
        return Outcome(Kind.ALREADY, self.detail) if self.detail else ALREADY

    @property
    def elsewhere(self) -> bool:
        """Whether the target has the item under another UID than its own, by which it can't be found there."""
        return self.arrived and self.detail.startswith((ELSEWHERE, NAMELESS))


# In memory once, for as many items as have them.
DELIVERED = Outcome(Kind.DELIVERED)
ALREADY = Outcome(Kind.ALREADY)
UNSENT = Outcome(Kind.UNSENT, "no confirmation yet")


@lru_cache(maxsize=256)
def outcome_of(kind: str, detail: str) -> Outcome:
    """Return the outcome that was kept so; in memory once for all items that have it."""
    return Outcome(Kind(kind), detail)
