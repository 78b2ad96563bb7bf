"""Prefect's database on PostgreSQL: when its connections are asked whether they are still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from prefect.server.database.configurations import AsyncPostgresConfiguration
from sqlalchemy import text
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from talaria.engine import database
from tests.servers.postgresql import PostgreSql, postgresql


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
