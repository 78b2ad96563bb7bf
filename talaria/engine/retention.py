"""Keeps what is remembered within bounds of age and size, as long as a server runs.

What goes: rows of the ledger, receipts, and of the embedded server runs that have ended, with their logs and artifacts,
and events. What has not ended, or may go on, stays, however old it is.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import TERMINAL_STATES, StateType

from talaria.engine.freed import give_back, taken
from talaria.engine.leftovers import forget
from talaria.settings import load_settings
from transfer import deadletters
from transfer.home import Home
from transfer.ledger import Ledger

EVERY_S = 3600.0  # between two looks
STEP = 0.8  # of the age; each step that the size asks for
YOUNGEST_S = 2 * 3600.0  # what is younger stays whatever its size
DAY_S = 86_400.0
EVENTS_S = 7 * DAY_S  # events are kept no longer
LOG_BYTES = 32 << 20  # of a log file, before it begins anew
PAGE = 200  # runs a request; Prefect's own limit
OPEN = [one.value for one in StateType if one not in TERMINAL_STATES]
RUNS = 20  # deleted with one commit, and what belongs to them
Vacuum = Callable[[float, Collection[str]], Awaitable[None]]
logger = logging.getLogger("talaria.retention")


async def keep(home: Home, client: httpx.AsyncClient, *, embedded: bool) -> None:
    """Look each hour, for ever.

    Args:
        client: of Prefect's API.
        embedded: whether its database is ours to clear.
    """
    settings = load_settings()
    age, failed, last = settings.keep_days * DAY_S, settings.keep_failed_days * DAY_S, math.inf
    while True:
        try:
            runs, clear = await unfinished(client), vacuum if embedded else None
            last = await tidy(home, age, settings.keep_limit, runs, clear, failed_age=failed, last=last)
        except Exception:  # whatever it is, nothing else depends on it
            logger.exception("what is old could not be cleared: tried again in an hour")
        await asyncio.sleep(EVERY_S)


async def tidy(
    home: Home,
    age: float,
    limit: int,
    open_runs: Collection[str],
    vacuum: Vacuum | None = None,
    *,
    failed_age: float = math.inf,
    last: float = math.inf,
) -> float:
    """Forget what is older than `age` seconds, and more if the rest takes more than `limit` bytes; free the disk of it.

    Args:
        open_runs: ids of runs that have not ended.
        vacuum: clears Prefect's database of what is older than so many seconds, but for some runs.
        failed_age: that of the files of dispatches that were given up. They go at that age whatever takes too much, and
            what is known of their runs not before them: else nobody could try these again.
        last: the age that was kept the last time, where the first step begins: what is older has gone. Each step looks
            through all that is kept.

    Returns:
        The age that was kept: infinite where nothing has begun for longer, and nothing is forgotten.
    """
    kept = age
    if await asyncio.to_thread(_is_all_old, home, age):
        logger.warning("nothing has begun for longer than is remembered, or the clock is wrong: nothing is forgotten")
        return math.inf
    # Nor the only copies of what was given up, by a clock that is weeks ahead for an hour.
    files_age = math.inf if await asyncio.to_thread(_is_all_old, home, failed_age) else failed_age
    while True:
        await asyncio.to_thread(_forget, home, kept, open_runs, files_age, max(age, failed_age))
        if vacuum:
            await vacuum(kept, deadletters.kept(home))
        size = await asyncio.to_thread(used, home)
        if size <= limit or kept <= YOUNGEST_S:
            break
        kept = max(min(kept * STEP, last), YOUNGEST_S)
    for path in _databases(home):
        await asyncio.to_thread(give_back, path)
    if kept < age:
        logger.warning("TALARIA_KEEP_LIMIT is reached: what is older than %.0f hours is forgotten", kept / 3600)
    return kept


async def vacuum(age: float, keep: Collection[str] = ()) -> None:
    """Delete ended runs, with all that belongs to them, and events from Prefect's database in this process.

    Args:
        keep: ids of runs that stay.
    """
    from prefect.server.database import provide_database_interface
    from prefect.server.services import db_vacuum
    from prefect.settings import PREFECT_SERVER_EVENTS_RETENTION_PERIOD, temporary_settings

    db = provide_database_interface()
    with temporary_settings({PREFECT_SERVER_EVENTS_RETENTION_PERIOD: timedelta(seconds=min(age, EVENTS_S))}):
        await _delete_runs(db, datetime.now(UTC) - timedelta(seconds=age), keep)
        await db_vacuum.vacuum_orphaned_logs(db=db)
        await db_vacuum.vacuum_orphaned_artifacts(db=db)
        await db_vacuum.vacuum_stale_artifact_collections(db=db)
        await db_vacuum.vacuum_old_events(db=db)


async def _delete_runs(db: Any, before: datetime, keep: Collection[str]) -> None:
    """Delete what Prefect's own vacuum would of runs that ended before a time, but for some, which that can't keep."""
    from sqlalchemy import delete, select

    run, kept, last = db.FlowRun, set(_ids(keep)), UUID(int=0)
    old = run.parent_task_run_id.is_(None), run.state_type.in_(TERMINAL_STATES), run.end_time < before
    while True:
        async with db.session_context(begin_transaction=True, with_for_update=True) as session:
            found = (
                await session.scalars(select(run.id).where(*old, run.id > last).order_by(run.id).limit(RUNS))
            ).all()
            ids = [one for one in found if one not in kept]  # a statement has no room for any number of them
            await session.execute(delete(run).where(run.id.in_(ids)))
        for table in (db.Log, db.Artifact) if ids else ():
            async with db.session_context(begin_transaction=True, with_for_update=True) as session:
                await session.execute(delete(table).where(table.flow_run_id.in_(ids)))
        if len(found) < RUNS:
            return
        last = found[-1]


def _ids(names: Iterable[str]) -> Iterator[UUID]:
    for name in names:
        with suppress(ValueError):  # a folder that is not ours
            yield UUID(name)


def used(home: Home) -> int:
    """Return the bytes of what is kept: databases, without pages that are free again, and receipts.

    Files of dispatches that were given up are bounded by their age alone: where they take much, forgetting what was
    delivered would make nothing smaller.
    """
    found = sum(taken(path) for path in _databases(home))
    for path in home.receipt("").parent.glob("*"):
        with suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


def _databases(home: Home) -> list[Path]:
    return [path for path in (home.root / "prefect" / "prefect.db", home.root / "ledger.sqlite") if path.exists()]


def _is_all_old(home: Home, age: float) -> bool:
    """Return True if all that is known would be forgotten at once, as by a clock that is years ahead."""
    with Ledger(home.ledger) as ledger:
        newest = ledger.runs.newest()
        return 0 < newest < ledger.now() - age


def _forget(home: Home, age: float, open_runs: Collection[str], failed_age: float, shared_age: float) -> None:
    """Forget what is older than `age`; of a ledger that several hosts share, `shared_age`: it takes no room here."""
    forget(home, age, open_runs, failed_age, shared_age)
    for log in (home.root / "logs").glob("*.log"):
        if log.stat().st_size > LOG_BYTES:
            _begin_anew(log)


def _begin_anew(log: Path) -> None:
    """Keep a log beside itself, where there is room for that, and empty it: who writes it appends, and goes on."""
    before = log.with_suffix(".log.1")
    try:
        shutil.copyfile(log, before)
        before.chmod(0o600)
    except OSError as exc:  # the disk is full, likely: this gives some of it back
        logger.warning("%s is begun anew without a copy of it: %s", log.name, exc.strerror)
        before.unlink(missing_ok=True)
    os.truncate(log, 0)


async def unfinished(client: httpx.AsyncClient | PrefectClient) -> set[str]:
    """Return the ids of runs that have not ended, and of those whose kept files they are to send."""
    found, count = set[str](), 0
    while True:
        body = {"flow_runs": {"state": {"type": {"any_": OPEN}}}, "limit": PAGE, "offset": count}
        answer = await client.request("POST", "/flow_runs/filter", json={**body, "sort": "ID_DESC"})
        page = answer.raise_for_status().json()
        for one in page:
            paths = one["parameters"].get("paths")
            found |= {one["id"], *deadletters.read_by(paths if isinstance(paths, list) else ())}
        count += len(page)
        if len(page) < PAGE:
            return found
