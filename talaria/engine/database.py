"""Prefect's database as the embedded server has it: an index for our lists of runs, a search, and its settings.

Prefect's own indexes know neither the names of runs nor the order within a deployment, so a page of a list, its count
or a search by a part of a name read tens of thousands of whole rows; ours has all that they look at.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.server.database.configurations import AioSqliteConfiguration, AsyncPostgresConfiguration

from talaria.engine.runs import BEGINNING

if TYPE_CHECKING:
    from sqlalchemy import Dialect
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry

INDEX = "talaria_flow_run"
MOST = 200  # ids that it returns
_UUID = "00000000-0000-0000-0000-000000000000"
# By the dialect of the database. PostgreSQL takes no entry above 2.7 kB, which a name may have, and has an index of
# trigrams for names.
COLUMNS = {
    "sqlite": "deployment_id, expected_start_time, state_type, name",
    "postgresql": "deployment_id, expected_start_time, state_type",
}
CACHE_KIB = 8192  # of a connection; Prefect's 80 MB each, for up to 15 of them, brought nothing that could be measured
ASKED_S = 2.0  # for which a connection to PostgreSQL that has answered is taken to be open
_ASKED = "talaria asked"  # when a connection answered, in monotonic seconds
_prefects_setup = AioSqliteConfiguration.setup_sqlite
_prefects_engine = AsyncPostgresConfiguration.engine
_logger = logging.getLogger("talaria.front")


def set_sqlite_up() -> None:
    """Let files of SQLite's give back what is free, and each connection to one hold some of its pages only."""
    AioSqliteConfiguration.setup_sqlite = _setup_sqlite  # type: ignore[method-assign]


def _setup_sqlite(self: AioSqliteConfiguration, conn: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    cursor = conn.cursor()
    cursor.execute("PRAGMA page_count")
    if cursor.fetchone() == (0,):  # a new file: later, it would have to be written anew
        cursor.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _prefects_setup(self, conn, record)
    cursor.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    cursor.close()


def ask_connections_seldom() -> None:
    """Ask a connection to PostgreSQL each ASKED_S, and not with each use, whether it is still open.

    Prefect lets it be asked some sixty times for a dispatch, each time by a transaction of its own. One that is lost
    meanwhile is as one that is lost in use: Prefect's answer is 503, and its clients ask again.
    """
    AsyncPostgresConfiguration.engine = _engine  # type: ignore[method-assign]


async def _engine(self: AsyncPostgresConfiguration) -> AsyncEngine:
    from sqlalchemy import event

    engine = await _prefects_engine(self)
    pool = engine.sync_engine.pool
    if pool._pre_ping:  # a private name of SQLAlchemy's: tests/engine/test_database.py fails when it changes
        pool._pre_ping = False
        event.listen(pool, "connect", _answers)
        event.listen(pool, "checkout", _ask)
    return engine


def _answers(connection: object, record: ConnectionPoolEntry) -> None:
    record.info[_ASKED] = time.monotonic()


def _ask(connection: Any, record: ConnectionPoolEntry, taken: object) -> None:
    """Ask a connection that is taken from the pool.

    Raises:
        InvalidatePoolError: it is lost; the pool opens others.
    """
    from sqlalchemy.exc import InvalidatePoolError

    if time.monotonic() - record.info[_ASKED] < ASKED_S:
        return
    try:
        connection.ping()
    except Exception as exc:  # whatever it is: this one can't be used
        raise InvalidatePoolError from exc
    _answers(connection, record)


def let_types_name_their_operators() -> None:
    """Let Prefect's types of columns say that they can be compared, as SQLAlchemy 2.1 wants it.

    Where one doesn't, it warns at each comparison, and looks through the whole stack for that: a fifth of a request.
    """
    from prefect.server.utilities import database
    from sqlalchemy.sql.operators import OperatorClass

    for one in (database.Timestamp, database.UUID, database.JSON, database.Pydantic):
        one.operator_classes = OperatorClass.ANY


def pass_times_on_plainly() -> None:
    """Let drivers of databases get times as plain datetimes, which say the same.

    Prefect's are pendulum's, which calculates in Python; asyncpg converts and subtracts each that it sends.
    """
    from prefect.server.utilities.database import Timestamp

    theirs = Timestamp.process_bind_param

    def process_bind_param(self: Timestamp, value: datetime | None, dialect: Dialect) -> datetime | None:
        return theirs(self, value if value is None else _plain(value), dialect)

    if theirs.__module__ != __name__:
        Timestamp.process_bind_param = process_bind_param  # type: ignore[method-assign]


def _plain(value: datetime) -> datetime:
    if type(value) is datetime:
        return value
    day, time = (value.year, value.month, value.day), (value.hour, value.minute, value.second, value.microsecond)
    return datetime(*day, *time, value.tzinfo, fold=value.fold)


def make_index_at_start(prefect: Any) -> None:
    """Let Prefect's FastAPI application make our index once its tables are there, before it answers."""
    theirs = prefect.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with theirs(app) as state:
            await make_index()
            yield state

    prefect.router.lifespan_context = lifespan


async def make_index() -> None:
    """Make our index where it isn't there: a second or two for 50,000 runs, once. Without it, lists are slow."""
    from prefect.server.database import provide_database_interface
    from sqlalchemy import text
    from sqlalchemy.exc import SQLAlchemyError

    db = provide_database_interface()
    try:
        async with db.session_context(begin_transaction=True) as session:
            columns = COLUMNS[(await session.connection()).dialect.name]
            await session.execute(text(f"CREATE INDEX IF NOT EXISTS {INDEX} ON flow_run ({columns})"))
    except (SQLAlchemyError, OSError) as exc:  # the disk is full, or another host makes it just now
        _logger.warning("the index %s could not be made, lists of runs are slow: %s", INDEX, type(exc).__name__)


def add_search(prefect: Any) -> None:
    """Let Prefect's API return the ids of the runs that begin with some characters; else all runs had to be read."""
    from prefect.server.database import provide_database_interface
    from sqlalchemy import select

    async def flow_run_ids(beginning: str) -> list[UUID]:
        """Return the ids of the runs that begin so, none for what no id begins with."""
        try:
            first, last = (UUID(beginning + filling[len(beginning) :]) for filling in (_UUID, _UUID.replace("0", "f")))
        except ValueError:
            return []
        db = provide_database_interface()
        async with db.session_context() as session:
            wanted = db.FlowRun.id.between(first, last)
            return [*(await session.execute(select(db.FlowRun.id).where(wanted).limit(MOST))).scalars()]

    prefect.api_app.add_api_route(BEGINNING, flow_run_ids, methods=["GET"])
