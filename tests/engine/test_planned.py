"""Who asks for the plan of a dispatch that a worker of another host takes does not wait for it: it is shown there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

from prefect.client.schemas.objects import FlowRun
from prefect.states import Pending, Running

from talaria.engine.recovery import TAKEN_BY
from talaria.service import Office
from talaria.service.dispatches import _planned
from transfer import live
from transfer.home import Home, host_name


class Server:
    """Has a run that a worker has begun."""

    def __init__(self, taker: str) -> None:
        self.run = FlowRun(id=uuid4(), flow_id=uuid4(), state=Running(), run_count=1)
        self.states: list[Any] = [Pending(message=f"{TAKEN_BY}{taker}"), Running()]

    async def read_flow_run(self, run_id: UUID) -> FlowRun:
        assert run_id == self.run.id
        return self.run

    async def read_flow_run_states(self, run_id: UUID) -> list[Any]:
        return self.states


def planned(server: Server, home: Home) -> dict[str, Any] | None:
    office = cast(Office, SimpleNamespace(home=home, client=server, alone=False, embedded=False))
    return asyncio.run(asyncio.wait_for(_planned(office, server.run), 30))


def test_of_another_host_it_is_not_waited_for(tmp_path: Path) -> None:
    """Seen: `send --no-wait --json` came back when the dispatch had ended, or after a minute."""
    assert planned(Server("elsewhere-17"), Home(tmp_path)) is None


def test_of_this_host_it_is(tmp_path: Path) -> None:
    server, home = Server(f"{host_name()}-17"), Home(tmp_path)
    asked = server.read_flow_run_states

    async def states(run_id: UUID) -> list[Any]:
        live.write(home, str(server.run.id), live.PLAN, [b'{"targets": {}}'])  # by now the worker has it
        return await asked(run_id)

    server.read_flow_run_states = states  # type: ignore[method-assign]
    assert planned(server, home) == {"targets": {}}
