"""Many questions to one peer: some at once, over associations beside the first, as many as may be opened.

A peer may allow one association, leave others waiting until the first is over, or break one: then the first goes on
with what is left.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Generic, TypeVar

from protocols.dimse.query import Finder, finder
from transfer.errors import Cancelled, DispatchError, Interrupted, TimedOut
from transfer.fanout import gravest

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

WORTH = 8  # questions that are worth an association of their own


class SideBySide(Generic[S]):
    """The associations of one search.

    Args:
        first: who asks over the search's own association.
        of: that association.
        another: returns who asks over another one.
        most: associations at most, the first among them.
    """

    def __init__(self, first: S, of: Finder, another: Callable[[Finder], S], most: int) -> None:
        self._first, self._of, self._another, self._most = first, of, another, most

    def each(self, ask: Callable[[S, T], R], values: Sequence[T]) -> list[R]:
        """Ask for each value; return the answers in the order of the values.

        Raises:
            DispatchError: the gravest that `ask` raised; a broken association beside the first one is none.
        """
        asking = _Asking(self._of, ask, values)
        count = min(self._most, len(values) // WORTH)
        threads = [
            threading.Thread(
                target=copy_context().run, args=(asking.help, self._another), name="find-beside", daemon=True
            )
            for _ in range(1, count)
        ]
        for thread in threads:
            thread.start()
        try:
            return asking.work(self._first)
        finally:
            asking.end()
            for thread in threads:
                thread.join()
            if asking.refused:
                self._most = 1


class _Over(Exception):
    """Nothing is left to be asked."""


class _Asking(Generic[S, T, R]):
    """Some values that are asked for.

    Attributes:
        refused: whether an association beside the first was not to be had, or broke.
    """

    def __init__(self, of: Finder, ask: Callable[[S, T], R], values: Sequence[T]) -> None:
        self.refused = False
        self._peer, self._check = of.peer, of.stream.check
        self._ask, self._values = ask, values
        self._left = deque(range(len(values)))
        self._found: dict[int, R] = {}
        self._errors: list[BaseException] = []
        self._busy = 0  # questions that are asked beside the first association
        self._changed = threading.Condition()
        self._over = False

    def work(self, first: S) -> list[R]:
        """Ask over the first association; wait for the last answers of the others."""
        while True:
            with self._changed:
                while not self._left and self._busy and not self._errors:
                    self._changed.wait()
                if self._errors:
                    raise gravest(self._errors)
                if not self._left:
                    break
                at = self._left.popleft()
            self._found[at] = self._ask(first, self._values[at])
        return [self._found[at] for at in range(len(self._values))]

    def end(self) -> None:
        """Stop the others."""
        self._over = True

    def help(self, another: Callable[[Finder], S]) -> None:
        """Ask over an association of its own, as long as there is something to be asked."""
        at: int | None = None

        def check() -> None:
            self._check()
            if self._over or (at is None and not self._left):
                raise _Over

        try:
            with finder(self._peer, check) as asked:
                asker = another(asked)
                while (at := self._next()) is not None:
                    self._found[at] = self._ask(asker, self._values[at])
                    self._answered()
        except _Over:
            pass
        except Cancelled as exc:
            self._failed(exc)
        except DispatchError as exc:
            if at is not None and not isinstance(exc, Interrupted | TimedOut):
                self._failed(exc)
                return
            self.refused = True
            if at is not None:
                self._left.append(at)
                self._answered()
        except BaseException as exc:
            self._failed(exc)

    def _next(self) -> int | None:
        with self._changed:
            if not self._left or self._over:
                return None
            self._busy += 1
            return self._left.popleft()

    def _answered(self) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def _failed(self, error: BaseException) -> None:
        with self._changed:
            self._errors.append(error)
            self._changed.notify_all()
