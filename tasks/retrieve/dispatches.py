"""The dispatches of a retrieval: each study's is a run of its own, which later parts of the retrieval go on with.

Prefect takes the flows that a run calls for the same ones, in their order, when that run begins again: a study would be
sent in the run of another one, at that one's time. So we make these runs ourselves, and the job keeps which is whose.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from prefect import Flow, Task, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterParentTaskRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.exceptions import Abort, ObjectNotFound, Pause
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry, Cancelled, Failed, Pending

from tasks.dispatch import rest, running
from tasks.dispatch.patience import patiently
from tasks.paging import every
from tasks.replaced import replaced
from transfer.database import LOST
from transfer.home import Home, host_name
from transfer.lease import living
from transfer.ledger import Ledger
from transfer.shared import HOST, several

OPEN = [kind for kind in StateType if kind not in TERMINAL_STATES]
PART = "part of a retrieval"  # tag of such a run: it is all that says so when the retrieval is deleted
RESTS = AwaitingRetry().name  # name of the state of one that waits by itself
HELD = "held by somebody"  # begins the reason of a study whose dispatch goes on when somebody lets it
HELD_S = 3_600.0  # between two looks at it, where nobody says that it goes on
ENDED = "its retrieval has ended"  # what the state of a dispatch says that waited until then
CUT_OFF = "its run was taken up again"  # and of one whose process died: its retrieval makes another one
LOOK_S = 0.2  # between two looks whether who takes a dispatch over has done so


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
    """Run the dispatch of one study until it ends, or waits; return its state, which others may have set.

    It is Completed only where it has come to that by itself.

    Args:
        whole: id of the retrieval's run.
        former: id of the run that has begun it; "" if none has.
        waited: whether that one was left waiting.
        begins: called with the run's id before anything is sent.

    Raises:
        Abort: somebody has deleted the run.
    """
    async with _having(former, whole) if former else nullcontext():
        return await _dispatched(flow, whole, former, waited, begins, {"paths": paths, "targets": targets, **more})


async def _dispatched(
    flow: Flow[..., Any],
    whole: str,
    former: str,
    waited: bool,
    begins: Callable[[str], None],
    parameters: dict[str, Any],
) -> State[Any]:
    async with get_client() as client:
        flow_run = await patiently(lambda: _known(client, former)) if former else None
        state = flow_run.state if flow_run else None
        if waited and flow_run is None:
            raise Abort(f"run {former} has been deleted")
        if flow_run and state and not state.is_final() and not _is_anothers(state, waited=waited):
            known, found = flow_run.id, state
            state = await patiently(lambda: _let_go_on(client, known, found))
        if state and _is_anothers(state, waited=waited):
            return _as_failed(state)
        if flow_run is None or state is None or state.is_final():
            flow_run = await patiently(lambda: _made(client, flow, whole, parameters))
    run_id = flow_run.id
    stop = running.flag(str(run_id))
    begins(str(run_id))
    try:
        run: Any = run_flow(flow, flow_run=flow_run, return_type="state")
        ended: State[Any] = await run
    except Pause as exc:
        if not isinstance(exc.state, State):
            raise
        ended = exc.state
    finally:
        running.forget(str(run_id))
    if ended.is_cancelling():  # it had done all when it was to stop
        cancelled: State[Any] = Cancelled(message="cancelled")
        async with get_client() as client:
            await patiently(lambda: client.set_flow_run_state(run_id, cancelled, force=True))
        return cancelled
    return _as_failed(ended) if stop.is_set() else ended


def is_held(state: State[Any]) -> bool:
    """Return True for the state of a dispatch that waits because somebody wants it to."""
    later = state.state_details.scheduled_time
    not_now = later is not None and later > datetime.now(UTC)
    return state.is_paused() or (state.is_scheduled() and state.name != RESTS and not_now)


def held_until(state: State[Any]) -> float:
    """Return when to look again at one that is held, in seconds since the epoch: its event may get lost."""
    later = state.state_details.scheduled_time if state.is_scheduled() else None
    soonest = time.time() + HELD_S
    return min(later.timestamp(), soonest) if later else soonest


def _is_anothers(state: State[Any], *, waited: bool) -> bool:
    """Return True if somebody has given a dispatch a state in which its study is not to be sent.

    Args:
        waited: whether it was left waiting; else it was under way when its process died, or has ended.
    """
    over = state.is_final() if waited else state.is_cancelled()
    return is_held(state) or ((over or state.is_cancelling()) and state.message not in (ENDED, CUT_OFF))


async def _let_go_on(client: PrefectClient, run_id: UUID, found: State[Any]) -> State[Any]:
    """Make a dispatch Pending; return its state, another one if somebody has set it meanwhile."""
    pending: State[Any] = Pending(message="goes on")
    if await replaced(client, run_id, found, pending):
        return pending
    return (await client.read_flow_run(run_id)).state or found


@asynccontextmanager
async def _having(run_id: str, whole: str) -> AsyncIterator[None]:
    """Let a dispatch that goes on be its retrieval's process's, in the ledger, before anything is made of its state.

    Whoever looks after what a dead process has left lets it be then, and has done with it before.
    """
    stop, owner = running.flag(run_id), None
    try:
        with suppress(*LOST), Ledger(Home.current().ledger) as ledger:
            owner, alive = ledger.runs.owner_of(whole), living(Home.current(), ledger)
            while owner and ledger.runs.owner_of(run_id) != owner and not ledger.runs.claimed(run_id, owner, alive):
                if stop.is_set():
                    break
                await asyncio.sleep(LOOK_S)
        yield
    finally:
        with suppress(*LOST), Ledger(Home.current().ledger) as ledger:
            if owner:
                ledger.runs.ends(run_id, owner, goes_on=True)
        running.forget(run_id)


def _as_failed(state: State[Any]) -> State[Any]:
    """Return a state that others have set, as the study sees it: to call it completed brings it nowhere."""
    return Failed(message="somebody has set its dispatch Completed") if state.is_completed() else state


async def end_waiting(client: PrefectClient, home: Home, whole: str) -> None:
    """Cancel the dispatches of a retrieval that wait: it has ended, and nobody goes on with them.

    So are those that nobody executes in any other state: a worker was killed between making one and beginning it, or
    somebody has set that state.
    """
    of_it = FlowRunFilterParentFlowRunId(any_=[UUID(whole)])
    await _end(client, home, await _open(client, FlowRunFilter(parent_flow_run_id=of_it)))


async def end_left(client: PrefectClient, home: Home, is_executed: Callable[[UUID], bool]) -> None:
    """Cancel the dispatches of retrievals that somebody has deleted, which nobody executes, or goes on with."""
    left = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[PART]), parent_task_run_id=FlowRunFilterParentTaskRunId(is_null_=True)
    )
    await _end(client, home, [one for one in await _open(client, left) if not is_executed(one.id)])


async def _open(client: PrefectClient, which: FlowRunFilter) -> list[FlowRun]:
    which.state = FlowRunFilterState(type=FlowRunFilterStateType(any_=OPEN))
    return await every(client.read_flow_runs, flow_run_filter=which)


async def _end(client: PrefectClient, home: Home, waiting: Sequence[FlowRun]) -> None:
    for one in waiting:
        # A run's own client would leave them as they are: what waits counts there as set by somebody, on purpose.
        await PrefectClient.set_flow_run_state(client, one.id, Cancelled(message=ENDED), force=True)
    if waiting:
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
    asked = flow.serialize_parameters(parameters)
    made = await client.create_flow_run(
        flow, parameters=asked, state=Pending(), parent_task_run_id=task_run.id, tags=["talaria", PART]
    )
    if several():  # what it sends is fetched here, and who sends it elsewhere must know where that is
        await client.update_flow_run_labels(made.id, {HOST: host_name()})
    return made
