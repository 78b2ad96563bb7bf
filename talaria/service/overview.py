"""Targets and dispatches at a glance, as pages show them: where a target leads, and what it has to do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from pydantic import SecretStr

from blocks import Target
from talaria.engine.runs import jobs
from talaria.service import Office
from tasks.dispatch.asked import asked_list
from transfer.happenings import HOUR_S, HourSum
from transfer.ledger import Ledger

DAY = timedelta(days=1)
PAGE = 200  # runs that are looked through
FEW = 50  # runs a request: meanwhile a server answers nobody else
NOT_ENDED = tuple(state for state in StateType if state not in TERMINAL_STATES)
GOOD, BAD = "delivered", ("partial", "failed")  # states of a dispatch at a target


@dataclass
class Activity:
    """What a target had to do in the last day, in dispatches.

    Attributes:
        last: when the newest one ended, ISO 8601; "" if there was none.
        waiting: those that have not ended.
        good, bad: those that were delivered, and that were not, or not wholly.
    """

    last: str = ""
    waiting: int = 0
    good: int = 0
    bad: int = 0


@dataclass(frozen=True)
class Day:
    """What was sent to a target on one day of the server's zone.

    Attributes:
        date: ISO 8601.
        bytes: that were sent.
    """

    date: str
    good: int
    bad: int
    bytes: float


async def not_ended(office: Office, most: int | None = None) -> list[FlowRun]:
    """Return all dispatches that have not ended, or so many of them."""
    found: list[FlowRun] = []
    while most is None or len(found) < most:
        limit = FEW if most is None else min(FEW, most - len(found))
        page = await jobs(office.client, limit, len(found), flows=("dispatch",), states=NOT_ENDED)
        found += page
        if len(page) < limit:
            break
    return found


async def to_target(office: Office, name: str, limit: int) -> list[FlowRun]:
    """Return the newest dispatches to a target."""
    found: list[FlowRun] = []
    seen, page = 0, 2 * limit
    while len(found) < limit and seen < PAGE:  # names that only hold this one are left out
        alike = await jobs(office.client, page, seen, flows=("dispatch",), like=name)
        found += [run for run in alike if name in names_of(run)]
        seen += len(alike)
        if len(alike) < page:
            break
    return found[:limit]


async def activity(office: Office, waiting: Iterable[FlowRun] = ()) -> dict[str, Activity]:
    """Return what each target had to do in the last day, by its name, as the ledger counts it.

    Args:
        waiting: dispatches that have not ended.
    """
    found: dict[str, Activity] = {}
    for one in await asyncio.to_thread(_sums, office):
        shown = found.setdefault(one.target, Activity())
        shown.last = max(shown.last, datetime.fromtimestamp(one.last, UTC).isoformat(timespec="seconds"))
        shown.good += one.dispatches if one.state == GOOD else 0
        shown.bad += one.dispatches if one.state in BAD else 0
    for run in waiting:
        for name in names_of(run):
            found.setdefault(name, Activity()).waiting += 1
    return found


def _sums(office: Office) -> list[HourSum]:
    with Ledger(office.home.ledger) as ledger:
        return ledger.happenings.days((datetime.now(UTC) - DAY).timestamp())


async def days(office: Office, name: str, count: int) -> list[Day]:
    """Return what was sent to a target on each of the last days, today at the end."""

    def read() -> list[HourSum]:
        with Ledger(office.home.ledger) as ledger:
            return ledger.happenings.hours((datetime.now(UTC) - count * DAY).timestamp(), name)

    today = datetime.now().astimezone().date()
    dates = [(today - timedelta(days=back)).isoformat() for back in range(count - 1, -1, -1)]
    found = {date: Day(date, 0, 0, 0.0) for date in dates}
    for one in await asyncio.to_thread(read):
        date = datetime.fromtimestamp(one.hour * HOUR_S, UTC).astimezone().date().isoformat()
        if (before := found.get(date)) is not None:
            good = before.good + (one.dispatches if one.state == GOOD else 0)
            bad = before.bad + (one.dispatches if one.state in BAD else 0)
            found[date] = Day(date, good, bad, before.bytes + one.bytes)
    return list(found.values())


def names_of(run: FlowRun) -> list[str]:
    """Return the names of a dispatch's targets, without their types; whoever made the run may have written anything."""
    return [one.rpartition("/")[2] for one in asked_list(run.parameters, "targets")]


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
    if port is None and target.host_in:  # two servers of one machine differ in nothing else
        with suppress(ValueError):
            port = urlsplit(str(getattr(target, target.host_in) or "")).port
    node = f"[{target.node}]" if port and ":" in target.node else target.node
    return f"{node}:{port}" if port else target.node
