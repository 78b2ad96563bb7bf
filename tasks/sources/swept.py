"""What a sweep has done, in numbers and in a sentence."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from transfer.sourcebook import UnitState


@dataclass
class Swept:
    """What a sweep has done.

    Attributes:
        runs: of the dispatches that it made: how many units each has.
        waiting: how many units have not settled yet.
        next: when one of them may be ready, in seconds since the epoch; 0 for none.
        counts: how many units came into each state.
    """

    runs: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    next: float = 0.0
    counts: dict[UnitState, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def words(self) -> str:
        """What was done, in a sentence."""
        said = [f"{sum(self.runs.values())} dispatched"] if self.runs else []
        said += [f"{count} {state}" for state, count in self.counts.items() if state is not UnitState.DELIVERED]
        said += [f"{self.waiting} not settled yet"] if self.waiting else []
        return ", ".join(said) or "nothing new"
