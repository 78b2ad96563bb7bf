"""Reads many small pieces of files: in this thread, or in several where most time is waiting, as on a share.

One thread is faster for files in the page cache, where several would only contend for the interpreter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

THREADS = 8
FIRST_BATCH = 16  # as long as nobody knows how slow the files are
WAITING = 0.5  # share of the time; with less, threads cost more than they gain


class Readers:
    """Threads that are started only where they pay. A context manager.

    Args:
        batch: how many files are read between two looks at whether to stop.

    Attributes:
        batch: how many to give to `map` now: a few at first, to find out how slow the files are.
    """

    def __init__(self, batch: int) -> None:
        self.batch, self._batch = min(FIRST_BATCH, batch), batch
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
        begun, worked = time.perf_counter(), time.thread_time()
        found = [read(name) for name in names]
        took, worked = time.perf_counter() - begun, time.thread_time() - worked
        if len(names) >= FIRST_BATCH:
            self.batch = self._batch
            if took - worked > WAITING * took:
                self._pool = ThreadPoolExecutor(THREADS)
        return found
