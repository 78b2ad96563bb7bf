"""The runs of this process: which there are, and how to stop one.

A run in a worker's thread can't be interrupted by a signal; it looks at its flag between items instead.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakSet

from prefect.client.schemas.objects import State
from prefect.exceptions import Abort
from prefect.states import Scheduled

PAUSING = "Pausing"  # name of the state of a run that is to pause
PAUSED = "Paused"  # and of one that has: scheduled for a time that does not come
UNTIL_RESUMED = timedelta(days=3650)

# Set while the server's events report changes of runs to this process.
WATCHED = threading.Event()

_lock = threading.RLock()  # held by `asked`, which looks at flags, whose look may lose all runs
_lost: set[str] = set()
_until = math.inf


class _Passed(threading.Event):
    """A flag whose setting sets those of the run's parts, too.

    Attributes:
        parts: their flags.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: WeakSet[_Passed] = WeakSet()

    def set(self) -> None:
        super().set()
        with _lock:
            parts = [*self.parts]
        for part in parts:
            part.set()

    def has(self, part: _Passed) -> None:
        """Note the flag of a part."""
        self.parts.add(part)
        if self.is_set():
            part.set()


class _Flag(_Passed):
    """A flag that is set, without anybody who sets it, when this process's lease may have ended (`transfer.lease`).

    A process that was paused finds it so at its next look, before any thread of its could have told it.

    Attributes:
        is_part: whether the run is a part of another one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_part = False

    def is_set(self) -> bool:
        return super().is_set() or _past()

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set() or super().wait(timeout) or self.is_set()


_flags: dict[str, _Flag] = {}
_pauses: dict[str, _Passed] = {}
_calls: dict[str, threading.Event] = {}
_whole: ContextVar[str] = ContextVar("whole", default="")
_stopping = threading.Event()


def flag(flow_run_id: str) -> threading.Event:
    """Return the flag that stops a run; the same one for the same run."""
    with _lock:
        if flow_run_id not in _flags:
            _flags[flow_run_id] = one = _Flag()
            if whole := _flags.get(_whole.get()):
                whole.has(one)
                one.is_part = True
        return _flags[flow_run_id]


@contextmanager
def part_of(flow_run_id: str) -> Iterator[None]:
    """Make runs that begin in this context parts of another one: what stops that one stops them, too."""
    token = _whole.set(flow_run_id)
    try:
        yield
    finally:
        _whole.reset(token)


def whole() -> str:
    """Return the id of the run that this context's runs are parts of; "" if there is none."""
    return _whole.get()


def pause(flow_run_id: str) -> threading.Event:
    """Return the flag that makes a run pause at a point from which it can continue later, and its parts with it."""
    with _lock:
        one = _pauses.setdefault(flow_run_id, _Passed())
        if (whole := _pauses.get(_whole.get())) not in (None, one):
            whole.has(one)
        return one


def pauses_with_its_whole() -> bool:
    """Return True if the run that this context's runs are parts of is to pause."""
    with _lock:
        whole = _pauses.get(_whole.get())
    return whole is not None and whole.is_set()


def paused(message: str = "") -> State[Any]:
    """Return the state of a run that goes on when somebody resumes it."""
    return Scheduled(scheduled_time=datetime.now(UTC) + UNTIL_RESUMED, name=PAUSED, message=message)


def call(flow_run_id: str) -> threading.Event:
    """Return the flag that says to a run that is under way: what a part of it waits for is there."""
    with _lock:
        return _calls.setdefault(flow_run_id, threading.Event())


def asked(flow_run_id: str) -> bool:
    """Return True if a run has been asked to stop or to pause."""
    with _lock:
        return any(one[flow_run_id].is_set() for one in (_flags, _pauses) if flow_run_id in one)


def forget(flow_run_id: str) -> None:
    """Drop the run, which is over."""
    with _lock:
        _flags.pop(flow_run_id, None)
        _pauses.pop(flow_run_id, None)
        _calls.pop(flow_run_id, None)


def running() -> list[str]:
    """Return the ids of the runs that this process executes, and can stop."""
    with _lock:
        return list(_flags)


def flags() -> dict[str, threading.Event]:
    """Return the flags, by id, of the runs that this process executes, and can stop."""
    with _lock:
        return dict(_flags)


def parts() -> dict[str, threading.Event]:
    """Return the flags, by id, of those runs of this process that are parts of others."""
    with _lock:
        return {run_id: one for run_id, one in _flags.items() if one.is_part}


def stopping() -> bool:
    """Return True if every run of this process has been asked to stop, to be taken up by another one."""
    return _stopping.is_set()


def stop_all() -> None:
    """Ask every run of this process to stop."""
    _stopping.set()
    with _lock:
        for event in _flags.values():
            event.set()


def hold_until(moment: float) -> None:
    """Let this process's runs go on until a moment of `transfer.lease.now`."""
    global _until
    _until = moment


def lose_all() -> None:
    """Stop every run of this process for good: it is somebody else's, and nothing more may be said of it here."""
    global _until
    _lose()
    _until = math.inf


def _lose() -> None:
    with _lock:
        _lost.update(_flags)
        for event in _flags.values():
            event.set()


def lost(flow_run_id: str) -> bool:
    """Return True if a run, which went on here, is or may be somebody else's."""
    return _past() or flow_run_id in _lost


def still_ours(flow_run_id: str) -> None:
    """Check that a run is this process's to say anything of.

    Raises:
        Abort: it is, or may be, somebody else's.
    """
    if lost(flow_run_id):
        raise Abort("this process has lost its lease on the run, which another one takes up")


def regained(flow_run_id: str) -> None:
    """Note that a run is this process's again."""
    _lost.discard(flow_run_id)


def _past() -> bool:
    """Return True if the lease may have ended; then the runs are lost for good, for whoever looked has stopped."""
    past = time.clock_gettime(time.CLOCK_BOOTTIME) > _until  # as transfer.lease.now
    if past:
        _lose()
    return past
