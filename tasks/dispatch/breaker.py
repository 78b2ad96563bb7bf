"""Which targets do not answer.

After LIMIT failures in a row a target's breaker opens: dispatches to it wait, and one run at a time tests whether it is
back; the first answer closes it. Of one that was connected and hung in a push, its check says nothing: when that is
answered, one run pushes, and the answer to that closes it.

A target that sends back to where studies come from (`host: sender`) has a breaker for each of these nodes, and is given
here with the node that is meant (`Target.at`).

What is known stands in the ledger's database, for all workers, of all hosts that share it. A target whose settings
have changed since begins anew. Where the database can't be asked, no target counts as dead.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from blocks.base import Target
from tasks.dispatch import line
from tasks.happened import target_stands
from tasks.names import split
from transfer.database import LOST
from transfer.errors import DispatchError, TimedOut, Unreachable
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.waits import AT, Breaker

LIMIT = 5  # failures in a row, of any dispatches
FIRST_S, LONGEST_S = 1.0, 300.0  # at least, and at most, between two tests; the target's own delays lie between
QUEUE = "?"  # ends the name of the line in which runs wait for a target to answer
DEAD = (Unreachable, TimedOut)  # errors that count
logger = logging.getLogger(__name__)


class _Taken(Exception):
    """Another one does it."""


def read(ledger: Ledger, target: Target) -> Breaker:
    """Return the state of a target's breaker."""
    with suppress(*LOST):
        return _of(target, ledger.waits.breaker(known_as(target)), ledger.now())
    return Breaker(known_as(target), "")


def every(ledger: Ledger, targets: list[Target]) -> dict[str, Breaker]:
    """Return the state of the breakers of targets, by name."""
    with suppress(*LOST):
        known = ledger.waits.breakers()
        return {one.name: _of(one, known.get(known_as(one)), ledger.now()) for one in targets}
    return {one.name: Breaker(one.name, "") for one in targets}


def failed(ledger: Ledger, target: Target, error: DispatchError, reason: str, *, pushed: bool = False) -> None:
    """Count a failure, if it is one of those that a dead target causes.

    Args:
        pushed: whether it is a push's, and no check's.
    """
    if not isinstance(error, DEAD):
        return
    try:
        with ledger.together():
            hung = pushed and isinstance(error, TimedOut)
            one = ledger.waits.count(known_as(target), _mark(target), reason, hung=hung)
            opens = one.failures >= LIMIT and not one.opened
            if opens:
                one.opened = one.tested
            if one.opened:
                longest = min(LONGEST_S, target.retry_max_delay_s)
                later = min(longest, target.retry_delay_s * 2 ** min(one.failures - LIMIT, 20))
                one.until = one.tested + max(FIRST_S, later)
                ledger.waits.save(one)
            if opens:  # with the same commit: who dies between two, or loses the ledger, would not say it
                _say(ledger, target, one, up=False)
    except LOST as exc:
        logger.warning("that %s does not answer can't be noted: %s", known_as(target), exc)


def answered(ledger: Ledger, target: Target) -> None:
    """Note that a target answers; wake what waits for that."""
    try:
        one = ledger.waits.breaker(known_as(target))
        if one:  # most often it is not: nothing is written then
            with ledger.together():
                if one := ledger.waits.answers(known_as(target)):
                    _say(ledger, target, one, up=True)  # also if it was open before its settings changed
        line.wake(ledger, queue(target), target.max_dispatches if one else 1)
    except LOST as exc:
        logger.warning("that %s answers can't be noted: %s", known_as(target), exc)


def reached(ledger: Ledger, target: Target, run: str = "") -> None:
    """Note that a target's check is answered, which is all that is wanted unless pushes hung.

    Args:
        run: that pushes then, where one is to try; "" for the first of those that wait.
    """
    try:
        with ledger.together():
            one = read(ledger, target)
            if one.trial is not None and one.opened:
                ledger.waits.tries(known_as(target), run, ledger.now() + (_patience(target) if run else 0.0))
        if one.trial is None:
            answered(ledger, target)
        elif one.opened and not run:
            line.wake(ledger, queue(target))
    except LOST as exc:
        logger.warning("that %s can be reached can't be noted: %s", known_as(target), exc)


def look_now(ledger: Ledger, names: Iterable[str]) -> None:
    """Let the next run test targets that do not answer: whoever has a dispatch retried knows that they are back.

    Args:
        names: of targets, as a run is given them.
    """
    for name in names:
        ledger.waits.due(split(name)[1])


def every_of(home: Home, targets: list[Target]) -> dict[str, Breaker]:
    """Return the state of the breakers of targets as `every` does, from a ledger that is opened for that."""
    with suppress(*LOST), Ledger(home.ledger) as ledger:
        return every(ledger, targets)
    return {one.name: Breaker(one.name, "") for one in targets}


def has_answered(home: Home, target: Target) -> None:
    """Note that a target's check is answered as `reached` does, in a ledger that is opened for that."""
    try:
        with Ledger(home.ledger) as ledger:
            reached(ledger, target)
    except LOST as exc:
        logger.warning("that %s answers can't be noted: %s", known_as(target), exc)


@contextmanager
def testing(home: Home, ledger: Ledger, target: Target) -> Iterator[bool]:
    """Be the one that tests a target during the block; yields False if another run, of any host, does."""
    with only_one(home, ledger, f"test {known_as(target)}") as mine:
        yield mine


@contextmanager
def only_one(home: Home, ledger: Ledger, what: str) -> Iterator[bool]:
    """Be the only one that does something during the block; yields False if another process, of any host, does."""

    def give_up() -> None:
        raise _Taken

    with ExitStack() as stack:
        try:
            stack.enter_context(home.exclusive(hashlib.sha256(what.encode()).hexdigest()[:24], give_up))
            stack.enter_context(ledger.exclusive(what, give_up))
        except (_Taken, *LOST):
            stack.close()
            mine = False
        else:
            mine = True
        yield mine


def queue(target: Target) -> str:
    """Return the name of the line in which runs wait for a target to answer."""
    return f"{known_as(target)}{QUEUE}"


def known_as(target: Target) -> str:
    """Return the name by which what is known of a target, or of one of its nodes, is kept; as people see it, too."""
    return f"{target.name}{AT}{target.node_of}" if target.node_of else target.name


def is_queue(name: str) -> bool:
    """Return True if a line is one of those."""
    return name.endswith(QUEUE)


def _of(target: Target, found: Breaker | None, now: float) -> Breaker:
    mark = _mark(target)
    if found is None or found.mark != mark:
        return Breaker(known_as(target), mark)
    if found.until > now + max(LONGEST_S, _patience(target)):  # noted before the clock was set back
        found.until = now
    return found


def _patience(target: Target) -> float:
    """Return the seconds after which a push would have hung, too."""
    return target.connect_timeout_s + 2 * target.idle_timeout_s


def _say(ledger: Ledger, target: Target, one: Breaker, *, up: bool) -> None:
    """Say that a target does not answer, or answers again."""
    about = {"failures": one.failures, "since": one.opened}
    target_stands(ledger, target.name, up=up, about=about, node=target.node_of)


def _mark(target: Target) -> str:
    return hashlib.sha256(target.model_dump_json().encode()).hexdigest()[:24]  # secrets are masked in it
