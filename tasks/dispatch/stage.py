"""Planning and staging, as a task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from transfer import deadletters
from transfer.errors import Cancelled, DispatchError
from transfer.globs import patterns
from transfer.home import Home
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


def keep_dead_letter(home: Home, run_id: str, staged: Staged | None, again: Callable[[], Staged]) -> None:
    """Keep the files of a run that was given up, as far as they can be.

    Args:
        staged: what is staged; None if the last part of the run had no files.
        again: plans and stages them anew.
    """
    with suppress(DispatchError, OSError):  # the source is gone, or there is no room
        staged = staged or again()
        deadletters.keep(home, run_id, staged.plan, staged.source)


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
