"""Says of dispatches that ended while nobody was at work that this was their end.

A run that is cancelled while a worker executes it says so itself. Of one that waits, in a queue or at rest, the server
sets the state and nobody is at work: a worker that hears of it, of whichever host, says it; once, however many hear. So
it is with one that somebody sets to any other state that is an end, or Prefect to Failed, whose pages suspend for a
time only. What waits of a retrieval is cancelled with it. So it is with a run whose process died while it was being
cancelled, and with one that is given up, as too many workers died with it.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound

from tasks.dispatch import kept, rest
from tasks.dispatch.asked import asked_list
from tasks.dispatch.ends import UNKNOWN, say_stopped, unsaid_is_no_failure
from tasks.names import split
from tasks.paging import every
from tasks.retrieve.dispatches import end_waiting
from tasks.retrieve.ending import end_at_rest
from tasks.targets import load
from transfer.deliveries import WHOLE
from transfer.errors import DispatchError
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.receipt import State as Stands

AT_FIRST = timedelta(days=1)  # how far back a worker that begins looks
ON = timedelta(minutes=5)  # before the last look, and afterwards each EACH_S, for events that were lost
EACH_S = 60.0
STOPPED = (*TERMINAL_STATES, StateType.CANCELLING)
ENDED = [StateType.CANCELLED, StateType.FAILED]  # those that are looked back for: of the others, most ran to their end
WAITED = (StateType.SCHEDULED, StateType.PENDING, StateType.PAUSED)


async def was_cancelled(client: PrefectClient, ledger: Ledger, run_id: UUID) -> None:
    """Say that a run has ended, if that was made of it while it waited."""
    try:
        flow_run = await client.read_flow_run(run_id)
    except ObjectNotFound:
        return
    await _look_at(client, ledger, flow_run)


class LookingBack:
    """Says so of those whose event was lost, or came while no worker was there."""

    def __init__(self) -> None:
        self._next = 0.0  # in monotonic seconds
        self._since = datetime.now(UTC) - AT_FIRST

    def soon(self) -> None:
        """Have the next look made at once: events may just have been lost."""
        self._next = 0.0

    async def heard(self, client: PrefectClient, ledger: Ledger, run_id: UUID) -> None:
        """Say that a run has ended, as `was_cancelled`; what goes wrong with that is made good soon."""
        try:
            await was_cancelled(client, ledger, run_id)
        except Exception:
            self.soon()
            raise

    async def look(self, client: PrefectClient, ledger: Ledger, pool: str) -> None:
        """Look for them, if it is time."""
        if time.monotonic() < self._next:
            return
        begun = datetime.now(UTC)
        self._next = time.monotonic() + EACH_S  # unless there is a reason meanwhile to look soon
        try:
            await self._look(client, ledger, pool)
        except BaseException:
            self.soon()
            raise
        self._since = begun - ON

    async def _look(self, client: PrefectClient, ledger: Ledger, pool: str) -> None:
        found = await every(
            client.read_flow_runs,
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ENDED)),
                end_time=FlowRunFilterEndTime.model_validate({"after_": self._since}),
            ),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
            sort=FlowRunSort.ID_DESC,
        )
        for flow_run in found:
            await _look_at(client, ledger, flow_run)


async def _look_at(client: PrefectClient, ledger: Ledger, flow_run: FlowRun) -> None:
    state, run_id, asked = flow_run.state, str(flow_run.id), flow_run.parameters
    if state is None or not state.is_final():
        return
    why = _why(state)
    if _is_retrieval(asked):
        waited = await _waited(client, flow_run)
        if waited or state.is_cancelled():
            await end_waiting(client, Home.current(), run_id)
        if waited:
            await end_at_rest(client, Home.current(), flow_run, why)
        return
    if not (asked.get("targets") and asked.get("paths")):
        return
    mark = str(state.id)
    if ledger.happenings.standing(f"cancelled/{run_id}") == mark or ledger.runs.owner_of(run_id) is not None:
        return
    if not state.is_cancelled() and not await asyncio.to_thread(_waits, ledger, run_id):
        return
    if await _waited(client, flow_run):
        await _say(client, ledger, flow_run, mark, why)
        await asyncio.to_thread(rest.forget, ledger, run_id)  # whoever retries it begins anew


def _why(state: State[Any]) -> str:
    """Return why a run has failed that was given a state while it waited; "" if that says only that it is over."""
    if not (state.is_failed() or state.is_crashed()):
        return ""
    by_hand = f"it was set to {state.name} while it waited"
    return f"{by_hand}: {state.message}" if state.message else by_hand


def _waits(ledger: Ledger, run_id: str) -> bool:
    """Return True unless a run has said how it ended: most of those that fail do so by themselves."""
    whole = ledger.deliveries.of([run_id]).get(run_id, {}).get(WHOLE)
    return whole is None or whole.state == Stands.WAITING


def _is_retrieval(asked: dict[str, Any]) -> bool:
    return bool(asked.get("source") and (asked.get("targets") or asked.get("into")))


async def _waited(client: PrefectClient, flow_run: FlowRun) -> bool:
    """Return True if nobody executed a run when that was made of it which it is now."""
    states = sorted(await client.read_flow_run_states(flow_run.id), key=lambda one: one.timestamp)
    before = [one.type for one in states if one.type not in STOPPED]
    return bool(before) and before[-1] in WAITED


async def was_cut_off(client: PrefectClient, flow_run: FlowRun, why: str = "") -> None:
    """Say that a run has ended whose process has died, in the state in which it was found; once.

    Args:
        why: it is given up, in a sentence; "" if it was cancelled.
    """
    home, asked = Home.current(), flow_run.parameters
    if _is_retrieval(asked):
        await end_waiting(client, home, str(flow_run.id))
        await end_at_rest(client, home, flow_run, why, dead=True)
    elif asked.get("paths") and asked.get("targets"):
        with unsaid_is_no_failure(str(flow_run.id)), Ledger(home.ledger) as ledger:
            await _say(client, ledger, flow_run, str(flow_run.state and flow_run.state.id), why)
            await asyncio.to_thread(rest.forget, ledger, str(flow_run.id))


async def _say(client: PrefectClient, ledger: Ledger, flow_run: FlowRun, mark: str, given_up: str = "") -> None:
    document = await kept.read(client, flow_run.id) or {}
    names = [await _known(client, name) for name in asked_list(flow_run.parameters, "targets")]
    paths = asked_list(flow_run.parameters, "paths")
    what = ledger, str(flow_run.id), mark, list(dict.fromkeys(names)), paths, document
    await asyncio.to_thread(say_stopped, *what, given_up=given_up)


async def _known(client: PrefectClient, name: str) -> str:
    try:
        await load(client, [name], secrets=False)
    except DispatchError:
        return UNKNOWN
    return split(name)[1]
