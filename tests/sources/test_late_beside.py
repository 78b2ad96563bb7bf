"""What comes late for a unit whose run rests, as for a target that is dead, does not wait for that target."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import AwaitingRetry, Completed, Paused, Running, Scheduled

from blocks.dicom_source import DicomSource
from talaria.testing import studies as material
from tasks.sources import beside
from tasks.sources.runs import PrefectDispatching
from tests.sources.bench import Bench
from transfer import unitlist
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.spool import ReceivedUnit

UIDS = {"study": material.uid(56), "series": material.uid(56)}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start a server
    monkeypatch.setattr(beside, "RESTS_S", 0.0)
    return Bench(tmp_path, "shelf", "tape")


def resting(bench: Bench, **fields: str) -> str:
    """Let a unit be dispatched whose run rests; return the run."""
    bench.source = bench.named(**fields)
    material.ct(bench.inbox / "s", 2, **UIDS)
    (run,) = bench.sweep().runs
    bench.resting_runs = {run}
    return run


def late(bench: Bench, number: int = 9) -> None:
    material.ct(bench.inbox / "s", 1, first=number, **UIDS)


def run_only(bench: Bench, run: str) -> None:
    others = {one: asked for one, asked in bench.asked.items() if one != run}
    bench.asked = {run: bench.asked[run]}
    bench.dispatch()
    bench.asked = others


def sent(bench: Bench, target: str) -> int:
    return len(list(bench.at(target).rglob("*.dcm")))


def told(bench: Bench) -> int:
    with Ledger(bench.home.ledger) as ledger:
        return len(list(ledger._db.execute("SELECT about FROM happenings WHERE event='source.stuck'")))


@pytest.mark.parametrize("unit", ["folder", "study"])
@pytest.mark.parametrize("first", ["older", "newer"])
def test_it_is_sent_and_nothing_goes_before_both_have_ended(bench: Bench, unit: str, first: str) -> None:
    old = resting(bench, unit=unit, after="delete")
    assert not bench.sweep().runs, "nothing has come"
    late(bench)
    (new,) = bench.sweep().runs
    assert new != old and not bench.sweep().runs
    bench.resting_runs.clear()
    with Ledger(bench.home.ledger) as ledger:
        assert ledger.sources.counts() == {"box": {"dispatched": 1}}
    assert len(unitlist.batches(bench.home, "box")) == 2, "the older run reads its list when it goes on"
    run_only(bench, new if first == "newer" else old)
    bench.sweep()
    assert len(list(bench.inbox.rglob("*.dcm"))) == 3, "the other run is still to send some"
    bench.dispatch()
    bench.sweep()
    assert (
        set(bench.states().values()) == {"done"} and len(bench.states()) == 1 and not list(bench.inbox.rglob("*.dcm"))
    )
    assert [sent(bench, name) for name in ("shelf", "tape")] == [3, 3] and told(bench) == 0
    assert all(end.study(next(iter(bench.states()))) for end in bench.done.values())
    bench.sweep()
    assert not unitlist.batches(bench.home, "box") and not bench.sweep().runs


def test_what_was_received_goes_beside_and_is_removed_when_both_have_ended(bench: Bench) -> None:
    bench.source = DicomSource(targets=["shelf", "tape"], settle_s=0, aet="ROUTER").named("box")
    folder = bench.home.root / "received" / "box" / ReceivedUnit("CT1", "ROUTER", "10.1.2.3", UIDS["study"]).name
    material.ct(folder, 2, **UIDS)
    (old,) = bench.sweep().runs
    bench.resting_runs = {old}
    material.ct(folder, 1, first=9, **UIDS)
    (new,) = bench.sweep().runs
    bench.resting_runs.clear()
    run_only(bench, new)
    bench.sweep()
    assert len(list(folder.glob("*.dcm"))) == 3
    bench.dispatch()
    bench.sweep()
    assert set(bench.states().values()) == {"done"} and not folder.exists()
    assert [sent(bench, name) for name in ("shelf", "tape")] == [3, 3] and told(bench) == 0


def test_that_both_failed_is_told_once(bench: Bench) -> None:
    resting(bench, after="delete")
    late(bench)
    bench.sweep()
    bench.down = {"tape"}
    bench.dispatch()
    bench.sweep()
    assert bench.states() == {"s": "failed"} and told(bench) == 1
    assert sent(bench, "shelf") == 3 and len(list(bench.inbox.rglob("*.dcm"))) == 3


def test_an_older_run_that_was_removed_is_forgotten(bench: Bench) -> None:
    old = resting(bench)
    late(bench)
    bench.sweep()
    del bench.asked[old]
    bench.dispatch()
    bench.sweep()
    assert bench.states() == {"s": "done"} and sent(bench, "tape") == 3


def test_so_many_runs_of_a_unit_rest_at_most(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "MOST", 2)
    resting(bench)
    made = []
    for number in range(3, 7):
        late(bench, number)
        made.append(len(bench.sweep().runs))
        bench.resting_runs = {*bench.asked}
    assert made == [1, 1, 0, 0] and len(bench.states()) == 3
    bench.resting_runs.clear()
    bench.dispatch()
    bench.sweep()
    bench.all()
    assert bench.states() == {"s": "done"} and sent(bench, "tape") == 6


@pytest.mark.parametrize("why", ["it does not rest", "it has just been dispatched", "a person decides"])
def test_it_waits_for_the_end_of_its_run(bench: Bench, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    resting(bench, late="hold" if why == "a person decides" else "append")
    if why == "it does not rest":
        bench.resting_runs.clear()
    elif why == "it has just been dispatched":
        monkeypatch.setattr(beside, "RESTS_S", 1000.0)
    late(bench)
    assert not bench.sweep().runs and bench.states() == {"s": "dispatched"}
    bench.dispatch()
    bench.sweep()
    assert bench.states() == {"s": "held" if why == "a person decides" else "dispatched"}


def test_which_runs_rest(tmp_path: Path) -> None:
    states = [(AwaitingRetry(), 1), (Scheduled(), 0), (Running(), 1), (Paused(), 1), (Completed(), 1)]
    runs = [FlowRun(flow_id=uuid4(), state=state, run_count=count) for state, count in states]

    class Client:
        async def read_flow_runs(self, **asked: Any) -> list[FlowRun]:
            return runs

    dispatching = PrefectDispatching(cast(Any, Client()), Home(tmp_path), "box")
    assert asyncio.run(dispatching.resting([str(one.id) for one in runs])) == {str(runs[0].id)}
