"""Begins one run of a retrieval: its source and targets are loaded, and looked at before anything is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from prefect import get_client
from prefect.context import FlowRunContext

from blocks.base import Target
from tasks.dispatch import audited, running
from tasks.dispatch.hours import check_hours
from tasks.dispatch.patience import patiently
from tasks.retrieve.moving import reach_into
from tasks.retrieve.run import DISPATCHES, Retrieval, Send
from tasks.retrieve.wish import Wish
from tasks.targets import UNKNOWN, check_destination, check_origin, check_source, load, origin_of
from transfer.home import Home


@asynccontextmanager
async def retrieving(wish: Wish, send: Send) -> AsyncIterator[Retrieval]:
    """Load source and targets for the flow run that is running.

    Raises:
        NotFound, Misconfigured: one doesn't exist, may not be queried or sent to, or the request is contradictory.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("a retrieval runs inside a flow run")
    flow_run_id, home = str(context.flow_run.id), Home.current()
    wish.numbers()
    if wish.into:
        await reach_into(wish.into)
    source, *targets = await patiently(lambda: _load([wish.source, *wish.targets]))
    if source.enabled:  # else it waits
        check_source(source)
        check_hours(source, wish.priority)
    for target in targets:
        if target.enabled:
            check_destination(target)
        check_origin(target, origin_of(source), UNKNOWN)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8, thread_name_prefix="retrieve"))
    try:
        at_once = min([DISPATCHES, *(target.max_dispatches for target in targets)])  # none waits for another one
        retrieval = Retrieval(flow_run_id, wish, source, home, send, at_once)
        retrieval.who = audited.requester(context.flow_run)
        yield retrieval
    finally:
        running.forget(flow_run_id)


async def _load(names: list[str]) -> list[Target]:
    async with get_client() as client:
        return [(await load(client, [name]))[0] for name in names]
