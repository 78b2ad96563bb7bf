"""What a dispatch waits for before its files are read: found out without them, and noted, so that it is called."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry

from blocks.base import Target
from tasks.dispatch import breaker, line, rest, slots
from tasks.dispatch.delivery import SentByAnother
from tasks.dispatch.hours import is_open, opens
from tasks.dispatch.lately import loaded
from tasks.dispatch.rest import Left, Rest, Wait
from transfer import deadletters, plan
from transfer import live as shown
from transfer.database import LOST
from transfer.deliveries import Standing
from transfer.globs import patterns
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.receipt import State as Stands
from transfer.silent import looked
from transfer.waits import Breaker

TURN_S = 15.0  # after which a run looks again for a slot, for each that stands in line before it
TURNS_S = 600.0  # and at most after this
DISABLED_S = 600.0  # after which a run looks again by itself whether a target is enabled
AFTER_S = 2.0  # and so much later for each that stands in line before it
LONGEST_S = 3600.0  # and at most after this
TEST_S = 60.0  # after which a run looks again whether a target passes a test, if nobody calls it
SAME_S = 60.0  # after which a run looks again whether another one that sends the same has done, if nobody calls it
LONG_S = 1.0  # for which all slots of a target have been held where more that comes rests at once
APART_S = 0.25  # between the returns of runs that wait for the same target to answer
UNREAD = "its files have not been read yet"


class InLine(Protocol):
    """What of a run stands in lines.

    Attributes:
        since: since when, in seconds since the epoch; 0 if it doesn't.
    """

    since: float


def for_its_hours(
    ledger: Ledger, target: Target, run_id: str, priority: str, left: InLine, *, rested: bool
) -> Wait | None:
    """Return what a target waits for by itself: its hours, or to be enabled; None for nothing.

    Args:
        rested: whether the run has waited before.
    """
    if not target.enabled and line.may_rest():
        return to_be_enabled(ledger, target, run_id, priority, left)
    if rested:
        is_enabled(ledger, target, run_id)
    return by_itself(target, priority)


def by_itself(target: Target, priority: str) -> Wait | None:
    """Return what a target waits for, without a line: its hours, or to be enabled; None for nothing."""
    opening = opens(target, priority)
    if opening is None:
        return None
    what = f"the hours of {target.name}" if target.enabled else f"{target.name} to be enabled"
    return Wait(opening, what, soon=False)


def heed_hours(ledger: Ledger, target: Target, run_id: str, opening: Wait | None) -> None:
    """Let a run be called if the hours that it waits for are changed, or no more if it does not wait for them.

    Args:
        opening: what it waits for by itself; None for nothing.
    """
    queue = line.of_hours(target.name)
    if opening is None or not line.may_rest() or not target.enabled or is_open(target):
        ledger.waits.leave(queue, run_id)
    else:
        ledger.waits.join(queue, run_id, ledger.now(), opening.until.timestamp())


def to_be_enabled(ledger: Ledger, target: Target, run_id: str, priority: str, left: InLine) -> Wait:
    """Let a run stand in line for a target that is disabled; return what it waits for.

    It is called when the target is enabled, wherever that is done. If not, a target that is disabled for long, and for
    which hundreds wait, has a run come back every few seconds.

    Args:
        run_id: "" for one that has yet to be created.
    """
    left.since = left.since or ledger.now()  # its turn for a slot, too
    turn, queue = line.turn(left.since, priority), line.to_be_enabled(target.name)
    before = ledger.waits.before(queue, run_id, turn)
    until = ledger.now() + min(LONGEST_S, DISABLED_S + before * AFTER_S)
    if run_id:
        ledger.waits.join(queue, run_id, turn, until)
    return Wait(datetime.fromtimestamp(until, UTC), f"{target.name} to be enabled", soon=False)


def is_enabled(ledger: Ledger, target: Target, run_id: str) -> None:
    """Let a run leave the line for a target that is enabled again, and call the next one."""
    queue = line.to_be_enabled(target.name)
    if ledger.waits.leave(queue, run_id):
        line.wake(ledger, queue)


def for_a_slot(ledger: Ledger, target: Target, run_id: str, priority: str, left: Left) -> Wait:
    """Let a run stand in line for a slot of a target; return what it waits for.

    Args:
        run_id: "" for one that has yet to be created.
    """
    left.since = left.since or ledger.now()
    turn = line.turn(left.since, priority)
    before = ledger.waits.before(target.name, run_id, turn)
    until = ledger.now() + min(TURNS_S, TURN_S * (before + 1))
    if run_id:
        ledger.waits.join(target.name, run_id, turn, until)
    return Wait(datetime.fromtimestamp(until, UTC), f"a slot at {target.name}")


def for_an_answer(
    ledger: Ledger, target: Target, run_id: str, priority: str, left: Left, one: Breaker, pause_s: float
) -> Wait:
    """Let a run stand in line for a target that does not answer; return what it waits for.

    Args:
        run_id: "" for one that has yet to be created.
        pause_s: the least time, in seconds, until it comes back by itself.
    """
    until, left.again = max(one.until, ledger.now() + pause_s), 0.0
    turn, queue = line.turn(left.tried, priority), breaker.queue(target)
    until += ledger.waits.before(queue, run_id, turn) * APART_S
    if run_id:
        ledger.waits.join(queue, run_id, turn, until)
    what = f"{one.target} to answer, which it hasn't since {datetime.fromtimestamp(one.opened, UTC):%H:%M:%S} UTC"
    return Wait(datetime.fromtimestamp(until, UTC), what)


def for_a_test(ledger: Ledger, target: Target, run_id: str, priority: str, left: Left) -> Wait:
    """Let a run stand in line until another one has tested a target that has failed lately; return what it waits for.

    Args:
        run_id: "" for one that has yet to be created.
    """
    left.since = left.since or ledger.now()  # its turn for a slot, too
    turn, queue = line.turn(left.since, priority), breaker.queue(target)
    until = ledger.now() + TEST_S + ledger.waits.before(queue, run_id, turn) * APART_S
    if run_id:
        ledger.waits.join(queue, run_id, turn, until)
    return Wait(datetime.fromtimestamp(until, UTC), f"{breaker.known_as(target)} to answer a test")


def for_the_same(ledger: Ledger, target: Target, run_id: str, left: Left) -> Wait:
    """Let a run stand in line until another one that does the same at a target has done; return what it waits for."""
    now = ledger.now()
    ledger.waits.join(line.of_the_same(left.beside), run_id, now, now + SAME_S)
    return Wait(
        datetime.fromtimestamp(now + SAME_S, UTC), f"the same dispatch to {target.name}, which another run sends"
    )


def is_done(home: Home, ledger: Ledger, run_id: str, left: Left) -> bool:
    """Return True if a run need not wait any more for another one that does the same; it leaves the line then."""

    def give_up() -> None:
        raise SentByAnother(left.beside)

    try:
        with home.exclusive(left.beside, give_up), ledger.exclusive(left.beside, give_up):
            pass
    except SentByAnother:
        return False
    ledger.waits.leave(line.of_the_same(left.beside), run_id)
    left.beside = ""
    return True


def others_stand_in_line(ledger: Ledger, target: Target, run_id: str, priority: str, since: float = 0.0) -> bool:
    """Return True if others wait for a slot of a target whom a run must not overtake.

    Args:
        since: when the run began to wait; 0 if it has just come.
    """
    return ledger.waits.before(target.name, run_id, line.turn(since or ledger.now(), priority)) > 0


def others_are_to_test(ledger: Ledger, target: Target, run_id: str, priority: str, since: float = 0.0) -> bool:
    """Return True if others wait for a target to answer whom a run must not overtake, one of which tests it."""
    return ledger.waits.before(breaker.queue(target), run_id, line.turn(since or ledger.now(), priority)) > 0


def can_be_read(home: Home, run_id: str, paths: list[str], exclude: str) -> None:
    """Make sure that a run has something to send, without reading any file.

    Args:
        run_id: "" if it is about to be created.

    Raises:
        NotFound, Denied, Misconfigured: as `scan` does.
    """
    plan.look(deadletters.instead(home, run_id, paths) if run_id else paths, patterns(exclude))


async def something_can_be_read(paths: Sequence[str], exclude: str) -> bool:
    """Return the same of a run that has never begun; False also where a file system does not answer.

    Raises:
        NotFound, Denied, Misconfigured: as `scan` does.
    """
    real = await looked(plan.source_of, paths)
    if len(real) < len({*paths}):
        return False
    asked = plan.outermost(real.values())
    found = await looked(lambda one: plan.has_files(Path(one), asked, patterns(exclude)), map(str, asked))
    return len(found) == len(asked) and any(found.values())


def unread(home: Home, ledger: Ledger, run_id: str, left: Rest, waits: dict[str, Wait]) -> State[Any]:
    """Note that a run waits whose files have not been read; return its state."""
    left.unread = True
    if run_id:
        rest.save(home, ledger, run_id, left)
        waiting = str(Stands.WAITING)
        ledger.deliveries.stand(run_id, waiting, [Standing(name, waiting, 0, 0, "") for name in waits])
    first = min(wait.until for wait in waits.values())
    failed = [f"{name}: {one.failures[-1]}" for name, one in left.left.items() if one.failures]
    return AwaitingRetry(scheduled_time=first, message=rest.message(waits.values(), "; ".join([UNREAD, *failed])))


def untried(ledger: Ledger) -> set[str]:
    """Return the names of the targets that can't be tried now, or have others in line, and of lines besides."""
    now, lines = ledger.now(), ledger.waits.lines()
    known = ledger.waits.breakers().items()
    dead = {name for name, one in known if (one.until > now if one.opened else f"{name}{breaker.QUEUE}" in lines)}
    return dead | lines | {*line.disabled(lines)}


def doubtful(ledger: Ledger) -> set[str]:
    """Return the names of the targets that have failed lately, and may answer the next time."""
    return {name for name, one in ledger.waits.breakers().items() if one.failures and not one.opened}


def may_rest(asked: Mapping[str, Any], known: Collection[str]) -> bool:
    """Return True for the parameters of a dispatch of one study to such targets alone, as far as names say that."""
    names, paths = asked.get("targets"), asked.get("paths")
    if not isinstance(names, list) or not isinstance(paths, list) or not names or not paths or asked.get("each"):
        return False
    return all(isinstance(one, str) and one.strip().rpartition("/")[2] in known for one in names)


def may_wait(ledger: Ledger, found: Sequence[FlowRun]) -> list[FlowRun]:
    """Return those of some runs that have never begun, to targets that can't be tried now, as far as names say that.

    What rests, and is called, is not among them: there may be what it waits for. If its target has failed meanwhile, it
    has to be tested first.
    """
    new = [one for one in found if not one.run_count and not one.labels.get(shown.SHOW_PLAN)]
    failed = doubtful(ledger) if new else set[str]()
    known = untried(ledger) | failed | slots.full(LONG_S) if new else set[str]()
    new = [one for one in new if may_rest(one.parameters, known)]
    called = {*ledger.waits.unheard(0.0)} if new else ()
    return [one for one in new if str(one.id) not in called or may_rest(one.parameters, failed)]


@dataclass(frozen=True)
class UnreadRest:
    """What lets a run rest before its files are read: the targets that it waits for, and the breakers of those.

    Attributes:
        left: what is known of each target; none for a run that has just come.
        tests: targets that have failed lately, which it has to test before it may rest.
    """

    home: Home
    targets: Sequence[Target]
    breakers: Mapping[str, Breaker]
    priority: str
    left: dict[str, Left]
    tests: Sequence[Target] = ()

    def state(self, ledger: Ledger, run_id: str = "") -> State[Any]:
        """Return the state of a run that waits, and note what for, so that it is called.

        Args:
            run_id: "" for one that has yet to be created, of which nothing can be noted.
        """
        with ledger.together() if run_id else nullcontext():
            waits = {target.name: self._wait(ledger, target, run_id) for target in self.targets}
            return unread(self.home, ledger, run_id, Rest(left=self.left), waits)

    def _wait(self, ledger: Ledger, target: Target, run_id: str) -> Wait:
        left, one = self.left.setdefault(target.name, Left()), self.breakers[target.name]
        what = ledger, target, run_id, self.priority
        if left.again > time.time():  # its test was its first attempt
            return rest.next_attempt(target.name, left.again)
        if not target.enabled:
            return to_be_enabled(*what, left)
        if one.opened:
            left.tried = left.tried or ledger.now()
            return for_an_answer(*what, left, one, breaker.FIRST_S)
        if one.failures and (target in self.tests or others_are_to_test(*what, left.since)):
            return for_a_test(*what, left)
        return for_a_slot(*what, left)

    def is_over(self, ledger: Ledger, run_id: str) -> bool:
        """Return True if a run that has begun to wait may have been called before that: it has to look again."""
        now = breaker.every(ledger, [*self.targets])
        return any(self._is_over(ledger, one, now[one.name], run_id) for one in self.targets)

    def _is_over(self, ledger: Ledger, target: Target, now: Breaker, run_id: str) -> bool:
        left = self.left[target.name]
        if left.again > time.time():
            return False
        if target in self.tests and now.failures:  # whoever tests it calls the first of the line, which it may be
            return False
        return not _keeps_waiting(ledger, target, now, run_id, self.priority, left)


async def ahead(
    client: PrefectClient,
    home: Home,
    ledger: Ledger,
    asked: Mapping[str, Any],
    run_id: str = "",
    mark: Callable[[], str] | None = None,
    *,
    tests: bool = False,
) -> UnreadRest | None:
    """Return what lets a run rest that has just come, or comes back; None if it has to begin, if only to be refused.

    Args:
        asked: its parameters.
        run_id: "" if it is about to be created.
        mark: as for `loaded`.
        tests: whether targets can be tested before it rests; else it has to begin for that.
    """
    priority = str(asked.get("priority") or "normal")
    try:
        left = rest.unread(ledger, run_id) if run_id else {}
        targets = await loaded(client, [str(one) for one in asked["targets"]], mark)
        if left is None or not all(target.stores for target in targets):  # it has begun, or is to be refused
            return None
        if not await something_can_be_read([str(one) for one in asked["paths"]], str(asked.get("exclude") or "")):
            return None
        breakers, tested = breaker.every(ledger, targets), list[Target]()
        for target in targets:
            one, mine = breakers[target.name], left.get(target.name, Left())
            if _keeps_waiting(ledger, target, one, run_id, priority, mine):
                continue
            # After its last attempt it ends, with receipts: it has to begin for that.
            if not (tests and _may_be_doubted(target, one, mine) and target.max_attempts > 1):
                return None
            tested.append(target)
    except LOST:
        return None
    return UnreadRest(home, targets, breakers, priority, left, tested)


def _may_be_doubted(target: Target, one: Breaker, left: Left) -> bool:
    """Return True if a target has failed lately, and a run has not tried it yet."""
    return target.enabled and bool(one.failures) and not one.opened and not left.attempts


def _keeps_waiting(ledger: Ledger, target: Target, one: Breaker, run_id: str, priority: str, left: Left) -> bool:
    """Return True if nothing can be done for a target, not even a test of it be counted."""
    if left.attempts or left.again:
        return False
    if not target.enabled:
        return True
    if one.opened:
        return one.until > ledger.now() and not (left.tried and one.tested > left.tried)
    what = ledger, target, run_id, priority, left.since
    if one.failures and others_are_to_test(*what):
        return True
    return target.name in slots.full(LONG_S) or others_stand_in_line(*what)
