"""Slots of a target: they limit how many dispatches it gets at once, over all workers.

The server counts them, as a global concurrency limit; a slot is a lease, renewed while it is held, so that a killed
worker's slot is free again after LEASE_S. Uses the present client: Prefect's own `concurrency` makes three more, and a
thread, for each slot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import PrefectException

from blocks.base import Target
from tasks.dispatch import line
from tasks.targets import limit, limit_name
from transfer.database import LOST
from transfer.ledger import Ledger

LEASE_S = 60  # a killed worker's slot is free again after this
WAIT_S = 2.0  # between two tries to get a slot, unless one becomes free in this process
LOCKED = 423  # HTTP: all slots are taken


class NoSlot(Exception):
    """All slots of a target are taken."""


_waiting: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
_held: dict[str, dict[UUID, tuple[float, int, int]]] = {}  # by target: since when, how many, of how many


def full(seconds: float) -> set[str]:
    """Return the names of the targets of which this process has held all slots for so long."""
    before, found = time.monotonic() - seconds, set[str]()
    for name, leases in [*_held.items()]:
        old = [one for one in [*leases.values()] if one[0] <= before]
        if old and sum(count for _, count, _ in old) >= max(most for _, _, most in old):
            found.add(name)
    return found


async def room(target: Target, wait_s: float) -> bool:
    """Wait until this process does not hold all slots of a target; return False if it still does after a time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + wait_s
    with _when_free(limit_name(target.name)) as free:
        while target.name in full(0.0):
            if (left := end - loop.time()) <= 0:
                return False
            free.clear()
            if target.name in full(0.0):  # not freed since
                with suppress(TimeoutError):
                    await asyncio.wait_for(free.wait(), left)
    return True


@asynccontextmanager
async def slots(
    client: PrefectClient,
    target: Target,
    count: int = 1,
    wait_s: float | None = None,
    ledger: Ledger | None = None,
    run: str = "",
) -> AsyncIterator[None]:
    """Wait for slots of a target, and hold them while the block runs.

    Args:
        wait_s: the longest wait in seconds; None for as long as it takes.
        ledger: in which those stand that are to be woken when the slots are free again, and what is held.
        run: that holds them; "" for one of which nothing is noted.

    Raises:
        NoSlot: none has become free in that time.
        httpx.HTTPError, PrefectException: the server does not answer as it should.
    """
    lease = await _taken(client, target, count, wait_s)
    _held.setdefault(target.name, {})[lease] = time.monotonic(), count, target.max_dispatches
    renewing: asyncio.Task[None] | None = None

    async def note() -> None:
        if ledger is not None and run:
            with suppress(*LOST):  # then it is noted when the lease is renewed
                await asyncio.to_thread(ledger.held.note, str(lease), target.name, run, count)

    def end(ledger: Ledger) -> None:
        ledger.held.forget(str(lease))
        line.wake(ledger, target.name, count)

    try:
        await note()
        renewing = asyncio.create_task(_renew(client, lease, note))
        yield
    finally:
        if renewing:
            renewing.cancel()
        _held[target.name].pop(lease)
        await _given_back(client, target, lease)
        if ledger is not None:
            with suppress(*LOST):  # then they come by themselves
                await asyncio.shield(asyncio.to_thread(end, ledger))


async def _taken(client: PrefectClient, target: Target, count: int, wait_s: float | None) -> UUID:
    name, known = limit_name(target.name), False
    loop = asyncio.get_running_loop()
    end = None if wait_s is None else loop.time() + wait_s
    while True:
        with _when_free(name) as free:
            try:
                lease, allowed = await _asked(client, target, count)
            except httpx.HTTPStatusError as exc:
                if exc.response.status_code != LOCKED:
                    raise
                lease, allowed = None, None
            if lease and (known or allowed == target.max_dispatches):
                return lease
            if not known:  # it is not there, or somebody has changed the target since
                if lease:
                    await _given_back(client, target, lease)
                await limit(client, target)
                known = True
                continue
            if end is not None and loop.time() >= end:
                raise NoSlot(name)
            with suppress(TimeoutError):
                await asyncio.wait_for(free.wait(), WAIT_S if end is None else min(WAIT_S, end - loop.time()))


async def _asked(client: PrefectClient, target: Target, count: int) -> tuple[UUID | None, int | None]:
    """Ask for slots; return the lease, None if there is no such limit, and how many slots there are."""
    asking = asyncio.ensure_future(
        client.increment_concurrency_slots_with_lease([limit_name(target.name)], count, "concurrency", LEASE_S)
    )
    try:
        answer = (await asyncio.shield(asking)).json()
    except asyncio.CancelledError:
        with suppress(httpx.HTTPError, PrefectException):  # it may have been granted: nobody else knows of it
            await _given_back(client, target, UUID((await asking).json()["lease_id"]))
        raise
    limits = answer["limits"]
    return (UUID(answer["lease_id"]), int(limits[0]["limit"])) if limits else (None, None)


async def _given_back(client: PrefectClient, target: Target, lease: UUID) -> None:
    with suppress(httpx.HTTPError, PrefectException):  # then it ends by itself
        await asyncio.shield(client.release_concurrency_slots_with_lease(lease))
    for loop, event in list(_waiting.get(limit_name(target.name), ())):
        with suppress(RuntimeError):  # its loop has just been closed
            loop.call_soon_threadsafe(event.set)


async def _renew(client: PrefectClient, lease: UUID, note: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(LEASE_S / 2)
        await note()
        with suppress(httpx.HTTPError, PrefectException):
            await client.renew_concurrency_lease(lease, LEASE_S)


class _when_free:
    """Return an event that is set when a slot of this name becomes free in this process."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> asyncio.Event:
        event = asyncio.Event()
        self._entry = (asyncio.get_running_loop(), event)
        _waiting.setdefault(self._name, set()).add(self._entry)
        return event

    def __exit__(self, *exc: object) -> None:
        _waiting[self._name].discard(self._entry)
