"""Threads that share the objects of a push: what is put aside, sent again at the end, and when all of them stop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotFound, Rejected, TimedOut
from transfer.outcome import Kind, Outcome
from transfer.plan import Item
from transfer.receipt import PushReport

IN_A_ROW = 6  # failures in a row that are put down to objects; a lost link breaks all connections at once
REFUSED_IN_A_ROW = 3  # likewise, refusals for good, as long as the store has taken nothing
PASS_OVER = 3  # failures in a row after which the last objects come first: neighbours are alike
FOR_NOW = (Busy, Interrupted, TimedOut)  # may be a matter of one object
FOR_GOOD = (Denied, NotFound, Misconfigured)  # may be a matter of one key, as a policy or a gateway has it


class Unanswered(Protocol):
    """An item that was sent, and whose answer is still to be read: `end` or `leave` it, exactly once."""

    @property
    def item(self) -> Item: ...

    def end(self) -> None:
        """Read the store's answer, and report the item; raises as sending does."""

    def leave(self) -> None:
        """Read no answer any more."""


class _Stopped(Exception):
    """This thread stops because another one failed."""


class Lanes:
    """What the threads of one push share.

    Args:
        at_once: threads at most.
    """

    def __init__(self, report: PushReport, at_once: int) -> None:
        self._report, self._at_once = report, at_once
        self._aside: list[tuple[Item, DispatchError]] = []  # what failed for now, and how
        self._in_a_row = 0  # failures without a success in between
        self._taken = 0  # objects that the store has taken
        self._failed = threading.Event()
        self._first: BaseException | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise if this push is to stop, or has failed in another thread."""
        if self._failed.is_set():
            raise _Stopped
        self._report.check()

    def took(self) -> None:
        """Note that the store has taken an object."""
        with self._lock:
            self._taken += 1

    def run(self, begin: Callable[[Item], Unanswered | None], waiting: deque[Item], *, ahead: bool = False) -> None:
        """Work through items that several threads share; the first error stops all of them.

        Args:
            begin: sends an item; may leave the answer for later.
            ahead: whether the next item is sent while the store works on the last one, over a second connection.
        """
        last: Unanswered | None = None
        try:
            while True:
                self.check()
                item = self._next(waiting)
                begun = self._try(item, partial(begin, item)) if item is not None else None
                if last is not None:
                    ending, last = last, begun
                    self._try(ending.item, ending.end)
                if begun is not None and not ahead:
                    self._try(begun.item, begun.end)
                else:
                    last = begun
                if item is None:
                    return
        except _Stopped:
            pass
        except BaseException as exc:
            with self._lock:
                self._first = self._first or exc
            self._failed.set()
        finally:
            if last is not None:
                self._report.unanswered[last.item.path] += 1
                last.leave()

    def _next(self, waiting: deque[Item]) -> Item | None:
        with self._lock:
            if not waiting:
                return None
            passed_over = self._in_a_row > (PASS_OVER if self._taken else 1)
            return waiting.pop() if passed_over else waiting.popleft()

    def _try(self, item: Item, step: Callable[[], Unanswered | None]) -> Unanswered | None:
        """Do a step of sending an item; if that fails, set it aside, unless nothing else gets through either."""
        try:
            left = step()
        except Rejected as exc:
            self._report(item, Outcome(Kind.REJECTED, exc.message))
            left = None
        except (*FOR_NOW, *FOR_GOOD) as exc:
            if exc.retryable:
                exc.item = exc.item or item.shown
                self._report.unanswered[item.path] += 1
            self._report.put_off[item.path] = exc.message
            with self._lock:
                self._aside.append((item, exc))
                self._in_a_row += 1
                lenient = exc.retryable or self._taken
                most = max(IN_A_ROW, self._at_once) if lenient else self._at_once + REFUSED_IN_A_ROW
                if self._in_a_row > most:
                    raise
            return None
        if left is None:
            with self._lock:
                self._in_a_row = 0
        return left

    def set_aside(self) -> Iterator[tuple[Item, DispatchError]]:
        """Yield what failed for now, and how; reject what was refused for good, if the store has taken anything else.

        Raises:
            DispatchError: something was refused for good, and the store has taken nothing.
        """
        for item, error in self._aside:
            if error.retryable:
                yield item, error
            elif self._taken:
                self._report(item, Outcome(Kind.REJECTED, error.message))
            else:
                raise error

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Raise what a thread has raised; stop all threads if this one is interrupted."""
        try:
            yield
        except BaseException:
            self._failed.set()
            raise
        if self._first:
            raise self._first
