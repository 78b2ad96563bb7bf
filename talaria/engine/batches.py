"""The deployments of sources: `batch/<source>`, whose runs are sweeps, with the schedule that the source gives.

What people change of a deployment in Prefect's UI stays: it is made once, and its schedule is changed only when the
source itself gets another one. Schedules that people add are theirs, and ours has a slug.
"""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
)
from prefect.client.schemas.filters import FlowRunFilterStateType as OfType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from blocks import Source
from talaria.engine import hosts
from talaria.engine.parameters import form
from talaria.engine.table import OF_SOURCES
from talaria.settings import POOL
from tasks.sources.saved import KEPT
from transfer import live

WHEN = ("cron", "interval_s", "rrule", "timezone")  # the fields of a source's schedule
CRON_FIELDS = 5  # croniter takes a sixth behind them, for seconds, which others put first
EACH_SECOND, NO_INTERVAL = re.compile(r"FREQ\s*=\s*SECONDLY", re.I), re.compile(r"INTERVAL\s*=\s*0*(?![0-9])", re.I)
SLUG = "talaria"  # of the schedule that a source gives, among those of its deployment
OPEN = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


async def deploy(client: PrefectClient, source: Source, before: Source | None = None) -> None:
    """Create the deployment of a source, or update our part of it.

    Args:
        before: the source as it was saved; its schedule is left alone if it is the same.
    """
    flow, entrypoint = OF_SOURCES["batch"]
    ours: dict[str, Any] = {
        "description": source.description or f"Sweeps of the source {source.name}, of type {source.type_name}.",
        "entrypoint": entrypoint,
        "enforce_parameter_schema": True,
        "parameter_openapi_schema": form(flow),
        "work_pool_name": POOL,
        # Its lock, and the lists of what is under way, lie in the state directory, which no other host has.
        "work_queue_name": hosts.own("normal") if hosts.several() else "normal",
    }
    there = await _deployment(client, source.name)
    if there is None:
        flow_id = await client.create_flow(flow)
        await client.create_deployment(
            flow_id=flow_id,
            name=source.name,
            tags=["talaria"],
            parameters={"source": source.name},
            schedules=_schedules(source),
            paused=not source.enabled,
            **ours,
        )
        return
    if before is None and hosts.of_queue(there.work_queue_name):
        del ours["work_queue_name"]  # a host that just starts is not the one that it was applied on
    await put_right(client, there, ours)
    if before is not None and any(getattr(source, name) != getattr(before, name) for name in WHEN):
        await _reschedule(client, there.id, source, before)
    if before is not None and source.enabled != before.enabled:
        await pause(client, source)


async def put_right(client: PrefectClient, there: DeploymentResponse, ours: dict[str, Any]) -> None:
    """Give a deployment what is ours of it; one that has it is left alone.

    With each change, Prefect deletes the runs that schedules have planned. It plans them anew some seconds later, but
    not what was due by then, and not as people had changed them.
    """
    known = json.loads(json.dumps(ours))  # as the server has it
    if any(getattr(there, name) != value for name, value in known.items()):
        await client.request("PATCH", "/deployments/{id}", path_params={"id": there.id}, json=ours)


async def _reschedule(client: PrefectClient, deployment_id: UUID, source: Source, before: Source) -> None:
    """Change the schedule that the source gives, and no other; whether people have paused it is theirs."""
    made = [one.schedule for one in _schedules(before)]
    ours = [
        one
        for one in await client.read_deployment_schedules(deployment_id)
        if one.slug == SLUG or (not one.slug and one.schedule in made)  # of an earlier Talaria
    ]
    new = _schedules(source)
    for one in ours[len(new) :]:
        await client.delete_deployment_schedule(deployment_id, one.id)
    for one, to in zip(ours, new, strict=False):
        slug = None if one.slug else SLUG
        await client.update_deployment_schedule(deployment_id, one.id, schedule=to.schedule, slug=slug)
    if len(ours) < len(new):
        await client.create_deployment_schedules(deployment_id, new)


async def pause(client: PrefectClient, source: Source) -> None:
    """Let the schedules of a source count, or not, as it is enabled."""
    there = await _deployment(client, source.name)
    if there is not None:
        await (client.resume_deployment if source.enabled else client.pause_deployment)(there.id)


async def withdraw(client: PrefectClient, name: str) -> None:
    """Remove the deployment of a source; what runs goes on."""
    there = await _deployment(client, name)
    if there is not None:
        await client.delete_deployment(there.id)


async def start(client: PrefectClient, name: str, by: str = "", *, settles: bool = False) -> FlowRun:
    """Create a sweep of a source that begins now; return the one that waits to begin, if there is one.

    Args:
        settles: whether it is only to see what has become of dispatches.
    """
    there = await _deployment(client, name)
    if there is None:
        await deploy(client, (await KEPT.load(client, [name], secrets=False))[0])
        there = await _deployment(client, name)
    assert there is not None  # noqa: S101 - for the type checker
    if waiting := await _waiting(client, there.id, settles=settles):
        return waiting
    return await client.create_flow_run_from_deployment(
        there.id,
        parameters={"source": name},
        name=f"sweep of {name}",
        state=Scheduled(scheduled_time=datetime.now(UTC)),
        labels=({live.BY: by} if by else {}) | ({live.SETTLES: True} if settles else {}),
    )


async def _waiting(client: PrefectClient, deployment_id: UUID, *, settles: bool) -> FlowRun | None:
    """Return a sweep that is due and has not begun; a schedule's later ones are no such.

    Args:
        settles: whether one may only see what has become of dispatches.
    """
    found = await client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id])),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=OfType(any_=[StateType.SCHEDULED, StateType.PENDING])),
            expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": datetime.now(UTC)}),
        ),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=2,  # there is one at most that only does so
    )
    return next((one for one in found if settles or not one.labels.get(live.SETTLES)), None)


async def schedule_of(client: PrefectClient, name: str) -> list[str]:
    """Return the schedules that a source's deployment has now, in words; people may have paused one, or all of it."""
    there = await _deployment(client, name)
    if there is None:
        return []
    return [_words(one.schedule) + ("" if one.active and not there.paused else ", paused") for one in there.schedules]


async def deploy_all(client: PrefectClient) -> None:
    """Create or update the deployments of all sources that are saved."""
    for one in await KEPT.all(client):
        if isinstance(one, Source):
            await deploy(client, one)


async def _deployment(client: PrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return await client.read_deployment_by_name(f"batch/{name}")
    except ObjectNotFound:
        return None


def _schedules(source: Source) -> list[DeploymentScheduleCreate]:
    made: CronSchedule | IntervalSchedule | RRuleSchedule
    if source.cron:
        made = CronSchedule(cron=source.cron, timezone=source.timezone)
    elif source.rrule:
        made = RRuleSchedule(rrule=source.rrule, timezone=source.timezone)
    elif source.interval_s:
        made = IntervalSchedule.model_validate({"interval": source.interval_s, "timezone": source.timezone})
    else:
        return []
    return [DeploymentScheduleCreate(schedule=made, active=True, slug=SLUG)]


def never_comes(source: Source) -> str:
    """Return why the schedule of a source begins nothing, in a sentence; "" if it does, or there is none.

    As of a date that no year has, or a COUNT or UNTIL that is over: without DTSTART, Prefect counts from 2020 on. It
    may take seconds, and runs in a thread of its own. A cron of more than five fields comes, but not when it is meant.
    """
    from prefect.server.schemas import schedules

    if len(source.cron.split()) > CRON_FIELDS:
        five = "minute, hour, day, month, day of the week, as in 0 2 * * *"
        return f"{source.cron}: a sixth field would be the second, and * in it a sweep each second: write five: {five}"
    if EACH_SECOND.search(source.rrule):
        return f"{source.rrule}: it would be swept each second: the most often is FREQ=MINUTELY, or interval_s"
    if NO_INTERVAL.search(source.rrule):  # dateutil would look for the next time for ever, and Prefect's scheduler too
        return f"{source.rrule}: INTERVAL is a number from 1 on"
    for one in _schedules(source):
        made = getattr(schedules, type(one.schedule).__name__).model_validate(one.schedule.model_dump())
        try:
            if asyncio.run(made.get_dates(1)):
                continue
        except ValueError:
            if source.rrule:  # UTC in UNTIL, and not in what it counts from
                return f"{source.rrule}: write its times without Z: they are those of the source's timezone"
        hint = ", or give it a DTSTART from which it counts" if "COUNT" in source.rrule.upper() else ""
        return f"{source.cron or source.rrule}: there is no such time from now on: correct it{hint}"
    return ""


def _words(schedule: Any) -> str:
    match schedule:
        case CronSchedule():
            return f"cron {schedule.cron} {schedule.timezone or 'UTC'}"
        case RRuleSchedule():
            return f"{schedule.rrule.rpartition(chr(10))[2]} {schedule.timezone or 'UTC'}"
        case IntervalSchedule():
            return f"every {schedule.interval.total_seconds():.0f} s"
        case _:
            return "none"
