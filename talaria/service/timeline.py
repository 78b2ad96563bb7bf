"""What happened to a run, in order: its states, and what its attempts, waits and scripts said."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterLevel
from prefect.client.schemas.objects import Log
from prefect.client.schemas.sorting import LogSort

from talaria.service import Office

MOST = 200  # lines of logs, which one request brings; earlier ones are in Prefect
BAD = ("FAILED", "CRASHED")
NOISE = ("Beginning flow run", "Finished in state")  # Prefect's own words for what the states say


async def timeline(office: Office, run_id: str) -> tuple[list[dict[str, Any]], bool]:
    """Return what happened to a run, oldest first: `time` (ISO 8601), `kind` (`state`, `info`, `warning`), `words`.

    Returns:
        The events, and whether earlier ones are left out; of the logs, the newest are there.
    """
    logs = await _logs(office, UUID(run_id))
    events = [
        {
            "time": state.timestamp.isoformat(timespec="milliseconds"),
            "kind": "warning" if state.type.value in BAD else "state",
            "words": state.name or "",
            "more": state.message or "",
        }
        for state in await office.client.read_flow_run_states(UUID(run_id))
    ]
    events += [
        {
            "time": one.timestamp.isoformat(timespec="milliseconds"),
            "kind": "warning" if one.level >= logging.WARNING else "info",
            "words": "",
            "more": one.message,
        }
        for one in logs
        if not one.message.startswith(NOISE)
    ]
    return sorted(events, key=lambda event: str(event["time"])), len(logs) >= MOST


async def _logs(office: Office, run_id: UUID) -> list[Log]:
    """Return the newest lines of a run's log, the newest first."""
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]), level=LogFilterLevel(ge_=logging.INFO))
    return await office.client.read_logs(wanted, limit=MOST, sort=LogSort.TIMESTAMP_DESC)
