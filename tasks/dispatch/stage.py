"""Planning and staging, as a task."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from transfer.errors import Cancelled
from transfer.globs import patterns
from transfer.plan import Origin, Plan, scan
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
