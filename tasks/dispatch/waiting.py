"""What a dispatch waits for before its files are read: found out without them, and noted, so that it is called."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry

from blocks.base import Target
from tasks.dispatch import breaker, line, rest
from tasks.dispatch.hours import opens
from tasks.dispatch.rest import Left, Rest, Wait
from tasks.names import split
from tasks.targets import check_destination, load
from transfer import deadletters, plan
from transfer import live as shown
from transfer.deliveries import Standing
from transfer.errors import DispatchError
from transfer.globs import patterns
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.receipt import State as Stands
from transfer.waits import Breaker

TURN_S = 15.0  # after which a run looks again for a slot, for each that stands in line before it
TURNS_S = 600.0  # and at most after this
APART_S = 0.25  # between the returns of runs that wait for the same target to answer
UNREAD = "its files have not been read yet"


def for_its_hours(target: Target, priority: str) -> Wait | None:
    """Return what a target waits for by itself: its hours, or to be enabled; None for nothing."""
    opening = opens(target, priority)
    if opening is None:
        return None
    what = f"the hours of {target.name}" if target.enabled else f"{target.name} to be enabled"
    return Wait(opening, what, soon=False)


def for_a_slot(ledger: Ledger, target: Target, run_id: str, priority: str, left: Left) -> Wait:
    """Let a run stand in line for a slot of a target; return what it waits for."""
    left.since = left.since or ledger.now()
    turn = line.turn(left.since, priority)
    before = ledger.waits.before(target.name, run_id, turn)
    until = ledger.now() + min(TURNS_S, TURN_S * (before + 1))
    ledger.waits.join(target.name, run_id, turn, until)
    return Wait(datetime.fromtimestamp(until, UTC), f"a slot at {target.name}")


def for_an_answer(
    ledger: Ledger, target: Target, run_id: str, priority: str, left: Left, one: Breaker, pause_s: float
) -> Wait:
    """Let a run stand in line for a target that does not answer; return what it waits for.

    Args:
        pause_s: the least time, in seconds, until it comes back by itself.
    """
    until, left.again = max(one.until, ledger.now() + pause_s), 0.0
    turn, queue = line.turn(left.tried, priority), breaker.queue(target)
    until += ledger.waits.before(queue, run_id, turn) * APART_S
    ledger.waits.join(queue, run_id, turn, until)
    what = f"{target.name} to answer, which it hasn't since {datetime.fromtimestamp(one.opened, UTC):%H:%M:%S} UTC"
    return Wait(datetime.fromtimestamp(until, UTC), what)


def others_stand_in_line(ledger: Ledger, target: Target, run_id: str, priority: str) -> bool:
    """Return True if others wait for a slot of a target whom a run that has just come must not overtake."""
    return ledger.waits.before(target.name, run_id, line.turn(ledger.now(), priority)) > 0


def can_be_read(home: Home, run_id: str, paths: list[str], exclude: str) -> None:
    """Make sure that a run has something to send, without reading any file.

    Raises:
        NotFound, Denied, Misconfigured: as `scan` does.
    """
    plan.look(deadletters.instead(home, run_id, paths), patterns(exclude))


def unread(home: Home, ledger: Ledger, run_id: str, left: Rest, waits: dict[str, Wait]) -> State[Any]:
    """Note that a run waits whose files have not been read; return its state."""
    left.unread = True
    rest.save(home, ledger, run_id, left)
    waiting = str(Stands.WAITING)
    ledger.deliveries.stand(run_id, waiting, [Standing(name, waiting, 0, 0, "") for name in waits])
    first = min(wait.until for wait in waits.values())
    failed = [f"{name}: {one.failures[-1]}" for name, one in left.left.items() if one.failures]
    return AwaitingRetry(scheduled_time=first, message=rest.message(waits.values(), "; ".join([UNREAD, *failed])))


def may_wait(ledger: Ledger, found: Sequence[FlowRun]) -> list[FlowRun]:
    """Return those of some runs that have just come, to targets that can't be tried now, as far as names say that."""
    new = [one for one in found if _is_new(ledger, one)]
    if not new:
        return []
    now = ledger.now()
    dead = {name for name, one in ledger.waits.breakers().items() if one.opened and one.until > now}
    known = dead | ledger.waits.lines()
    return [one for one in new if {split(str(name))[1] for name in one.parameters["targets"]} <= known]


def _is_new(ledger: Ledger, flow_run: FlowRun) -> bool:
    """Return True for a dispatch of one study, none of whose parts has begun, and whose plan nobody waits for."""
    asked = flow_run.parameters
    names, paths = asked.get("targets"), asked.get("paths")
    if not isinstance(names, list) or not isinstance(paths, list) or not names or not paths or asked.get("each"):
        return False
    return (
        not flow_run.run_count and not flow_run.labels.get(shown.SHOW_PLAN) and not rest.rests(ledger, str(flow_run.id))
    )


async def ahead(
    client: PrefectClient, home: Home, ledger: Ledger, flow_run: FlowRun
) -> Callable[[], State[Any]] | None:
    """Return what lets a run rest that has just come; None if it has to begin, if only to be refused.

    What is returned notes what the run waits for, and returns its state.
    """
    asked, run_id = flow_run.parameters, str(flow_run.id)
    priority = str(asked.get("priority") or "normal")
    try:
        targets = await load(client, [str(one) for one in asked["targets"]], secrets=False)
        for target in targets:
            check_destination(target)
        paths = [str(one) for one in asked["paths"]]
        await asyncio.to_thread(can_be_read, home, run_id, paths, str(asked.get("exclude") or ""))
        breakers, now = breaker.every(ledger, targets), ledger.now()
        for target in targets:
            one = breakers[target.name]
            if (one.opened and one.until > now) or others_stand_in_line(ledger, target, run_id, priority):
                continue
            return None
    except (DispatchError, OSError, sqlite3.Error):
        return None

    def rests() -> State[Any]:
        left, waits = Rest(), dict[str, Wait]()
        for target in targets:
            mine, one = left.left.setdefault(target.name, Left()), breakers[target.name]
            what = ledger, target, run_id, priority, mine
            if one.opened:
                mine.tried = now
                waits[target.name] = for_an_answer(*what, one, breaker.FIRST_S)
            else:
                waits[target.name] = for_a_slot(*what)
        return unread(home, ledger, run_id, left, waits)

    return rests
