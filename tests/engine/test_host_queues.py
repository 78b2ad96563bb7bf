"""A run starts where its files are: in which queue it waits, and who takes it from there."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelling, Running

from talaria.engine import bound, called, hosts, stray
from talaria.engine.aside import Aside
from talaria.engine.bound import DEAD_S, Bound
from talaria.engine.recovery import TAKEN_BY, TAKEN_UP, _take_up, elsewhere, taken_over
from talaria.engine.table import Flows
from talaria.engine.watch import StateChange
from talaria.engine.worker import LOST, Worker
from talaria.service import Office, jobs
from talaria.testing import studies
from talaria.testing.process import until
from tasks.dispatch import keeping, line, running
from transfer import silent
from transfer.errors import LedgerAway, Misconfigured
from transfer.home import Home
from transfer.lease import Lease, living
from transfer.ledger import Ledger
from transfer.receipt import State as Ended
from transfer.runs import Runs
from transfer.shared import KEPT


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that every host has; this one is called `here`."""
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setenv("TALARIA_LEDGER", "postgresql://database/talaria")
    monkeypatch.setenv("TALARIA_HOST_NAME", "here")
    monkeypatch.setenv("TALARIA_SHARED_SOURCES", str(folder))
    return folder


def queue_for(queue: str, parameters: dict[str, Any]) -> str:
    return asyncio.run(hosts.queue_for(queue, parameters))


def is_here(flow_run: FlowRun) -> bool:
    return asyncio.run(hosts.here([flow_run])) == [flow_run]


def must_stay(flow_run: FlowRun) -> bool:
    return asyncio.run(hosts.must_stay(flow_run)) == {flow_run.id}


def a_run(queue: str, *paths: Path, label: str = "") -> FlowRun:
    labels: dict[str, Any] = {hosts.HOST: label} if label else {}
    return FlowRun(
        flow_id=uuid4(), work_queue_name=queue, parameters={"paths": [str(one) for one in paths]}, labels=labels
    )


def test_what_every_host_has_goes_into_the_queue_of_all(shared: Path, tmp_path: Path) -> None:
    assert queue_for("urgent", {"paths": [str(shared / "study")]}) == "urgent"
    assert queue_for("normal", {"paths": [str(shared / "a"), str(tmp_path / "b")]}) == "normal@here"
    assert queue_for("normal", {"paths": [str(shared / ".." / "b")]}) == "normal@here"
    assert queue_for("normal", {"source": "pacs", "targets": ["archive"]}) == "normal"
    assert queue_for("normal", {"source": "pacs", "into": str(tmp_path)}) == "normal@here"


def test_a_link_in_a_shared_folder_counts_as_what_it_points_at(shared: Path, tmp_path: Path) -> None:
    (shared / "link").symlink_to(tmp_path)
    assert queue_for("normal", {"paths": [str(shared / "link")]}) == "normal@here"


def test_the_lines_of_a_list_count_as_well(shared: Path, tmp_path: Path) -> None:
    """A list of one host's files lay in a shared folder: any host ran it, and another host's files went out."""
    whole, mixed, gone = (shared / name for name in ("whole.txt", "mixed.txt", "gone.txt"))
    (tmp_path / "one").mkdir()
    whole.write_text(f"a\n{shared / 'b'}\n# no study\n")
    mixed.write_text(f"a\n{tmp_path / 'one'}\n{tmp_path / 'missing'}\n")
    gone.write_text(f"a\n{tmp_path / 'missing'}\n")

    def asked(path: Path, each: str = "line") -> dict[str, Any]:
        return {"paths": [str(path)], "each": each}

    assert queue_for("normal", asked(whole)) == "normal" and queue_for("normal", asked(mixed, "")) == "normal"
    assert queue_for("normal", asked(mixed)) == "normal@here" and queue_for("urgent", asked(gone)) == "urgent@here"
    assert queue_for("normal", asked(shared / "none.txt")) == "normal@here"  # nobody knows what it names
    runs = {path: a_run("normal", path) for path in (whole, mixed, gone, shared / "none.txt")}
    for run in runs.values():
        run.parameters["each"] = "line"
    assert [is_here(run) for run in runs.values()] == [True, True, False, True]
    assert [must_stay(run) for run in runs.values()] == [False, True, True, True]


def test_alone_a_host_has_no_queue_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TALARIA_LEDGER")
    assert queue_for("normal", {"paths": [str(tmp_path)]}) == "normal"
    assert is_here(a_run("normal", tmp_path / "missing"))


def test_a_run_in_the_queue_of_all_begins_where_its_files_are(shared: Path, tmp_path: Path) -> None:
    assert is_here(a_run("normal", shared / "anything"))
    assert is_here(a_run("normal", tmp_path))
    assert not is_here(a_run("normal", tmp_path, tmp_path / "missing"))
    # Once begun at one host, it goes on there.
    assert not is_here(a_run("normal", tmp_path, label="there"))
    assert is_here(a_run("normal", tmp_path / "missing", label="here"))
    assert must_stay(a_run("normal", tmp_path)) and not must_stay(a_run("normal", shared))
    # What was put into this host's queue fails here if it is missing, and waits nowhere.
    assert is_here(a_run("normal@here", tmp_path / "missing"))


def test_a_share_that_does_not_answer_keeps_no_other_run_from_its_beginning(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look into it stopped the worker's loop: no cancel was heeded, and nothing else began."""
    dead, there, answers = tmp_path / "dead", os.path.lexists, threading.Event()

    def hangs(path: str) -> bool:
        return answers.wait() if str(path).startswith(str(dead)) else there(path)

    monkeypatch.setattr(silent, "LOOK_S", 1.0)
    monkeypatch.setattr(os.path, "lexists", hangs)
    runs = [a_run("normal", one) for one in (tmp_path, dead / "a", dead / "b", shared)]
    here, gone = [runs[0], runs[3]], [runs[1], runs[2]]
    try:
        for _ in range(2):
            assert asyncio.run(hosts.here(runs)) == here
        assert asyncio.run(hosts.must_stay(*runs)) == {runs[0].id, *(one.id for one in gone)}
    finally:
        answers.set()
    until(lambda: asyncio.run(hosts.here(runs)) == runs)


def test_what_another_host_has_is_sent_elsewhere_by_that_one(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host that was asked looked for it on its own disk: there was no such file, or another one."""
    made: list[dict[str, Any]] = []
    by_source = a_run("normal@there", tmp_path / "units.jsonl")
    by_source.parameters["each"] = "unit"
    kept = a_run("normal", shared / "study", label="there")
    kept.labels[KEPT] = "/home/there/failed/1/files"
    runs = {"own": a_run("normal@there", tmp_path), "kept": kept, "ours": a_run("normal@here", tmp_path)}

    async def found(office: Office, job: str) -> FlowRun:
        return (runs | {"source": by_source})[job]

    async def create(office: Office, **asked: Any) -> dict[str, Any]:
        made.append(asked)
        return asked

    async def no_target(*_: Any, **__: Any) -> list[Any]:
        return []

    monkeypatch.setattr(jobs, "found", found)
    monkeypatch.setattr(jobs, "load", no_target)
    monkeypatch.setattr(jobs, "create_dispatch", create)
    office = Office(cast(PrefectClient, None), Home(tmp_path), embedded=False)
    for job in runs:
        asyncio.run(jobs.send_job(office, job, ["archive"]))
    assert [(one["paths"], one["host"]) for one in made] == [
        ([str(tmp_path)], "there"),
        (["/home/there/failed/1/files"], "there"),
        ([str(tmp_path)], ""),
    ]
    with pytest.raises(Misconfigured, match="a source of the host there"):
        asyncio.run(jobs.send_job(office, "source", ["archive"]))


@pytest.mark.parametrize("several", [True, False])
def test_a_run_of_which_files_are_kept_stays_with_its_host(
    several: bool, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its retry went to any host, and ended there as its source was gone."""
    run, server = a_run("normal", shared / "study"), Server(a_run("normal"))
    server.run = run
    studies.ct(shared / "study", 1)
    if not several:
        monkeypatch.delenv("TALARIA_LEDGER")
    monkeypatch.setattr(keeping, "get_client", lambda: nullcontext(server))
    context = SimpleNamespace(parameters=run.parameters, flow_run=run)
    monkeypatch.setattr(keeping, "FlowRunContext", SimpleNamespace(get=lambda: context))
    home, flag = Home(tmp_path / "home"), threading.Event()
    home.root.mkdir()

    def ends(state: Ended) -> None:
        asyncio.run(keeping.keep_files(home, str(run.id), None, home.staging / "x", flag, state, unsent=True))

    ends(Ended.FAILED)
    files = home.root / "failed" / str(run.id) / "files"
    assert files.is_dir() and run.labels == ({hosts.HOST: "here", KEPT: str(files)} if several else {})
    assert is_here(run) and must_stay(run) is False
    ends(Ended.DELIVERED)
    assert files.is_dir() is several, "another host may have been asked to send it elsewhere"


def a_retrieval(queue: str = "normal", label: str = "", **parameters: Any) -> FlowRun:
    run = a_run(queue, label=label)
    run.parameters = {"source": "pacs", "accessions": "A1 A2"} | parameters
    return run


def test_a_retrieval_stays_with_the_host_that_has_fetched_for_it(shared: Path, tmp_path: Path) -> None:
    """At each of its rests the other host took it, and fetched from the first study on."""
    for wish in ({"targets": ["archive"]}, {"into": str(shared / "new")}, {"into": str(tmp_path)}):
        assert must_stay(a_retrieval(**wish))
        assert not must_stay(a_retrieval(label="here", **wish))  # it is said already
        assert not must_stay(a_retrieval("normal@here", **wish))
        assert is_here(a_retrieval(label="here", **wish)) and not is_here(a_retrieval(label="there", **wish))
    assert not must_stay(a_retrieval()) and not must_stay(a_run("normal", shared))  # a query


def test_a_retrieval_of_a_dead_host_begins_anew_wherever_its_folder_is(shared: Path, tmp_path: Path) -> None:
    """As a dispatch of shared files does; where it writes to a folder of that host's, it waits for it."""
    for wish, free in (
        ({"targets": ["archive"]}, True),
        ({"into": str(shared)}, True),
        ({"into": str(tmp_path)}, False),
    ):
        run = a_retrieval(label="there", **wish)
        run.state = Running()
        server = Server(run)
        assert asyncio.run(_take_up(cast(PrefectClient, server), str(run.id)))
        assert (run.labels[hosts.HOST] == "") is free and is_here(run) is free
        assert ("waits for there" in (server.set[0].message or "")) is not free
    own = a_retrieval(label="here", targets=["archive"])  # a worker died, and its host lives
    own.state = Running()
    asyncio.run(_take_up(cast(PrefectClient, Server(own)), str(own.id)))
    assert own.labels[hosts.HOST] == "here"


def test_a_retrieval_that_rests_when_its_host_dies_begins_anew_elsewhere(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has it then, to be taken over from: it waited for its host, and its dispatches stayed Running."""
    alive, labels, now = {"here"}, dict[UUID, Any](), time.monotonic()

    class Labelled:
        async def update_flow_run_labels(self, run_id: UUID, given: dict[str, Any]) -> None:
            labels[run_id] = given

    free, kept = a_retrieval(label="there", targets=["archive"]), a_retrieval(label="there", targets=["archive"])
    kept.labels[KEPT] = "/somewhere"
    due = [free, kept, a_retrieval(label="there", into=str(tmp_path)), a_retrieval(label="here", targets=["archive"])]
    ledger, look = SimpleNamespace(runs=SimpleNamespace(hosts=lambda: alive)), Bound()

    def looked(after_s: float) -> None:
        monkeypatch.setattr(bound.time, "monotonic", lambda: now + after_s)
        asyncio.run(look.look(cast(PrefectClient, Labelled()), cast(Ledger, ledger), due))

    looked(0.0)
    alive.add("there")  # it was only started anew
    looked(DEAD_S)
    alive.remove("there")
    looked(2 * DEAD_S)
    assert not labels
    looked(3 * DEAD_S)
    assert labels == {free.id: {hosts.HOST: ""}}


@pytest.mark.parametrize("path", ["~nobody-of-this-host/study", "/a\0b", "study"])
def test_what_lies_nowhere_begins_and_is_refused_there(shared: Path, path: str) -> None:
    """A worker that can't tell where a path lies would end, and so would each that finds the run after it."""
    run = a_run("normal")
    run.parameters["paths"] = [path]
    assert is_here(run)


class Server:
    """What is asked of a server about one run; no other worker is online."""

    def __init__(self, run: FlowRun, *before: State[Any]) -> None:
        self.run, self.before = run, [*before, *([run.state] if run.state else [])]
        self.set: list[State[Any]] = []

    async def read_flow_run(self, run_id: UUID) -> FlowRun:
        return self.run

    async def read_flow_runs(self, **_: Any) -> list[FlowRun]:
        return [self.run]

    async def read_flow_run_states(self, run_id: UUID) -> list[State[Any]]:
        now = [one for one in (self.run.state,) if one and one not in (*self.before, *self.set)]
        return [*self.before, *now, *self.set[-1:]]

    async def read_workers_for_work_pool(self, pool: str) -> list[Any]:
        return []

    async def update_flow_run_labels(self, run_id: UUID, labels: dict[str, Any]) -> None:
        assert run_id == self.run.id
        self.run.labels.update(labels)

    async def set_flow_run_state(self, run_id: UUID, state: State[Any], force: bool = False) -> Any:
        self.set.append(state)
        return SimpleNamespace(state=state)


@pytest.mark.parametrize(("queue", "says"), [("normal@there", "waits for there"), ("normal", ""), ("normal@here", "")])
def test_a_dead_host_s_run_waits_in_its_queue_and_says_so(queue: str, says: str, shared: Path) -> None:
    run = a_run(queue, shared)
    run.state = Running()
    server = Server(run)
    assert asyncio.run(_take_up(cast(PrefectClient, server), str(run.id)))
    (state,) = server.set
    assert state.type is StateType.SCHEDULED
    message = state.message or ""
    assert message.startswith(TAKEN_UP) and (says in message if says else message == TAKEN_UP)


@pytest.mark.parametrize(("name", "foreign"), [("there-12", True), ("here-12", False), ("a-b-12", True), ("", False)])
def test_a_run_that_a_worker_of_another_host_took_is_its_own(name: str, foreign: bool) -> None:
    """As the embedded server decides before it takes up what its ledger does not know."""
    run = a_run("normal")
    run.state = Running()
    before = State(type=StateType.PENDING, message=f"{TAKEN_BY}{name}" if name else "")
    server = cast(PrefectClient, Server(run, before, run.state))
    assert asyncio.run(elsewhere(server, run, online=False)) is foreign
    assert asyncio.run(elsewhere(server, run, online=True)) is False  # nobody is there to end it


class Shared(Ledger):
    """A ledger as several hosts share one, in a file."""

    shared = True


def test_a_cancelled_run_is_left_to_the_host_whose_lease_holds(tmp_path: Path) -> None:
    """It was set Cancelled by whoever heard of it first, while its owner went on sending."""
    home, run = Home(tmp_path), a_run("normal")
    run.state = Cancelling()
    server, change = Server(run), StateChange(run.id, "CANCELLING", "Cancelling", "")
    with Shared(tmp_path / "ledger.sqlite") as ledger:
        worker = Worker(cast(PrefectClient, server), "talaria", home, ledger, cast(Lease, None), limit=0)
        ledger.runs.enroll("theirs", "another state directory", "there", 60.0)
        ledger.runs.begins(str(run.id), "theirs")
        asyncio.run(stray.look_after(worker.client, ledger, worker.alive, change))
        assert server.set == []
        ledger.runs.resign("theirs")
        asyncio.run(stray.look_after(worker.client, ledger, worker.alive, change))
        assert [state.type for state in server.set] == [StateType.CANCELLED] and ledger.runs.unfinished() == {}


def resting(run: FlowRun, seconds: float) -> FlowRun:
    """A run that rests, and begins by itself after so many seconds."""
    begins = datetime.now(UTC) + timedelta(seconds=seconds)
    run.state = AwaitingRetry(scheduled_time=begins)
    run.state_name, run.next_scheduled_start_time = run.state.name, begins
    return run


def test_a_run_that_has_begun_by_itself_is_not_called(tmp_path: Path) -> None:
    """The server says later than the ledger that it runs: the call would take that state away."""
    home, run = Home(tmp_path), resting(a_run("normal"), 60)
    server = Server(run)
    with Shared(tmp_path / "ledger.sqlite") as ledger:
        lease = cast(Lease, SimpleNamespace(owner="ours"))
        worker = Worker(cast(PrefectClient, server), "talaria", home, ledger, lease, limit=0)
        ledger.runs.enroll("theirs", "another state directory", "there", 60.0)
        ledger.runs.begins(str(run.id), "theirs")
        asyncio.run(worker._bring_forward(run.id))
        assert server.set == []
        ledger.runs.ends(str(run.id))
        asyncio.run(worker._bring_forward(run.id))
        assert [state.name for state in server.set] == [AwaitingRetry().name]


def test_a_host_whose_clock_is_ahead_calls_nobody_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the server's clock the run, or one of a worker that died, would wait as long as that."""
    run, ahead = resting(a_run("normal"), 3600), time.time() + 60
    server = Server(run)
    with Shared(tmp_path / "ledger.sqlite") as ledger:
        monkeypatch.setattr(ledger, "now", lambda: ahead - 120)
        asyncio.run(called.bring_forward(cast(PrefectClient, server), ledger, run.id, lambda run_id: False))
        run.state = Running(timestamp=datetime.fromtimestamp(ahead - 120, UTC))
        asyncio.run(_take_up(cast(PrefectClient, server), str(run.id)))
    begins = [state.state_details.scheduled_time for state in server.set]
    assert len(begins) == 2 and all(one and one.timestamp() <= ahead - 119 for one in begins)


def test_a_run_that_was_called_too_late_goes_on(tmp_path: Path) -> None:
    home, run = Home(tmp_path), resting(a_run("normal"), 0)
    server = Server(run)

    async def heed() -> bool:
        worker.active[run.id] = cast(Any, asyncio.current_task())
        worker._claimed.add(run.id)
        try:
            await worker._heed([run.id])
            return running.flag(str(run.id)).is_set()
        finally:
            running.forget(str(run.id))

    with Shared(tmp_path / "ledger.sqlite") as ledger:
        worker = Worker(cast(PrefectClient, server), "talaria", home, ledger, cast(Lease, None), limit=0)
        assert not asyncio.run(heed())
        run.state = Cancelling()
        assert asyncio.run(heed())


def test_who_stands_behind_a_run_of_a_silent_host_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, here = resting(a_run("normal@there"), 60), resting(a_run("normal@here"), 60)
    woken: list[str] = []
    monkeypatch.setattr(line, "_waker", woken.append)
    with Shared(tmp_path / "ledger.sqlite") as ledger:
        for turn, run in enumerate((gone, here)):
            ledger.waits.join("pacs", str(run.id), turn, ledger.now() + 60)
        line.wake(ledger, "pacs")
        assert woken == [str(gone.id)]
        server = cast(PrefectClient, Server(gone))
        assert not asyncio.run(called.waits_elsewhere(server, ledger, gone.id))  # the call itself was lost
        resting(gone, -1)
        assert asyncio.run(called.waits_elsewhere(server, ledger, gone.id))
        assert woken == [str(gone.id), str(here.id)]
        resting(here, -1)  # there is no place for it yet
        assert asyncio.run(called.waits_elsewhere(cast(PrefectClient, Server(here)), ledger, here.id))
        assert ledger.waits.gone(str(here.id)) == ["pacs"] and not ledger.waits.gone(str(gone.id))


def test_a_host_without_places_holds_up_nobody_behind_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its runs is passed over soon after it was called, and not at the next look at the server."""
    there, behind = [resting(a_run("normal@there"), 60) for _ in range(3)], resting(a_run("normal@here"), 60)
    by_id = {str(run.id): run for run in (*there, behind)}
    woken: list[str] = []

    class Servers(Server):
        async def read_flow_run(self, run_id: UUID) -> FlowRun:
            return by_id[str(run_id)]

        async def read_flow_run_states(self, run_id: UUID) -> list[State[Any]]:
            return []

        async def set_flow_run_state(self, run_id: UUID, state: State[Any], force: bool = False) -> Any:
            resting(by_id[str(run_id)], -1)  # it is due, and nobody takes it
            return SimpleNamespace(state=state)

    monkeypatch.setattr(line, "_waker", woken.append)
    monkeypatch.setattr(line, "LOST_S", -called.MARGIN_S)
    with Shared(tmp_path / "ledger.sqlite") as ledger:
        for turn, run in enumerate(by_id.values()):
            ledger.waits.join("pacs", str(run.id), turn, ledger.now() + 60)
        line.wake(ledger, "pacs")
        server = cast(PrefectClient, Servers(behind))
        for at in range(len(by_id)):
            assert woken == list(by_id)[: at + 1]
            asyncio.run(called.call(server, ledger, UUID(woken[at]), lambda run_id: False))
        assert ledger.waits.gone(str(behind.id)) == ["pacs"]  # this host takes it as soon as it has a place


def test_a_call_counts_until_the_server_has_heard_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, run = Home(tmp_path), resting(a_run("normal"), 60)

    class Silent(Server):
        async def set_flow_run_state(self, run_id: UUID, state: State[Any], force: bool = False) -> None:
            raise httpx.ConnectError("no server")

    with Shared(tmp_path / "ledger.sqlite") as ledger:
        lease = cast(Lease, SimpleNamespace(owner="ours"))
        worker = Worker(cast(PrefectClient, Silent(run)), "talaria", home, ledger, lease, limit=0)
        ledger.waits.join("pacs", str(run.id), 1.0, ledger.now() + 60)
        ledger.waits.call("pacs", 1)

        monkeypatch.setattr(line, "LOST_S", -1.0)
        monkeypatch.setattr(worker, "_set_alarms", _nothing)
        with pytest.raises(httpx.ConnectError):
            asyncio.run(worker._look())
        assert ledger.waits.unheard(-1.0) == [str(run.id)]
        worker.client = cast(PrefectClient, server := Server(run))
        asyncio.run(worker._bring_forward(run.id))
        assert len(server.set) == 1


async def _nothing() -> None:
    """Stands for what is not looked at here."""


def test_of_a_silent_host_s_runs_each_is_taken_up_once(tmp_path: Path) -> None:
    home, run, other = Home(tmp_path), a_run("normal"), a_run("normal")
    run.state = Running()
    server = Server(run)
    with Shared(tmp_path / "ledger.sqlite") as ledger, home.owner("ours") as ours:
        ledger.runs.enroll(ours, home.kernel(), "here", 60.0)
        ledger.runs.enroll("gone", "another state directory", "there", -1.0)
        ledger.runs.enroll("theirs", "another state directory", "there", 60.0)
        ledger.runs.begins(str(run.id), "gone")
        ledger.runs.begins(str(other.id), "theirs")
        assert look_over(server, ledger, ours, home) == [str(run.id)]
        assert look_over(server, ledger, ours, home) == []
        assert ledger.runs.unfinished() == {str(other.id): "theirs"} and len(server.set) == 1


def look_over(server: Server, ledger: Ledger, ours: str, home: Home, at_work: tuple[UUID, ...] = ()) -> list[str]:
    busy = {str(run_id) for run_id in at_work}
    return asyncio.run(
        taken_over(cast(PrefectClient, server), ledger, ours, living(home, ledger), lambda run_id: run_id in busy)
    )


class Failing(Server):
    """A server that is away at first, or does not know a run any more when its label is set."""

    def __init__(self, run: FlowRun, *errors: Exception) -> None:
        super().__init__(run)
        self.errors = list(errors)

    async def update_flow_run_labels(self, run_id: UUID, labels: dict[str, Any]) -> None:
        if self.errors:
            raise self.errors.pop()
        await super().update_flow_run_labels(run_id, labels)


@pytest.mark.parametrize("error", [httpx.ConnectError("away"), ObjectNotFound(http_exc=RuntimeError("404"))])
def test_a_run_that_the_server_is_not_there_to_take_over_is_looked_at_again(tmp_path: Path, error: Exception) -> None:
    """It was ours in the ledger from then on, and nobody's: it stayed Running for as long as this worker lived."""
    home, run, behind = Home(tmp_path), a_run("normal"), a_run("normal")
    run.state = behind.state = Running()
    server = Failing(run, error)
    with Shared(tmp_path / "ledger.sqlite") as ledger, home.owner("ours") as ours:
        ledger.runs.enroll(ours, home.kernel(), "here", 60.0)
        ledger.runs.enroll("gone", "another state directory", "there", -1.0)
        for one in (run, behind):
            ledger.runs.begins(str(one.id), "gone")
        first = look_over(server, ledger, ours, home)
        assert len(first) == 1 and len(ledger.runs.unfinished()) == 1  # one run's error keeps no other waiting
        assert sorted([*first, *look_over(server, ledger, ours, home)]) == sorted([str(run.id), str(behind.id)])
        assert not ledger.runs.unfinished()


@pytest.mark.parametrize("shares", [True, False])
def test_a_run_whose_server_was_away_when_it_ended_is_put_back_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    """For longer than its end waits: the ledger had it that it had ended, and it stayed Running for good."""
    home, run = Home(tmp_path), a_run("normal")
    run.state = Running()
    server = Server(run)

    async def away(run_id: str) -> bool:
        return False

    async def breaks(self: Flows, flow_run: FlowRun) -> None:
        raise httpx.ConnectError("no server")

    monkeypatch.setattr("talaria.engine.worker.settle", away)
    monkeypatch.setattr(Flows, "of", breaks)

    async def work() -> None:
        worker = Worker(cast(PrefectClient, server), "talaria", home, ledger, cast(Lease, lease), limit=0)
        worker.active[run.id] = asyncio.create_task(worker._run(run))
        await worker.active[run.id]
        assert not worker.active and ledger.runs.unfinished() == {str(run.id): ours}
        worker.active[run.id] = cast(Any, asyncio.current_task())  # while it runs, it is not looked at
        await worker._take_over()
        assert server.set == []
        worker.active.clear()
        running.flag(str(run.id))  # as a part of a retrieval has one, which is no run of a queue
        await worker._take_over()
        assert server.set == []
        running.forget(str(run.id))
        await worker._take_over()
        assert [state.type for state in server.set] == [StateType.SCHEDULED] and not ledger.runs.unfinished()

    with (Shared if shares else Ledger)(tmp_path / "ledger.sqlite") as ledger, home.owner("ours") as ours:
        ledger.runs.enroll(ours, home.kernel(), "here", 60.0)
        lease = SimpleNamespace(owner=ours)
        asyncio.run(work())


def test_two_looks_at_the_same_time_take_a_run_of_ours_over_once(tmp_path: Path) -> None:
    home, run = Home(tmp_path), a_run("normal")
    run.state = Running()

    class Slow(Server):
        async def read_flow_run(self, run_id: UUID) -> FlowRun:
            await asyncio.sleep(0)
            return await super().read_flow_run(run_id)

    server = Slow(run)

    async def both() -> list[list[str]]:
        looks = (taken_over(cast(PrefectClient, server), ledger, ours, home.alive, lambda _: False) for _ in range(2))
        return await asyncio.gather(*looks)

    with Ledger(tmp_path / "ledger.sqlite") as ledger, home.owner("ours") as ours:
        ledger.runs.begins(str(run.id), ours)
        assert sorted(asyncio.run(both())) == [[], [str(run.id)]] and len(server.set) == 1
        assert not ledger.runs.unfinished()


def test_a_run_that_has_ended_since_a_look_began_is_left_alone(tmp_path: Path) -> None:
    home, run, ended = Home(tmp_path), a_run("normal"), str(UUID(int=2**128 - 1))
    run.state = Running()

    class Slow(Server):
        async def read_flow_run(self, run_id: UUID) -> FlowRun:
            ledger.runs.begins(ended, "theirs")
            return await super().read_flow_run(run_id)

    with Ledger(tmp_path / "ledger.sqlite") as ledger, home.owner("ours") as ours:
        for run_id in (str(run.id), ended):
            ledger.runs.begins(run_id, ours)
        assert list(ledger.runs.unfinished()) == [str(run.id), ended]
        assert look_over(Slow(run), ledger, ours, home) == [str(run.id)]
        assert ledger.runs.unfinished() == {ended: "theirs"}


class Full(Runs):
    """Those of a ledger whose disk is full for a while."""

    full = True

    def ends(self, *what: Any, **more: Any) -> None:
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")
        super().ends(*what, **more)


@pytest.mark.parametrize("broken", [True, False])
def test_a_run_whose_end_cannot_be_noted_gives_its_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    home, run, settled = Home(tmp_path), a_run("normal"), list[str]()

    async def settle(run_id: str) -> bool:
        settled.append(run_id)
        return True

    async def no_flow(self: Flows, flow_run: FlowRun) -> None:
        if broken:
            raise RuntimeError("an error of the engine")

    monkeypatch.setattr("talaria.engine.worker.settle", settle)
    monkeypatch.setattr(Flows, "of", no_flow)

    async def work() -> None:
        worker = Worker(cast(PrefectClient, Server(run)), "talaria", home, ledger, cast(Lease, lease), limit=0)
        worker.active[run.id] = asyncio.create_task(worker._run(run))
        await worker.active[run.id]
        assert not worker.active and len(settled) == broken and ledger.runs.unfinished() == {str(run.id): "ours"}
        worker._end_late()
        assert ledger.runs.unfinished()
        full.full = False
        worker._end_late()
        assert not ledger.runs.unfinished() and not worker._unended

    lease = SimpleNamespace(owner="ours")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.runs = full = Full(ledger._db, ledger.happenings)
        asyncio.run(work())


def test_a_run_that_another_process_has_ended_meanwhile_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found while the other one had it; the server lets one that is Completed become Pending."""
    home, run = Home(tmp_path), a_run("normal")
    server = Server(run)
    monkeypatch.setattr("talaria.engine.worker.LATE_S", (0.0,))

    async def work() -> None:
        worker = Worker(cast(PrefectClient, server), "talaria", home, ledger, cast(Lease, lease), limit=1)
        asked = time.monotonic()
        ledger.runs.begins(str(run.id), "another process")
        ledger.runs.ends(str(run.id), "another process")
        await worker._begin([run], 1, asked)
        await worker.active[run.id]
        assert server.set == [] and not worker.active and not ledger.runs.unfinished()
        await asyncio.gather(*worker._jobs)
        assert worker._wake.is_set()  # if it only rests, and its time has come, it is found again

    lease = SimpleNamespace(owner="ours")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        asyncio.run(work())


def test_a_run_that_nobody_can_tell_about_takes_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, run, begun = Home(tmp_path), a_run("normal"), list[UUID]()

    async def chosen(_: Any, found: list[FlowRun]) -> set[UUID]:
        raise RuntimeError("something of it that nobody has thought of")

    async def one_run(_: Any, flow_run: FlowRun, asked: float) -> None:
        begun.append(flow_run.id)

    monkeypatch.setattr(Aside, "chosen", chosen)
    monkeypatch.setattr(Worker, "_run", one_run)

    async def work() -> None:
        worker = Worker(cast(PrefectClient, Server(run)), "talaria", home, ledger, cast(Lease, None), limit=1)
        assert await worker._begin([run], 1, time.monotonic()) == 1
        await worker.active[run.id]

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        asyncio.run(work())
    assert begun == [run.id]


class Away(Runs):
    """Those of a ledger whose database can't be reached."""

    def claimed(self, *_: Any) -> bool:
        raise LedgerAway("the ledger's database can't be reached")

    def unfinished(self) -> dict[str, str]:
        raise LedgerAway("the ledger's database can't be reached")


def test_a_worker_outlives_a_database_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that can't be claimed gives its place back, and the look for runs of dead hosts is made again."""
    home, run, settled = Home(tmp_path), a_run("normal"), list[str]()

    async def settle(run_id: str) -> bool:
        settled.append(run_id)
        return True

    monkeypatch.setattr("talaria.engine.worker.settle", settle)

    async def work() -> None:
        worker = Worker(cast(PrefectClient, Server(run)), "talaria", home, ledger, cast(Lease, lease), limit=0)
        worker.active[run.id] = asyncio.create_task(worker._run(run))
        await worker.active[run.id]
        assert not worker.active and settled == []  # it may be another's
        with pytest.raises(LOST):
            ledger.runs.unfinished()

    lease = SimpleNamespace(owner="ours")
    with Shared(tmp_path / "ledger.sqlite") as ledger:
        ledger.runs = Away(ledger._db, ledger.happenings)
        asyncio.run(work())
