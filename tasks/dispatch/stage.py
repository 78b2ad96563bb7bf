"""Planning and staging, as a task."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from tasks.dispatch import running
from tasks.dispatch.patience import patiently
from transfer import deadletters
from transfer.errors import Cancelled, DispatchError
from transfer.globs import patterns
from transfer.home import Home, host_name
from transfer.plan import Origin, Plan, scan
from transfer.receipt import State
from transfer.shared import HOST, KEPT, several
from transfer.staging import Way, stage


class Staged:
    """The plan of the staged files, and the folder that they came from.

    A plain class, because Prefect would walk through thousands of items.
    """

    def __init__(self, plan: Plan, source: Path) -> None:
        self.plan, self.source = plan, source


def plan_and_stage(
    paths: list[str], exclude: str, origin: Origin, into: Path, cancelled: threading.Event, way: Way = Way.READ
) -> Staged:
    """Plan the files below `paths` without the excluded ones and bring them into the folder `into`.

    Raises:
        NotFound, Misconfigured, Busy, Cancelled: as `scan` and `stage` do.
    """

    def check() -> None:
        if cancelled.is_set():
            raise Cancelled("the dispatch was cancelled")

    found = [scan(paths, patterns(exclude), origin, check)]  # a list, to hand the plan over without keeping it
    root = found[0].root
    check()  # if the run has ended meanwhile, nobody else removes the folder
    return Staged(stage(found.pop(), into, check, way), root)


async def keep_files(
    home: Home,
    run_id: str,
    staged: Staged | None,
    staging: Path,
    cancelled: threading.Event,
    state: State,
    unsent: bool,
) -> None:
    """Keep the files of this context's run if it was given up, for a retry; forget what was kept of one that succeeded.

    Where several hosts share a ledger, the run stays with this one then, which has its files; and what was kept goes
    with the retention alone: another host may have been asked to send it elsewhere.

    Args:
        staged: what is staged; None if the last part of the run had no files.
        staging: where they are staged then.
        state: of the run.
        unsent: whether some of them have not been sent.
    """
    context = FlowRunContext.get()
    asked = (context and context.parameters) or {}
    kept = await asyncio.to_thread(_kept, home, run_id, asked, staged, staging, cancelled, state, unsent)
    if kept and several():

        async def stays() -> None:
            async with get_client() as client:
                await client.update_flow_run_labels(UUID(run_id), {HOST: host_name(), KEPT: kept})

        await patiently(stays)


def _kept(
    home: Home,
    run_id: str,
    asked: dict[str, Any],
    staged: Staged | None,
    staging: Path,
    cancelled: threading.Event,
    state: State,
    unsent: bool,
) -> str:
    """Do so for the run of these parameters; return where its files are kept, "" if they aren't."""
    if state is State.DELIVERED and not several():
        deadletters.forget(home, run_id, asked.get("paths", []))
    if state in (State.DELIVERED, State.CANCELLED) or asked.get("each") or running.whole() or not unsent:
        return ""
    with suppress(DispatchError, OSError):  # the source is gone, or there is no room
        if staged is None:
            paths = deadletters.instead(home, run_id, asked.get("paths", []))
            staged = plan_and_stage(paths, asked.get("exclude", ""), Origin(), staging, cancelled)
        return deadletters.keep(home, run_id, staged.plan, staged.source)
    return ""


@task(name="stage", cache_policy=NO_CACHE, persist_result=False)
async def stage_files(paths: list[str], exclude: str, origin: Origin, into: Path, cancel: object, way: Way) -> Staged:
    """Stage a dispatch's files; log their number and size, and how many are read where they lie."""
    cancelled = cancel if isinstance(cancel, threading.Event) else threading.Event()
    staged = await asyncio.to_thread(plan_and_stage, paths, exclude, origin, into, cancelled, way)
    plan = staged.plan
    apart = sum(item.in_place for item in plan.items)
    where = f"; {apart} can't be linked and are read in their place" if apart else ""
    get_run_logger().info("%d files, %d bytes, dispatch %s%s", len(plan.items), plan.size, plan.dispatch_id, where)
    return staged
