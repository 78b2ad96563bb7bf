"""What runs, what waits, and how the targets were when they were last checked."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from talaria.engine.registry import QUEUES, waiting, workers
from talaria.service import Office
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
    """Return how many runs wait in a queue, and in those that hosts have beside it."""
    asked = waiting(datetime.now(UTC), startswith_=[queue])
    return int((await office.client.request("POST", "/flow_runs/count", json=asked)).json())
