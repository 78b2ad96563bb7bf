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
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import httpx
from prefect.client.schemas.objects import TERMINAL_STATES, StateType

from talaria.engine.freed import give_back, taken
from talaria.engine.leftovers import clear
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
Vacuum = Callable[[float], Awaitable[None]]
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
            runs, clear = await _unfinished(client), vacuum if embedded else None
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
        vacuum: clears Prefect's database of what is older than so many seconds.
        failed_age: that of the files of dispatches that were given up, if it is shorter.
        last: the age that was kept the last time, where the first step begins: what is older has gone. Each step looks
            through all that is kept.

    Returns:
        The age that was kept.
    """
    kept = age
    while True:
        await asyncio.to_thread(_forget, home, kept, open_runs, min(kept, failed_age))
        if vacuum:
            await vacuum(kept)
        size = await asyncio.to_thread(used, home)
        if size <= limit or kept <= YOUNGEST_S:
            break
        kept = max(min(kept * STEP, last), YOUNGEST_S)
    for path in _databases(home):
        await asyncio.to_thread(give_back, path)
    if kept < age:
        logger.warning("TALARIA_KEEP_LIMIT is reached: what is older than %.0f hours is forgotten", kept / 3600)
    return kept


async def vacuum(age: float) -> None:
    """Delete ended runs, with all that belongs to them, and events from Prefect's database in this process."""
    from prefect.server.database import provide_database_interface
    from prefect.server.services import db_vacuum
    from prefect.settings import (
        PREFECT_SERVER_EVENTS_RETENTION_PERIOD,
        PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD,
        temporary_settings,
    )

    bounds = {
        PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD: timedelta(seconds=age),
        PREFECT_SERVER_EVENTS_RETENTION_PERIOD: timedelta(seconds=min(age, EVENTS_S)),
    }
    db = provide_database_interface()
    with temporary_settings(bounds):
        await db_vacuum.vacuum_old_flow_runs(db=db)
        await db_vacuum.vacuum_orphaned_logs(db=db)
        await db_vacuum.vacuum_orphaned_artifacts(db=db)
        await db_vacuum.vacuum_stale_artifact_collections(db=db)
        await db_vacuum.vacuum_old_events(db=db)


def used(home: Home) -> int:
    """Return the bytes of what is kept: databases, without pages that are free again, receipts, and dead letters."""
    found = sum(taken(path) for path in _databases(home))
    for path in home.receipt("").parent.glob("*"):
        with suppress(FileNotFoundError):
            found += path.stat().st_size
    return found + deadletters.used(home)


def _databases(home: Home) -> list[Path]:
    return [path for path in (home.root / "prefect" / "prefect.db", home.root / "ledger.sqlite") if path.exists()]


def _forget(home: Home, age: float, open_runs: Collection[str], failed_age: float) -> None:
    now = time.time()
    before = now - age
    with Ledger(home.ledger) as ledger:
        ledger.prune(before, open_runs)
        clear(home, ledger, before, open_runs, now - failed_age)
    for log in (home.root / "logs").glob("*.log"):
        if log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            log.with_suffix(".log.1").chmod(0o600)
            os.truncate(log, 0)  # who writes it appends, and goes on


async def _unfinished(client: httpx.AsyncClient) -> set[str]:
    """Return the ids of runs that have not ended, and of those whose kept files they are to send."""
    found, count = set[str](), 0
    while True:
        body = {"flow_runs": {"state": {"type": {"any_": OPEN}}}, "limit": PAGE, "offset": count}
        answer = await client.post("/flow_runs/filter", json={**body, "sort": "ID_DESC"})
        page = answer.raise_for_status().json()
        for one in page:
            paths = one["parameters"].get("paths")
            found |= {one["id"], *deadletters.read_by(paths if isinstance(paths, list) else ())}
        count += len(page)
        if len(page) < PAGE:
            return found
