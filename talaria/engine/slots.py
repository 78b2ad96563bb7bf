"""Frees slots of targets that nobody holds.

The Prefect server counts those that are taken, and has a lease for each taking; the ledger knows whose it is
(`transfer.held`). What a killed process held is given back by its leases: who set the count to nothing would leave
these to end later, and free slots that others hold by then. Where a server has lost its leases, as one does at each
start that keeps them in its memory, it counts their slots for ever: if more are counted for two minutes than the ledger
knows of, the count is put right.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import ObjectNotFound, PrefectException

from tasks.dispatch import breaker, line
from tasks.targets import limit_name
from transfer.home import Home
from transfer.ledger import Ledger

LOST_S = 120.0  # leases of whom the ledger does not know end within 60 s, which the server notices within 15 s
LOOKS = 4  # in that time, at least: between two calls of ours, a count may be ahead of the ledger
logger = logging.getLogger(__name__)


@dataclass
class Excess:
    """How many more slots of a target are counted than the ledger knows of.

    Attributes:
        since: when that was seen first, by the clock of who looks.
        least: of all looks since then.
    """

    since: float
    least: int
    looks: int = 0


class Slots:
    """The slots of all targets, as far as a worker looks after them."""

    def __init__(
        self,
        client: PrefectClient,
        home: Home,
        ledger: Ledger,
        alive: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client, self.home, self.ledger, self.alive = client, home, ledger, alive
        self._clock = clock
        self._excess: dict[str, Excess] = {}  # by target

    async def look(self) -> None:
        """Give back what the dead held, and put counts right that keep somebody waiting."""
        await give_back(self.client, self.ledger, self.alive)
        lines = await asyncio.to_thread(self.ledger.waits.lines)
        for target in {one for one in lines if not (line.is_for_a_change(one) or breaker.is_queue(one))} | {
            *self._excess
        }:
            await self._put_right(target)

    async def _put_right(self, target: str) -> None:
        excess = await self._counted_only(target)
        if excess <= 0:
            self._excess.pop(target, None)
            return
        one = self._excess.setdefault(target, Excess(self._clock(), excess))
        one.least, one.looks = min(one.least, excess), one.looks + 1
        if self._clock() - one.since < LOST_S or one.looks < LOOKS or await self._others_work():
            return
        del self._excess[target]
        with breaker.only_one(self.home, self.ledger, f"slots of {target}") as mine:
            count = min(one.least, await self._counted_only(target)) if mine else 0
            if count <= 0:
                return
            body = {"names": [limit_name(target)], "slots": count}
            await self.client.request("POST", "/v2/concurrency_limits/decrement", json=body)
        logger.warning("%s: %d slots were counted that nobody holds: they are free again", target, count)
        await asyncio.to_thread(line.wake, self.ledger, target, count)

    async def _counted_only(self, target: str) -> int:
        """Return how many more slots of a target the server counts than the ledger knows of."""
        try:
            limit = await self.client.read_global_concurrency_limit_by_name(limit_name(target))
        except ObjectNotFound:
            return 0
        held = await asyncio.to_thread(self.ledger.held.all)
        return limit.active_slots - sum(one.slots for one in held if one.target == target)

    async def _others_work(self) -> bool:
        """Return True if workers of another ledger take runs from the server: ours doesn't know what they hold."""
        from talaria.engine.registry import workers  # imports every driver, and every command imports this module

        names = {one.name for one in await workers(self.client)}
        if not self.ledger.shared:
            return bool(names - await asyncio.to_thread(self.home.owners))
        hosts = await asyncio.to_thread(self.ledger.runs.hosts)
        return any(name.rpartition("-")[0] not in hosts for name in names)


async def give_back(client: PrefectClient, ledger: Ledger, alive: Callable[[str], bool]) -> None:
    """Give back the slots that processes hold which are dead, or don't have the run any more."""
    for one in await asyncio.to_thread(ledger.held.all):
        if one.at_work and await asyncio.to_thread(alive, one.owner):
            continue
        if not await asyncio.to_thread(ledger.held.forget, one.lease):
            continue  # another one does it
        with suppress(httpx.HTTPError, PrefectException):  # then its lease ends by itself
            await client.release_concurrency_slots_with_lease(UUID(one.lease))
        await asyncio.to_thread(line.wake, ledger, one.target, one.slots)
