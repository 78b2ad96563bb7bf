"""Targets and dispatches at a glance, as pages show them: where a target leads, and what it has to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from pydantic import SecretStr

from blocks import Target
from talaria.engine.registry import deployed
from talaria.engine.runs import jobs
from talaria.service import Office
from talaria.service.jobs import line

DAY = timedelta(days=1)
PAGE, MOST = 200, 1000  # runs a request, and in all
NOT_ENDED = tuple(state for state in StateType if state not in TERMINAL_STATES)
ENDED_WELL, ENDED_BADLY = ("COMPLETED",), ("FAILED", "CRASHED")


@dataclass
class Activity:
    """What a target had to do in the last day, in dispatches.

    Attributes:
        last: when the newest one began, ISO 8601; "" if there was none.
        waiting: those that have not ended.
    """

    last: str = ""
    waiting: int = 0
    good: int = 0
    bad: int = 0


async def last_day(office: Office) -> list[FlowRun]:
    """Return the dispatches of the last day, newest first: the newest thousand, if there are more."""
    deployment = await deployed(office.client, "dispatch")
    since = FlowRunFilterExpectedStartTime.model_validate({"after_": datetime.now(UTC) - DAY})
    found: list[FlowRun] = []
    while len(found) < MOST:
        page = await office.client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id])),
            flow_run_filter=FlowRunFilter(expected_start_time=since),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE:
            break
    return found


async def not_ended(office: Office) -> list[FlowRun]:
    """Return all dispatches that have not ended."""
    found: list[FlowRun] = []
    while page := await jobs(office.client, PAGE, len(found), flows=("dispatch",), states=NOT_ENDED):
        found += page
    return found


def names_of(run: FlowRun) -> list[str]:
    """Return the names of a dispatch's targets, without their types; whoever made the run may have written anything."""
    return [str(one).rpartition("/")[2] for one in run.parameters.get("targets") or ()]


def by_target(runs: Iterable[FlowRun]) -> dict[str, Activity]:
    """Return what each target had to do, by its name."""
    found: dict[str, Activity] = {}
    for run in runs:
        state = run.state.type.value if run.state else ""
        for name in names_of(run):
            one = found.setdefault(name, Activity())
            one.last = one.last or str(line(run)["begun"] or "")
            one.good += state in ENDED_WELL
            one.bad += state in ENDED_BADLY
            one.waiting += bool(run.state and not run.state.is_final())
    return found


def leads_to(target: Target) -> str:
    """Return where a target leads, in a line: its node and port, and what else says where the data goes."""
    parts = [] if not target.node else [_at_port(target)]
    for name in target.where:
        value = getattr(target, name)
        apart = isinstance(value, SecretStr | bool) or name in ("port", "layout", target.host_in)
        if value and not apart:
            parts.append(str(value))
    url = str(getattr(target, target.host_in, "") or "") if target.host_in else ""
    if not target.node and url:
        parts.insert(0, url)
    return " ".join(parts)


def _at_port(target: Target) -> str:
    port: Any = getattr(target, "port", None)
    return f"{target.node}:{port}" if port else target.node
