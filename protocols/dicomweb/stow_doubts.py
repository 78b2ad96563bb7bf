"""Finds out, when a whole request is refused or broken off, whether the server fails or one instance makes it fail.

No status says so: a gateway whose backend falls over at one instance answers 502, a firewall 403, a route for one kind
of instance 404, and a server that breaks down answers nothing. Another instance, sent alone, shows it:

    the same becomes of the next ones, each alone, and nothing was stored     it is the server: its error ends the push
    others are stored, one fails alone as well                                it is that instance

An instance that fails so for good (4xx, 500) is rejected at once, one that fails for now in the third attempt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from protocols.dicomweb.stow_body import Batch
from transfer.errors import Busy, DispatchError, Retryable, TimedOut
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport

PROBES = 3  # instances, each alone, that go next after a failure, as long as nothing was stored
MOST = 4  # failures in a row, as long as nothing was stored, after which it is the server
MOST_LASTING = 3  # likewise, where one would have been enough: credentials, settings, or a silence of a whole time-out
MOST_BETWEEN = 10  # failures in a row once the server has taken something
MOST_SILENT = 7  # likewise, each of which costs the idle time-out
LONE_TRIES = 3  # attempts in which an instance fails alone, while the server takes others, before it is rejected
NAMED = 5  # instances in one message


@dataclass(frozen=True)
class Lone:
    """An instance that failed alone.

    Attributes:
        said: the server's words or reaction. lasting: whether it would react so again.
    """

    item: Item
    said: str
    error: DispatchError
    lasting: bool


class Doubts:
    """The requests of one push that failed as a whole; may be used from several threads.

    Args:
        at_once: requests that may be under way together, and so fail together.
        known: whether an earlier attempt has met such an instance.
        alive: asks whether the server answers at all.
    """

    def __init__(self, plan: Plan, report: PushReport, at_once: int, *, known: bool, alive: Callable[[], bool]) -> None:
        self.stored = 0
        self._report = report
        self._before = bool(plan.done)  # whether the server has taken others earlier
        self._known, self._at_once, self._is_alive = known, at_once, alive
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._lone: list[Lone] = []

    def settled(self, *, arrived: bool) -> None:
        """Note that an instance has its outcome: the server works."""
        with self._lock:
            self._in_a_row = 0
            self.stored += arrived

    def is_server(self, error: DispatchError) -> bool:
        """Count a failure; return True if the server is its cause."""
        with self._lock:
            self._in_a_row += 1
            count, stored = self._in_a_row, self.stored
        if isinstance(error, Busy) and error.retry_after is not None and not self._known:
            return True  # it asks to be left in peace
        silent = isinstance(error, TimedOut)
        lasting = MOST_SILENT if silent else MOST_BETWEEN
        if stored:
            return count >= lasting
        few = (MOST_LASTING if silent or not error.retryable else MOST) + self._at_once - 1
        if count < few:
            return False
        # What an earlier attempt has left may be nothing but such instances.
        return count >= lasting or not (self._before and error.retryable and self._is_alive())

    def apart(self, batch: Batch) -> list[Batch]:
        """Return the instances of a failed batch, each alone: to be sent last, but some at once if nothing was stored.

        Neighbours are alike, so those that go first are far from each other.
        """
        count = len(batch.items)
        bits = count.bit_length()
        order = sorted(range(1, count + 1), key=lambda at: int(f"{at:0{bits}b}"[::-1], 2))
        soon = 0 if self.stored else PROBES
        return [Batch((batch.items[at - 1],), last=True, soon=n < soon) for n, at in enumerate(order)]

    def failed_alone(self, item: Item, said: str, error: DispatchError, *, lasting: bool) -> None:
        """Note an instance that failed in a request of its own."""
        with self._lock:
            self._lone.append(Lone(item, said, error, lasting or not error.retryable))
        self._report.put_off[item.path] = said

    def judge(self, report: Callable[[Item, Outcome], None]) -> list[Retryable]:
        """Reject instances that fail by themselves; return why others are left for the next attempt.

        Raises:
            DispatchError: the server fails, as far as this push shows.
        """
        lone, self._lone = self._lone, []
        left: list[Retryable] = []
        counts = bool(self.stored) or (bool(lone) and self._before and self._is_alive())
        for one in lone:
            if not counts or (one.lasting and not self.stored):
                raise one.error
            tries = self._report.tries
            tries[one.item.path] += 1
            if one.lasting:
                report(one.item, Outcome(Kind.REJECTED, one.said))
            elif (times := tries[one.item.path]) >= LONE_TRIES:
                report(one.item, Outcome(Kind.REJECTED, f"{one.said} ({times} times, alone); others were stored"))
            else:
                assert isinstance(one.error, Retryable)  # noqa: S101 - what isn't is lasting
                wait_s = one.error.retry_after if isinstance(one.error, Busy) else None
                message = f"{one.error.message}: {one.item.shown}"
                left.append(Busy(message, retry_after=wait_s) if wait_s else type(one.error)(message))
        return left


def together(where: str, left: list[Retryable]) -> Retryable:
    """Return one error for all instances that are left for the next attempt."""
    waits = [error.retry_after for error in left if isinstance(error, Busy) and error.retry_after is not None]
    named = "; ".join(dict.fromkeys(error.message.removeprefix(f"{where}: ") for error in left[:NAMED]))
    text = f"{where}: {named}" + (f" (and {len(left) - NAMED} more)" if len(left) > NAMED else "")
    if waits or any(isinstance(error, Busy) for error in left):
        return Busy(text, retry_after=max(waits, default=None))
    return type(left[0])(text)
