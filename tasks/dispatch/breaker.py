"""Which targets do not answer.

After LIMIT failures in a row a target's breaker opens: dispatches to it wait, and one run at a time tests whether it is
back; the first answer closes it.

One small file for each such target in `TALARIA_HOME/breakers`, for all workers of this machine. A target whose settings
have changed since begins anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from blocks.base import Target
from tasks.dispatch import line
from tasks.happened import target_stands
from transfer.errors import DispatchError, TimedOut, Unreachable
from transfer.home import Home, locked
from transfer.ledger import Ledger
from transfer.live import replace

LIMIT = 5  # failures in a row, of any dispatches
FIRST_S, LONGEST_S = 1.0, 300.0  # at least, and at most, between two tests; the target's own delays lie between
DEAD = (Unreachable, TimedOut)  # errors that count
UP_S = 60.0  # between two looks whether another host has said that a target is down
_up: dict[str, float] = {}  # when each was looked at
logger = logging.getLogger(__name__)


@dataclass
class Breaker:
    """What is known of a target that did not answer.

    Attributes:
        mark: of its settings then.
        failures: in a row.
        opened: when that were too many, in seconds since the epoch; 0 if they are not.
        tested: when it was tried last.
        until: when it is tested again.
        reason: what the last failure was.
    """

    mark: str
    failures: int = 0
    opened: float = 0.0
    tested: float = 0.0
    until: float = 0.0
    reason: str = ""


def read(home: Home, target: Target) -> Breaker:
    """Return the state of a target's breaker."""
    mark = _mark(target)
    with suppress(OSError, ValueError, TypeError):
        found = Breaker(**json.loads(_path(home, target).read_bytes()))
        if found.mark == mark:
            return found
    return Breaker(mark)


def failed(home: Home, target: Target, error: DispatchError, reason: str) -> Breaker:
    """Count a failure, if it is one of those that a dead target causes; return the state then."""
    if not isinstance(error, DEAD):
        return read(home, target)
    with locked(_lock(home, target, "lock"), fcntl.LOCK_EX):
        one = read(home, target)
        opens = one.failures + 1 >= LIMIT and not one.opened
        one.failures, one.tested, one.reason = one.failures + 1, time.time(), reason
        if opens:
            one.opened = one.tested
        if one.opened:
            longest = min(LONGEST_S, target.retry_max_delay_s)
            later = min(longest, target.retry_delay_s * 2 ** min(one.failures - LIMIT, 20))
            one.until = one.tested + max(FIRST_S, later)
        replace(_path(home, target), asdict(one))
    if opens:
        _up.pop(target.name, None)
        _say(home, target, one, up=False)
    return one


def answered(home: Home, target: Target) -> None:
    """Note that a target answers; wake what waits for that."""
    if _path(home, target).exists():
        with locked(_lock(home, target, "lock"), fcntl.LOCK_EX):
            one = read(home, target)
            _path(home, target).unlink(missing_ok=True)
        _say(home, target, one, up=True)  # also if it was open before its settings changed
        if one.opened:
            line.wake(queue(target), target.max_dispatches)
            return
    elif isinstance(home.ledger, str) and _up.get(target.name, 0.0) < time.monotonic() - UP_S:
        _say(home, target, Breaker(""), up=True)  # if another host has said that it is down
        _up[target.name] = time.monotonic()
    line.wake(queue(target))


@contextmanager
def testing(home: Home, target: Target) -> Iterator[bool]:
    """Be the one that tests a target during the block; yields False if another run does."""
    with locked(_lock(home, target, "test"), fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
        yield mine is not None


def queue(target: Target) -> str:
    """Return the name of the line in which runs wait for a target to answer."""
    return f"{target.name}?"


def _lock(home: Home, target: Target, what: str) -> Path:
    path = _path(home, target).with_suffix(f".{what}")
    path.parent.mkdir(exist_ok=True, mode=0o700)
    return path


def _say(home: Home, target: Target, one: Breaker, *, up: bool) -> None:
    """Say that a target does not answer, or answers again; where that fails, no dispatch does."""
    try:
        with Ledger(home.ledger) as ledger:
            target_stands(ledger, target.name, up=up, about={"failures": one.failures, "since": one.opened})
    except (DispatchError, OSError, sqlite3.Error) as exc:
        logger.warning("that %s is %s can't be said: %s", target.name, "up" if up else "down", exc)


def _mark(target: Target) -> str:
    return hashlib.sha256(target.model_dump_json().encode()).hexdigest()[:24]  # secrets are masked in it


def _path(home: Home, target: Target) -> Path:
    return home.root / "breakers" / f"{target.name}.json"
