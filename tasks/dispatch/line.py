"""Who waits for what at a target, in this process: runs that rest are woken one by one, the first of the line first.

A run that rests holds nothing. Its state says until when; a line only lets it come back earlier, and keeps a run that
has just begun from overtaking it. What other processes free is found when the time has come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tasks.dispatch import running

LATE_S = 10.0  # after its time, or after it was woken, one that does not come is not waited for any more
AHEAD_S = {"urgent": -600.0, "offpeak": 600.0}  # a run of that priority stands in line as if it had come then

_lock = threading.Lock()
_lines: dict[str, dict[str, tuple[float, float]]] = {}  # by target, by run: its turn, and until when it rests
_waker: Callable[[str], None] | None = None


def serve(waker: Callable[[str], None] | None) -> None:
    """Say how a run of this process is made to come back before its time; None for not at all."""
    global _waker
    _waker = waker


def may_rest() -> bool:
    """Return True if a run of this context may end its part while it waits: a worker will run it again."""
    return _waker is not None and not running.whole()


def turn(since: float, priority: str) -> float:
    """Return a run's turn, for one that has waited since then; the lowest comes first."""
    return since + AHEAD_S.get(priority, 0.0)


def join(target: str, run_id: str, turn: float, until: float) -> None:
    """Let a run stand in line until its time comes."""
    with _lock:
        _lines.setdefault(target, {})[run_id] = turn, until


def leave(target: str, run_id: str) -> None:
    """Take a run out of a target's line."""
    with _lock:
        _lines.get(target, {}).pop(run_id, None)


def gone(run_id: str) -> None:
    """Take a run that waits no more out of every line, and wake those behind it."""
    with _lock:
        targets = [target for target, line in _lines.items() if line.pop(run_id, None)]
    for target in targets:
        wake(target)


def before(target: str, run_id: str, turn: float) -> int:
    """Return how many other runs stand in line before this one."""
    with _lock:
        line = _lines.get(target, {})
        return sum(other < turn and _fresh(end) for one, (other, end) in line.items() if one != run_id)


def wake(target: str, count: int = 1) -> None:
    """Wake the first runs of a target's line: a slot there is free, or the target can be reached again."""
    with _lock:
        line = _lines.get(target, {})
        for gone in [one for one, (_, end) in line.items() if not _fresh(end)]:
            del line[gone]
        chosen = sorted(line, key=lambda one: line[one][0])[:count]
        for one in chosen:
            line[one] = line[one][0], min(line[one][1], time.time())
    for one in chosen if _waker else ():
        _waker(one)  # type: ignore[misc]  # asked just before


def _fresh(until: float) -> bool:
    return until + LATE_S > time.time()
