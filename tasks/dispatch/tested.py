"""Tests of targets that have failed lately: what each says of the target, and of the run that makes it.

A run that has read no files yet needs no place of a worker for one, nor its flow (`fails`): it tests until the breaker
opens, as long as others wait for that, and rests. So a target that is found to be dead costs little more than the
pushes that failed first.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from blocks.base import Target
from tasks import DRIVERS
from tasks.dispatch import breaker, line, waiting
from tasks.dispatch.push import delay_before
from tasks.dispatch.rest import Left
from tasks.dispatch.waiting import UnreadRest
from tasks.quiet import Quiet
from transfer.errors import Busy, DispatchError
from transfer.home import Home
from transfer.ledger import Ledger

Log = logging.LoggerAdapter[Any]
AT_ONCE = 16  # targets that a worker tests without a place; more wait for their runs to begin
_threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="test")  # not those that ask the ledger: a test may hang
_at_work = 0


async def tested(ledger: Ledger, target: Target, run_id: str, threads: Executor | None = None) -> DispatchError | None:
    """Test a target; return the error that keeps it from being reached, None if a push may do better.

    Args:
        run_id: that pushes then, if one is to try.
        threads: in one of which it waits; None for those of the event loop.
    """
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    try:
        error = (await loop.run_in_executor(threads, context.run, DRIVERS.of(target).check, target)).error
    except DispatchError as exc:
        error = exc
    if not isinstance(error, breaker.DEAD):
        await asyncio.to_thread(breaker.reached, ledger, target, run_id)
        return error if isinstance(error, Busy) else None
    words = Quiet(target).text(error.message)
    await asyncio.to_thread(breaker.failed, ledger, target, error, words)
    return error


def count(ledger: Ledger, target: Target, left: Left, error: DispatchError) -> str:
    """Count a test as a failed attempt, without files; return why in words.

    After the last one there is no next.
    """
    left.attempts, left.futile, left.tried = left.attempts + 1, left.futile + 1, ledger.now()
    left.error, words = type(error).__name__, " ".join(Quiet(target).text(error.message).split())
    possible = left.attempts - left.futile + target.max_attempts
    left.failures.append(f"attempt {left.attempts} of {possible} failed: {words}")
    if left.futile < target.max_attempts:
        left.again = time.time() + delay_before(left.futile + 1, target, error)
    return words


async def fails(
    home: Home, ledger: Ledger, rests: UnreadRest, run_id: str, stops: Callable[[], bool], log: Log
) -> bool:
    """Test the targets that a run, which has not begun, has to test; return True if it has to wait for each of them.

    Args:
        stops: whether to make no more tests.
        log: of the run.
    """
    global _at_work
    if _at_work + len(rests.tests) > AT_ONCE:
        return False  # the run begins, and tests them itself
    _at_work += len(rests.tests)
    try:
        found = [_Test(home, ledger, target, run_id, rests) for target in rests.tests]
        return all(await asyncio.gather(*(one.fails(stops, log) for one in found)))
    finally:
        _at_work -= len(rests.tests)


class _Test:
    """The tests of a target on behalf of a run, and of those behind it in the line."""

    def __init__(self, home: Home, ledger: Ledger, target: Target, run_id: str, rests: UnreadRest) -> None:
        self._home, self._ledger, self._target, self._run_id = home, ledger, target, run_id
        self._left, self._priority = rests.left.setdefault(target.name, Left()), rests.priority

    async def fails(self, stops: Callable[[], bool], log: Log) -> bool:
        what = self._ledger, self._target, self._run_id, self._priority
        # It stands in line before it looks whose turn it is: whoever ends a test calls the next one.
        await asyncio.to_thread(waiting.for_a_test, *what, self._left)
        with breaker.testing(self._home, self._ledger, self._target) as mine:
            if not mine:
                return True
            opened = False
            try:
                error, opened = await self._repeatedly(stops)
            finally:
                await asyncio.to_thread(self._ends, opened)
        if error:
            count(self._ledger, self._target, self._left, error)
            log.warning("%s: %s", self._target.name, self._left.failures[-1])
        return error is not None or opened

    async def _repeatedly(self, stops: Callable[[], bool]) -> tuple[DispatchError | None, bool]:
        """Test until the target answers, its breaker opens, or nobody else waits; return the first error, and if it is.

        One failure is an attempt of the run's; those after it only spare each of the others a test of its own.
        """
        first: DispatchError | None = None
        while True:
            one = await asyncio.to_thread(breaker.read, self._ledger, self._target)
            if one.opened or not one.failures:  # not any more, if another one has found out
                return first, bool(one.opened)
            if first and (stops() or not await asyncio.to_thread(self._others)):
                return first, False
            if first:
                await asyncio.sleep(breaker.FIRST_S)
            error = await tested(self._ledger, self._target, self._run_id, _threads)
            if not isinstance(error, breaker.DEAD):
                return error, False
            first = first or error

    def _others(self) -> bool:
        """Return True if others wait for an answer, or for a slot."""
        lines = breaker.queue(self._target), self._target.name
        return any(self._ledger.waits.before(one, self._run_id, math.inf) for one in lines)

    def _ends(self, opened: bool) -> None:
        """Leave the line, and call the next one: not if the breaker has opened, until when all know what to do."""
        queue = breaker.queue(self._target)
        self._ledger.waits.leave(queue, self._run_id)
        if not opened:
            line.wake(self._ledger, queue)
