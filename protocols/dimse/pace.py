"""How many associations pay: as many as keep this process busy, and not more.

With one association to a near and fast peer our thread hardly waits; more threads would only contend for the
interpreter. To a far or slow peer a thread waits nearly all the time, and each further association adds its own rate.
So what is measured is the share of the time in which the associations' threads compute, send and receive.
"""

from __future__ import annotations

import threading
import time

from transfer.meter import Meter

LOOK_S = 0.01  # the shortest time that is judged: a hundred small instances, or half a round trip of a far peer
# Shares of one processor: from the first on nothing is gained by more associations; below the second that is certain
# at once; the third is what is aimed at.
ENOUGH, CERTAIN, AIM = 0.5, 0.2, 0.75


class Pace:
    """Decides how many associations there are to be.

    Args:
        most: at most so many.

    Attributes:
        count: how many were requested so far.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 1
        self._lock = threading.Lock()
        self._shares: dict[int, float] = {}
        self._low = 0

    def look(self, meter: Meter) -> int:
        """Return how many associations to add now; each association's thread calls this after its answers."""
        if self.count >= self.most or time.perf_counter() - meter.begun < LOOK_S:
            return 0
        share = meter.share()
        with self._lock:
            self._shares[id(meter)] = share
            busy = sum(self._shares.values())
            if len(self._shares) < self.count or busy >= ENOUGH:
                self._low = 0 if busy >= ENOUGH else self._low
                return 0
            self._low += 1
            if self._low < 2 and busy > CERTAIN:
                return 0
            return self._grow(max(self.count + 1, int(AIM * self.count / max(busy, 0.01))))

    def hang(self) -> int:
        """Return how many to add when a thread can only wait."""
        with self._lock:
            return self._grow(self.most)

    def _grow(self, wanted: int) -> int:
        added = max(0, min(wanted, self.most) - self.count)
        self.count += added
        self._low = 0
        self._shares.clear()
        return added

    def full(self) -> None:
        """Note that the peer grants no more than there are."""
        self.most = 0
