"""How a sweep has its units dispatched: what it asks of Prefect, so that tests can do without."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class EndedRun:
    """A run of a dispatch that has ended.

    Attributes:
        gone: whether it was removed from the server, so that nothing is known of it.
        message: of its last state.
        studies: of its receipts, the row of each unit, by the unit's key.
        numbers: of a retrieval, that of each accession number, in lower case: archives write numbers in a case of their
            own.
    """

    gone: bool = False
    message: str = ""
    studies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def study(self, unit: str) -> Mapping[str, Any] | None:
        """Return the row of a unit; None if the run has none."""
        return self.studies.get(unit) or self.numbers.get(unit.strip().casefold())


class Dispatching(Protocol):
    """What creates runs of dispatches, and looks at them."""

    async def create(self, batch: str, parameters: Mapping[str, Any]) -> str:
        """Create the run that dispatches a batch and return its id; the same run if it has been created before."""

    async def ended(self, runs: Collection[str]) -> Mapping[str, EndedRun]:
        """Return those of some runs that have ended; others are under way, or wait."""

    async def going(self, runs: Collection[str]) -> set[str]:
        """Return those of some runs that have not failed: somebody has let them run again."""
