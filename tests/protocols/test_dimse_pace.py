"""How many associations are opened: as many as keep this process busy."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import cast

import pytest

from protocols.dimse.backlog import Backlog
from protocols.dimse.fleet import Fleet
from protocols.dimse.pace import LOOK_S, Pace
from protocols.dimse.transport import Peer
from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import until
from tests.servers.scp import scp
from tests.servers.steps import Script, Store, Wait
from tests.targets.dicom import dicom_target
from transfer.meter import Meter
from transfer.plan import scan
from transfer.receipt import PushReport
from transfer.throttle import Throttle


class Reading:
    """A meter that was last looked at long ago, and says what a test wants."""

    def __init__(self, share: float, age_s: float = 1.0) -> None:
        self.begun = time.perf_counter() - age_s
        self._share = share

    def share(self) -> float:
        return self._share


def look(pace: Pace, *shares: float) -> int:
    return sum(pace.look(cast(Meter, Reading(share))) for share in shares)


def test_a_busy_thread_gets_no_help() -> None:
    pace = Pace(8)
    assert [look(pace, 0.8) for _ in range(20)] == [0] * 20
    assert pace.count == 1


def test_a_thread_that_waits_nearly_all_the_time_gets_all_help_at_once() -> None:
    pace = Pace(8)
    assert look(pace, 0.02) == 7
    assert look(pace, 0.02) == 0


def test_what_is_not_sure_is_looked_at_twice() -> None:
    pace = Pace(8)
    assert look(pace, 0.4) == 0
    assert look(pace, 0.7) == 0
    assert look(pace, 0.4) == 0
    assert look(pace, 0.4) == 1


def test_help_comes_as_long_as_all_together_wait() -> None:
    pace = Pace(8)
    assert look(pace, 0.15) == 4
    meters = [cast(Meter, Reading(0.03)) for _ in range(5)]
    assert sum(map(pace.look, meters)) == 3


def test_no_time_is_too_short_to_be_judged() -> None:
    assert Pace(8).look(cast(Meter, Reading(0.0, LOOK_S / 10))) == 0


def test_a_peer_that_grants_no_more_is_asked_for_no_more() -> None:
    pace = Pace(8)
    pace.full()
    assert look(pace, 0.01) == pace.hang() == 0


def test_a_long_wait_gets_all_help() -> None:
    pace = Pace(5)
    assert pace.hang() == 4
    assert pace.hang() == 0


def test_a_meter_tells_work_from_waiting() -> None:
    meter = Meter()
    threading.Event().wait(0.2)
    idle = meter.share()
    end = time.thread_time() + 0.2
    while time.thread_time() < end:
        pass
    busy = meter.share()
    meter.close()
    assert idle < 0.3
    assert busy > idle + 0.3


@pytest.mark.parametrize("concurrency", [1, 2, 6])
def test_a_slow_peer_gets_as_many_as_are_allowed(
    concurrency: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies.ct(tmp_path, 40)
    monkeypatch.setattr(Pace, "hang", lambda self: 0)  # it is slow, and goes on
    stored = itertools.count()

    def store(request: Store) -> Script:
        if next(stored) >= 20:  # what is left waits for those that were asked for: to open them takes its time
            until(lambda: peer.most_open == concurrency)
        return [Wait(0.05), 0]

    with scp(on_store=store) as peer:
        attempt(dicom_target(peer.port, aet_target=peer.aet, concurrency=concurrency), scan([tmp_path])).require()
        assert peer.most_open == concurrency


def test_an_association_that_is_waited_for_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever joins the threads of a fleet takes them out of its list at any moment."""
    studies.ct(tmp_path, 3)
    plan = scan([tmp_path])
    fleet = Fleet(Peer("127.0.0.1", 1), plan, PushReport(), 3, "never", Throttle(None))
    fleet.backlog = Backlog(plan.items)
    monkeypatch.setattr(Fleet, "_work", lambda self, *, further: None)

    class Begun(list[threading.Thread]):
        def append(self, thread: threading.Thread) -> None:
            thread.join()  # raises for one that has not begun
            super().append(thread)

    fleet._threads = Begun()
    fleet.grow(3)
    assert len(fleet._threads) == 3
