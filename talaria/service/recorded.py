"""What the audit trail says of requests: which jobs and which changes of targets somebody asked for."""

from __future__ import annotations

import asyncio
from typing import Any

from prefect.client.schemas.objects import FlowRun

from talaria.engine import runs
from talaria.service import Office
from tasks.dispatch.asked import asked_list
from transfer.audit import Event, record

EVENTS = {"dispatch": Event.DISPATCH, "retrieval": Event.RETRIEVAL, "query": Event.QUERY}


async def job(office: Office, flow_run: FlowRun, action: str) -> None:
    """Record that somebody asked for a job (`asked`), or for its retry, cancellation, pause or resumption."""
    kind = runs.kind_of(flow_run)
    about = {
        "source": flow_run.parameters.get("source", ""),
        "targets": asked_list(flow_run.parameters, "targets"),
        "into": flow_run.parameters.get("into", ""),
    }
    await _record(office, EVENTS[kind], action=action, run=str(flow_run.id), **about)


async def target_changed(office: Office, name: str, change: str, fields: list[str]) -> None:
    """Record a change of a target: `created`, `updated`, `renamed`, `enabled`, `disabled`; names of fields only."""
    await _record(office, Event.TARGET_CHANGED, target=name, change=change, fields=fields)


async def target_removed(office: Office, name: str) -> None:
    """Record that a target was removed."""
    await _record(office, Event.TARGET_REMOVED, target=name)


async def source_changed(office: Office, name: str, change: str, fields: list[str]) -> None:
    """Record a change of a source: `created`, `updated`, `replaced`, `paused`, `resumed`; names of fields only."""
    await _record(office, Event.SOURCE_CHANGED, source=name, change=change, fields=fields)


async def source_removed(office: Office, name: str) -> None:
    """Record that a source was removed."""
    await _record(office, Event.SOURCE_REMOVED, source=name)


async def rule_changed(office: Office, name: str, change: str, fields: list[str]) -> None:
    """Record a change of a rule: `created`, `updated`, `removed`; names of fields only."""
    await _record(office, Event.RULE_CHANGED, rule=name, change=change, fields=fields)


async def _record(office: Office, event: Event, **details: Any) -> None:
    await asyncio.to_thread(lambda: record(event, office.user, address=office.address, **details))
