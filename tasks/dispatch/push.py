"""A delivery as Prefect tasks: one for each type, with the target's own retry policy."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger

from blocks.base import Target
from tasks.dispatch import breaker
from tasks.dispatch.delivery import MAX_ATTEMPTS, Delivery, SentByAnother
from tasks.dispatch.rest import LEDGER_S
from transfer.errors import Busy, DispatchError, LedgerAway, Retryable

NEAR_S = 1.0  # a run waits so long for its next attempt; for a later one it ends its part
MAX_RETRY_AFTER_S = 86_400  # a peer that asks for more than a day means "don't"


def delay_before(attempt: int, target: Target, error: BaseException | None) -> float:
    """Return the seconds to wait before an attempt (2 is the first retry).

    Exponential back-off with full jitter: any time up to `retry_delay_s`, doubled with each attempt, at most
    `retry_max_delay_s`. A peer's `Retry-After` wins.
    """
    if isinstance(error, Busy) and error.retry_after is not None:
        return min(max(0.0, error.retry_after), MAX_RETRY_AFTER_S)
    longest = min(target.retry_max_delay_s, target.retry_delay_s * 2 ** (attempt - 2))
    return random.uniform(0, longest)  # noqa: S311 - spreads load, guards nothing


def hook_delay_before(attempt: int, target: Target) -> float:
    """Return the seconds to wait before an attempt at a target's script: its own delay, doubled each time.

    Without jitter: one script on one server is no crowd. At most `retry_max_delay_s`, unless the first delay is longer.
    """
    first = target.hook.retry_delay_s if target.hook else 0.0
    longest = max(first, target.retry_max_delay_s)
    return float(min(longest, first * 2 ** (attempt - 2)))


def push_task(delivery: Delivery) -> Task[[Delivery], Any]:
    """Return the task `push-<type>` for a delivery, with the retry policy of its target."""
    target = delivery.target

    def delay(attempt: int, error: BaseException) -> float | None:
        # An attempt that got further is not counted: the next one waits as the first retry does.
        if not delivery.may_go_on:
            return None
        if isinstance(error, LedgerAway):  # what is sent until it is back, and can't be noted, is sent once more
            return None if delivery.may_rest else LEDGER_S
        seconds = delay_before(max(2, delivery.futile + 1), target, error)
        if delivery.may_rest and (seconds > NEAR_S or breaker.read(delivery.ledger, _node(delivery)).opened):
            delivery.again = datetime.now(UTC) + timedelta(seconds=seconds)
            return None
        return seconds

    return _with_policy(push, f"push-{target.type_name}", target, MAX_ATTEMPTS, delay)


def hook_task(delivery: Delivery) -> Task[[Delivery], Any]:
    """Return the task `hook-<type>`, which has a policy of its own: its failure never sends data again."""
    target = delivery.target
    attempts = target.hook.attempts if target.hook else 1

    def delay(attempt: int, error: BaseException) -> float | None:
        if delivery.hook_tries >= attempts:  # those of earlier parts of the run count
            return None
        seconds = hook_delay_before(delivery.hook_tries + 1, target)
        if delivery.may_rest and seconds > NEAR_S:
            delivery.again = datetime.now(UTC) + timedelta(seconds=seconds)
            return None
        return seconds

    return _with_policy(run_hook, f"hook-{target.type_name}", target, attempts, delay)


@task(cache_policy=NO_CACHE, persist_result=False)
async def push(delivery: Delivery) -> None:
    """Push the items that have no outcome yet to the delivery's target.

    Its receipt is the delivery's: what a task returns, Prefect keeps until the run ends.
    """
    logger = get_run_logger()
    target, futile = delivery.target, delivery.futile
    try:
        receipt = await asyncio.to_thread(delivery.push)
    except SentByAnother:
        logger.info("%s: another run sends the same there", target.name)
        return
    except DispatchError as exc:
        logger.warning("%s: %s", target.name, delivery.failures[-1])
        if delivery.futile > futile:
            await asyncio.to_thread(breaker.failed, delivery.ledger, _node(delivery), exc, exc.message, pushed=True)
        raise
    # Where all was there, it may not have been asked for more than a check asks.
    said = breaker.answered if delivery.heard else breaker.reached
    await asyncio.to_thread(said, delivery.ledger, _node(delivery))
    logger.info(
        "%s: %s, %d bytes in %.1f s", target.name, receipt.words or "nothing to do", receipt.bytes, receipt.seconds
    )


@task(cache_policy=NO_CACHE, persist_result=False)
async def run_hook(delivery: Delivery) -> None:
    """Run the target's own script on its server."""
    try:
        with suppress(SentByAnother):
            await asyncio.to_thread(delivery.run_hook)
    finally:
        if delivery.hook_result:
            said = f"; it said: {delivery.hook_output}" if delivery.hook_output else ""
            get_run_logger().info("%s: %s%s", delivery.target.name, delivery.hook_result, said)


def _node(delivery: Delivery) -> Target:
    """Return the target with the node that a delivery goes to."""
    return delivery.target.at(delivery.plan.origin)


class _Plainly(logging.Filter):
    """Drops Prefect's log records of errors that we have logged in one line.

    A traceback is for bugs, and those are logged where they are caught.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args if isinstance(record.args, tuple) else ()
        if any(isinstance(arg, DispatchError) for arg in args) and "Retry" in str(record.msg):
            begins = str(args[-1])  # "0.157654317 second(s) from now", or "immediately"
            seconds = begins.removesuffix(" second(s) from now")
            when = begins if seconds == begins else f"in {float(seconds):.1f} s"
            record.msg, record.args = "the next attempt begins %s", (when,)
        return not (record.exc_info and isinstance(record.exc_info[1], DispatchError))


logging.getLogger("prefect.task_runs").addFilter(_Plainly())


def _with_policy(
    base: Task[[Delivery], Any],
    name: str,
    target: Target,
    attempts: int,
    delay: Callable[[int, BaseException], float | None],
) -> Task[[Delivery], Any]:
    """Return a task with this name that is tried again after a Retryable, unless `delay` returns None."""

    def is_retryable(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
        # A plain function: Prefect takes anything else for "no retry". The engine reads the delay of the next
        # attempt from the task after this, so that the peer's Retry-After can decide it.
        error = state.data if isinstance(state.data, BaseException) else None
        seconds = delay((run.run_count or 1) + 1, error) if isinstance(error, Retryable) else None
        if seconds is None:
            return False
        task.retry_delay_seconds = [seconds]
        return True

    return base.with_options(
        name=name,
        task_run_name=f"{name} {target.name}",
        retries=attempts - 1,
        retry_delay_seconds=0,  # is_retryable sets it
        retry_condition_fn=is_retryable,
    )


def failure_of(error: BaseException, target: str) -> DispatchError:
    """Return an error as one of ours; an unexpected one is named by its type only, as its text may hold PHI."""
    if isinstance(error, DispatchError):
        return error
    return DispatchError(f"unexpected {type(error).__name__}: see the run's log", target)
