"""Dispatches of retrievals that somebody has let go on, where no event says so: looked for, and found."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry, Cancelling, Running, Scheduled

from talaria.engine import parts
from talaria.engine.parts import WAIT, RetrievalParts
from talaria.engine.watch import resuming
from tasks.dispatch import running
from transfer.ledger import Ledger

LATER = datetime.now(UTC) + timedelta(hours=1)


class Server:
    """As far as dispatches of one retrieval go."""

    def __init__(self, *states: State[Any]) -> None:
        self.whole, self.asked = uuid4(), list[Any]()
        self.parts = [FlowRun(flow_id=uuid4(), parent_task_run_id=uuid4(), state=state) for state in states]

    async def read_flow_runs(self, *, flow_filter: Any, flow_run_filter: Any) -> list[FlowRun]:
        self.asked.append(flow_run_filter)
        return self.parts

    async def read_flow_run(self, run_id: UUID) -> FlowRun:
        return next(one for one in self.parts if one.id == run_id)

    async def read_task_run(self, _: UUID) -> Any:
        return SimpleNamespace(flow_run_id=self.whole)


def test_one_that_goes_on_is_found_though_its_event_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked at once an hour."""
    monkeypatch.setattr(parts, "LATE_S", ())
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        goes_on = [resuming(ledger), Running(), Scheduled()]
        server = Server(Scheduled(scheduled_time=LATER), *goes_on, Running(), Running(), Running())
        _held, resumed, running_again, due, here, elsewhere, ended = server.parts
        ledger.runs.begins(str(elsewhere.id), "another worker")
        called: list[UUID] = []
        done: list[Coroutine[Any, Any, None]] = []
        client = cast(Any, server)
        one = RetrievalParts(client, ledger, lambda owner: owner == "another worker", called.append, done.append)

        async def look() -> set[UUID]:
            await one.look()
            looked = {cast(Any, work).cr_frame.f_locals["run_id"] for work in done}
            ended.state = AwaitingRetry(scheduled_time=LATER)  # it was about to come to rest
            for work in done:
                await work
            return looked

        monkeypatch.setattr(running, "parts", lambda: {str(here.id): None})
        monkeypatch.setattr(parts, "heed_all", _nothing)
        monkeypatch.setattr(parts, "end_left", _nothing)
        assert asyncio.run(look()) == {resumed.id, running_again.id, due.id, ended.id}
        assert called == [server.whole] * 3
        (asked,) = server.asked
        assert asked.state.name.not_any_ == WAIT and asked.parent_task_run_id.is_null_ is False
        server.parts, done[:] = [FlowRun(flow_id=uuid4(), parent_task_run_id=uuid4(), state=Cancelling())], []
        asyncio.run(one.look())
        (work,) = done
        assert work.__qualname__.endswith("_look_after")
        work.close()


async def _nothing(*_: Any) -> None:
    """Do nothing."""
