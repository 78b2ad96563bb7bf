"""What is made of the runs of dead processes, while others, and people, make something of them at the same moment."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import (
    AwaitingRetry,
    Cancelled,
    Cancelling,
    Completed,
    Failed,
    Paused,
    Pending,
    Running,
    Scheduled,
    Suspended,
)

from talaria.engine import called, lanes, runs
from talaria.engine.leftovers import clear_staging
from talaria.engine.recovery import _take_up, recover, taken_over
from tasks.dispatch import running
from tasks.retrieve import dispatches
from tasks.retrieve.dispatches import CUT_OFF, ENDED, dispatched
from transfer.home import Home
from transfer.lease import living
from transfer.ledger import Ledger

WHOLE, PART = UUID(int=1), UUID(int=2)  # by their ids alone, the whole would come first
Set = Callable[[UUID, State[Any]], None]


class Server:
    """Some runs, with the history of their states.

    Attributes:
        before: called before a state is set: others may do something meanwhile.
    """

    def __init__(self, **states: State[Any]) -> None:
        self.runs, self.history = dict[UUID, FlowRun](), defaultdict[UUID, list[State[Any]]](list)
        self.before: Set = lambda run_id, state: None

    def add(self, run_id: UUID, state: State[Any], *, part: bool = False) -> None:
        self.runs[run_id] = FlowRun(id=run_id, flow_id=uuid4(), parent_task_run_id=uuid4() if part else None)
        self.put(run_id, state)

    def put(self, run_id: UUID, state: State[Any]) -> None:
        """Set a state as others do."""
        run = self.runs[run_id]
        run.state, run.state_name = state, state.name
        self.history[run_id].append(state)

    def state(self, run_id: UUID) -> State[Any]:
        return cast(State[Any], self.runs[run_id].state)

    @property
    def client(self) -> PrefectClient:
        return cast(PrefectClient, self)

    async def read_flow_run(self, run_id: UUID) -> FlowRun:
        return self.runs[run_id].model_copy()

    async def read_flow_runs(self, *, flow_run_filter: Any, **_: Any) -> list[FlowRun]:
        wanted = [self.runs[run_id] for run_id in flow_run_filter.id.any_]
        return [one for one in wanted if one.parent_task_run_id] if flow_run_filter.parent_task_run_id else wanted

    async def read_flow_run_states(self, run_id: UUID) -> list[State[Any]]:
        return self.history[run_id]

    async def update_flow_run_labels(self, run_id: UUID, labels: dict[str, Any]) -> None:
        self.runs[run_id].labels.update(labels)

    async def set_flow_run_state(self, run_id: UUID, state: State[Any], force: bool = False) -> Any:
        self.before(run_id, state)
        made = state.model_copy(update={"id": uuid4()})
        self.put(run_id, made)
        return SimpleNamespace(state=made)


class Shared(Ledger):
    """A ledger as several hosts share one, in a file."""

    shared = True


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path))
    return Home(tmp_path)


@pytest.fixture
def server() -> Server:
    return Server()


def by_its_host(server: Server, home: Home) -> list[str]:
    """Take up what was left, as `up` does for a worker that died."""
    with Ledger(home.ledger) as ledger:
        for run_id in server.runs:
            ledger.runs.begins(str(run_id), "gone")
    return asyncio.run(recover(server.client, home, "talaria", alone=False))


def by_another_host(server: Server, home: Home) -> list[str]:
    """Take it over as a worker of another host does."""
    with Shared(home.root / "ledger.sqlite") as ledger, home.owner("ours") as ours:
        ledger.runs.enroll(ours, home.kernel(), "here", 60.0)
        ledger.runs.enroll("gone", "another kernel", "there", -1.0)
        for run_id in server.runs:
            ledger.runs.begins(str(run_id), "gone")
        return asyncio.run(taken_over(server.client, ledger, ours, living(home, ledger), lambda _: False))


@pytest.mark.parametrize("take", [by_its_host, by_another_host])
def test_a_dispatch_is_ended_before_its_retrieval_goes_on(
    take: Callable[[Server, Home], list[str]], server: Server, home: Home
) -> None:
    """Another worker began the retrieval, which went on with the dispatch, and then that was ended under its hands."""
    server.add(WHOLE, Running())
    server.add(PART, Running(), part=True)

    def before(run_id: UUID, state: State[Any]) -> None:
        if run_id == WHOLE:
            assert server.state(PART).message == CUT_OFF, "it goes on from here, and with its dispatch"

    server.before = before
    assert take(server, home) == [str(WHOLE)]
    assert server.state(WHOLE).is_scheduled() and server.state(PART).is_cancelled()


def test_what_another_worker_has_begun_meanwhile_is_its_own(server: Server, home: Home) -> None:
    """It had ended, by the ledger: no other one took it up when that worker died, and its files were cleared away."""
    server.add(WHOLE, Running())
    with Ledger(home.ledger) as ledger, home.owner("another worker") as theirs:

        def before(run_id: UUID, state: State[Any]) -> None:
            server.before = lambda *_: None
            assert ledger.runs.claimed(str(run_id), theirs, home.alive)

        server.before = before
        assert by_its_host(server, home) == [str(WHOLE)]
        assert ledger.runs.unfinished() == {str(WHOLE): theirs}


def test_what_another_worker_has_begun_before_its_turn_came_is_left_alone(server: Server, home: Home) -> None:
    server.add(WHOLE, Running())
    server.add(other := UUID(int=3), Running())
    with Ledger(home.ledger) as ledger, home.owner("another worker") as theirs:

        def before(run_id: UUID, state: State[Any]) -> None:
            if run_id == WHOLE:
                ledger.runs.begins(str(other), theirs)

        server.before = before
        assert by_its_host(server, home) == [str(WHOLE)]
        assert ledger.runs.unfinished() == {str(other): theirs} and server.state(other).is_running()


@pytest.mark.parametrize(
    ("set_", "ends"),
    [(Cancelling, "Cancelled"), (Cancelled, "Cancelled"), (Paused, "Paused"), (Completed, "Completed"),
     (Failed, "Failed"), (Suspended, "Suspended")],
)  # fmt: skip
def test_a_state_that_is_set_while_a_run_is_taken_up_stays(
    set_: Callable[[], State[Any]], ends: str, server: Server, home: Home
) -> None:
    """A run that was cancelled at that moment went on, and was delivered."""
    server.add(WHOLE, Running())

    def before(run_id: UUID, state: State[Any]) -> None:
        server.before = lambda *_: None
        server.put(run_id, set_())

    server.before = before
    assert not asyncio.run(_take_up(server.client, str(WHOLE)))
    assert server.state(WHOLE).name == ends


def test_a_run_that_is_cancelled_while_it_is_called_stays_cancelled(server: Server, home: Home) -> None:
    server.add(WHOLE, AwaitingRetry())
    server.before = lambda run_id, state: server.put(run_id, Cancelled()) if state.is_scheduled() else None
    with Ledger(home.ledger) as ledger:
        asyncio.run(called.bring_forward(server.client, ledger, WHOLE, lambda _: False))
    assert server.state(WHOLE).is_cancelled()


def test_a_run_of_a_command_stands_in_the_ledger_before_it_is_under_way(server: Server, home: Home) -> None:
    """Another command that began just then put it back into the queue, as nobody's, and it was run twice."""
    server.add(WHOLE, Scheduled())
    seen = list[dict[str, str]]()

    class Here:
        """A command that runs its dispatch itself; another one is faster at the server."""

        def __init__(self) -> None:
            self.home = home

        def run(self, call: Callable[..., Any], *_: Any) -> Any:
            if call is lanes.claim:
                seen.append(ledger.runs.unfinished())
                return False
            server.put(WHOLE, Completed())
            return server.runs[WHOLE] if call is runs._when_due else "dispatch"

    with Ledger(home.ledger) as ledger:
        runs.run_here(cast(runs.Runner, Here()), server.runs[WHOLE])
        ((run_id, owner),) = seen[0].items()
        assert run_id == str(WHOLE) and owner and not ledger.runs.unfinished()


# ---- dispatches of retrievals


@pytest.fixture
def go_on(server: Server, home: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], State[Any]]:
    """Let a retrieval go on with its dispatch, which was left waiting or not; return its state."""

    class Client:
        async def __aenter__(self) -> PrefectClient:
            return server.client

        async def __aexit__(self, *exc: object) -> None:
            pass

    async def run_flow(*_: Any, flow_run: FlowRun, **__: Any) -> State[Any]:
        assert flow_run.id == PART, "another run was made"
        return Completed()

    monkeypatch.setattr(dispatches, "get_client", Client)
    monkeypatch.setattr(dispatches, "run_flow", run_flow)

    async def one(waited: bool) -> State[Any]:
        asked = {"whole": str(WHOLE), "former": str(PART), "waited": waited, "begins": lambda _: None}
        return await dispatched(cast(Any, None), ["/study"], ["pacs"], **asked)

    return lambda waited: asyncio.run(one(waited))


@pytest.mark.parametrize("set_", [Cancelled, Cancelling, Failed, Completed, Paused])
def test_a_state_that_is_set_while_a_dispatch_is_let_go_on_stays(
    set_: Callable[[], State[Any]], server: Server, go_on: Callable[[bool], State[Any]]
) -> None:
    """It was made Pending by force, and its study was sent."""
    server.add(PART, AwaitingRetry(), part=True)
    server.before = lambda run_id, state: server.put(run_id, set_()) if state.is_pending() else None
    ended = go_on(True)
    assert not ended.is_completed() and server.state(PART).type is set_().type


@pytest.mark.parametrize("state", [Cancelled(message="cancelled"), Cancelling(), Paused()])
def test_what_was_made_of_a_dispatch_while_its_process_was_dead_stays(
    state: State[Any], server: Server, go_on: Callable[[bool], State[Any]]
) -> None:
    server.add(PART, state, part=True)
    assert go_on(False).type is state.type and server.state(PART) == state


@pytest.mark.parametrize(
    ("state", "waited"), [(Running(), False), (Pending(), True), (AwaitingRetry(), True)], ids=lambda one: str(one)[:9]
)
def test_a_dispatch_whose_process_died_goes_on(
    state: State[Any], waited: bool, server: Server, go_on: Callable[[bool], State[Any]]
) -> None:
    server.add(PART, state, part=True)
    assert go_on(waited).is_completed()


@pytest.mark.parametrize("said", [CUT_OFF, ENDED])
def test_a_dispatch_that_ended_with_its_process_is_made_anew(
    said: str, server: Server, go_on: Callable[[bool], State[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(PART, Cancelled(message=said), part=True)

    async def made(*_: Any) -> FlowRun:
        return FlowRun(id=PART, flow_id=uuid4())

    monkeypatch.setattr(dispatches, "_made", made)
    assert go_on(False).is_completed()


def test_a_dispatch_goes_on_when_who_takes_it_over_has_done_so(
    server: Server, home: Home, go_on: Callable[[bool], State[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody takes it over from then on."""
    server.add(PART, Running(), part=True)
    looks = list[float]()
    with Ledger(home.ledger) as ledger, home.owner("ours") as ours, home.owner("theirs") as theirs:
        ledger.runs.begins(str(WHOLE), ours)
        ledger.runs.begins(str(PART), theirs)

        async def sleep(seconds: float, *, really: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
            looks.append(seconds)
            server.put(PART, Cancelled(message="cancelled"))
            ledger.runs.ends(str(PART), theirs)
            await really(0)

        def before(run_id: UUID, state: State[Any]) -> None:
            assert ledger.runs.owner_of(str(PART)) == ours and str(PART) in running.running()

        server.before = before
        monkeypatch.setattr(dispatches.asyncio, "sleep", sleep)
        assert go_on(False).is_cancelled() and len(looks) == 1  # as it was left
        server.put(PART, AwaitingRetry())
        assert go_on(True).is_completed()
        assert ledger.runs.unfinished() == {str(WHOLE): ours} and str(PART) not in running.running()


# ---- staging


def test_staged_files_are_those_of_the_process_that_has_the_run_now(home: Home) -> None:
    """Of a worker that was paused for longer than its lease: when it went on, it took away what its successor sent."""
    with home.owner("paused") as former:
        with home.owner("has it now") as now:
            for owner in (former, now):
                (home.staging / f"{WHOLE}.{owner}").mkdir(parents=True)
            assert clear_staging(home) == 0
        assert clear_staging(home) == 1
        assert [one.name for one in home.staging.iterdir()] == [f"{WHOLE}.{former}"]
