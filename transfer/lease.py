"""Which processes may run dispatches, where several hosts share a ledger: those whose lease has not ended.

On one host, the kernel says whether a process is alive (`Home.alive`). Of another host's nothing is known but what it
last said: it renews its lease, by the database's clock, and a lease that has ended never comes back. Its process stops
sending a while before that, by its own clock that goes on while it is paused, so that who takes its runs up does not
send beside it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Self

from transfer.database import lease_s
from transfer.errors import DispatchError
from transfer.home import Home, host_name
from transfer.ledger import Ledger

BEATS = 6  # in a lease: how often it is renewed
USED = 2 / 3  # of a lease, after which its owner stops if it could not be renewed
logger = logging.getLogger(__name__)


def now() -> float:
    """Return the seconds of a clock that knows no steps, and goes on while this machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def living(home: Home, ledger: Ledger) -> Callable[[str], bool]:
    """Return what says whether an owner of runs, of any host that shares the ledger, may still be at work."""
    if not ledger.shared:
        return home.alive

    def alive(owner: str) -> bool:
        held = ledger.runs.holder(owner)
        # Of our own state directory we know more: the kernel, at once.
        return held is not None and held.live and (held.home != home.kernel() or home.alive(owner))

    return alive


class Lease:
    """Makes this process an owner of runs during the block; renews that, where the ledger is shared.

    Args:
        label: the name that others know this process by.
        until: called with the time, by `now`, until which its runs may go on.
        lost: called when they may not any more; the owner is another one afterwards.

    Attributes:
        owner: its id; it is alive until the process, the block or the lease ends.
    """

    def __init__(
        self, home: Home, label: str, until: Callable[[float], None], lost: Callable[[], None], *, seconds: float = 0.0
    ) -> None:
        self._home, self._label, self._until, self._lost = home, label, until, lost
        self._seconds = seconds or lease_s()
        self._end, self._mine = threading.Event(), ExitStack()
        self.owner = ""

    def __enter__(self) -> Self:
        # It leaves a connection that is silent while there is time to renew the lease by another one.
        self._ledger = Ledger(self._home.ledger, answer_s=self._seconds / BEATS)
        try:
            self._begin()
        except BaseException:
            self._ledger.close()
            raise
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        if self._ledger.shared:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        if self._ledger.shared:
            self._thread.join(self._seconds)
            self._resign(self.owner)
        self._mine.close()
        self._ledger.close()

    def _begin(self) -> None:
        with ExitStack() as mine:
            owner = mine.enter_context(self._home.owner(self._label))
            if self._ledger.shared:
                asked = now()
                self._ledger.runs.enroll(owner, self._home.kernel(), host_name(), self._seconds)
                self._deadline = asked + self._seconds * USED
                self._until(self._deadline)
            self.owner, self._mine = owner, mine.pop_all()

    def _renew(self) -> None:
        while not self._end.wait(self._seconds / BEATS):
            asked = now()
            try:
                kept = asked < self._deadline and self._ledger.runs.renew(self.owner, self._seconds)
                kept = kept and now() < self._deadline  # else the answer came when runs had stopped already
            except Exception as exc:  # whatever it is, this thread must go on
                said = None if isinstance(exc, DispatchError) else exc
                logger.warning("the lease on this process's runs can't be renewed: %s", exc, exc_info=said)
                kept = now() < self._deadline
                if kept:
                    continue
            if kept:
                self._deadline = asked + self._seconds * USED
                self._until(self._deadline)
            else:
                self._let_go()

    def _let_go(self) -> None:
        """Stop what runs, and become another owner as soon as the database can be reached."""
        logger.error("the lease on this process's runs has ended: they stop here, and are taken up anew")
        self._lost()
        former, before = self.owner, self._mine
        while not self._end.is_set():
            try:
                self._begin()
            except Exception as exc:
                said = None if isinstance(exc, DispatchError) else exc
                logger.warning("no new lease: %s", exc, exc_info=said)
                self._end.wait(self._seconds / BEATS)
            else:
                self._lost()  # what has begun meanwhile, as the former one's
                self._until(self._deadline)
                self._resign(former)
                break
        with suppress(OSError):
            before.close()

    def _resign(self, owner: str) -> None:
        """End a lease, unless that can't be said: it ends by itself."""
        try:
            self._ledger.runs.resign(owner)
        except Exception as exc:
            logger.debug("the lease's end can't be noted: %s", exc)
