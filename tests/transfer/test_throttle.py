"""The limit holds over all threads of a dispatch."""

from __future__ import annotations

import threading
import time

from talaria.testing.process import as_loaded
from transfer.throttle import Throttle


def test_no_limit_waits_never() -> None:
    throttle = Throttle(None)
    assert throttle.delay(1 << 40) == 0
    throttle.spend(1 << 40)


def test_the_average_is_the_limit() -> None:
    throttle = Throttle(1_000_000)
    begun = time.monotonic()
    for _ in range(50):
        throttle.spend(10_000)
    assert 0.35 <= time.monotonic() - begun <= as_loaded(0.9)  # half a second, less the burst, and a busy machine


def test_threads_share_it() -> None:
    throttle = Throttle(1_000_000)
    begun = time.monotonic()

    def work() -> None:
        for _ in range(12):
            throttle.spend(10_000)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.35 <= time.monotonic() - begun <= as_loaded(0.9)


def test_idle_time_is_not_saved_up() -> None:
    throttle = Throttle(1_000_000)
    throttle.spend(1)
    time.sleep(0.5)
    assert sum(throttle.delay(100_000) for _ in range(3)) > 0.09


def test_pieces_are_a_tenth_of_a_second() -> None:
    assert Throttle(1_000_000).piece == 100_000
    assert Throttle(1024).piece == 1024
    assert Throttle(None).piece > 1 << 20
