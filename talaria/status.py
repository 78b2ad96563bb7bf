"""What `talaria status` shows."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from talaria.server import healthy, running, use
from talaria.settings import POOL, client_environment
from transfer.home import Home


def collect(home: Home) -> dict[str, Any]:
    """Return the JSON of `status`; starts nothing."""
    url, address = os.environ.get("PREFECT_API_URL"), None
    if url:
        ok = healthy(url.rstrip("/"))
    else:
        address = running(home)
        ok = address is not None
        if address:
            url = address.url
            use(client_environment(home, address.url))
    document: dict[str, Any] = {"server": {"ok": ok, "url": url}, "workers": [], "queues": {}, "targets": []}
    return document | asyncio.run(_ask()) if ok else document


async def _ask() -> dict[str, Any]:
    from prefect import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
        WorkQueueFilter,
        WorkQueueFilterName,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort

    from talaria.engine.registry import QUEUES, workers
    from tasks.checking import last_checks
    from tasks.paging import every
    from tasks.targets import all_targets, facts

    async with get_client() as client:
        online = await workers(client)
        queues = {}
        for queue in QUEUES:
            waiting = await every(
                client.read_flow_runs,
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
                ),
                work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
                work_queue_filter=WorkQueueFilter(name=WorkQueueFilterName(any_=[queue])),
                sort=FlowRunSort.ID_DESC,
            )
            queues[queue] = len(waiting)
        targets = await all_targets(client)
        checks = await last_checks(client, targets)
    return {
        "workers": [
            {
                "name": worker.name,
                "status": "ONLINE",
                "last_seen": worker.last_heartbeat_time.isoformat(timespec="seconds")
                if worker.last_heartbeat_time
                else None,
            }
            for worker in online
        ],
        "queues": queues,
        "targets": [facts(target) | {"last_check": checks.get(target.name)} for target in targets],
    }
