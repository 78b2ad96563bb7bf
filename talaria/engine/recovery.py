"""Takes up what a crash left unfinished: the runs of processes that no longer exist.

The ledger knows which process began a run; the kernel knows whether that process is alive, and of another host's its
lease says so (`transfer.lease`). A run whose owner is dead is put back into the queue under its own id, where the
ledger makes it send only what is missing.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentTaskRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import AwaitingRetry, Cancelled, Failed

from talaria.engine import hosts, slots
from talaria.engine.leftovers import clear_staging
from tasks.dispatch.running import PAUSING, paused
from tasks.paging import every
from tasks.replaced import replaced
from tasks.retrieve.dispatches import CUT_OFF
from transfer import lease
from transfer.home import Home, host_name, locked
from transfer.ledger import Ledger

MAX_CRASHES = 20  # a run that crashed that often is left for people to look at
CRASHES = "talaria.crashes"  # label of a run: how often it was taken up, since somebody has begun it
CRASHED = "talaria.crashed"  # label of a run: when it was taken up last, in seconds since 1970
APART_S = 86_400.0  # crashes further apart are not one's own: a long run meets those of others
PATIENCE_S = 600  # how long a run's end waits for a server that is away
TAKEN_BY = "taken by "  # begins what the state of a Pending run says, then comes the name of a process
ABANDONED_S = 120.0  # after which a run should have begun; Prefect takes a worker for offline after 90 s
TAKEN_UP = "taken up after a crash"  # what the state of a run says that is back in the queue
logger = logging.getLogger(__name__)
_taking_over: set[str] = set()  # the runs that this process takes over just now


async def recover(client: PrefectClient, home: Home, pool: str, *, alone: bool) -> list[str]:
    """Put the runs of dead owners back into the queue; remove what they left in staging.

    Args:
        alone: whether only the processes of this state directory work for the server (the embedded one).

    Returns:
        The ids of the runs that were taken up.
    """
    taken: list[str] = []
    with Ledger(home.ledger) as ledger:
        if ledger.shared:  # each worker looks after the runs of all hosts, and of many who do, one takes a run up
            await asyncio.to_thread(clear_staging, home)
            return taken
        # Asked first: a run is in the ledger before it is under way at the server.
        lost = await _under_way(client, pool) if alone else set()
        owners, alive = ledger.runs.unfinished(), lease.living(home, ledger)
        lost = {run_id for run_id in lost | set(owners) if not (owners.get(run_id) and alive(owners[run_id]))}
        for run_id in await _parts_first(client, lost):
            former = owners.get(run_id)
            if former is None and await elsewhere(client, await client.read_flow_run(UUID(run_id)), online=False):
                continue
            if ledger.runs.owner_of(run_id) != former:  # another worker has begun it since
                continue
            if again := await _take_up(client, run_id):
                taken.append(run_id)
            ledger.runs.ends(run_id, former or "", goes_on=again)  # who has begun it by now has it
        await slots.give_back(client, ledger, alive)
        await asyncio.to_thread(clear_staging, home)
    return taken


async def abandoned(client: PrefectClient, home: Home, ledger: Ledger, begun: list[FlowRun]) -> list[str]:
    """Put runs back into the queue that are Pending or Running, and that no process has, whatever the ledger knows.

    Nothing was sent for them since: whoever begins them next, nothing goes out twice. Somebody has set that by hand.

    Returns:
        The ids of the runs that were taken up.
    """
    from talaria.engine.registry import workers  # imports every driver, and every command imports this module

    late = datetime.now(UTC).timestamp() - ABANDONED_S
    old = [(one, one.state) for one in begun if one.state and one.state.timestamp.timestamp() < late]
    taken: list[str] = []
    if not old:
        return taken
    ours = home.owners()
    others = {worker.name for worker in await workers(client)} - ours
    with locked(home.root / "abandoned.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
        for flow_run, state in old if mine else ():
            run_id = str(flow_run.id)
            owner = ledger.runs.owner_of(run_id)
            if owner and lease.living(home, ledger)(owner):
                continue
            taker = await _taker(client, flow_run)
            over = bool(taker) and _ended_here(ledger, run_id, taker)
            if not (state.is_pending() and over):  # else the claim came late (`lanes.claim`), and its taker has let go
                # Where nobody is named, it may be any worker's.
                if taker in others if taker else others:
                    continue
                if taker in ours if state.is_pending() else taker and not over:
                    continue
            now = (await client.read_flow_run(flow_run.id)).state
            if now is None or now.id != state.id:
                continue
            if again := await _take_up(client, run_id):
                taken.append(run_id)
            ledger.runs.ends(run_id, owner or "", goes_on=again)
    return taken


async def taken_over(
    client: PrefectClient, ledger: Ledger, owner: str, alive: Callable[[str], bool], at_work: Callable[[str], bool]
) -> list[str]:
    """Put runs back into the queue that nobody executes; return their ids.

    Those of owners whose leases have ended, on whichever host, and our own that the server was not there to settle, or
    to take over. Of several who see one, one does so: who becomes, or is, its owner in the ledger, until it is done.

    Args:
        at_work: whether this process executes a run, or has settled it.
    """
    taken, unfinished = [], ledger.runs.unfinished()
    left = [one for one, former in unfinished.items() if former == owner or (ledger.shared and not alive(former))]
    for run_id in await _parts_first(client, {one for one in left if not at_work(one)}):
        former = unfinished[run_id]
        if at_work(run_id) or run_id in _taking_over:
            continue
        if former == owner:  # by now it may have ended, and be another's
            mine = ledger.runs.unfinished().get(run_id) == owner
        else:
            mine = ledger.runs.claimed(run_id, owner, alive)
        if not mine:
            continue
        _taking_over.add(run_id)
        try:
            if again := await _take_up(client, run_id):
                taken.append(run_id)
            ledger.runs.ends(run_id, owner, goes_on=again)
        except (httpx.HTTPError, PrefectException) as exc:  # it stays ours until the next look
            logger.warning("run %s can't be taken over yet: %s", run_id, exc)
        finally:
            _taking_over.discard(run_id)
    return taken


async def _parts_first(client: PrefectClient, run_ids: set[str]) -> list[str]:
    """Return the ids of runs with those first that are parts of others: who has a whole next makes of them what is due.

    A part would else be ended when its whole goes on with it already.
    """
    found = (
        await every(
            client.read_flow_runs,
            flow_run_filter=FlowRunFilter(
                id=FlowRunFilterId(any_=[*map(UUID, run_ids)]),
                parent_task_run_id=FlowRunFilterParentTaskRunId(is_null_=False),
            ),
            sort=FlowRunSort.ID_DESC,
        )
        if len(run_ids) > 1
        else ()
    )
    parts = {str(one.id) for one in found}
    return sorted(run_ids, key=lambda one: (one not in parts, one))


async def elsewhere(client: PrefectClient, flow_run: FlowRun, *, online: bool) -> bool:
    """Return True if the worker that took a run, of which our ledger knows nothing, is another host's.

    Args:
        online: count only one that sends heartbeats.
    """
    name = await _taker(client, flow_run)
    if not name or _is_here(name):
        return False
    from talaria.engine.registry import workers  # imports every driver, and every command imports this module

    return not online or name in {worker.name for worker in await workers(client)}


def _ended_here(ledger: Ledger, run_id: str, taker: str) -> bool:
    """Return True if a run's last part ended under our ledger, which knows then that nobody is at work on it."""
    return ledger.runs.is_over(run_id) and (ledger.shared or _is_here(taker))


def _is_here(name: str) -> bool:
    """Return True if a worker of this name is, or was, this host's."""
    return name.rpartition("-")[0] == host_name()


async def _taker(client: PrefectClient, flow_run: FlowRun) -> str:
    """Return the name of the process that took a run last; "" if its states name none."""
    states = [flow_run.state] if flow_run.state and flow_run.state.is_pending() else []
    states = states or await client.read_flow_run_states(flow_run.id)
    said = [state.message or "" for state in states if state and (state.message or "").startswith(TAKEN_BY)]
    return said[-1].removeprefix(TAKEN_BY) if said else ""


async def taken_up(client: PrefectClient, pool: str) -> list[str]:
    """Return the ids of the runs that are back in the queue after a crash, and that no worker has begun yet."""
    queued = await _runs(client, pool, [StateType.SCHEDULED])
    return [str(run.id) for run in queued if run.state and (run.state.message or "").startswith(TAKEN_UP)]


async def settle(run_id: str) -> bool:
    """Make sure that a run which has ended in this process has also ended at the server.

    An engine that lost its server may leave a run in Running: then it is put back into the queue. Waits for the
    server if it is away.

    Returns:
        False if it is away for so long that this is left to `taken_over`, or to `recover`: the ledger must not have it
        that the run has ended.
    """
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            async with get_client() as client:
                await _take_up(client, run_id)
            return True
        except (httpx.HTTPError, PrefectException):
            await asyncio.sleep(2)
    logger.error("run %s could not be settled: the server is away", run_id)
    return False


async def _take_up(client: PrefectClient, run_id: str) -> bool:
    """Put an unfinished run back into the queue, or finish its cancellation."""
    try:
        flow_run = await client.read_flow_run(UUID(run_id))
    except ObjectNotFound:
        return False
    state = flow_run.state
    if state is None or state.type is StateType.SCHEDULED or state.is_paused():
        return False
    if state.is_final() and state.type is not StateType.CRASHED:
        return False
    if state.type is StateType.CANCELLING:
        await _say_cut_off(client, flow_run)
        await client.set_flow_run_state(flow_run.id, Cancelled(message="cancelled"), force=True)
        return False
    if state.name == PAUSING:  # it was killed before it had paused
        return await _replaced(client, flow_run, state, paused(), taken_up=False)
    if flow_run.parent_task_run_id is not None:  # a part of a run that is taken up itself, and makes it anew
        return await _replaced(client, flow_run, state, Cancelled(message=CUT_OFF), taken_up=False)
    now, crashes = time.time(), int(str(flow_run.labels.get(CRASHES, 0)))
    if now - float(str(flow_run.labels.get(CRASHED, now))) > APART_S:
        crashes = 0
    if crashes >= MAX_CRASHES:
        await _give_up(client, flow_run, crashes)
        return False
    labels: dict[str, Any] = {CRASHES: crashes + 1, CRASHED: now}
    other = hosts.where_it_waits(flow_run)
    if other and await hosts.may_leave(flow_run):
        other, labels[hosts.HOST] = "", ""
    await client.update_flow_run_labels(flow_run.id, labels)
    message = f"{TAKEN_UP}; waits for {other}, where its files are" if other else TAKEN_UP
    at_once = min(datetime.now(UTC), state.timestamp)  # by the server's clock, where ours is ahead
    again: State[Any] = AwaitingRetry(scheduled_time=at_once, message=message)
    return await _replaced(client, flow_run, state, again, taken_up=True)


async def _replaced(
    client: PrefectClient, flow_run: FlowRun, found: State[Any], state: State[Any], *, taken_up: bool
) -> bool:
    """Give a run a state, and return as `_take_up`; if somebody has set another one meanwhile, go by that."""
    if await replaced(client, flow_run.id, found, state):
        return taken_up
    return await _take_up(client, str(flow_run.id))


async def _say_cut_off(client: PrefectClient, flow_run: FlowRun, why: str = "") -> None:
    from talaria.engine.cancelled import was_cut_off  # imports every driver, and every command imports this module

    await was_cut_off(client, flow_run, why)


async def _give_up(client: PrefectClient, flow_run: FlowRun, crashes: int) -> None:
    """Let a run fail that may be what kills its workers; say so before, so that it is said in any case."""
    why = f"given up: its worker or server died {crashes} times while it ran: look why, then retry it"
    await _say_cut_off(client, flow_run, why)
    await client.set_flow_run_state(flow_run.id, Failed(message=why), force=True)
    await client.update_flow_run_labels(flow_run.id, {CRASHES: 0})  # where somebody retries it, it counts anew


async def _under_way(client: PrefectClient, pool: str) -> set[str]:
    """Return the pool's runs that are under way according to their state, whoever owns them."""
    under_way = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    return {str(run.id) for run in await _runs(client, pool, under_way)}


async def _runs(client: PrefectClient, pool: str, states: list[StateType]) -> list[FlowRun]:
    return await every(
        client.read_flow_runs,
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        sort=FlowRunSort.ID_DESC,
    )
