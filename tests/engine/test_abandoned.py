"""Runs that are Pending, or Running, and that nobody has: a claim was lost, or the state directory is an older copy."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType, Worker, WorkerStatus
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus, StateRejectDetails
from prefect.states import Pending, Running

from talaria.engine import lanes
from talaria.engine.recovery import ABANDONED_S, TAKEN_BY, abandoned
from tasks.dispatch import running
from transfer.home import Home, host_name
from transfer.ledger import Ledger

OLD = timedelta(seconds=ABANDONED_S + 1)


class Server:
    """One run and the workers that are online."""

    def __init__(
        self, message: str = "", age: timedelta = OLD, online: tuple[str, ...] = (), *, running: bool = False
    ) -> None:
        self.state: State[Any] = Pending(message=message, timestamp=datetime.now(UTC) - age)
        self.history = [self.state]
        if running:
            self.state = Running(timestamp=datetime.now(UTC) - age)
        self.id, self.online = uuid4(), online
        self.change: State[Any] | None = None  # somebody sets it meanwhile

    @property
    def run(self) -> FlowRun:
        return FlowRun(id=self.id, flow_id=uuid4(), state=self.state)

    async def read_workers_for_work_pool(self, pool: str) -> list[Worker]:
        if self.change:
            self.state = self.change
        pool_id = uuid4()
        return [Worker(name=name, work_pool_id=pool_id, status=WorkerStatus.ONLINE) for name in self.online]

    async def read_flow_run(self, run_id: UUID) -> FlowRun:
        return self.run

    async def update_flow_run_labels(self, run_id: UUID, labels: dict[str, Any]) -> None:
        assert run_id == self.id

    async def read_flow_run_states(self, run_id: UUID) -> list[State[Any]]:
        return self.history

    async def set_flow_run_state(self, run_id: UUID, state: State[Any], force: bool = False) -> Any:
        assert run_id == self.id and force
        self.history = [self.state, state]
        self.state = state
        return SimpleNamespace(state=state)


def look(server: Server, home: Home, owner: str = "") -> list[str]:
    with Ledger(home.ledger) as ledger:
        if owner:
            ledger.runs.begins(str(server.id), owner)
        return asyncio.run(abandoned(cast(PrefectClient, server), home, ledger, [server.run]))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.mark.parametrize(
    ("message", "online"),
    [
        (f"{TAKEN_BY}gone-1", ("other-2", "ours-3")),
        (f"{TAKEN_BY}gone-1", ()),
        ("", ("ours-3",)),  # of an earlier version, or set by hand; no other worker lives
        ("", ()),
    ],
)
def test_a_run_whose_worker_is_gone_is_taken_up(home: Home, message: str, online: tuple[str, ...]) -> None:
    server = Server(message, online=online)
    with home.owner("ours-3"):
        assert look(server, home) == [str(server.id)]
    assert server.state.type is StateType.SCHEDULED


@pytest.mark.parametrize(
    ("message", "online"),
    [
        (f"{TAKEN_BY}other-2", ("other-2",)),
        (f"{TAKEN_BY}ours-3", ()),  # it has not sent a heartbeat yet
        ("", ("other-2", "ours-3")),
    ],
)
def test_a_run_that_a_living_worker_may_have_stays(home: Home, message: str, online: tuple[str, ...]) -> None:
    server = Server(message, online=online)
    with home.owner("ours-3"):
        assert look(server, home) == []
    assert server.state.is_pending()


def test_a_run_that_has_just_been_taken_or_goes_on_stays(home: Home) -> None:
    assert look(Server(age=timedelta()), home) == []
    server = Server()
    server.change = Running()
    assert look(server, home) == [] and server.state.is_running()
    with home.owner("ours-3") as owner:
        assert look(Server(), home, owner) == []
    assert look(dead := Server(), home, owner) == [str(dead.id)]  # its owner has ended


@pytest.mark.parametrize(
    ("taker", "ended", "online", "taken"),
    [
        (f"{host_name()}-1", True, (), True),  # it rested when somebody set that
        ("", False, (), True),  # it had not begun
        ("", False, ("other-2",), False),
        ("other-2", True, ("other-2",), False),
        ("other-2", False, (), False),  # another host's, whose ledger knows what it has sent
        (f"{host_name()}-1", False, (), False),  # of another state directory
    ],
)
def test_what_somebody_has_set_to_running_and_nobody_runs_is_taken_up(
    home: Home, taker: str, ended: bool, online: tuple[str, ...], taken: bool
) -> None:
    server = Server(f"{TAKEN_BY}{taker}" if taker else "", online=online, running=True)
    if ended:
        with Ledger(home.ledger) as ledger:
            ledger.runs.begins(str(server.id), "gone")
            ledger.runs.ends(str(server.id))
    assert look(server, home) == ([str(server.id)] if taken else [])
    assert server.state.is_running() is not taken


@pytest.mark.parametrize("taker", ["ours-3", "gone-1"])
def test_a_claim_that_came_when_another_host_had_completed_the_run_is_taken_back(home: Home, taker: str) -> None:
    """Its worker lives, and lost the run in the ledger meanwhile: it stayed Pending for as long as that one lived."""
    taker = taker.replace("ours", host_name())
    server = Server(f"{TAKEN_BY}{taker}", online=(taker,))
    with home.owner(taker), Ledger(home.ledger) as ledger:
        ledger.runs.begins(str(server.id), "another host's")
        ledger.runs.ends(str(server.id))
        assert look(server, home) == ([str(server.id)] if taker.startswith(host_name()) else [])
        assert ledger.runs.is_over(str(server.id))


def test_two_look_at_once_and_one_takes_up(home: Home) -> None:
    server, both = Server(), threading.Barrier(2)
    found: list[list[str]] = []

    def one() -> None:
        with Ledger(home.ledger) as ledger:
            pending = [server.run]
            both.wait()
            found.append(asyncio.run(abandoned(cast(PrefectClient, server), home, ledger, pending)))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, found)) == [0, 1]


class Claimed(Server):
    """Refuses to set what is Pending to Pending, as Prefect does."""

    async def set_flow_run_state(self, run_id: UUID, state: State[Any], force: bool = False) -> Any:
        details = StateRejectDetails(reason="it is pending")
        return OrchestrationResult(state=None, status=SetStateStatus.REJECT, details=details)


@pytest.mark.parametrize(("taker", "ours"), [("me-1", True), ("other-2", False)])
def test_a_claim_whose_answer_was_lost_is_still_ours(taker: str, ours: bool) -> None:
    server = Claimed(f"{TAKEN_BY}{taker}")
    assert asyncio.run(lanes.claim(cast(PrefectClient, server), server.id, "me-1")) is ours


def test_a_process_whose_lease_has_ended_meanwhile_claims_nothing() -> None:
    """It was paused since it had the run in the ledger; by now another host may have completed it."""
    server = Server()
    before = server.state
    try:
        running.hold_until(0.0)
        assert not asyncio.run(lanes.claim(cast(PrefectClient, server), server.id, "me-1"))
    finally:
        running.lose_all()
    assert server.state is before
