"""Puts runs into queues for who asks for them."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import FlowRun

from talaria.engine import runs
from talaria.service import Conflict, Office, recorded


async def queued(
    office: Office,
    flow: str,
    parameters: dict[str, Any],
    name: str,
    queue: str,
    key: str,
    *,
    what: str = "job",
    show_plan: bool = False,
    host: str = "",
) -> FlowRun:
    """Put a run into a queue for the user who asks.

    Args:
        key: idempotency key; the same key again gives the same run, not a second one.
        host: the one that must run it, if it is another one.

    Raises:
        Conflict: the key was used for something else.
    """
    own = f"{office.user}:{key}" if key else None
    flow_run = await runs.create(
        office.client, flow, parameters, name, queue, key=own, by=office.user, show_plan=show_plan, host=host
    )
    await recorded.job(office, flow_run, "asked")
    if key and flow_run.parameters != parameters:
        raise Conflict(f"the idempotency key {key} was used for another {what}, {flow_run.id}: choose a new one")
    return flow_run
