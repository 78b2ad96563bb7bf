"""Looks whether a run may push to its targets, before its files are read, and notes what it waits for if it may not.

A target that has just failed is tested by one run at a time, before anybody reads files for it: the others stand in
line, for an answer. So a dead one costs little until its breaker opens, and one that is well little more than a test.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime

from prefect import get_client
from prefect.logging import get_run_logger

from blocks.base import Target
from tasks.dispatch import breaker, line, rest, slots, tested, waiting
from tasks.dispatch.delivery import Delivery
from tasks.dispatch.patience import patiently
from tasks.dispatch.rest import Left, Rest, Wait
from tasks.dispatch.slots import NoSlot
from transfer.errors import Busy, DiskFull, DispatchError, Unreachable
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.plan import Origin
from transfer.receipt import State
from transfer.waits import Breaker

SLOT_S = 2.0  # how long a run waits for a slot, where no other one rests for it; then it rests, too
TESTED = (*breaker.DEAD, Busy, DiskFull)  # after one of these a target is tested before its files are read again


class Looks:
    """What a run knows of its targets.

    Args:
        in_line: the id under which it stands in lines.

    Attributes:
        rest: what it has left behind.
        waits: what it waits for, by target.
        held: slots that were taken before the files are staged, by target.
        failed: targets that a test found dead: why, and whether it was the last attempt.
    """

    def __init__(
        self, flow_run_id: str, home: Home, ledger: Ledger, in_line: str, priority: str, origin: Origin
    ) -> None:
        self.flow_run_id, self.home, self.ledger = flow_run_id, home, ledger
        self.in_line, self.priority, self.origin = in_line, priority, origin
        self.rest = Rest()
        self.waits: dict[str, Wait] = {}
        self.held: dict[str, AsyncExitStack] = {}
        self.failed: dict[str, tuple[str, bool]] = {}

    def left(self, target: Target) -> Left:
        """Return what the run has achieved at a target."""
        return self.rest.left.setdefault(target.name, Left())

    def open(self, targets: Sequence[Target]) -> list[Target]:
        """Return the targets for which something is left to do in this part."""
        waits = {*self.waits, *self.failed}
        return [one for one in targets if not self.left(one).ended and one.name not in waits]

    @property
    def is_new(self) -> bool:
        """Whether the run has read no files yet."""
        return not self.rest.document

    async def look(self, target: Target, *, has_read: bool = False) -> None:
        """Look whether a run may push to a target; one that comes back tests it, or takes a slot of it.

        Args:
            has_read: whether its files were read since it looked first.
        """
        left, name, node = self.left(target), target.name, target.at(self.origin)
        what = self.ledger, target, self.in_line, self.priority
        opening = waiting.for_its_hours(*what, left, rested=self.rest.kept)
        if opening or self.rest.kept:
            waiting.heed_hours(self.ledger, target, self.in_line, opening)
        if opening:
            self.waits[name] = opening
            return
        heeds = bool(self.rest.document) or line.may_rest()
        one = await asyncio.to_thread(breaker.read, self.ledger, node) if heeds else Breaker(name, "")
        if one.opened and await self._is_dead(node, one):
            return
        if self.rest.kept and (one.opened or not one.failures):
            self.ledger.waits.leave(breaker.queue(node), self.in_line)
        if left.again > time.time():
            self.waits[name] = rest.next_attempt(name, left.again, left.hook_tries)
            return
        if left.beside and not await asyncio.to_thread(waiting.is_done, self.home, self.ledger, self.in_line, left):
            self.waits[name] = waiting.for_the_same(self.ledger, target, self.in_line, left)
            return
        if await self._fails(node, one):
            return
        if left.since:
            try:
                self.held[name] = await patiently(lambda: self.slot(target))
            except NoSlot:
                self.stand_in_line(target)
        elif self.is_new and line.may_rest():
            waits = not has_read and name in slots.full(0.0)
            if waiting.others_stand_in_line(*what) or (waits and not await slots.room(target, SLOT_S)):
                self.stand_in_line(target)
            elif waits:  # it may have failed meanwhile
                await self._fails(node, await asyncio.to_thread(breaker.read, self.ledger, node))

    async def _is_dead(self, target: Target, one: Breaker) -> bool:
        """Return True if an open breaker stays so: the run waits for that, and has tested the target if it was time."""
        if one.trial == self.flow_run_id:
            return False
        left, pause_s = self.left(target), breaker.FIRST_S
        if one.until <= self.ledger.now():
            with breaker.testing(self.home, self.ledger, target) as mine:
                if not mine:  # whoever tests it wakes us if it answers
                    pause_s = min(target.idle_timeout_s, breaker.LONGEST_S)
                elif breaker.read(self.ledger, target).until <= self.ledger.now() and not await self._tested(target):
                    return False
        one = await asyncio.to_thread(breaker.read, self.ledger, target)
        if not one.opened:
            return False
        if not left.tried:  # it has just come: tests from now on are attempts of its own
            left.tried = self.ledger.now()
        elif one.tested > left.tried:
            self._count(target, Unreachable(one.reason))
            if target.name not in self.waits:
                return True
        what = self.ledger, target, self.in_line, self.priority, left, one, pause_s
        self.waits[target.name] = waiting.for_an_answer(*what)
        return True

    async def _fails(self, target: Target, one: Breaker) -> bool:
        """Return True if a target has to be tested first, and fails, or another run tests it: then the run waits.

        It has to be after its last failure, of whatever run, and after one of this run that a test may find again.
        """
        if one.failures and not one.opened and line.may_rest():
            return await self._is_doubtful(target)
        if self.left(target).error not in [error.__name__ for error in TESTED]:
            return False
        error = await self._tested(target)
        if error:
            self._count(target, error)
        return error is not None

    async def _is_doubtful(self, target: Target) -> bool:
        """Return True if a target that has failed lately does so again, or another run is to find out before this one.

        The run stands in line before it looks whose turn it is: whoever ends a test calls the next one.
        """
        name, queue = target.name, breaker.queue(target)
        what, left = (self.ledger, target, self.in_line, self.priority), self.left(target)
        self.waits[name] = waiting.for_a_test(*what, left)
        if waiting.others_are_to_test(*what, left.since):
            return True
        with breaker.testing(self.home, self.ledger, target) as mine:
            if not mine:
                return True
            try:
                one, error = breaker.read(self.ledger, target), None
                if one.failures and not one.opened:  # still
                    error = await self._tested(target)
            finally:
                self.ledger.waits.leave(queue, self.in_line)
                if not breaker.read(self.ledger, target).opened:  # else all know what they wait for
                    line.wake(self.ledger, queue)
        del self.waits[name]
        if one.opened:
            return await self._is_dead(target, one)
        if error:
            self._count(target, error)
        return error is not None

    async def _tested(self, target: Target) -> DispatchError | None:
        return await tested.tested(self.ledger, target, self.flow_run_id)

    def _count(self, target: Target, error: DispatchError) -> None:
        """Count a test as a failed attempt, without files."""
        left = self.left(target)
        words = tested.count(self.ledger, target, left, error)
        get_run_logger().warning("%s: %s", target.name, left.failures[-1])
        self.failed[target.name] = words, left.futile >= target.max_attempts
        if left.futile < target.max_attempts:
            self.waits[target.name] = rest.next_attempt(target.name, left.again)

    def wait_for_the_same(self, delivery: Delivery) -> None:
        """Let the run wait until another one that does the same at a target has done, which it may have just now."""
        target = delivery.target
        delivery.stopped, left = State.WAITING, self.left(target)
        left.beside = delivery.beside
        wait = self.waits[target.name] = waiting.for_the_same(self.ledger, target, self.in_line, left)
        if waiting.is_done(self.home, self.ledger, self.in_line, left):
            wait.until = datetime.now(UTC)

    def stand_in_line(self, target: Target) -> None:
        """Let the run wait for a slot of a target."""
        what = self.ledger, target, self.in_line, self.priority, self.left(target)
        self.waits[target.name] = waiting.for_a_slot(*what)

    async def slot(self, target: Target) -> AsyncExitStack:
        """Take a slot of a target: at once or soon where a run can rest, else as soon as there is one.

        Raises:
            NoSlot: there is none, or others wait for one.
        """
        left, wait_s = self.left(target), None
        if line.may_rest():
            turn = line.turn(left.since or self.ledger.now(), self.priority)
            if self.ledger.waits.before(target.name, self.in_line, turn):
                raise NoSlot(target.name)
            wait_s = 0.0 if left.since else SLOT_S
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(get_client())
            await stack.enter_async_context(slots.slots(client, target, 1, wait_s, self.ledger, self.in_line))
            self.ledger.waits.leave(target.name, self.in_line)
            left.since = 0.0
            return stack.pop_all()

    async def release(self) -> None:
        """Give back what was taken and not used."""
        while self.held:
            await self.held.popitem()[1].aclose()
