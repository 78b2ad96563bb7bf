"""Runs that have crashed: they are taken up, but not for ever, and who follows one hears of its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import psutil
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelling, Completed, Crashed, Failed, Running

from talaria.cli.output import code_of
from talaria.engine import cancelled
from talaria.engine.recovery import CRASHED, CRASHES, MAX_CRASHES, _take_up
from talaria.engine.runs import at_rest, retry
from talaria.service.results import settled
from talaria.testing import studies
from tasks.crashed import TAKEN_UP_WITHIN
from tasks.dispatch import kept
from tasks.retrieve import ending
from tasks.retrieve.job import Job, folder_of
from tasks.sources.runs import PrefectDispatching
from tests.engine.material import folder
from tests.servers.up import Talaria
from transfer.deliveries import WHOLE, Standing
from transfer.errors import NotFound
from transfer.happenings import DISPATCHES
from transfer.home import Home
from transfer.ledger import Ledger

ASKED = {"paths": ["/study"], "targets": ["folder-target/pacs", "archive"]}
BEFORE = datetime.now(UTC) - TAKEN_UP_WITHIN - timedelta(minutes=1)


class Server:
    """What is asked of a server about one run."""

    def __init__(self, state: State[Any], crashes: int = 0, ago_s: float = 60.0, **parameters: Any) -> None:
        labels = {CRASHES: crashes, CRASHED: time.time() - ago_s} if crashes else {}
        self.run = FlowRun(flow_id=uuid4(), parameters=parameters, state=state, labels=labels)
        self.set: list[State[Any]] = []
        self.former = state  # before the last one that was set

    async def read_flow_run_states(self, run_id: UUID) -> list[State[Any]]:
        return [self.former, *self.set[-1:]]

    async def read_flow_run(self, run_id: UUID) -> FlowRun:
        return self.run

    async def read_flow_runs(self, *, flow_run_filter: Any, **_: Any) -> list[FlowRun]:
        return [] if flow_run_filter.parent_flow_run_id else [self.run]  # nothing waits of a retrieval

    async def read_artifacts(self, **_: Any) -> list[Any]:
        return []

    async def update_flow_run_labels(self, run_id: UUID, labels: dict[str, Any]) -> None:
        self.run.labels.update(labels)

    async def set_flow_run_state(self, run_id: UUID, state: State[Any], force: bool = False) -> Any:
        self.set.append(state)
        self.former, self.run.state = cast(State[Any], self.run.state), state
        return SimpleNamespace(state=state)

    def take_up(self) -> bool:
        return asyncio.run(_take_up(cast(PrefectClient, self), str(self.run.id)))

    def asks(self) -> PrefectDispatching:
        return PrefectDispatching(cast(PrefectClient, self), Home.current(), "inbox")


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def load(client: Any, names: list[str], secrets: bool) -> None:
        """Know every target."""

    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cancelled, "load", load)
    monkeypatch.setattr("tasks.happened.emit_event", lambda *_, **__: None)


def test_a_dispatch_that_kills_its_workers_ends_and_is_said_to_have_failed_once(alone: None) -> None:
    server = Server(Running(), MAX_CRASHES, **ASKED)
    run = str(server.run.id)
    with Ledger(Home.current().ledger) as ledger:
        state = server.run.state
        for _ in range(2):  # its worker died before the server had heard of it
            server.run.state, server.run.labels[CRASHES] = state, MAX_CRASHES
            assert not server.take_up()
        happened = ledger.happenings.waiting(9)
        assert [(one.event, one.about["target"], one.about["cause"]) for one in happened] == [
            ("dispatch.failed", "pacs", "unexpected"),
            ("dispatch.failed", "archive", "unexpected"),
        ]
        assert all("died 20 times" in one.about["words"] for one in happened)
        found = {(one.target, one.label): one.value for one in ledger.happenings.totals("") if one.name == DISPATCHES}
        assert found == {("pacs", "failed"): 1, ("archive", "failed"): 1}
        stands = ledger.deliveries.of([run])[run]
        assert {name: one.state for name, one in stands.items()} == {
            WHOLE: "failed", "pacs": "failed", "archive": "failed",
        }  # fmt: skip
        assert "died 20 times" in stands["pacs"].words
    assert [state.type for state in server.set] == [StateType.FAILED] * 2
    assert (server.set[0].message or "").startswith("given up: its worker or server died 20 times")


def test_one_that_was_given_up_is_taken_up_no_more_and_a_retry_counts_anew(alone: None) -> None:
    server = Server(Running(), MAX_CRASHES, **ASKED)
    assert not server.take_up() and not server.take_up() and len(server.set) == 1
    asyncio.run(retry(cast(PrefectClient, server), server.run.id))
    server.run.state = Running()
    assert server.take_up() and server.run.labels[CRASHES] == 1


@pytest.mark.parametrize("state", [Failed(), Crashed()], ids=["failed", "crashed"])
def test_a_retry_forgets_earlier_crashes(state: State[Any]) -> None:
    server = Server(state, 5, **ASKED)
    asyncio.run(retry(cast(PrefectClient, server), server.run.id))
    assert server.run.labels[CRASHES] == 0


def test_crashes_of_a_long_run_count_only_while_each_follows_within_a_day() -> None:
    server = Server(Running(), MAX_CRASHES, ago_s=25 * 3600, **ASKED)
    assert server.take_up() and server.run.labels[CRASHES] == 1
    server.run.state = Running()
    assert server.take_up() and server.run.labels[CRASHES] == 2


def test_a_retrieval_that_kills_its_workers_ends_too(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[tuple[Any, str]]()

    async def end(client: Any, home: Home, flow_run: FlowRun, why: str = "", *, dead: bool) -> None:
        said.append((flow_run.id, why))

    monkeypatch.setattr(cancelled, "end_at_rest", end)
    server = Server(Running(), MAX_CRASHES, source="pacs", accessions="A1", targets=["archive"])
    assert not server.take_up() and server.set[0].type is StateType.FAILED
    ((run, why),) = said  # its result says so, too
    assert run == server.run.id and "given up: its worker or server died" in why
    with Ledger(Home.current().ledger) as ledger:
        assert not ledger.happenings.waiting(9)


def test_a_dispatch_whose_worker_dies_while_it_is_being_cancelled_is_said_to_be_once(alone: None) -> None:
    """Nobody heard of its end, and for the lists it waited for ever."""
    server = Server(Cancelling(), **ASKED)
    run = str(server.run.id)
    with Ledger(Home.current().ledger) as ledger:
        ledger.deliveries.stand(run, "waiting", [Standing(name, "waiting", 2, 1, "") for name in ("pacs", "archive")])
        state = server.run.state
        for _ in range(2):  # whoever finished that died before the server had heard of it
            server.run.state = state
            assert not server.take_up()
        happened = [(one.event, one.about["target"]) for one in ledger.happenings.waiting(9)]
        assert happened == [("dispatch.cancelled", "pacs"), ("dispatch.cancelled", "archive")]
        stands = {name: one.state for name, one in ledger.deliveries.of([run])[run].items()}
        assert stands == dict.fromkeys((WHOLE, "pacs", "archive"), "cancelled")
    assert {state.type for state in server.set} == {StateType.CANCELLED}


def test_a_retrieval_whose_worker_dies_while_it_is_being_cancelled_has_ended(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its retry was none: what had been missing was not searched for again."""
    said = list[str]()

    async def report(*about: Any) -> None:
        said.append(about[-1])

    async def gone(*_: Any, **__: Any) -> None:
        raise NotFound("no target named pacs")

    monkeypatch.setattr(ending, "report", report)
    monkeypatch.setattr(ending, "load", gone)
    server, home = Server(Cancelling(), source="pacs", accessions="A1 A2", targets=["archive"]), Home.current()
    run = str(server.run.id)
    job = Job(folder_of(home, run), missing=["A1"], pending=["A2"])
    job.save()
    with Ledger(home.ledger) as ledger:
        ledger.runs.begins(run, "gone")
        assert not server.take_up() and server.set[0].is_cancelled()
        assert ledger.deliveries.of([run])[run][WHOLE].state == "cancelled"
    again = Job.load(home, run, ("A1", "A2"))
    assert said == ["cancelled"] and again.ended
    again.again()
    assert sorted(again.pending) == ["A1", "A2"]


@pytest.mark.parametrize(
    "damaged", ['""', "", "{", "{}", "[]", '{"studies": {"1": {}}}', '{"studies": [], "later": 1}']
)
def test_a_retrieval_whose_state_is_damaged_begins_anew(damaged: str) -> None:
    """It ended the worker that looked after it, and the next one, and so on."""
    home = Home.current()
    begun = Job(folder_of(home, "run"))
    begun.save()
    (begun.folder / "job.json").write_text(damaged)
    again = Job.load(home, "run", ("A1", "A2"))
    assert again.pending == ["A1", "A2"] and not again.studies and not again.ended


def test_damaged_receipts_are_none() -> None:
    home = Home.current()
    path = home.receipt("run")
    path.parent.mkdir(exist_ok=True)
    for damaged in ("", "{", "[]", '""'):
        path.write_text(damaged)
        assert kept.here(home, "run") is None
    path.write_text('{"targets": {}}')
    assert kept.here(home, "run") == {"targets": {}}
    path.unlink()
    assert kept.here(home, "run") is None


@pytest.mark.parametrize(
    ("made", "over"),
    [
        (Crashed, False),  # a process that lives takes it up
        (partial(Crashed, timestamp=BEFORE), True),  # none has: somebody has set it so
        (Failed, True),
        (Completed, True),
        (Running, False),
    ],
    ids=["crashed just now", "stayed crashed", "failed", "completed", "running"],
)
def test_who_follows_a_run_that_stays_crashed_hears_of_its_end(
    alone: None, made: Callable[[], State[Any]], over: bool
) -> None:
    state = made()  # now, not when tests are collected
    server = Server(state, **ASKED)
    run = str(server.run.id)
    assert at_rest(server.run) is over
    assert asyncio.run(server.asks().any_ended([run])) is over
    assert (run in asyncio.run(server.asks().ended([run]))) is over
    # What its source takes for failed is looked at again only while its run may still bring it.
    assert (run in asyncio.run(server.asks().going([run]))) is (not over or state.is_completed())


def test_nothing_waits_of_a_dispatch_that_was_given_up() -> None:
    part = {"state": "waiting", "error": None}
    document = {"state": "waiting", "targets": {"pacs": part, "archive": {"state": "delivered", "error": None}}}
    result = settled(FlowRun(flow_id=uuid4(), state=Failed(message="given up: look why")), "dispatch", document)
    assert [result["state"], *(one["state"] for one in result["targets"].values())] == ["failed", "failed", "delivered"]
    rows = [{"state": "waiting", "study": "1.2", "reason": ""}, {"state": "delivered", "study": "1.3", "reason": ""}]
    document = {"state": "waiting", "waiting": ["A1"], "failed": [], "studies": rows, "accessions": [], "error": None}
    result = settled(FlowRun(flow_id=uuid4(), state=Failed(message="given up: look why")), "retrieval", document)
    assert (result["state"], result["waiting"], result["failed"]) == ("failed", [], ["A1"])
    assert [one["state"] for one in result["studies"]] == ["failed", "delivered"]
    assert result["studies"][0]["reason"] == "given up: look why"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("/in/study: no such file or folder", "/in/study: no such file or folder"),
        ("pacs partial: 1 delivered, 1 rejected; archive failed: refused", None),
    ],
)
def test_a_retry_that_did_not_come_to_its_targets_says_why(message: str, error: str | None) -> None:
    """Beside its receipts, which are of the time before."""
    targets = {"pacs": {"state": "partial", "error": None}, "archive": {"state": "failed", "error": "refused"}}
    document = {"state": "partial", "targets": targets}
    result = settled(FlowRun(flow_id=uuid4(), state=Failed(message=message)), "dispatch", document)
    assert (result.get("error"), result["targets"]) == (error, targets)


@pytest.mark.parametrize(
    ("message", "error"), [("no target named pacs", "no target named pacs"), ("1 study found, 1 delivered", None)]
)
def test_a_retrieval_whose_retry_could_not_begin_says_why(message: str, error: str | None) -> None:
    """It was shown as delivered, and nothing else: `jobs retry` said nothing of it, and ended with 0."""
    rows = [{"state": "delivered", "study": "1.3", "reason": ""}]
    document: dict[str, Any] = {"state": "delivered", "found": 1, "delivered": 1, "studies": rows, "accessions": []}
    document |= {key: [] for key in ("waiting", "failed", "missing", "partial", "cancelled")} | {"error": None}
    result = settled(FlowRun(flow_id=uuid4(), state=Failed(message=message)), "retrieval", document)
    assert result == document | {"error": error}
    assert code_of(result) == (1 if error else 0)


@pytest.mark.timeout(600)
def test_a_run_at_which_its_worker_dies_once_more_ends_for_who_follows_it(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 40)
    up.apply(deadly=folder(tmp_path / "deadly", bandwidth_limit=2000, concurrency=1))
    follows = up.background("send", str(tmp_path / "study"), "--to", "deadly")
    up.until(lambda: list((tmp_path / "deadly").iterdir()))
    found = up.api("POST", "/flow_runs/filter", sort="START_TIME_DESC")
    (run,) = (one["id"] for one in found if one["parameters"].get("targets") == ["deadly"])
    up.api("PATCH", f"/flow_runs/{run}/labels", **{CRASHES: MAX_CRASHES, CRASHED: time.time()})
    up.child("talaria.engine.worker").kill()
    up.until(lambda: follows.poll() is not None)
    assert follows.returncode == 1
    assert up.run(run)["state_type"] == "FAILED"
    shown = up.told("jobs", "show", run)
    assert shown["state"] == "failed" and "died 20 times" in shown["error"]
    about = {"event": {"prefix": ["talaria.dispatch."]}, "related": {"id": [f"prefect.flow-run.{run}"]}}
    up.until(lambda: up.api("POST", "/events/filter", filter=about)["events"])
    assert [one["event"] for one in up.api("POST", "/events/filter", filter=about)["events"]] == [
        "talaria.dispatch.failed"
    ]
    # Its files are sent where somebody retries it: what came is not sent again.
    up.apply(deadly=folder(tmp_path / "deadly"))
    assert up.told("jobs", "retry", run)["targets"]["deadly"]["state"] == "delivered"


@pytest.mark.timeout(600)
def test_a_worker_that_dies_while_the_ledger_is_away_comes_back_with_it(up: Talaria, tmp_path: Path) -> None:
    """Seen: `up` ended, and took the server, the pages and every other worker along."""
    studies.ct(tmp_path / "study", 2)
    up.apply(comes_back=folder(tmp_path / "comes-back"))
    assert up.process
    ledger, seen = up.home / "ledger.sqlite", up.log.stat().st_size

    def said(words: str) -> int:
        return up.log.read_text()[seen:].count(words)

    worker = up.child("talaria.engine.worker")
    ledger.rename(away := up.folder / "ledger-that-is-away")
    try:
        ledger.mkdir()
        worker.kill()
        up.until(lambda: said("the ledger does not answer"), alive=True)
        begun = psutil.Process(up.process.pid).cpu_times().user
        up.until(lambda: psutil.Process(up.process.pid).cpu_times().user > begun, alive=True)  # it has tried again
        assert up.process.poll() is None and up.api("GET", "/health")
    finally:
        ledger.rmdir()
        away.rename(ledger)
    up.until(lambda: [one for one in up.children() if "talaria.engine.worker" in " ".join(one.cmdline())], alive=True)
    assert up.told("send", str(tmp_path / "study"), "--to", "comes-back")["targets"]["comes-back"]["delivered"] == 2
    assert said("a worker ended") == said("the ledger does not answer") == 1
