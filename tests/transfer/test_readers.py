"""Threads are started where files are slow, not where the machine is busy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from transfer.readers import FIRST_BATCH, SLOW_BATCHES, THREADS, Readers


@contextmanager
def clocks(wall_s: float, worked_s: float, queued_s: float) -> Iterator[None]:
    """Let every look at the clocks find that a batch took so long, worked so long and waited so long for a core."""
    looks = iter(range(100))

    def read(self: object) -> tuple[float, float]:
        look = next(looks)
        return look * worked_s, look * queued_s

    walls = iter(look * wall_s for look in range(100))
    with (
        mock.patch("transfer.meter.Meter._read", read),
        mock.patch("transfer.meter.time.perf_counter", lambda: next(walls)),
    ):
        yield


@pytest.mark.parametrize(
    ("wall_s", "worked_s", "queued_s", "threads"),
    [
        (1.0, 0.9, 0.0, False),  # from memory
        (1.0, 0.1, 0.0, True),  # from a share
        (10.0, 0.9, 9.0, False),  # from memory, on a machine that is busy otherwise
        (10.0, 0.9, 5.0, True),  # from a share, on such a machine
    ],
)
def test_threads(wall_s: float, worked_s: float, queued_s: float, threads: bool) -> None:
    with Readers(64) as readers:
        with clocks(wall_s, worked_s, queued_s):
            for _ in range(SLOW_BATCHES):
                assert readers._pool is None
                assert list(readers.map(str, range(FIRST_BATCH))) == [str(number) for number in range(FIRST_BATCH)]
        assert readers.batch == 64
        assert (readers._pool is not None) is threads
        assert list(readers.map(str, range(3 * THREADS))) == [str(number) for number in range(3 * THREADS)]


def test_one_slow_batch_decides_nothing() -> None:
    with Readers(64) as readers:
        for worked_s in (0.0, 1.0) * 3:
            with clocks(1.0, worked_s, 0.0):
                list(readers.map(str, range(FIRST_BATCH)))
        assert readers._pool is None


def test_a_few_files_decide_nothing() -> None:
    with Readers(64) as readers, clocks(1.0, 0.0, 0.0):
        assert list(readers.map(str, range(3))) == ["0", "1", "2"]
        assert readers._pool is None
        assert readers.batch == FIRST_BATCH
