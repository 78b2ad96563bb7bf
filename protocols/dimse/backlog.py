"""What several associations still have to send, and what is known about instances without a plain answer.

    waiting    in the plan's order, each to whoever is free
    later      what was passed over because nothing around it went through
    suspects   outstanding when an association broke, or refused "for now": tried alone, one by one, after all others

An instance is rejected when it also fails alone and the peer has taken others meanwhile. A peer that takes nothing gets
no more requests, and an instance of which nothing can be said has no outcome. To fail alone is to fail as the first on
an association: a later one may have met the limit of what the peer takes on one.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transfer.errors import Busy, Denied, DispatchError, Retryable, TimedOut
from transfer.outcome import Kind, Outcome
from transfer.plan import Item

# How often an instance may end an association, or be refused for now, before it is rejected. A silence costs a whole
# idle timeout.
MOST_BREAKS, MOST_SILENCES, MOST_REFUSALS = 3, 2, 2
# Of the idle timeout, for an instance that was met with silence before; more after a short one.
FIRST_SHARE, SECOND_SHARE = 0.1, 0.25
# Failures in a row, over all associations, after which the peer itself is taken to have failed; from the fourth on
# every one makes the queue go on elsewhere, so that a whole series that fails is passed over.
MOST_FRUITLESS, MOST_SILENT, PASS_OVER = 10, 7, 3
MOST_DENIED = 3  # likewise, where nothing was stored before: a peer that lets us store nothing says so each time
# Seconds after a break before the same instance goes out again: peers clean up what they have half, some of them late.
PAUSE_S = 1.0
SAME_ENDS = 2  # associations that end after as many instances, before that is taken for the peer's habit
SAME_SILENCES = 3  # likewise, in silence: that looks alike at any instance
DOUBT_AFTER = 8  # associations that were ended in time for such a habit; the next one finds out whether it is one


@dataclass
class Suspect:
    """An instance that was outstanding at a break, or refused for now.

    Attributes:
        error: what happened last.
        times: how often something happened while it was outstanding alone, so that it must be the cause.
        at: when something happened last; `time.monotonic`.
        waited: the longest silence that it was given alone, seconds.
        arrived: how many instances had arrived by when it did first.
    """

    item: Item
    error: DispatchError
    at: float
    arrived: int
    times: int = 0
    waited: float = 0.0

    @property
    def words(self) -> str:
        times = f"{self.times} times" if self.times > 1 else "once"
        return f"{self.error.message.partition(': ')[2] or self.error.message} ({times})"

    @property
    def used_up(self) -> bool:
        if isinstance(self.error, Denied):
            return True
        if isinstance(self.error, Busy):
            return self.times >= MOST_REFUSALS
        return self.times >= (MOST_SILENCES if isinstance(self.error, TimedOut) else MOST_BREAKS)


class Backlog:
    """The instances of some associations; all methods are safe to call from several threads.

    Attributes:
        lasts: how many instances the peer takes on one association before it ends it; None if it was not seen to.
        slowest: the longest time that an answer took, seconds.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self.lasts: int | None = None
        self.slowest = 0.0
        self._lock = threading.Lock()
        self._waiting = deque(items)
        self._later: list[Item] = []
        self._suspects: dict[str, Suspect] = {}
        self._stopped = False
        self._arrived = self._fruitless = self._silent = 0
        self._first_refusal: float | None = None  # when something was refused for now; `time.monotonic`
        self._stored_since = False  # whether something was stored that went out after that
        self._ends: Counter[int] = Counter()
        self._silences: Counter[int] = Counter()
        self._longest = 0  # instances that one association has carried
        self._spared = 0  # associations that were ended in time

    def __len__(self) -> int:
        """Return how many wait, suspects not among them."""
        return len(self._waiting)

    def next(self) -> Item | None:
        """Return the next instance; None if none waits, or no more are to be sent."""
        with self._lock:
            return self._waiting.popleft() if self._waiting and not self._stopped else None

    def put_back(self, item: Item) -> None:
        """Make an instance that was read but not sent the next one."""
        with self._lock:
            self._waiting.appendleft(item)

    def stop(self) -> None:
        """Hand out no more instances."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        return self._stopped

    def turn(self) -> bool:
        """Let instances that were passed over wait again; return whether there are any."""
        with self._lock:
            self._waiting.extend(self._later)
            self._later.clear()
            return bool(self._waiting) and not self._stopped

    def answered(self, item: Item, *, arrived: bool, sent: float, carried: int) -> None:
        """Note that an instance has its outcome.

        Args:
            sent: when the last byte of it went out; `time.monotonic`.
            carried: how many instances its association has carried.
        """
        with self._lock:
            self._suspects.pop(item.path, None)
            self._arrived += arrived
            # An answer that was under way when the peer ran out of resources says nothing of the time after.
            self._stored_since |= arrived and self._first_refusal is not None and sent > self._first_refusal
            self.slowest = max(self.slowest, time.monotonic() - sent)
            self._fruitless = self._silent = 0
            self._longest = max(self._longest, carried)
            if self.lasts is not None and carried > self.lasts:
                self.lasts = None

    def refused(self, item: Item, error: Busy | Denied, *, certain: bool = True) -> None:
        """Note that the peer can't store an instance now, or doesn't let us.

        Args:
            certain: False for one that was tried alone and came after others on its association.
        """
        with self._lock:
            if self._first_refusal is None and isinstance(error, Busy):
                self._first_refusal = time.monotonic()
            self._suspect(item, error, certain=certain)
            self._count(silent=False)
            if isinstance(error, Denied) and not self._arrived and self._fruitless >= MOST_DENIED:
                self._stopped = True

    def broke(
        self, outstanding: Sequence[Item], error: Retryable, answered: int, patience: float, *, alone: bool = False
    ) -> None:
        """Note that an association ended, and what was outstanding.

        Args:
            answered: how many instances it had carried.
            patience: seconds of silence that the peer was given.
            alone: whether it carried suspects.
        """
        silent = isinstance(error, TimedOut)
        certain = len(outstanding) == 1 and not (alone and answered)
        with self._lock:
            for item in outstanding:
                suspect = self._suspect(item, error, certain=certain)
                if silent and certain:
                    suspect.waited = max(suspect.waited, patience)
            if answered:
                self._ended(answered, silent=silent)
            self._count(silent=silent)

    def released(self, outstanding: Sequence[Item], answered: int) -> None:
        """Note that the peer ended an association in order, after some instances: none of the others is the reason."""
        with self._lock:
            self._waiting.extendleft(item for item in reversed(outstanding) if item.path not in self._suspects)
            self._ended(answered)

    def _ended(self, answered: int, *, silent: bool = False) -> None:
        ends, most = (self._silences, SAME_SILENCES) if silent else (self._ends, SAME_ENDS)
        ends[answered] += 1
        # Where others carried many more, it is the instances at which they ended.
        if ends[answered] >= most and 2 * answered >= self._longest:
            self.lasts = min(answered, self.lasts or answered)

    def full(self, carried: int) -> bool:
        """Return True if the peer would end an association that has carried so many with the next instance."""
        with self._lock:
            if self.lasts is None or carried < self.lasts:
                return False
            if carried == self.lasts:
                self._spared += 1
                return self._spared != DOUBT_AFTER + 1
            return carried > self.lasts

    def _suspect(self, item: Item, error: DispatchError, *, certain: bool) -> Suspect:
        suspect = self._suspects.setdefault(item.path, Suspect(item, error, 0.0, self._arrived))
        suspect.at = time.monotonic()
        suspect.times += certain
        if certain and not (suspect.waited and isinstance(error, TimedOut)):  # the first silence is the longest
            suspect.error = error
        return suspect

    def patience(self, item: Item, longest: float) -> float:
        """Return how many seconds of silence to allow an instance that is tried alone.

        After a silence it is less: of a few seconds each, some instances together cost no more than one of `longest`.
        """
        suspect = self._suspects.get(item.path)
        if suspect is None or not isinstance(suspect.error, TimedOut):
            return longest
        share = SECOND_SHARE if 0 < suspect.waited < longest else FIRST_SHARE
        return min(longest, max(share * longest, 4 * self.slowest))

    def _count(self, *, silent: bool) -> None:
        self._fruitless += 1
        self._silent += silent
        if self._fruitless >= MOST_FRUITLESS or self._silent >= MOST_SILENT:
            self._stopped = True
        elif self._fruitless > PASS_OVER:
            for _ in range((len(self._waiting) + 1) // 2):
                self._later.append(self._waiting.popleft())

    def suspects(self) -> list[Suspect]:
        """Return the instances to try alone, those that failed least first."""
        with self._lock:
            return sorted(self._suspects.values(), key=lambda one: (one.times, one.at))

    def verdict(self, suspect: Suspect) -> Outcome | None:
        """Return a rejection of an instance; None as long as the peer may be what fails.

        A peer that aborts or falls silent and took others is one that can't take this instance. One that is out of
        resources is that for all, unless it took others afterwards.
        """
        if not suspect.used_up or isinstance(suspect.error, Denied):
            return None
        with self._lock:
            if not (self._stored_since if isinstance(suspect.error, Busy) else self._arrived):
                return None
            self._suspects.pop(suspect.item.path, None)
        return Outcome(Kind.REJECTED, f"{suspect.words}; other instances were stored")
