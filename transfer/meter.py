"""How much of the time a thread works, for decisions on how many threads pay.

Time in which it waits for a processor, on a machine that is busy otherwise, doesn't count (proc(5), schedstat).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress


class Meter:
    """Measures how long the thread that makes it has worked since the last look."""

    def __init__(self) -> None:
        self._fd = -1
        with suppress(OSError):
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self.begun = time.perf_counter()
        self._worked, self._queued = self._read()

    def _read(self) -> tuple[float, float]:
        """Return seconds on a processor, and seconds waiting for one."""
        worked = time.thread_time()
        if self._fd >= 0:
            with suppress(OSError, ValueError):
                return worked, int(os.pread(self._fd, 64, 0).split()[1]) / 1e9
        return worked, 0.0

    def share(self) -> float:
        """Return the share of the time since the last look in which the thread worked, if it had a processor."""
        now, (worked, queued) = time.perf_counter(), self._read()
        free = max(now - self.begun - (queued - self._queued), 1e-6)
        share = (worked - self._worked) / free
        self.begun, self._worked, self._queued = now, worked, queued
        return share

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
