"""How many connections a push to S3 uses for small objects."""

from __future__ import annotations

from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.s3 import pace
from tests.servers.s3_stub import Refusal, Stub
from tests.targets.s3_push.pushing import assert_whole, on, target
from transfer import meter
from transfer.plan import Item


@pytest.mark.parametrize(
    ("wait", "size", "count", "connections"),
    [(0.0, 30_000, 500, 1), (0.9, 30_000, 500, 1), (1.5, 30_000, 500, 2), (50.0, 30_000, 500, 4),
     (0.0, 500_000, 500, 4), (0.0, 30_000, 100, 4)],
)  # fmt: skip
def test_connections_that_are_of_use(
    monkeypatch: pytest.MonkeyPatch, wait: float, size: int, count: int, connections: int
) -> None:
    """As many as share what is waited for, in units of what an object costs this process."""
    clock = {"busy": 0.0, "all": 0.0}

    def send() -> None:
        clock["busy"] += 1
        clock["all"] += 1 + wait

    monkeypatch.setattr(meter.time, "thread_time", lambda: clock["busy"])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock["all"])
    assert pace.useful([Item(str(n), size, 0) for n in range(count)], 4, send) == connections


def test_many_small_objects(store: Stub, study: Path) -> None:
    studies.ct(study, pace.MANY + 10)
    store.fault = on("Put", Refusal(503, "SlowDown"), times=1, key="CT0003.dcm")
    assert_whole(store, attempt(target(store), study))
