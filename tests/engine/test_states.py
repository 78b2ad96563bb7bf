"""What others make of a run, by Prefect's API or pages: it does what it says, at any time, and no other run minds."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from unittest import mock
from uuid import UUID, uuid4

import pytest
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import refresh_global_settings_context
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Pending, Running, Scheduled
from prefect.utilities.engine import propose_state

from flows.dispatch import dispatch
from talaria.engine import lanes, runs
from talaria.engine.watch import StateChange
from talaria.engine.worker import RETRIES, Worker
from talaria.testing import studies
from talaria.testing.process import as_loaded
from tasks.dispatch import line, rest, running
from tasks.retrieve import dispatches
from tests.engine.material import later
from tests.servers.up import Talaria
from transfer import silent
from transfer.errors import Misconfigured
from transfer.happenings import DISPATCHES
from transfer.home import Home
from transfer.ledger import Ledger

pytestmark = pytest.mark.timeout(600)
COUNT, SLOW = 40, 2_000  # files of 7 kB, and bytes per second: more than two minutes
LATER = {"scheduled_time": (datetime.now(UTC) + timedelta(hours=5)).isoformat()}
# As the API takes them; "" is a run that is deleted.
STATES: dict[str, dict[str, Any]] = {
    "Suspended": {"type": "PAUSED", "name": "Suspended", "state_details": {"pause_reschedule": True}},
    "Paused": {"type": "PAUSED", "name": "Paused"},
    "Cancelled": {"type": "CANCELLED"},
    "Failed": {"type": "FAILED"},
    "Completed": {"type": "COMPLETED"},
    "Crashed": {"type": "CRASHED"},
    "Scheduled": {"type": "SCHEDULED", "state_details": LATER},
    "": {},
}


def folder(path: Path, **fields: Any) -> dict[str, Any]:
    path.mkdir(parents=True, exist_ok=True)
    return {"type": "folder", "folder": str(path), "max_attempts": 3, "retry_delay_s": 0.2, **fields}


def instances(path: Path) -> set[str]:
    found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return {os.path.relpath(name, path) for name in found if name.endswith(".dcm")}


def put(up: Talaria, run_id: str, name: str) -> None:
    if name:
        up.api("POST", f"/flow_runs/{run_id}/set_state", state=STATES[name], force=True)
    else:
        up.api("DELETE", f"/flow_runs/{run_id}")


def is_at_rest(up: Talaria, run_id: str) -> bool:
    return not [*(up.home / "staging").glob(f"{run_id}*")]


def named(up: Talaria, run_id: str) -> str:
    found = up.api("POST", "/flow_runs/filter", flow_runs={"id": {"any_": [run_id]}})
    return str(found[0]["state"]["name"]) if found else ""


@pytest.fixture
def here(up: Talaria) -> Iterator[None]:
    """Let this process be a client of the server, and dispatch from its state directory."""
    auth = (up.home / "worker.auth").read_text().strip()
    env = {**up.env, "PREFECT_API_URL": up.url, "PREFECT_API_AUTH_STRING": auth}
    with mock.patch.dict(os.environ, env):
        refresh_global_settings_context()
        yield
    refresh_global_settings_context()


@pytest.mark.parametrize("names", [list(STATES)[:4], list(STATES)[4:]], ids=",".join)
def test_a_state_that_is_set_while_a_run_sends_stops_it_and_stays(
    up: Talaria, tmp_path: Path, names: list[str]
) -> None:
    targets = {f"s{number}": folder(tmp_path / str(number), bandwidth_limit=SLOW, concurrency=1) for number in range(5)}
    up.apply(**targets)
    runs = {}
    for number, name in enumerate([*names, "neighbour"]):
        studies.ct(tmp_path / f"study{number}", 2 if name == "neighbour" else COUNT)
        told = up.told("send", str(tmp_path / f"study{number}"), "--to", f"s{number}", "--no-wait")
        runs[name] = told["flow_run_id"]
    up.until(lambda: all(instances(tmp_path / str(number)) for number in range(5)), 180)
    worker = up.child("talaria.engine.worker").pid
    for name in names:
        put(up, runs[name], name)
    up.until(lambda: all(is_at_rest(up, runs[name]) for name in names), 60)
    came = [len(instances(tmp_path / str(number))) for number in range(4)]
    assert all(count < COUNT for count in came), came
    assert all(came[names.index(name)] for name in names if STATES[name].get("type") == "PAUSED")  # what came is kept
    up.until(lambda: named(up, runs["neighbour"]) == "Completed", 60)
    assert [named(up, runs[name]) for name in names] == names
    assert [len(instances(tmp_path / str(number))) for number in range(4)] == came
    assert len(instances(tmp_path / "4")) == 2
    assert up.child("talaria.engine.worker").pid == worker
    # What was stopped to go on does, by Prefect's own way; what came is not sent again.
    up.apply(**{name: fields | {"bandwidth_limit": None} for name, fields in targets.items()})
    for number, name in enumerate(names):
        if name in ("Suspended", "Paused"):
            up.api("POST", f"/flow_runs/{runs[name]}/resume", run_input=None)
            up.until(lambda name=name: named(up, runs[name]) == "Completed", 60)  # type: ignore[misc]
            receipt = up.told("jobs", "show", runs[name])["targets"][f"s{number}"]
            assert receipt["state"] == "delivered" and receipt["delivered"] == COUNT


def test_a_state_that_is_set_while_a_run_rests_stays_and_who_waits_behind_it_is_called(
    up: Talaria, tmp_path: Path
) -> None:
    """Where all of them stand in line for a slot, and it is free at last."""
    for number in range(len(STATES) + 1):
        studies.ct(tmp_path / f"short{number}", 1)
    studies.ct(tmp_path / "long", COUNT)
    line = folder(tmp_path / "line", max_dispatches=1, concurrency=1)
    up.apply(line=line | {"bandwidth_limit": SLOW})

    def send(study: str) -> str:
        return str(up.told("send", str(tmp_path / study), "--to", "line", "--no-wait")["flow_run_id"])

    holds = send("long")
    up.until(lambda: instances(tmp_path / "line"))
    runs = {name: send(f"short{number}") for number, name in enumerate([*STATES, "neighbour"])}
    up.until(lambda: all("a slot at line" in (up.run(run)["state"]["message"] or "") for run in runs.values()))
    for name in STATES:
        put(up, runs[name], name)
    up.told("jobs", "cancel", holds)
    up.until(lambda: named(up, runs["neighbour"]) == "Completed")
    assert [named(up, runs[name]) for name in STATES] == list(STATES)
    assert all(up.run(runs[name])["run_count"] <= 2 for name in STATES if name)  # none has begun again for the slot
    assert len(list((tmp_path / "line").glob("*/.complete"))) == 1  # the neighbour's


def test_runs_that_are_resumed_while_they_stop_for_their_pause_go_on(up: Talaria, tmp_path: Path) -> None:
    pauses = [(name, after) for after in (0.0, 0.15, 0.4) for name in ("Suspended", "Paused")]
    up.apply(**{f"r{n}": folder(tmp_path / str(n), bandwidth_limit=5_000, concurrency=1) for n in range(len(pauses))})
    runs = []
    for n in range(len(pauses)):
        studies.ct(tmp_path / f"study{n}", 8)
        runs.append(up.told("send", str(tmp_path / f"study{n}"), "--to", f"r{n}", "--no-wait")["flow_run_id"])
    for n, (name, after) in enumerate(pauses):
        up.until(lambda n=n: instances(tmp_path / str(n)))  # type: ignore[misc]
        put(up, runs[n], name)
        time.sleep(after)
        up.api("POST", f"/flow_runs/{runs[n]}/resume", run_input=None)
    for n, run_id in enumerate(runs):
        up.until(lambda run_id=run_id: named(up, run_id) == "Completed")  # type: ignore[misc]
        assert len(instances(tmp_path / str(n))) == 8


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_set_before_a_run_begins_keeps_it_from_beginning(
    up: Talaria, here: None, tmp_path: Path, name: str
) -> None:
    """Where its worker has taken it, and its flow has not begun."""
    studies.ct(tmp_path / "study", 1)
    up.apply(archive=folder(tmp_path / "archive"))

    async def claimed() -> FlowRun:
        async with get_client() as client:
            parameters = {"paths": [str(tmp_path / "study")], "targets": ["archive"]}
            return await client.create_flow_run(dispatch, parameters=parameters, state=Pending())

    flow_run = asyncio.run(claimed())
    put(up, str(flow_run.id), name)
    ended: State[Any] | None = None
    try:
        ended = asyncio.run(lanes.run_here(dispatch, flow_run))
    except ObjectNotFound:
        assert not name
    assert named(up, str(flow_run.id)) == name
    assert ended is None or ended.name == name
    assert not instances(tmp_path / "archive")


def test_a_dispatch_that_was_made_for_a_retrieval_and_never_began_ends_with_it(up: Talaria, here: None) -> None:
    """Its worker was killed in between: it stayed Pending for ever."""

    async def ended() -> list[str | None]:
        async with get_client() as client:
            parameters: dict[str, Any] = {"paths": [], "targets": []}
            whole = await client.create_flow_run(dispatch, parameters=parameters, state=Pending())
            made = [await dispatches._made(client, dispatch, str(whole.id), parameters) for _ in range(2)]
            await client.set_flow_run_state(made[1].id, State(type=StateType.COMPLETED), force=True)
            await dispatches.end_waiting(client, Home(up.home), str(whole.id))
            return [(await client.read_flow_run(one.id)).state_name for one in made]

    assert asyncio.run(ended()) == ["Cancelled", "Completed"]


def test_the_dispatches_of_a_retrieval_that_is_deleted_end_with_it(up: Talaria, here: None) -> None:
    """They waited for ever; those of others go on, and one that some process executes ends by itself."""

    async def ended() -> list[str | None]:
        async with get_client() as client:
            parameters: dict[str, Any] = {"paths": [], "targets": []}
            wholes = [await client.create_flow_run(dispatch, parameters=parameters) for _ in range(2)]
            made = [await dispatches._made(client, dispatch, str(whole.id), parameters) for whole in wholes * 2]
            alone = await client.create_flow_run(dispatch, parameters=parameters, state=Pending())
            ledger.runs.begins(str(made[2].id), owner)
            await client.delete_flow_run(wholes[0].id)
            await dispatches.end_left(client, Home(up.home), lambda run_id: run_id == made[2].id)
            found = [(await client.read_flow_run(one.id)).state_name for one in (*made, alone)]
            ledger.runs.ends(str(made[2].id), owner)
            return found

    with Home(up.home).owner("this process") as owner, Ledger(up.home / "ledger.sqlite") as ledger:
        assert asyncio.run(ended()) == ["Cancelled", "Pending", "Pending", "Pending", "Pending"]


def test_a_worker_does_not_sleep_through_the_return_of_its_server(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited as long again as the server had been away; what a run asks for still waits for that long."""
    seen: dict[str, int] = {}

    async def in_a_run(flow: Any, flow_run: Any) -> None:
        seen["run"] = PREFECT_CLIENT_MAX_RETRIES.value()

    async def looks(worker: Worker) -> None:
        seen["worker"] = PREFECT_CLIENT_MAX_RETRIES.value()
        await worker._in_lane(cast(Any, None), cast(Any, None))

    async def nothing(*_: Any) -> None:
        pass

    monkeypatch.setattr(lanes, "run", in_a_run)
    monkeypatch.setattr(Worker, "_take_runs", looks)
    for name in ("_beat", "_look_again"):
        monkeypatch.setattr(Worker, name, nothing)
    monkeypatch.setattr("talaria.engine.worker.watch", nothing)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        worker = Worker(cast(Any, None), "talaria", Home(tmp_path), ledger, cast(Any, None), limit=1)
        asyncio.run(worker.serve())
        worker.close()
    assert seen == {"worker": RETRIES, "run": PREFECT_CLIENT_MAX_RETRIES.value()} and seen["run"] > RETRIES


@pytest.mark.parametrize("asked", [True, False], ids=["cancelled", "stopped"])
def test_a_process_that_ends_says_of_no_dispatch_that_it_was_cancelled(
    up: Talaria, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """As at a second Ctrl-C: another process goes on with it."""
    name = f"left-{asked}".lower()
    studies.ct(tmp_path / "study", COUNT)
    up.apply(**{name: folder(tmp_path / name, bandwidth_limit=SLOW, concurrency=1)})

    async def part() -> str:
        async with get_client() as client:
            parameters = {"paths": [str(tmp_path / "study")], "targets": [name]}
            flow_run = await client.create_flow_run(dispatch, parameters=parameters, state=Pending())
            ledger.runs.begins(str(flow_run.id), owner)  # else the worker takes it for left, and clears its files away
            runs_here = asyncio.create_task(lanes.run_here(dispatch, flow_run))
            while not instances(tmp_path / name):
                assert not runs_here.done()
                await asyncio.sleep(0.05)
            if asked:
                await client.set_flow_run_state(flow_run.id, Cancelling(), force=True)
            monkeypatch.setattr(running, "stopping", lambda: True)
            running.flag(str(flow_run.id)).set()
            await runs_here
            return str(flow_run.id)

    with Home(up.home).owner("this process") as owner, Ledger(up.home / "ledger.sqlite") as ledger:
        run_id = asyncio.run(part())
        state = named(up, run_id)
        ledger.runs.ends(run_id, owner)
    assert state == ("Cancelled" if asked else "AwaitingRetry")
    receipt = up.told("jobs", "show", run_id)["targets"][name]
    assert receipt["state"] == ("cancelled" if asked else "waiting")
    with Ledger(up.home / "ledger.sqlite") as ledger:
        said = [one.label for one in ledger.happenings.totals("") if (one.name, one.target) == (DISPATCHES, name)]
    assert said == (["cancelled"] if asked else [])
    assert not (up.home / "failed" / run_id).exists()


@pytest.mark.parametrize(
    ("where", "state_name"),
    [
        *((one, "Cancelled") for one in ("run.studies_of", "run.deadletters.instead", "keeping._kept")),
        ("folder._Push.run", "Paused"),
    ],
)
def test_a_dispatch_is_cancelled_or_paused_while_a_share_hangs(
    up: Talaria, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, state_name: str
) -> None:
    """As a hard mount does that is away, of its files or a target's: no call returns until it is back."""
    name = f"hangs-{where.replace('.', '-').replace('_', '').lower()}"
    studies.ct(tmp_path / "study" / "one", 1)
    gone = {"type": "dicom", "host": "127.0.0.1", "port": 1, "aet_target": "PACS", "max_attempts": 1}
    up.apply(**{name: folder(tmp_path / "shelf") if "folder" in where else gone})
    entered, back = threading.Event(), threading.Event()

    def hangs(*_: Any) -> None:
        entered.set()
        back.wait()

    monkeypatch.setattr(f"tasks.{where}" if "folder" in where else f"tasks.dispatch.{where}", hangs)

    async def ended() -> State[Any] | None:
        async with get_client() as client:
            each = "folder" if where == "run.studies_of" else ""
            parameters = {"paths": [str(tmp_path / "study")], "targets": [name], "each": each}
            flow_run = await client.create_flow_run(dispatch, parameters=parameters, state=Pending())
            runs_here = asyncio.create_task(lanes.run_here(dispatch, flow_run))
            try:
                while not entered.is_set():
                    assert not runs_here.done()
                    await asyncio.sleep(0.05)
                pauses = state_name == "Paused"
                state = State(type=StateType.RUNNING, name=running.PAUSING) if pauses else Cancelling()
                await client.set_flow_run_state(flow_run.id, state, force=True)
                (running.pause if pauses else running.flag)(str(flow_run.id)).set()
                return await asyncio.wait_for(runs_here, as_loaded(30))
            finally:
                back.set()

    state = asyncio.run(ended())
    assert state is not None and state.name == state_name


@pytest.mark.parametrize("where", ["run.studies_of", "stage.scan", "delivery.Plan.open", "keeping._kept"])
def test_a_dispatch_rests_when_the_share_of_its_files_hangs_while_it_is_read(
    up: Talaria, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It held a place of the worker's, and a slot of the target, until the share was back or somebody cancelled it."""
    studies.ct(tmp_path / "study" / "one", 1)
    gone = {"type": "dicom", "host": "127.0.0.1", "port": 1, "aet_target": "PACS", "max_attempts": 1}
    up.apply(shelf=folder(tmp_path / "shelf"), gone=gone)
    entered, back, ask = threading.Event(), threading.Event(), os.statvfs

    def hangs(*_: Any, **__: Any) -> None:
        entered.set()
        back.wait()

    def answers(path: Any) -> os.statvfs_result:
        if entered.is_set() and str(path).startswith(str(tmp_path / "study")):
            back.wait()
        return ask(path)

    monkeypatch.setattr(line, "_waker", lambda run_id: None)
    monkeypatch.setattr(os, "statvfs", answers)
    for name, seconds in (("LOOK_S", 0.1), ("ANSWER_S", 0.0), ("BESIDE_S", 0.1)):
        monkeypatch.setattr(silent, name, seconds)
    begins = silent.check

    async def checks(paths: Any, seconds: float) -> None:
        if entered.is_set():
            await begins(paths, seconds)

    monkeypatch.setattr(silent, "check", checks)
    monkeypatch.setattr("tasks.dispatch.run.GRACE_S", 0.1)
    monkeypatch.setattr(f"tasks.dispatch.{where}", hangs)

    async def ended() -> State[Any] | None:
        async with get_client() as client:
            each, target = "folder" if where == "run.studies_of" else "", "gone" if "keeping" in where else "shelf"
            parameters = {"paths": [str(tmp_path / "study")], "targets": [target], "each": each}
            flow_run = await client.create_flow_run(dispatch, parameters=parameters, state=Pending())
            try:
                return await asyncio.wait_for(lanes.run_here(dispatch, flow_run), as_loaded(60))
            finally:
                back.set()

    state = asyncio.run(ended())
    assert state is not None and entered.is_set()
    if "keeping" in where:
        assert state.is_failed()
    else:
        assert state.name == "AwaitingRetry" and "the share of its files to answer" in (state.message or "")


def in_this_order(up: Talaria, run: str, names: list[str]) -> bool:
    """Set these states on a run; return whether none came in between."""
    for name in names:
        kind = {"type": "RUNNING"} if name == "Pausing" else {"type": "SCHEDULED", "state_details": LATER}
        up.api("POST", f"/flow_runs/{run}/set_state", state={"name": name, **kind}, force=True)
    set_so_far = [one["name"] for one in up.api("GET", f"/flow_run_states/?flow_run_id={run}")]
    last = max(place for place, name in enumerate(set_so_far) if name == names[-1])
    return set_so_far[last + 1 - len(names) : last + 1] == names


def test_a_run_that_comes_to_rest_just_when_it_is_to_pause_is_paused(up: Talaria, tmp_path: Path) -> None:
    """Whichever of the two states came first, nobody executed it any more: it went on, or stayed about to pause."""
    studies.ct(tmp_path / "study", 1)
    up.apply(resting=folder(tmp_path / "resting", window=later(2)))
    found = []
    for order in (["Pausing"], ["Pausing", "AwaitingRetry"]):
        run = up.told("send", str(tmp_path / "study"), "--to", "resting", "--no-wait", "--force")["flow_run_id"]
        up.until(lambda run=run: named(up, run) == "AwaitingRetry")  # type: ignore[misc]
        # It may be paused before the second one is set, which is then what somebody has made of a paused run.
        up.until(lambda run=run, order=order: in_this_order(up, run, order))  # type: ignore[misc]
        found.append(run)
    up.until(lambda: all(named(up, run) == "Paused" for run in found), 60)
    for run in found:
        up.told("jobs", "resume", run, "--no-wait")
    up.until(lambda: all(named(up, run) == "AwaitingRetry" for run in found), 60)


def test_a_run_that_is_to_pause_is_paused_where_its_process_ends_before_it_has(
    up: Talaria, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would go on by itself with the next process, though somebody has paused it."""
    monkeypatch.setattr(running, "stopping", lambda: True)

    async def ends(name: str) -> str | None:
        async with lanes.client(lanes.RunClient) as client:
            assert isinstance(client, lanes.RunClient)
            made = await client.create_flow_run(dispatch, parameters={"paths": [], "targets": []}, state=Pending())
            await client.set_flow_run_state(made.id, State(type=StateType.RUNNING, name=name))
            await client.set_flow_run_state(made.id, Cancelled())
            return (await client.read_flow_run(made.id)).state_name

    assert [asyncio.run(ends(name)) for name in (running.PAUSING, "Running")] == [running.PAUSED, "AwaitingRetry"]


@pytest.mark.parametrize("state", [Scheduled, AwaitingRetry])
def test_a_run_that_is_put_off_just_before_it_begins_is_left_alone(
    up: Talaria, here: None, monkeypatch: pytest.MonkeyPatch, state: Callable[..., State[Any]]
) -> None:
    """Prefect's engine would sleep until then, in a place of the worker's, and hear nothing of a stop."""
    watched = threading.Event()
    watched.set()
    monkeypatch.setattr(running, "WATCHED", watched)  # as by a worker, which hears what others set

    async def begins() -> tuple[State[Any], FlowRun]:
        async with lanes.client(lanes.RunClient) as client:
            made = await client.create_flow_run(dispatch, parameters={"paths": [], "targets": []}, state=Pending())
            put_off = state(scheduled_time=datetime.now(UTC) + timedelta(hours=5))
            await PrefectClient.set_flow_run_state(client, made.id, put_off, force=True)
            begun = propose_state(client, Running(), flow_run_id=made.id)
            return await asyncio.wait_for(begun, 60), await client.read_flow_run(made.id)

    answer, flow_run = asyncio.run(begins())
    assert answer.is_scheduled() and flow_run.state is not None and flow_run.state.id == answer.id


def test_a_run_that_a_process_takes_while_it_is_cancelled_or_paused_is_told_so(up: Talaria, here: None) -> None:
    """What is set in between would be lost, for Prefect lets a run begin that was cancelled."""

    async def told(
        act: Callable[[PrefectClient, UUID], Awaitable[str]], reads: int, *, rests: bool = False
    ) -> list[str | None]:
        async with get_client() as client:
            later = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(hours=5))
            waits = await client.create_flow_run(dispatch, parameters={"paths": [], "targets": []}, state=later)
            await client.set_flow_run_state(waits.id, Pending(), force=True)
            if rests:
                waits = await client.read_flow_run(waits.id)
                await client.set_flow_run_state(waits.id, later, force=True)
            read, stale = client.read_flow_run, [waits] * reads

            async def late(run_id: UUID) -> FlowRun:
                return stale.pop() if stale else await read(run_id)

            with mock.patch.object(client, "read_flow_run", late):
                said = await act(client, waits.id)
            return [said, (await client.read_flow_run(waits.id)).state_name]

    assert asyncio.run(told(runs.cancel, 2)) == ["Cancelling"] * 2
    assert asyncio.run(told(runs.pause, 1)) == [running.PAUSING] * 2
    assert asyncio.run(told(runs.pause, 1, rests=True)) == [running.PAUSED] * 2  # it has just come to rest


def test_a_dispatch_is_paused_after_the_items_under_way_and_goes_on_there(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", COUNT)
    slow = folder(tmp_path / "archive", bandwidth_limit=SLOW, concurrency=1)
    up.apply(archive=slow)
    run_id = up.told("send", str(tmp_path / "study"), "--to", "archive", "--no-wait")["flow_run_id"]
    up.until(lambda: instances(tmp_path / "archive"))
    assert up.told("jobs", "pause", run_id)["action"] == "pausing"
    up.until(lambda: named(up, run_id) == "Paused")
    came = len(instances(tmp_path / "archive"))
    shown = up.told("jobs", "show", run_id)
    receipt = shown["targets"]["archive"]
    assert (receipt["state"], receipt["unsent"]) == ("waiting", COUNT) and 0 < came < COUNT  # no folder of half a study
    assert receipt["error"] == "the dispatch was paused"
    assert up.run(run_id)["state"]["type"] == StateType.SCHEDULED.value
    assert "paused already" in up.here("jobs", "pause", run_id).stderr
    up.apply(archive=slow | {"bandwidth_limit": None})
    resumed = up.told("jobs", "resume", run_id)["targets"]["archive"]
    assert resumed["state"] == "delivered" and resumed["delivered"] == COUNT


class Alone:
    """A process without a worker, as `talaria send` is where no `talaria up` runs; counts what it asks for."""

    def __init__(self, up: Talaria) -> None:
        self.home, self.asked = Home(up.home), 0

    def run(self, call: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        self.asked += 1

        async def with_client() -> Any:
            async with get_client() as client:
                return await call(client, *args)

        return asyncio.run(with_client())

    def created(self, path: Path, target: str) -> FlowRun:
        async def created(client: PrefectClient) -> FlowRun:
            parameters = {"paths": [str(path)], "targets": [target]}
            return await client.create_flow_run(dispatch, parameters=parameters, state=Scheduled())

        return cast(FlowRun, self.run(created))

    def begins(self, flow_run: FlowRun) -> threading.Thread:
        thread = threading.Thread(target=runs.run_here, args=(self, flow_run), daemon=True)
        thread.start()
        return thread


def test_a_run_that_no_worker_runs_heeds_what_others_make_of_it(up: Talaria, here: None, tmp_path: Path) -> None:
    """It sent to its end; and one that was paused asked what had become of it for ever, without a pause."""
    states = {**STATES, "Cancelling": {"type": "CANCELLING"}}
    up.apply(
        **{f"alone{n}": folder(tmp_path / str(n), bandwidth_limit=SLOW, concurrency=1) for n in range(len(states))}
    )
    studies.ct(tmp_path / "study", COUNT)
    begun = {}
    for number, name in enumerate(states):
        alone = Alone(up)
        flow_run = alone.created(tmp_path / "study", f"alone{number}")
        begun[name] = alone, str(flow_run.id), alone.begins(flow_run)
    up.until(lambda: all(instances(tmp_path / str(number)) for number in range(len(states))), 120)
    for name, (_, run_id, _) in begun.items():
        if name == "Cancelling":
            up.api("POST", f"/flow_runs/{run_id}/set_state", state=states[name], force=True)
        else:
            put(up, run_id, name)
    up.until(lambda: not any(thread.is_alive() for _, _, thread in begun.values()), 60)
    assert all(len(instances(tmp_path / str(number))) < COUNT for number in range(len(states)))
    assert {name: named(up, one[1]) for name, one in begun.items()} == {
        name: {"Cancelling": "Cancelled"}.get(name, name) for name in states
    }
    assert all(alone.asked <= 4 for alone, _, _ in begun.values())


def test_a_look_that_goes_wrong_ends_no_heeding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of such a process went to their ends, whatever others made of them."""

    async def looks() -> None:
        again, wrong = asyncio.Event(), [ValueError("an answer that nobody expects")]

        async def look(*_: Any) -> None:
            if wrong:
                raise wrong.pop()
            again.set()

        monkeypatch.setattr(runs, "heed_all", look)
        heeding = asyncio.create_task(runs._heed_here())
        await asyncio.wait([heeding, waits := asyncio.create_task(again.wait())], return_when=asyncio.FIRST_COMPLETED)
        assert waits.done()
        heeding.cancel()

    monkeypatch.setattr(runs, "HEED_S", 0)
    monkeypatch.setattr(lanes, "Client", lambda: mock.AsyncMock())
    asyncio.run(looks())


def test_a_run_that_is_cancelled_when_it_is_taken_and_has_not_begun_is_looked_at_when_it_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody said that it had ended, for five minutes."""
    run_id, looked = uuid4(), list[UUID]()

    async def was_cancelled(_client: Any, _ledger: Any, of: UUID) -> None:
        assert of not in worker.active
        looked.append(of)

    async def taken() -> None:
        run = asyncio.get_running_loop().create_future()
        worker.active[run_id] = cast(Any, run)
        for name in ("Cancelled", "Running"):
            worker._changed(StateChange(run_id, name.upper(), name, "SCHEDULED"))
        (look,) = worker._jobs
        for _ in range(9):
            await asyncio.sleep(0)
        assert not looked
        del worker.active[run_id]
        run.set_result(None)
        await look

    monkeypatch.setattr("talaria.engine.worker.cancelled.was_cancelled", was_cancelled)
    for name, value in (("HEED_S", 0), ("LATE_S", ())):
        monkeypatch.setattr(f"talaria.engine.worker.{name}", value)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        worker = Worker(cast(Any, None), "talaria", Home(tmp_path), ledger, cast(Any, None), limit=0)
        asyncio.run(taken())
    assert looked == [run_id]


def test_a_run_that_another_process_has_is_waited_for(up: Talaria, here: None, tmp_path: Path) -> None:
    """As of two `talaria recover` at once, each of which lists the same runs."""
    alone = Alone(up)
    flow_run = alone.created(tmp_path, "nowhere")
    run_id = str(flow_run.id)
    with alone.home.owner("another") as another, Ledger(up.home / "ledger.sqlite") as ledger:
        ledger.runs.begins(run_id, another)
        up.api("POST", f"/flow_runs/{run_id}/set_state", state={"type": "RUNNING"}, force=True)
        read, looks = PrefectClient.read_flow_run, threading.Semaphore(0)

        async def counted(client: PrefectClient, of: UUID) -> FlowRun:
            looks.release()
            return await read(client, of)

        with mock.patch.object(PrefectClient, "read_flow_run", counted):
            waits = alone.begins(flow_run)
            for _ in range(4):  # it looks, again and again
                assert looks.acquire(timeout=60)
            assert waits.is_alive()
            up.api("POST", f"/flow_runs/{run_id}/set_state", state={"type": "COMPLETED"}, force=True)
            ledger.runs.ends(run_id, another)
            up.until(lambda: not waits.is_alive(), 60)
    assert alone.asked <= 5


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (running.paused(), r"Paused: `talaria jobs resume .*` lets it go on$"),
        (Scheduled(), "Scheduled: it goes on by itself$"),
        (AwaitingRetry(message=f"{rest.TRIES_AGAIN} at 10:00:00 UTC: pacs to answer; "), "soon after a good .* test"),
        (
            AwaitingRetry(message=f"{rest.WAITS} until 22:00:00 UTC: the hours of pacs; "),
            "it waits for the hours of pa",
        ),
        (Pending(), "Pending$"),
    ],
    ids=["paused", "queued", "resting", "waiting", "taken"],
)
def test_one_that_has_not_ended_is_not_retried_and_how_it_goes_on_is_said(state: State[Any], words: str) -> None:
    client = mock.AsyncMock(read_flow_run=mock.AsyncMock(return_value=mock.Mock(state=state, state_name=state.name)))
    with pytest.raises(Misconfigured, match=f"has not ended: .*{words}"):
        asyncio.run(runs.retry(client, UUID(int=1)))
