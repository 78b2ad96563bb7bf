"""Heeds what others make of the dispatches of retrievals, which Prefect shows below these and no work pool knows.

The worker that executes a retrieval executes its dispatches, each of which has a flag of its own
(`tasks.dispatch.running`). Those that wait are let go on by their retrieval, which is called for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterParentTaskRunId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound

from flows.dispatch import dispatch
from talaria.engine import stray
from talaria.engine.heeding import HEED_S, heed_all, is_stop
from talaria.engine.stray import LATE_S
from talaria.engine.watch import StateChange, cancelling
from tasks.dispatch import running
from tasks.retrieve.dispatches import RESTS, end_left, is_held
from transfer.home import Home
from transfer.ledger import Ledger

# Names of states in which one waits as it is to: for a time that its retrieval knows, or for somebody.
WAIT = [str(RESTS), running.PAUSED, running.PAUSING]


class RetrievalParts:
    """The dispatches of the retrievals of this process, and those of any that wait.

    Args:
        call: lets a retrieval look which of its dispatches may go on.
        do: does some work beside all other.
    """

    def __init__(
        self,
        client: PrefectClient,
        ledger: Ledger,
        alive: Callable[[str], bool],
        call: Callable[[UUID], None],
        do: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self.client, self.ledger, self.alive = client, ledger, alive
        self._call, self._do = call, do

    async def resource(self) -> str:
        """Return by what events of these runs are known: their flow."""
        try:
            return f"prefect.flow.{(await self.client.read_flow_by_name(dispatch.name)).id}"
        except ObjectNotFound:  # somebody has removed it: then there are none, until it is registered again
            return f"prefect.flow.{dispatch.name}"

    def changed(self, change: StateChange) -> None:
        """Look into a change of the state of such a run."""
        if str(change.run_id) in running.parts():
            if is_stop(change.type, change.name):
                self._do(self._heed_soon(str(change.run_id)))
        elif change.is_resumption or (change.type == "SCHEDULED" and change.before in ("SCHEDULED", "PAUSED")):
            self._do(self._goes_on(change.run_id))
        elif change.type == "CANCELLING" or change.name == running.PAUSING:
            self._do(self._look_after(change))

    async def look(self) -> None:
        """Ask the server for what events should have reported; of a retrieval that is deleted, none does."""
        await self._heed([*running.parts()])
        await end_left(self.client, Home.current(), self._is_executed)
        found = await self.client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[dispatch.name])),
            flow_run_filter=FlowRunFilter(
                parent_task_run_id=FlowRunFilterParentTaskRunId(is_null_=False),
                state=FlowRunFilterState(
                    type=FlowRunFilterStateType(any_=[StateType.CANCELLING, StateType.RUNNING, StateType.SCHEDULED]),
                    name=FlowRunFilterStateName(not_any_=WAIT),
                ),
            ),
        )
        for one in found:
            if one.state is None or str(one.id) in running.parts():
                continue
            if one.state.is_cancelling():
                self._do(self._look_after(cancelling(one.id)))
            elif not is_held(one.state) and not self._is_executed(one.id):
                self._do(self._found(one.id))

    async def _found(self, run_id: UUID) -> None:
        """Let the retrieval go on with a dispatch that was to go on when it was looked for, unless that has ended."""
        with suppress(ObjectNotFound):
            state = (await self.client.read_flow_run(run_id)).state
            if state is not None and state.name not in WAIT:
                await self._goes_on(run_id)

    def _is_executed(self, run_id: UUID) -> bool:
        owner = self.ledger.runs.owner_of(str(run_id))
        return bool(owner and self.alive(owner))

    async def _heed_soon(self, run_id: str) -> None:
        for seconds in (HEED_S, *LATE_S):
            await asyncio.sleep(seconds)
            await self._heed([run_id])

    async def _heed(self, run_ids: list[str]) -> None:
        await heed_all(self.client, {run_id: one for run_id, one in running.parts().items() if run_id in run_ids})

    async def _goes_on(self, run_id: UUID) -> None:
        """Let the retrieval go on with a dispatch that somebody has let go on; it may be about to rest, without it."""
        for seconds in (0.0, *LATE_S):
            await asyncio.sleep(seconds)
            try:
                part = await self.client.read_flow_run(run_id)
            except ObjectNotFound:
                return
            begun = part.state is None or part.state.is_final() or part.state.is_pending()
            if begun or part.parent_task_run_id is None or str(run_id) in running.parts():
                return
            whole = (await self.client.read_task_run(part.parent_task_run_id)).flow_run_id
            if whole is None:
                return
            self._call(whole)

    async def _look_after(self, change: StateChange) -> None:
        """See to a state in which none stays that nobody executes."""
        await asyncio.sleep(sum(LATE_S))  # until whoever begins it has noted that it is at work
        if change.type == "CANCELLING":
            await stray.look_after(self.client, self.ledger, self.alive, change)
        else:
            await stray.pause(self.client, self.ledger, self.alive, change.run_id)
