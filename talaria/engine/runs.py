"""Flow runs as commands use them: created, run here if no worker runs them, followed to their end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar
from urllib.parse import quote
from uuid import UUID
from weakref import WeakKeyDictionary

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    ArtifactFilterType,
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterId,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Scheduled

from talaria.engine import hosts, lanes
from talaria.engine.heeding import heed_all
from talaria.engine.listed import listed
from talaria.engine.lost import going_on
from talaria.engine.recovery import CRASHES, settle
from talaria.engine.registry import deployed
from talaria.engine.table import FLOWS
from tasks.crashed import is_over
from tasks.dispatch import rest, running
from tasks.dispatch.asked import dispatch_in
from tasks.replaced import around
from transfer import live
from transfer.errors import Misconfigured, NotFound
from transfer.home import Home
from transfer.lease import Lease, living
from transfer.ledger import Ledger

R = TypeVar("R")

BEGINNING = "/talaria/flow_run_ids/{beginning}"  # a search that our embedded server adds to Prefect's API
POLL_S = 0.25
HEED_S = 0.5  # between two looks at what others have made of a run that is run here
TAKEN_S = 10.0  # within which whoever has taken a run has noted that in the ledger
PAGE = 200  # runs a request; Prefect's own limit
SHOWN_JOBS = 5  # candidates that a message lists
UNDER_WAY = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
KNOWN_S = 30.0  # for which the id of a deployment is taken for known: somebody may remove it, and we make it anew
GIVEN_UP = (StateType.FAILED, StateType.CRASHED)
GOES_ON = ": it goes on by itself"
SOON_AFTER = ", soon after a good `talaria target test` of the target that it waits for"
UNPROCESSABLE, TOO_LONG = 422, "parameters must be less than"  # Prefect's answer to long parameters
SOON_S = 20  # a next attempt further away than this is not waited for


async def create(
    client: PrefectClient,
    flow: str,
    parameters: dict[str, Any],
    name: str,
    queue: str,
    begin: datetime | None = None,
    *,
    key: str | None = None,
    by: str = "",
    show_plan: bool = False,
    host: str = "",
) -> FlowRun:
    """Create a flow run of one of our deployments, to begin now or at a given time.

    Args:
        key: idempotency key; the same key again gives the same run.
        by: who asked for it.
        show_plan: whether the worker is to show what it is going to do (`transfer.live`).
        host: the one that must run it, if it is another one.

    Raises:
        Misconfigured: the parameters are longer than the server keeps.
    """
    deployment = await deployed(client, flow)
    try:
        return await client.create_flow_run_from_deployment(
            deployment.id,
            parameters=parameters,
            name=name,
            work_queue_name=hosts.queue_of(queue, host) if host else await hosts.queue_for(queue, parameters),
            state=Scheduled(scheduled_time=begin or datetime.now(UTC)),
            idempotency_key=key,
            labels=({live.BY: by} if by else {}) | ({live.SHOW_PLAN: True} if show_plan else {}),
        )
    except PrefectHTTPStatusError as exc:
        if exc.response.status_code == UNPROCESSABLE and TOO_LONG in exc.response.text:
            size = len(json.dumps(parameters))
            raise Misconfigured(
                f"what is asked for takes {size:,} bytes, more than the Prefect server keeps of one run "
                "(PREFECT_SERVER_API_MAX_PARAMETER_SIZE): ask for it in several parts"
            ) from exc
        raise


class Runner(Protocol):
    """What executes runs where no worker does."""

    home: Home

    def run(self, call: Callable[..., Awaitable[R]], *args: Any) -> R:
        """Call a coroutine function with a client as its first argument."""


def run_here(access: Runner, flow_run: FlowRun) -> None:
    """Run a flow run in this process instead of a worker; return when it has ended, or has long to wait."""
    run_id = str(flow_run.id)
    flow, _ = FLOWS[access.run(_flow_name, flow_run)]
    name = lanes.name()
    lease = Lease(access.home, name, running.hold_until, running.lose_all)
    with lease, Ledger(access.home.ledger) as ledger:
        alive = living(access.home, ledger)

        def is_executed() -> bool:
            owner = ledger.runs.owner_of(run_id)
            return owner not in (None, lease.owner) and alive(str(owner))

        def is_ours() -> bool:
            """Take it, in the ledger first: what is under way and stands there for nobody's is taken for left."""
            running.regained(run_id)
            owner = lease.owner
            if ledger.runs.owner_of(run_id) != owner and not ledger.runs.claimed(run_id, owner, alive):
                return False
            if not access.run(lanes.claim, flow_run.id, name):
                ledger.runs.ends(run_id, owner, goes_on=True)
                return False
            return True

        while True:
            if is_ours():
                running.forget(run_id)  # what was heeded at the end of its last part
                state = asyncio.run(_run_here(flow, flow_run))
                stands = state is not None and (state.is_final() or state.is_scheduled() or state.is_paused())
                if not running.lost(run_id) and (stands or asyncio.run(settle(run_id))):
                    ledger.runs.ends(run_id, lease.owner, goes_on=rest.rests(ledger, run_id))
            else:
                time.sleep(POLL_S)  # what keeps us from it may do so for a while
            # It may wait for a window that opens soon, or have lost its server: there is no worker to take it up.
            try:
                flow_run = access.run(_when_due, flow_run.id, is_executed)
            except ObjectNotFound:  # somebody has deleted it
                return
            if flow_run.state is None or flow_run.state.type is not StateType.SCHEDULED or at_rest(flow_run):
                return


async def _run_here(flow: Flow[..., Any], flow_run: FlowRun) -> State[Any] | None:
    """Run a part of a run, and return as `lanes.run` does.

    What others make of it, and of its dispatches, is heeded meanwhile: no worker listens for that.
    """
    heeding = asyncio.create_task(_heed_here())
    try:
        return await lanes.run_here(flow, flow_run)
    finally:
        heeding.cancel()
        await asyncio.gather(heeding, return_exceptions=True)


async def _heed_here() -> None:
    async with lanes.Client() as client:  # not that of the run, which remembers what its engine asks for
        while True:
            await asyncio.sleep(HEED_S)
            with going_on("a look at what others make of the runs here failed: it is made again"):
                await heed_all(client, running.flags())


async def _flow_name(client: PrefectClient, flow_run: FlowRun) -> str:
    return (await client.read_flow(flow_run.flow_id)).name


async def _when_due(client: PrefectClient, run_id: UUID, is_executed: Callable[[], bool]) -> FlowRun:
    """Return a run that has stopped; one that continues soon is returned at that time.

    Args:
        is_executed: whether a process has it: then that one's end is waited for.

    Raises:
        ObjectNotFound: somebody has deleted it.
    """
    idle = time.monotonic()
    while True:
        flow_run = await client.read_flow_run(run_id)
        state = flow_run.state
        if state is None or at_rest(flow_run) or state.is_paused():
            return flow_run
        if state.type is StateType.SCHEDULED:
            begin = state.state_details.scheduled_time
            if begin is None or begin <= datetime.now(UTC):
                return flow_run
        elif is_executed():
            idle = time.monotonic()
        elif state.is_final() or time.monotonic() > idle + TAKEN_S:
            return flow_run
        await asyncio.sleep(POLL_S)


def at_rest(flow_run: FlowRun) -> bool:
    """Return True if a run has ended, or waits for a time that is not soon and that people have set."""
    state = flow_run.state
    if state is None:
        return False
    if state.type is StateType.SCHEDULED:
        if (state.message or "").startswith(rest.TRIES_AGAIN):
            return False
        begin = state.state_details.scheduled_time
        return begin is not None and begin > datetime.now(UTC) + timedelta(seconds=SOON_S)
    return is_over(state)


def under_way(flow_run: FlowRun) -> bool:
    """Return True if some process executes a run."""
    return flow_run.state is not None and flow_run.state.type in UNDER_WAY


async def table_of(client: PrefectClient, run_id: UUID, key: str) -> list[dict[str, Any]]:
    """Return the rows of a run's newest table of this name; none if it has none."""
    newest = await client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]), key=ArtifactFilterKey(any_=[key])
        ),
        sort=ArtifactSort.CREATED_DESC,
        limit=1,
    )
    rows: list[dict[str, Any]] = json.loads(str(newest[0].data)) if newest else []
    return rows


async def shown_progress(
    client: PrefectClient, run_id: UUID, since: datetime | None = None
) -> dict[str, tuple[float, str]]:
    """Read the progress artifacts of a run that are not older than `since`: percent and words by target."""
    newest = await client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]), type=ArtifactFilterType(any_=["progress"])
        ),
        sort=ArtifactSort.CREATED_DESC,
    )
    return {
        str(artifact.key).removeprefix("progress-"): (float(str(artifact.data)), artifact.description or "")
        for artifact in reversed(newest)  # a run that was run again has several of a target
        if since is None or (artifact.created and artifact.created >= since)
    }


async def cancel(client: PrefectClient, run_id: UUID) -> str:
    """Ask a run to stop; return the name of its state afterwards."""
    flow_run = await client.read_flow_run(run_id)
    if flow_run.state is None or flow_run.state.is_final():
        raise Misconfigured(f"run {run_id} has ended: {flow_run.state_name}")
    return await _cancel(client, run_id)


async def _cancel(client: PrefectClient, run_id: UUID) -> str:
    flow_run = await client.read_flow_run(run_id)
    if flow_run.state is None or flow_run.state.is_final():
        return str(flow_run.state_name)
    if flow_run.state.type is StateType.SCHEDULED:
        if await _kept_waiting(client, run_id, Cancelled()):
            return "Cancelled"
        flow_run = await client.read_flow_run(run_id)
        if flow_run.state is not None and flow_run.state.is_final() and not flow_run.state.is_cancelled():
            return str(flow_run.state_name)
    state: State[Any] = Cancelling()
    await client.set_flow_run_state(run_id, state, force=flow_run.state is not None and flow_run.state.is_cancelled())
    return str(state.name)


async def _kept_waiting(client: PrefectClient, run_id: UUID, state: State[Any]) -> bool:
    """Give a run that nobody executes a state in which it does not begin.

    Returns:
        False if a process had just taken it: Prefect lets that one go on to Running, whatever is set before.
    """
    ours = (await client.set_flow_run_state(run_id, state, force=True)).state
    before, _ = await around(client, run_id, ours)
    return before is None or before.type not in UNDER_WAY


async def retry(client: PrefectClient, run_id: UUID) -> FlowRun:
    """Put a run that has ended back into the queue, under its own id."""
    flow_run = await client.read_flow_run(run_id)
    if flow_run.state is None or not flow_run.state.is_final():
        raise Misconfigured(f"run {run_id} has not ended: {flow_run.state_name}{_how_on(run_id, flow_run.state)}")
    if flow_run.parent_task_run_id is not None:
        raise Misconfigured(f"run {run_id} is a part of a retrieval, which nobody begins alone: retry that one")
    if flow_run.labels.get(CRASHES):
        await client.update_flow_run_labels(run_id, {CRASHES: 0})
    await client.set_flow_run_state(run_id, AwaitingRetry(scheduled_time=datetime.now(UTC)), force=True)
    return await client.read_flow_run(run_id)


def _how_on(run_id: UUID, state: State[Any] | None) -> str:
    """Return how a run goes on that somebody wants to go on; "" where it does already."""
    if state is not None and (state.is_paused() or state.name == running.PAUSED):
        return f": `talaria jobs resume {run_id}` lets it go on"
    if state is None or state.type is not StateType.SCHEDULED:
        return ""
    said = state.message or ""
    if said.startswith(rest.TRIES_AGAIN):
        return GOES_ON + SOON_AFTER
    what = rest.awaited(said)
    return f"{GOES_ON}: it waits for {what}" if what else GOES_ON


async def pause(client: PrefectClient, run_id: UUID) -> str:
    """Ask a run to stop where it can go on, a retrieval after the current series; or keep it from beginning.

    Returns:
        The name of its state afterwards.
    """
    flow_run = await client.read_flow_run(run_id)
    state = flow_run.state
    if state is None or state.is_final() or state.type is StateType.CANCELLING:
        raise Misconfigured(f"run {run_id} has ended, or is ending: {flow_run.state_name}")
    if state.is_paused() or state.name == running.PAUSED:
        raise Misconfigured(f"run {run_id} is paused already: {flow_run.state_name}")
    pausing: State[Any] = State(type=StateType.RUNNING, name=running.PAUSING)
    if state.type is StateType.SCHEDULED:
        if await _kept_waiting(client, run_id, running.paused()):
            return running.PAUSED
        state = (await client.read_flow_run(run_id)).state
        if state is not None and state.is_final():
            return str(state.name)
        await client.set_flow_run_state(run_id, pausing, force=True)
    elif await _kept_waiting(client, run_id, pausing):  # it had just come to rest
        await client.set_flow_run_state(run_id, running.paused(), force=True)
        return running.PAUSED
    return running.PAUSING


async def resume(client: PrefectClient, run_id: UUID) -> FlowRun:
    """Let a paused run continue."""
    flow_run = await client.read_flow_run(run_id)
    if flow_run.state_name == running.PAUSING:
        raise Misconfigured(f"run {run_id} is about to pause: it can be resumed when it has")
    if flow_run.state_name != running.PAUSED and not (flow_run.state and flow_run.state.is_paused()):
        raise Misconfigured(f"run {run_id} is not paused: {flow_run.state_name}")
    await client.set_flow_run_state(run_id, AwaitingRetry(scheduled_time=datetime.now(UTC)), force=True)
    return await client.read_flow_run(run_id)


def kind_of(flow_run: FlowRun) -> str:
    """Return what a run is, by its parameters: `dispatch`, `retrieval` or `query`."""
    if "source" not in flow_run.parameters:
        return "dispatch"
    return "retrieval" if {"targets", "into"} & flow_run.parameters.keys() else "query"


async def jobs(
    client: PrefectClient,
    limit: int,
    offset: int = 0,
    flows: tuple[str, ...] = ("dispatch", "retrieve"),
    states: tuple[StateType, ...] = (),
    like: str = "",
    since: datetime | None = None,
    ids: Sequence[str] | None = None,
) -> list[FlowRun]:
    """Return the newest runs of some flows, dispatches and retrievals unless others are named.

    Args:
        states: only those that are in one of these.
        like: only those whose names hold this: a dispatch's has its id and its targets.
        since: only those that were to begin after this.
        ids: only these.
    """
    body = await _asked(client, flows, _wanted(states, like, since, ids))
    body |= {"sort": FlowRunSort.EXPECTED_START_TIME_DESC, "limit": limit, "offset": offset}
    return listed((await client.request("POST", "/flow_runs/filter", json=body)).json())


async def count(
    client: PrefectClient,
    flows: tuple[str, ...],
    states: tuple[StateType, ...] = (),
    like: str = "",
    since: datetime | None = None,
    ids: Sequence[str] | None = None,
) -> int:
    """Return how many runs `jobs` would return without a limit."""
    body = await _asked(client, flows, _wanted(states, like, since, ids))
    return int((await client.request("POST", "/flow_runs/count", json=body)).json())


async def _asked(client: PrefectClient, flows: tuple[str, ...], wanted: FlowRunFilter) -> dict[str, Any]:
    """Return what a request for runs of some flows asks for, as the database finds it soonest."""
    deployments = await _deployments(client, flows)
    if len(deployments) == 1:  # the order in which they are wanted is that of an index, if there is one
        wanted.deployment_id = FlowRunFilterDeploymentId(any_=deployments)
        return {"flow_runs": wanted.model_dump(mode="json", exclude_none=True)}
    of_several = DeploymentFilter(id=DeploymentFilterId(any_=deployments))
    return {
        "flow_runs": wanted.model_dump(mode="json", exclude_none=True),
        "deployments": of_several.model_dump(mode="json", exclude_none=True),
    }


_ids: WeakKeyDictionary[PrefectClient, dict[str, tuple[float, UUID]]] = WeakKeyDictionary()


async def _deployments(client: PrefectClient, flows: tuple[str, ...]) -> list[UUID]:
    """Return the ids of our deployments of some flows; a client asks for each now and then only."""
    known, now = _ids.setdefault(client, {}), time.monotonic()
    for name in flows:
        if name not in known or now - known[name][0] > KNOWN_S:
            known[name] = now, (await deployed(client, name)).id
    return [known[name][1] for name in flows]


def _wanted(
    states: tuple[StateType, ...], like: str, since: datetime | None, ids: Sequence[str] | None
) -> FlowRunFilter:
    return FlowRunFilter(
        id=None if ids is None else FlowRunFilterId(any_=[UUID(one) for one in ids]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[*states])) if states else None,
        name=FlowRunFilterName(like_=like) if like else None,
        expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"after_": since}) if since else None,
    )


async def find(client: PrefectClient, job: str, flows: tuple[str, ...] = ("dispatch", "retrieve")) -> FlowRun:
    """Find a run by its id, the beginning of it, or the id of its dispatch.

    Raises:
        NotFound: there is no such run.
        Misconfigured: the id is empty, or means several runs; the message lists them.
    """
    job = job.strip().lower()
    try:
        return await client.read_flow_run(UUID(job))
    except (ValueError, ObjectNotFound):
        pass
    found = await _meant(client, job, flows) if job else await jobs(client, SHOWN_JOBS, flows=flows)
    if not found and job:
        raise NotFound(f"no job {job}: `talaria jobs list` shows them")
    if len(found) == 1 and job:
        return found[0]
    several = len(found) if job else await count(client, flows)
    more = f", and {several - SHOWN_JOBS} more" if several > SHOWN_JOBS else ""
    candidates = ", ".join(f"{run.id} ({run.state_name})" for run in found[:SHOWN_JOBS]) or "there are none"
    what = f"{job} means {several} jobs" if job else "no job is named"
    raise Misconfigured(f"{what}: {candidates}{more}")


async def _meant(client: PrefectClient, job: str, flows: tuple[str, ...]) -> list[FlowRun]:
    """Return the runs of a dispatch, or those whose ids begin so, the newest first."""
    try:
        path: Any = BEGINNING.format(beginning=quote(job, safe=""))
        answer = await client.request("GET", path)
    except (ObjectNotFound, PrefectHTTPStatusError):  # a Prefect server elsewhere has no such path
        every = [run async for run in _all_jobs(client, flows)]
        return [run for run in every if str(run.id).startswith(job) or dispatch_of(run) == job]
    found = [run for run in await jobs(client, PAGE, flows=flows, like=job) if dispatch_of(run) == job]
    if ids := answer.json():
        known = {run.id for run in found}
        found += [run for run in await jobs(client, PAGE, flows=flows, ids=ids) if run.id not in known]
    return found


async def _all_jobs(client: PrefectClient, flows: tuple[str, ...]) -> AsyncIterator[FlowRun]:
    offset = 0
    while page := await jobs(client, PAGE, offset, flows):
        for run in page:
            yield run
        offset += len(page)


def dispatch_of(flow_run: FlowRun) -> str:
    """Return the dispatch id in a run's name; "" until its files have been read."""
    return dispatch_in(flow_run.name)
