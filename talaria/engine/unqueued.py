"""Runs whose queue somebody has removed at a Prefect server elsewhere: the queue is made again, and they are begun.

The embedded server's front door refuses that. Prefect leaves such runs, and the deployments, the name of their queue
alone, lists the runs in none, and lets nobody put them into another.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, DeploymentFilterWorkQueueName
from prefect.client.schemas.sorting import DeploymentSort
from prefect.exceptions import ObjectNotFound

from talaria.engine import hosts
from talaria.engine.registry import CHECKS, QUEUES, make_pool
from talaria.engine.table import flow_at
from talaria.settings import POOL
from tasks.paging import every

LOOK_S = 60.0  # between two looks
logger = logging.getLogger("prefect.worker")


class Unqueued:
    """Looks after the queues that this host's runs come into.

    Attributes:
        ids: of the runs that have lost theirs and wait, those that have waited longest first.
    """

    def __init__(self, client: PrefectClient) -> None:
        self.client = client
        self.ids: list[UUID] = []
        self._queues: set[UUID] | None = None  # that there were at the last look; None before the first
        self._next = 0.0

    async def look(self) -> None:
        """Make queues again that are gone, and find the runs that stood in them.

        Raises:
            httpx.HTTPError, PrefectException: as the server does.
        """
        if getattr(self.client, "saved", "") or time.monotonic() < self._next:
            return
        there, ours = await self._there(), _ours()
        if gone := sorted(ours - there.keys()):
            logger.warning("somebody has removed the queues %s: they are made again", ", ".join(gone))
            await make_pool(self.client)
            there = await self._there()
        now = {there[name] for name in ours & there.keys()}
        if gone or self.ids or (await self._are_any(ours) if self._queues is None else self._queues != now):
            await self._put_right(ours)
            self.ids = await self._without(ours)
        self._queues, self._next = now, time.monotonic() + LOOK_S

    async def _there(self) -> dict[str, UUID]:
        try:
            return {one.name: one.id for one in await every(self.client.read_work_queues, work_pool_name=POOL)}
        except ObjectNotFound:  # the pool is gone, with all of them
            return {}

    async def _put_right(self, ours: set[str]) -> None:
        """Put deployments of our flows back into their queue; they have lost it as well, and so would their runs."""
        named = DeploymentFilter(work_queue_name=DeploymentFilterWorkQueueName(any_=[*ours]))
        for one in await every(self.client.read_deployments, deployment_filter=named, sort=DeploymentSort.NAME_ASC):
            if not one.work_pool_name and flow_at(one.entrypoint or ""):
                body = {"work_pool_name": POOL, "work_queue_name": one.work_queue_name}
                await self.client.request("PATCH", "/deployments/{id}", path_params={"id": one.id}, json=body)

    async def _are_any(self, ours: set[str]) -> bool:
        """Return True if more runs wait under the names of our queues than in them."""
        in_them = _wanted(ours) | {"work_pools": {"name": {"any_": [POOL]}}}
        counts = [
            int((await self.client.request("POST", "/flow_runs/count", json=body)).json())
            for body in (_wanted(ours), in_them)
        ]
        return counts[0] > counts[1]  # what has come between them makes the second larger

    async def _without(self, ours: set[str]) -> list[UUID]:
        async def ask(**page: int) -> list[Any]:
            body = _wanted(ours) | page | {"sort": "EXPECTED_START_TIME_ASC"}
            return list((await self.client.request("POST", "/flow_runs/filter", json=body)).json())

        found = {one["id"]: one for one in await every(ask) if not one["work_queue_id"]}  # who goes shifts the pages
        deployments = await self._ours_of({str(one["deployment_id"]) for one in found.values() if one["deployment_id"]})
        return [UUID(run_id) for run_id, one in found.items() if one["deployment_id"] in deployments]

    async def _ours_of(self, ids: set[str]) -> set[str]:
        """Return those deployments that are of our flows: another pool may have had a queue of the same name."""
        if not ids:
            return set()
        wanted = DeploymentFilter(id=DeploymentFilterId(any_=[*map(UUID, sorted(ids))]))
        there = await every(self.client.read_deployments, deployment_filter=wanted, sort=DeploymentSort.NAME_ASC)
        return {str(one.id) for one in there if flow_at(one.entrypoint or "")}


def _ours() -> set[str]:
    """Return the names of the queues that runs for this host come into."""
    return {*QUEUES} | ({hosts.own(one) for one in QUEUES if one != CHECKS} if hosts.several() else set())


def _wanted(queues: set[str]) -> dict[str, Any]:
    """Return what asks for runs of these queues, by their names alone, that are due or at rest."""
    before = {"before_": datetime.now(UTC).isoformat()}
    return {
        "flow_runs": {
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "work_queue_name": {"any_": sorted(queues)},
            "expected_start_time": before,
        }
    }
