"""Prefect's database: when connections to PostgreSQL are asked whether they are there, and how times get to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from prefect.server.database.configurations import AsyncPostgresConfiguration
from prefect.server.utilities.database import Timestamp
from prefect.settings import Settings
from prefect.types import DateTime
from sqlalchemy import Column, MetaData, Table, select, text
from sqlalchemy.dialects import postgresql as postgresql_dialect
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from talaria.engine import database
from talaria.settings import CONNECTIONS, server_environment
from tests.servers.postgresql import PostgreSql, postgresql
from transfer.home import Home


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSql]:
    with postgresql() as one:
        yield one


@pytest.fixture
def pings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Count how often connections are asked; True for those that are there."""
    found: list[bool] = []
    theirs = AsyncAdapt_asyncpg_connection.ping

    def ping(self: AsyncAdapt_asyncpg_connection) -> None:
        found.append(False)
        theirs(self)
        found[-1] = True

    monkeypatch.setattr(AsyncAdapt_asyncpg_connection, "ping", ping)
    monkeypatch.setattr(AsyncPostgresConfiguration, "engine", AsyncPostgresConfiguration.engine)
    database.ask_connections_seldom()
    return found


@asynccontextmanager
async def engine_of(server: PostgreSql) -> AsyncIterator[AsyncEngine]:
    url = server.url(driver="+asyncpg")
    engine = await AsyncPostgresConfiguration(
        connection_url=url, sqlalchemy_pool_size=1, sqlalchemy_max_overflow=0
    ).engine()
    try:
        yield engine
    finally:
        await engine.dispose()


async def number_of(engine: AsyncEngine) -> int:
    """Return the process of the server that answers a connection of the pool."""
    async with engine.connect() as connection:
        return int((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())


def test_a_connection_that_has_just_answered_is_not_asked(
    server: PostgreSql, pings: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look() -> None:
        async with engine_of(server) as engine:
            assert engine.sync_engine.pool._pre_ping is False  # Prefect's way, which is ours now
            first = await number_of(engine)
            assert [await number_of(engine) for _ in range(20)] == [first] * 20 and not pings
            monkeypatch.setattr(database, "ASKED_S", 0.0)
            assert [await number_of(engine) for _ in range(3)] == [first] * 3 and pings == [True] * 3

    asyncio.run(look())


def test_one_that_was_lost_is_replaced_and_within_the_time_lost_once(
    server: PostgreSql, pings: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look() -> None:
        async with engine_of(server) as engine:
            first = await number_of(engine)
            server.execute(f"SELECT pg_terminate_backend({first}, 10000)")
            with pytest.raises(DBAPIError):  # which Prefect answers with 503
                await number_of(engine)
            second = await number_of(engine)
            assert second != first and not pings
            server.execute(f"SELECT pg_terminate_backend({second}, 10000)")
            monkeypatch.setattr(database, "ASKED_S", 0.0)
            assert await number_of(engine) != second and not pings[0]

    asyncio.run(look())


def test_an_engine_is_changed_once(server: PostgreSql, pings: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    async def look() -> None:
        monkeypatch.setattr(database, "ASKED_S", 0.0)
        async with engine_of(server) as engine, engine_of(server) as same:
            assert engine is same
            await number_of(engine)
            await number_of(same)
        assert pings == [True] * 2  # once with each use

    asyncio.run(look())


def test_connections_stay_open_with_what_is_prepared_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but five were closed after each use: half of all statements were prepared anew."""
    for name, value in server_environment(Home(tmp_path), "http://127.0.0.1:4200/api").items():
        if "SQLALCHEMY" in name:
            monkeypatch.setenv(name, value)
    found = Settings().server.database.sqlalchemy
    assert (found.pool_size, found.max_overflow) == (15, 0)
    assert found.connect_args.prepared_statement_cache_size == 500
    # As PgBouncer needs it, or where a server allows fewer connections.
    own = dict.fromkeys(CONNECTIONS, "2")
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert own.items() <= server_environment(Home(tmp_path), "http://127.0.0.1:4200/api").items()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timestamp, "process_bind_param", Timestamp.process_bind_param)
    database.pass_times_on_plainly()
    database.pass_times_on_plainly()


TIMES = [
    DateTime(2026, 10, 25, 2, 30, 15, 123456, tzinfo=ZoneInfo("Europe/Vienna"), fold=1),
    DateTime(2026, 7, 1, 12, tzinfo=UTC),
    datetime(2026, 1, 2, 3, 4, 5, 6, UTC),
]


@pytest.mark.parametrize("kind", [sqlite, postgresql_dialect], ids=["sqlite", "postgresql"])
def test_a_database_gets_plain_times_that_say_the_same(plain: None, kind: Any) -> None:
    dialect, column = kind.dialect(), Timestamp()
    for time in TIMES:
        found = column.process_bind_param(time, dialect)
        assert type(found) is datetime and found.astimezone(UTC) == datetime.fromisoformat(time.isoformat())
    assert column.process_bind_param(None, dialect) is None
    with pytest.raises(ValueError, match="timezone"):
        column.process_bind_param(datetime(2026, 1, 2), dialect)


def test_no_time_is_calculated_in_python_on_its_way_to_the_database(
    server: PostgreSql, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's times were converted and subtracted by asyncpg: a twentieth of what a dispatch cost the server."""
    called: list[str] = []
    for name in ("__sub__", "astimezone"):
        monkeypatch.setattr(DateTime, name, lambda *_, name=name: called.append(name))

    async def written() -> list[Any]:
        async with engine_of(server) as engine, engine.begin() as connection:
            times = Table("times", MetaData(), Column("at", Timestamp()), prefixes=["TEMPORARY"])
            await connection.run_sync(times.create)
            await connection.execute(times.insert(), [{"at": time} for time in TIMES])
            return [*(await connection.execute(select(times.c.at))).scalars()]

    found = asyncio.run(written())
    assert [time.isoformat() for time in found] == [
        datetime.fromisoformat(time.isoformat()).astimezone(UTC).isoformat() for time in TIMES
    ]
    assert not called
