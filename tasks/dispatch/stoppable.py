"""Waits for work that may be stopped: by itself, else it is left alone, so that its run ends within five seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from prefect.context import FlowRunContext

from tasks.dispatch import running
from tasks.dispatch.ends import Paused
from transfer import stopping
from transfer.errors import Cancelled

R = TypeVar("R")
LOOK_S = 0.25  # between two looks whether to stop
GRACE_S = 3.0  # for work to stop by itself


async def stoppable(work: Awaitable[R], stops: Callable[[], bool], grace_s: Callable[[], float] = lambda: GRACE_S) -> R:
    """Wait for work; where it is to stop, give it some seconds to do so by itself, then leave it.

    Raises:
        asyncio.CancelledError: it was left; in a thread it goes on until its waits end. Others: as the work does.
    """
    task = asyncio.ensure_future(work)
    while not (await asyncio.wait([task], timeout=LOOK_S))[0]:
        if stops():
            if patience := grace_s():
                await asyncio.wait([task], timeout=patience)
            task.cancel()
            break
    return await task


async def in_thread(what: str, work: Callable[..., R], *args: Any) -> R:
    """Do blocking work of this context's run in a thread, until it ends, or somebody stops the run.

    In the thread, `stopping.check` raises Cancelled then.

    Args:
        what: the work, as in "query".

    Raises:
        Paused, Cancelled: somebody has stopped the run. Others: as the work does.
    """
    run = getattr(FlowRunContext.get(), "flow_run", None)
    run_id = str(run.id) if run else ""
    cancelled, paused = running.flag(run_id), running.pause(run_id)

    def stops() -> bool:
        return cancelled.is_set() or paused.is_set()

    def stopped() -> Cancelled:
        return Paused(f"the {what} was paused") if paused.is_set() else Cancelled(f"the {what} was cancelled")

    def check() -> None:
        if stops():
            raise stopped()

    def stoppably() -> R:
        with stopping.stoppable(check):
            return work(*args)

    try:
        return await stoppable(asyncio.to_thread(stoppably), stops)
    except asyncio.CancelledError as exc:
        if not stops():
            raise
        raise stopped() from exc
    finally:
        running.forget(run_id)
