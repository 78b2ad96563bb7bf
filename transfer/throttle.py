"""Holds a dispatch to a number of bytes per second."""

from __future__ import annotations

import threading
import time

BURST_S = 0.1  # seconds' worth of bytes that may go at once: keeps the average exact and the link smooth


class Throttle:
    """A token bucket, shared by all connections of one dispatch.

    Args:
        limit: bytes per second; None lets everything pass.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._free_at = time.monotonic()  # when all bytes asked for so far will have been paid for

    @property
    def piece(self) -> int:
        """The largest number of bytes to send between two calls of `spend`, so that the rate stays smooth."""
        return max(1024, int(self.limit * BURST_S)) if self.limit else 1 << 24

    def delay(self, count: int) -> float:
        """Reserve `count` bytes; return the seconds to wait before sending them."""
        if self.limit is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - BURST_S) + count / self.limit
            return max(0.0, self._free_at - now - BURST_S)

    def spend(self, count: int) -> None:
        """Wait until `count` bytes may be sent; thread-safe."""
        wait = self.delay(count)
        if wait:
            time.sleep(wait)
