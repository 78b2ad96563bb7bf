"""Who waits for what at a target: runs that rest are woken one by one, the first of the line first.

A run that rests holds nothing. Its state says until when; a line only lets it come back earlier, and keeps a run that
has just begun from overtaking it. Lines stand in the ledger's database: whatever process, of whatever host, frees a
slot calls the next run, and Prefect's state of it tells the host that has its files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tasks.dispatch import running
from transfer.ledger import Ledger

LOST_S = 2.0  # after which a run that was called, by somebody who may have died, is called again
AHEAD_S = {"urgent": -600.0, "offpeak": 600.0}  # a run of that priority stands in line as if it had come then

_DISABLED, _HOURS = "!", "~"  # behind the name of a target, in that of a line for what somebody may change of it
_waker: Callable[[str], None] | None = None


def serve(waker: Callable[[str], None] | None) -> None:
    """Say how this process makes a run come back before its time; None for not at all."""
    global _waker
    _waker = waker


def may_rest() -> bool:
    """Return True if a run of this context may end its part while it waits: a worker will run it again."""
    return _waker is not None


def stands(run_id: str) -> str:
    """Return the id under which a run of this context stands in lines: that of the run that it is a part of, if any."""
    return running.whole() or run_id


def turn(since: float, priority: str) -> float:
    """Return a run's turn, for one that has waited since then; the lowest comes first."""
    return since + AHEAD_S.get(priority, 0.0)


def to_be_enabled(target: str) -> str:
    """Return the name of the line in which runs wait for a target to be enabled."""
    return f"{target}{_DISABLED}"


def of_hours(target: str) -> str:
    """Return the name of the line in which runs wait for the hours of a target, which somebody may change."""
    return f"{target}{_HOURS}"


def outside_hours(lines: Iterable[str]) -> list[str]:
    """Return the targets for whose hours somebody waits."""
    return _targets(lines, _HOURS)


def of_the_same(lock: str) -> str:
    """Return the name of the line in which runs wait for another one that does the same at a target."""
    return f"{lock}="


def disabled(lines: Iterable[str]) -> list[str]:
    """Return the targets for which somebody stands in such a line."""
    return _targets(lines, _DISABLED)


def is_for_a_change(line: str) -> bool:
    """Return True if who stands in a line waits for somebody to change the target, not for a slot of it."""
    return line.endswith((_DISABLED, _HOURS))


def _targets(lines: Iterable[str], mark: str) -> list[str]:
    return sorted(one.removesuffix(mark) for one in lines if one.endswith(mark))


def gone(ledger: Ledger, run_id: str) -> None:
    """Take a run that waits no more out of every line, and wake those behind it."""
    for line in ledger.waits.gone(run_id):
        wake(ledger, line)


def wake(ledger: Ledger, line: str, count: int = 1) -> None:
    """Wake the first runs of a line: a slot of the target is free, or it can be reached again.

    In a process without a worker they are only noted; the next look of any worker finds them.
    """
    for one in ledger.waits.call(line, count):
        if _waker:
            _waker(one)
