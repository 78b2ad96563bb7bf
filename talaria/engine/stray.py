"""Runs that no process executes, in a state in which no run stays: each is put into the one that it belongs in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled

from talaria.engine.called import RESTS
from talaria.engine.cancelled import was_cut_off
from talaria.engine.recovery import elsewhere
from talaria.engine.watch import StateChange, resuming
from tasks.dispatch import running
from transfer.ledger import Ledger

LATE_S = (0.5, 2.0)  # after which an event is looked into again: the server sends it before its transaction ends


async def look_after(client: PrefectClient, ledger: Ledger, alive: Callable[[str], bool], change: StateChange) -> None:
    """End the cancellation of a run that nobody executes, or let it go on after its pause."""
    for seconds in (0.0, *LATE_S):
        await asyncio.sleep(seconds)
        flow_run = await client.read_flow_run(change.run_id)
        state = flow_run.state
        if state is not None and state.type.value == change.type:
            break
    else:
        return
    owner = ledger.runs.owner_of(str(flow_run.id))
    if await _is_executed(client, alive, flow_run, owner):
        return
    if state.is_cancelling():  # while it waited for its next attempt, or its process has died
        if owner:
            await was_cut_off(client, flow_run)
        await client.set_flow_run_state(flow_run.id, Cancelled(), force=True)
        ledger.runs.ends(str(flow_run.id), owner or "")
    elif state.is_running():  # it ended when it was paused
        await client.set_flow_run_state(flow_run.id, resuming(ledger), force=True)


async def pause(client: PrefectClient, ledger: Ledger, alive: Callable[[str], bool], run_id: UUID) -> None:
    """Pause a run that nobody executes, if it came to rest without hearing that it was to pause."""
    for seconds in (0.0, *LATE_S):
        await asyncio.sleep(seconds)
        try:
            flow_run = await client.read_flow_run(run_id)
            states = sorted(await client.read_flow_run_states(run_id), key=lambda one: one.timestamp)
        except ObjectNotFound:
            return
        said = [one.name for one in states if one.name != RESTS]
        state = flow_run.state
        if said[-1:] == [running.PAUSING] and state is not None and state.name in (running.PAUSING, RESTS):
            if not await _is_executed(client, alive, flow_run, ledger.runs.owner_of(str(run_id))):
                await client.set_flow_run_state(run_id, running.paused(state.message or ""), force=True)
            return


async def _is_executed(
    client: PrefectClient, alive: Callable[[str], bool], flow_run: FlowRun, owner: str | None
) -> bool:
    return alive(owner) if owner else await elsewhere(client, flow_run, online=True)
