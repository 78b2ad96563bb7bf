"""The dispatches of a retrieval: each study's is a run of its own, which later parts of the retrieval go on with.

Prefect takes the flows that a run calls for the same ones, in their order, when that run begins again: a study would be
sent in the run of another one, at that one's time. So we make these runs ourselves, and the job keeps which is whose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

from prefect import Flow, Task, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Pending

from tasks.dispatch import rest
from tasks.dispatch.patience import patiently
from tasks.paging import every
from transfer.home import Home
from transfer.ledger import Ledger

WAITING = StateType.SCHEDULED, StateType.PAUSED, StateType.PENDING
ENDED = "its retrieval has ended"  # what the state of a dispatch says that waited until then


async def dispatched(
    flow: Flow[..., Any],
    paths: list[str],
    targets: list[str],
    *,
    whole: str,
    former: str,
    waited: bool,
    begins: Callable[[str], None],
    **more: Any,
) -> State[Any]:
    """Run the dispatch of one study until it ends, or waits; return its state.

    Args:
        whole: id of the retrieval's run.
        former: id of the run that has begun it; "" if none has.
        waited: whether that one was left waiting.
        begins: called with the run's id before anything is sent.

    Raises:
        Pause, Abort: somebody has stopped or deleted the run.
    """
    async with get_client() as client:
        flow_run = await patiently(lambda: _known(client, former)) if former else None
        state = flow_run.state if flow_run else None
        if state and waited and (state.is_cancelling() or state.is_cancelled()) and state.message != ENDED:
            return state  # somebody wants this study not to be sent
        if flow_run is None or state is None or state.is_final():
            flow_run = await patiently(lambda: _made(client, flow, whole, {"paths": paths, "targets": targets, **more}))
        else:
            run_id = flow_run.id
            await patiently(lambda: client.set_flow_run_state(run_id, Pending(message="goes on"), force=True))
    begins(str(flow_run.id))
    running: Any = run_flow(flow, flow_run=flow_run, return_type="state")
    ended: State[Any] = await running
    return ended


async def end_waiting(client: PrefectClient, home: Home, whole: str) -> None:
    """Cancel the dispatches of a retrieval that wait: it has ended, and nobody goes on with them.

    So are those that are Pending: a worker was killed between making one and beginning it.
    """
    waiting = await every(
        client.read_flow_runs,
        flow_run_filter=FlowRunFilter(
            parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[UUID(whole)]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[*WAITING])),
        ),
    )
    for one in waiting:
        await client.set_flow_run_state(one.id, Cancelled(message=ENDED), force=True)
    with Ledger(home.ledger) as ledger:
        for one in waiting:
            rest.forget(ledger, str(one.id))


async def _known(client: PrefectClient, run_id: str) -> FlowRun | None:
    try:
        return await client.read_flow_run(UUID(run_id))
    except ObjectNotFound:
        return None


async def _made(client: PrefectClient, flow: Flow[..., Any], whole: str, parameters: dict[str, Any]) -> FlowRun:
    """Make a run that Prefect shows as a part of the retrieval's."""
    key = uuid4().hex
    shown = Task(name=flow.name, fn=flow.fn)
    task_run = await client.create_task_run(shown, UUID(whole), key, name=f"{flow.name}-{key[:8]}", state=Pending())
    return await client.create_flow_run(
        flow, parameters=flow.serialize_parameters(parameters), state=Pending(), parent_task_run_id=task_run.id
    )
