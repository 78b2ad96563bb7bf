"""What runs, what waits, and how the targets were when they were last checked."""

from __future__ import annotations

from typing import Any

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

from talaria.engine.registry import QUEUES, workers
from talaria.service import Office
from talaria.settings import POOL
from tasks.checking import last_checks
from tasks.targets import all_targets, facts


async def status(office: Office, url: str = "") -> dict[str, Any]:
    """Return the JSON of `talaria status` at a server that answers.

    Args:
        url: of the server, as it is shown.
    """
    client = office.client
    targets = await all_targets(client)
    checks = await last_checks(client, targets)
    return {
        "server": {"ok": True, "url": url},
        "workers": [
            {
                "name": worker.name,
                "status": "ONLINE",
                "last_seen": worker.last_heartbeat_time.isoformat(timespec="seconds")
                if worker.last_heartbeat_time
                else None,
            }
            for worker in await workers(client)
        ],
        "queues": {queue: await _waiting(office, queue) for queue in QUEUES},
        "targets": [facts(target) | {"last_check": checks.get(target.name)} for target in targets],
    }


async def _waiting(office: Office, queue: str) -> int:
    """Return how many runs wait in a queue."""
    states = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
    body = {
        "flow_runs": states.model_dump(mode="json"),
        "work_pools": WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])).model_dump(mode="json"),
        "work_pool_queues": WorkQueueFilter(name=WorkQueueFilterName(any_=[queue])).model_dump(mode="json"),
    }
    return int((await office.client.request("POST", "/flow_runs/count", json=body)).json())
