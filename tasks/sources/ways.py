"""How a sweep has its units dispatched: what it asks of Prefect, so that tests can do without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from transfer.outcome import Kind
from transfer.receipt import State


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

    async def resting(self, runs: Collection[str]) -> set[str]:
        """Return those of some runs that have begun, and wait to go on."""

    async def waits(self, runs: Collection[str]) -> Mapping[str, str]:
        """Return those of some runs that wait for hours that people have set, each with the words for that."""


def failure(study: Mapping[str, Any] | None, message: str) -> str:
    """Return why a unit was not delivered; "" if it was."""
    if study is None:
        return message or "its dispatch did not begin"
    bad = {name: one for name, one in study["targets"].items() if one["state"] != State.DELIVERED}
    if not bad and study["targets"]:
        return ""
    said = [f"{name}: {one.get('error') or _words_of(one)}" for name, one in bad.items()]
    return "; ".join(said) or message or "its dispatch did not begin"


def _words_of(outcome: Mapping[str, Any]) -> str:
    """Return how a delivery ended, with the reason for which most of its items were rejected."""
    why = Counter(one["detail"] for one in outcome.get("items", ()) if one["outcome"] == Kind.REJECTED)
    (most, _), others = (why.most_common(1) or [("", 0)])[0], len(why) > 1
    count = f", {outcome['rejected']} rejected" if outcome.get("rejected") else ""
    return f"{outcome['state']}{count}{f': {most}' if most else ''}{', and other reasons' if others else ''}"
