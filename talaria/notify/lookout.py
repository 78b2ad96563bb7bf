"""Looks for what nobody reports by itself: late dispatches, sweeps that nobody begins, certificates, disks, dead
targets that are back.

Only for rules that hear of it. What is seen by several hosts, or again, happens once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort

from blocks import Source, Target
from blocks.rule import Rule, RuleEvent
from talaria.engine import runs
from talaria.metrics import certificates, disks, peers
from talaria.notify import dead
from tasks.checking import last_checks
from tasks.dispatch import rest, running
from tasks.dispatch.asked import asked_list
from tasks.dispatch.hours import off_peak
from tasks.documents import Broken
from tasks.happened import happened
from tasks.paging import every
from tasks.sources.saved import KEPT
from tasks.targets import all_targets
from transfer.database import LOST
from transfer.home import Home, host_name
from transfer.ledger import Ledger
from transfer.shared import of_queue

MOST_RUNS = 2000  # of those that have not ended, the oldest
UNSWEPT_S = 3600.0  # of a sweep, after it was due
SURE_S = 600.0  # for which it was seen to be so: a worker that has just started may be about to begin it
DAYS = (1, 7, 30)  # before a certificate expires, when that is told
OFFPEAK = "offpeak"
FLOWS = ("dispatch", "retrieve")  # whose runs may be late: also a retrieval's dispatches, which have no deployment
logger = logging.getLogger("talaria.notify")
NOT_ENDED = [state for state in StateType if state not in TERMINAL_STATES]

APART_S = 30.0  # for a look, before the next one begins
_looks: dict[RuleEvent, asyncio.Future[Exception | None]] = {}  # the last one for each
_unswept: dict[UUID, float] = {}  # sweeps that nobody has begun, since when they are known (`time.monotonic`)
_asked: dict[UUID, tuple[UUID | None, datetime | None]] = {}  # by run: its state, and what its states said then


async def look(client: PrefectClient, home: Home, ledger: Ledger, rules: Iterable[Rule], certificate: str) -> None:
    """Look once.

    Args:
        certificate: file of the front door's certificate, "" for none.
    """
    at_work = [rule for rule in rules if rule.enabled]
    heard = {event for rule in at_work for event in rule.on}
    if RuleEvent.LATE in heard:
        late = {rule.late_s for rule in at_work if RuleEvent.LATE in rule.on}
        await _apart(RuleEvent.LATE, lambda: _late(client, ledger, late))
    if RuleEvent.STUCK in heard:
        await _apart(RuleEvent.STUCK, lambda: _say_unswept(client, ledger))
    if not heard & {RuleEvent.UP, RuleEvent.CERTIFICATE, RuleEvent.DISK}:
        return
    saved = await all_targets(client)
    targets = [one for one in saved if isinstance(one, Target)]
    if RuleEvent.UP in heard:
        await _apart(RuleEvent.UP, lambda: dead.ask_again(client, home, ledger, targets))
    if RuleEvent.CERTIFICATE in heard:
        await _apart(RuleEvent.CERTIFICATE, lambda: _say_expiring(client, home, ledger, saved, certificate))
    if RuleEvent.DISK in heard:
        wanted = {rule.free_percent for rule in at_work if RuleEvent.DISK in rule.on}
        await _apart(RuleEvent.DISK, lambda: asyncio.to_thread(_say_low, home, ledger, targets, wanted))


async def _apart(event: RuleEvent, look: Callable[[], Awaitable[None]]) -> None:
    """Look for one thing, so that what is wrong with it keeps nobody from hearing of the others.

    A look that does not end, as at a file on a share that is silent, is left after APART_S; there is no other one for
    the same thing until it ends.
    """
    if event in _looks and not _looks[event].done():
        return
    _looks[event] = asyncio.ensure_future(_away(event, look))
    done, _ = await asyncio.wait([_looks[event]], timeout=APART_S)
    if not done:
        logger.warning("%s is still looked for, after %.0f seconds", event, APART_S)
    elif away := _looks[event].result():
        raise away


async def _away(event: RuleEvent, look: Callable[[], Awaitable[None]]) -> Exception | None:
    """Look for one thing; return the error if the server or the ledger is away."""
    try:
        await look()
    except (*LOST, httpx.HTTPError) as exc:
        return exc
    except Exception:
        logger.exception("%s can't be looked for: an unexpected error", event)
    return None


async def _late(client: PrefectClient, ledger: Ledger, seconds: Collection[int]) -> None:
    now = datetime.now(UTC)
    found = await _expected(client, list(FLOWS), NOT_ENDED, now - timedelta(seconds=min(seconds)))
    paused = await _parts_of(client, [run for run in found if _is_paused(run)]) if found else set()
    for run in found:
        planned = run.expected_start_time
        if planned is None or _is_paused(run) or run.id in paused:
            continue
        begin = late_from(run, await _asked_again(client, run) or planned, now)
        for late_s in seconds if begin else ():
            if begin and (now - begin).total_seconds() > late_s:
                again = "" if begin == planned else f"/{begin.timestamp():.0f}"
                await asyncio.to_thread(_say_late, ledger, run, late_s, again)


async def _expected(
    client: PrefectClient, flows: list[str], states: list[StateType], before: datetime
) -> list[FlowRun]:
    """Return the runs of some flows, in some states, that were to begin before a time; the oldest MOST_RUNS or so."""
    return await every(
        client.read_flow_runs,
        most=MOST_RUNS,
        flow_filter=FlowFilter(name=FlowFilterName(any_=flows)),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)),
            expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": before}),
        ),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
    )


async def _say_unswept(client: PrefectClient, ledger: Ledger) -> None:
    """Say of each source whose sweep is long due that no worker begins it, as of one whose host is dead."""
    now, seen = datetime.now(UTC), time.monotonic()
    found = await _expected(client, ["batch"], [StateType.SCHEDULED], now - timedelta(seconds=UNSWEPT_S))
    first = dict[str, FlowRun]()
    for run in found:
        first.setdefault(str(run.parameters.get("source", "")), run)
    known = {run.id: _unswept.get(run.id, seen) for run in first.values()}
    _unswept.clear()
    _unswept.update(known)
    for name, run in first.items():
        if seen - known[run.id] >= SURE_S:
            host = of_queue(run.work_queue_name)
            whose = f"no worker of {host}" if host else "no worker"
            words = f"its sweep of {run.expected_start_time:%Y-%m-%d %H:%M} UTC has not begun: {whose} takes it"
            await asyncio.to_thread(happened, ledger, RuleEvent.STUCK, {"source": name}, f"unswept/{run.id}", words)


async def _parts_of(client: PrefectClient, retrievals: Sequence[FlowRun]) -> set[UUID]:
    """Return the dispatches of retrievals, which are runs of their own."""
    if not retrievals:
        return set()
    parents = FlowRunFilterParentFlowRunId(any_=[one.id for one in retrievals])
    parts = await every(client.read_flow_runs, flow_run_filter=FlowRunFilter(parent_flow_run_id=parents))
    return {one.id for one in parts}


async def _asked_again(client: PrefectClient, run: FlowRun) -> datetime | None:
    """Return what `asked_for` says of a run; its states are read again only after one has been added."""
    if not run.run_count:
        return None
    state_id, asked = _asked.get(run.id, (None, None))
    if state_id != run.state_id or state_id is None:
        asked = asked_for(await client.read_flow_run_states(run.id))
        while len(_asked) >= MOST_RUNS:
            del _asked[next(iter(_asked))]
        _asked[run.id] = run.state_id, asked
    return asked


def asked_for(states: Iterable[State[Any]]) -> datetime | None:
    """Return when somebody has last asked that a run begin again: it had ended, or was paused; None for never.

    What goes on by itself does not count: the end of a wait, or of a crash. That of a wait for hours that people have
    set does, from when these were to begin.
    """
    in_order = sorted(states, key=lambda one: one.timestamp)
    asked = None
    for before, after in pairwise(in_order):
        ended = before.is_final() and not before.is_crashed()
        paused = before.name == running.PAUSED or before.is_paused()
        if (ended or paused) and after.name != before.name and not after.is_final():
            asked = max(after.timestamp, after.state_details.scheduled_time or after.timestamp)
        elif _waits_for_hours(before) and not after.is_final():
            asked = min(after.timestamp, before.state_details.scheduled_time or after.timestamp)
    return asked


def late_from(run: FlowRun, begin: datetime, now: datetime) -> datetime | None:
    """Return since when a run should have been at work; None while it waits for hours that people have set.

    Args:
        begin: when it was to begin, or asked for again.
    """
    if run.state and _waits_for_hours(run.state):
        opening = run.state.state_details.scheduled_time
        return max(begin, opening) if opening and opening <= now else None
    if not run.run_count and run.parameters.get("priority") == OFFPEAK:
        begin = off_peak().opens(begin) or begin
        return begin if begin <= now else None
    return begin


def _waits_for_hours(state: State[Any]) -> bool:
    return (state.message or "").startswith(rest.WAITS)


def _is_paused(run: FlowRun) -> bool:
    return run.state_name in (running.PAUSED, running.PAUSING) or bool(run.state and run.state.is_paused())


def _say_late(ledger: Ledger, run: FlowRun, late_s: int, again: str) -> None:
    """Say that a run is late, once.

    Args:
        again: names the time at which it was asked for again; "" for the first one.
    """
    for name in {one.rpartition("/")[2] for one in asked_list(run.parameters, "targets")}:
        known = {"target": name, "run": str(run.id), "dispatch": runs.dispatch_of(run), "late_s": late_s}
        happened(ledger, RuleEvent.LATE, known, key=f"late/{run.id}/{name}/{late_s}{again}")


async def _say_expiring(
    client: PrefectClient, home: Home, ledger: Ledger, saved: Sequence[Target | Broken], certificate: str
) -> None:
    checks = await last_checks(client, saved)
    sources = [one for one in await KEPT.all(client) if isinstance(one, Source)]
    targets = [one for one in saved if isinstance(one, Target)]
    known = await asyncio.to_thread(certificates.known, certificate, targets, checks, sources, ledger)
    await asyncio.to_thread(_expiring, ledger, known)
    peers.ask_again(home, targets)


def _say_low(home: Home, ledger: Ledger, targets: Iterable[Target], wanted: Collection[float]) -> None:
    _low(ledger, disks.spaces(home, targets), wanted)


def _expiring(ledger: Ledger, known: Iterable[certificates.KnownCertificate]) -> None:
    for one in known:
        front = one.whose == certificates.SERVER  # each host has its own
        subject = f"certificate/{host_name() if front else ''}/{one.of}/{one.whose}"
        days = next((days for days in DAYS if one.days <= days), None)
        before = ledger.happenings.standing(subject)
        if before and one.days > int(before) + 1 and (days is None or days > int(before)):
            # Renewed, perhaps for a month; what is known of a peer's is known to a day.
            ledger.happenings.stands(subject, str(days or ""))
        elif days is None:
            continue
        elif (not before or days < int(before)) and ledger.happenings.stands(subject, str(days)):
            of = "of" if front else "source" if one.whose in certificates.OF_SOURCES else "target"
            about = {of: one.of, "whose": one.whose, "days": max(0, int(one.days))}
            happened(ledger, RuleEvent.CERTIFICATE, about)


def _low(ledger: Ledger, spaces: Iterable[disks.DiskSpace], wanted: Collection[float]) -> None:
    """Say which disks are low: once a day, as long as they are."""
    today = datetime.now(UTC).date()
    for space in spaces:
        for percent in wanted:
            if space.percent < percent:
                ours = space.of == disks.STATE
                about = {
                    "of" if ours else "target": f"{disks.STATE} of {host_name()}" if ours else space.of,
                    "percent": round(space.percent, 1),
                    "free_percent": percent,
                    "free": space.free,
                    "size": space.size,
                }
                happened(ledger, RuleEvent.DISK, about, key=f"disk/{host_name()}/{space.of}/{percent}/{today}")
