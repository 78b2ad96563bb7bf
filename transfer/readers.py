"""Reads many small pieces of files: in this thread, or in several where most time is waiting, as on a share.

One thread is faster for files in the page cache, where several would only contend for the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transfer.meter import Meter

A = TypeVar("A")
B = TypeVar("B")

THREADS = 8
FIRST_BATCH = 16  # as long as nobody knows how slow the files are
SLOW_BATCHES = 2  # in a row, before threads are started: one may only have been interrupted between two clocks
WORKING = 0.5  # share of the time in which one thread works; with more, threads cost more than they gain


class Readers:
    """Threads that are started only where they pay. A context manager.

    Args:
        batch: how many files are read between two looks at whether to stop.

    Attributes:
        batch: how many to give to `map` now: a few at first, to find out how slow the files are.
    """

    def __init__(self, batch: int) -> None:
        self.batch, self._batch = min(FIRST_BATCH, batch), batch
        self._slow = 0  # batches in a row
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, read: Callable[[A], B], names: Sequence[A]) -> Iterable[B]:
        """Return what `read` returns for each, in order."""
        if self._pool:
            return self._pool.map(read, names)
        meter = Meter()
        try:
            found = [read(name) for name in names]
            share = meter.share()
        finally:
            meter.close()
        if len(names) >= FIRST_BATCH:
            self._slow = self._slow + 1 if share < WORKING else 0
            if not self._slow:
                self.batch = self._batch
            if self._slow == SLOW_BATCHES:
                self.batch, self._pool = self._batch, ThreadPoolExecutor(THREADS)
        return found
