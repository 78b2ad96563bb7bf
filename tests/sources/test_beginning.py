"""When a sweep begins."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Failed, Running, Scheduled

from blocks.inbox import InboxSource
from talaria.engine.sweeping import _Sweeping, _Watched
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.sourcebook import UnitRow, UnitState

NEVER = float("inf")


class Server:
    """What is asked of a server about a run."""

    def __init__(self, run: UUID | None = None) -> None:
        self.run, self.state = run, cast(State[Any] | None, None)

    async def read_flow_runs(self, **asked: Any) -> list[FlowRun]:
        return [FlowRun(id=self.run, flow_id=uuid4(), state=self.state)] if self.run and self.state else []


def box(folder: Path) -> InboxSource:
    return InboxSource(folder=str(folder), targets=["shelf"]).named("box")


def test_a_run_that_goes_on_begins_no_sweep_when_a_part_of_it_ends(tmp_path: Path) -> None:
    run = uuid4()
    server = Server(run)
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.run_begins(str(run), "somebody")
        ledger.sources.save("box", [UnitRow("s", "s", UnitState.FAILED, "1:1", run=str(run))])
        sweeping = _Sweeping(cast(Any, server), Home(tmp_path), ledger)
        watched = sweeping.watched["box"] = _Watched(box(tmp_path), due=NEVER)

        def is_due(state: State[Any] | None) -> bool:
            server.state, watched.due = state, NEVER
            asyncio.run(sweeping._see_ends())
            return watched.due < NEVER

        assert not is_due(Failed()), "its end was seen"
        ledger.run_ends(str(run), goes_on=True)  # somebody retried it, and it waits for its hours
        assert not is_due(Scheduled()) and not is_due(Running())
        assert is_due(Failed()) and is_due(Completed()), "it has ended once more"
        assert is_due(None), "it was removed"
