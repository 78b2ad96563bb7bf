"""Runs that rest and are called before their time: what they wait for is there (`tasks.dispatch.line`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container
from contextlib import suppress
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry

from blocks import Target
from talaria.engine import hosts
from talaria.engine.due import come
from tasks.dispatch import line
from tasks.dispatch.hours import is_open
from tasks.dispatch.lately import loaded
from tasks.replaced import replaced
from transfer.errors import DispatchError
from transfer.ledger import Ledger

HOURS_AT_ONCE = 50  # runs that are called by one look as their target has other hours
MARGIN_S = 0.1  # after that time, for the clocks of two machines
RESTS = str(AwaitingRetry().name)  # name of the state of a run that rests


async def bring_forward(client: PrefectClient, ledger: Ledger, run_id: UUID, has_begun: Callable[[UUID], bool]) -> None:
    """Let a run that rests begin now; one that rests no more leaves its lines to those behind it.

    That it was called stays noted until it begins: if the server can't be reached here, the next look calls it again.

    Args:
        has_begun: whether a process has taken it already, by the ledger, where it stands before the server says so.
    """
    try:
        state = (await client.read_flow_run(run_id)).state
    except ObjectNotFound:
        state = None
    if state is not None and (state.is_running() or state.is_pending()):
        return  # it is under way, at another worker, which looks when it rests
    if state is None or state.name != RESTS:  # somebody has ended it, or let it wait for something else
        await asyncio.to_thread(line.gone, ledger, str(run_id))
        return
    if await asyncio.to_thread(has_begun, run_id):  # its own time has come
        return
    now: State[Any] = AwaitingRetry(scheduled_time=come(ledger), message=state.message)
    await replaced(client, run_id, state, now)


async def look(
    client: PrefectClient, ledger: Ledger, active: Container[UUID], has_begun: Callable[[UUID], bool]
) -> None:
    """Call what waits for a target that is enabled again, or has other hours, and what somebody has called in vain.

    Args:
        active: the runs of this process, which look for that themselves.
    """
    lines = await asyncio.to_thread(ledger.waits.lines)
    for name in line.outside_hours(lines):
        await _wake(client, ledger, name, line.of_hours(name), _within_hours, HOURS_AT_ONCE)
    for name in line.disabled(lines):
        await _wake(client, ledger, name, line.to_be_enabled(name), _enabled, 1)
    for run_id in map(UUID, await asyncio.to_thread(ledger.waits.unheard, line.LOST_S)):
        if run_id not in active and not await waits_elsewhere(client, ledger, run_id):
            await bring_forward(client, ledger, run_id, has_begun)


async def _wake(
    client: PrefectClient, ledger: Ledger, name: str, queue: str, count: Callable[[Target], int], gone: int
) -> None:
    """Wake so many of a line as its target lets come; if that is there no more, `gone` of them, who say so."""
    so_many = gone
    with suppress(DispatchError):
        (target,) = await loaded(client, [name])
        so_many = count(target)
    if so_many:
        await asyncio.to_thread(line.wake, ledger, queue, so_many)


def _within_hours(target: Target) -> int:
    return HOURS_AT_ONCE if is_open(target) else 0


def _enabled(target: Target) -> int:
    return target.max_dispatches if target.enabled else 0  # the others are called by those


async def call(client: PrefectClient, ledger: Ledger, run_id: UUID, has_begun: Callable[[UUID], bool]) -> None:
    """Let a run that rests begin now; if it is for another host, and doesn't begin soon, call the next one.

    That host may be silent, or have no place for it: what it was called for, a slot, isn't kept free until it has. It
    keeps its turn for when it comes.
    """
    await bring_forward(client, ledger, run_id, has_begun)
    if hosts.several():
        await asyncio.sleep(line.LOST_S + MARGIN_S)
        if str(run_id) in await asyncio.to_thread(ledger.waits.unheard, line.LOST_S):
            await waits_elsewhere(client, ledger, run_id)


async def waits_elsewhere(client: PrefectClient, ledger: Ledger, run_id: UUID) -> bool:
    """Return True if a run that was called is due and has not come; if it is for another host, call the next one."""
    try:
        flow_run = await client.read_flow_run(run_id)
    except ObjectNotFound:
        return False
    due = flow_run.next_scheduled_start_time
    if flow_run.state_name != RESTS or due is None or due > come(ledger):
        return False
    if not await hosts.here([flow_run]):  # else it is for this host's next free place
        await asyncio.to_thread(line.gone, ledger, str(run_id))
    return True
