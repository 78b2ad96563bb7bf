"""What Prefect's server and engine no longer do anew for each request and run: private names that are still theirs."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import sqlite3
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from aiosqlite.core import Connection
from docket import Docket, Worker
from fastapi import Depends, FastAPI
from fastapi.dependencies import utils
from prefect import flow, results
from prefect.server.api import background_workers, work_queues
from prefect.server.api import dependencies as api_dependencies
from prefect.server.api import workers as polls
from prefect.server.api.flow_runs import delete_flow_run_logs
from prefect.server.database import dependencies
from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.events.storage import database as events
from prefect.server.models.deployments import mark_deployments_ready
from prefect.server.models.work_queues import mark_work_queues_ready
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_API_AUTH_STRING, temporary_settings
from prefect.utilities.schema_tools import validation
from sqlalchemy import Column, Integer, MetaData, Table, Text, func, insert, select, update
from sqlalchemy.dialects.sqlite.aiosqlite import AsyncAdapt_aiosqlite_connection, AsyncAdapt_aiosqlite_cursor
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware

from talaria.engine import lanes, leaner, onestep
from talaria.engine.database import let_types_name_their_operators

ITEMS = Table("item", MetaData(), Column("id", Integer, primary_key=True), Column("name", Text, unique=True))


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every name be what it was when a test ends."""
    for where, names in (
        (AsyncAdapt_aiosqlite_connection, ("_cursor_cls", "commit", "rollback")),
        (utils, ("run_in_threadpool", "get_dependant")),
        (dependencies, ("provide_database_interface",)),
        (events, ("_write_sqlite_events",)),
        (validation._VALIDATOR, ("check_schema",)),
        (background_workers, ("Worker",)),
        (results, ("resolve_result_storage",)),
    ):
        for name in names:
            monkeypatch.setattr(where, name, inspect.getattr_static(where, name))
    lanes._know_storage.cache_clear()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often something was done in a connection's thread, by the name of what was done."""
    found: Counter[str] = Counter()
    theirs = Connection._execute

    async def execute(self: Connection, fn: Any, *args: Any, **kwargs: Any) -> Any:
        found[fn.__name__] += 1
        return await theirs(self, fn, *args, **kwargs)

    monkeypatch.setattr(Connection, "_execute", execute)
    return found


async def engine(path: Path) -> AsyncEngine:
    return await AioSqliteConfiguration(f"sqlite+aiosqlite:///{path}").engine()


def test_a_statement_is_one_step_and_says_what_it_said(tmp_path: Path, steps: Counter[str]) -> None:
    onestep.make_statements_one_step()
    assert AsyncAdapt_aiosqlite_cursor.server_side is False  # else there would be no rows at once

    async def work() -> None:
        prefects = await engine(tmp_path / "some.db")
        async with prefects.begin() as there:
            await there.run_sync(ITEMS.metadata.create_all)
            made = await there.execute(insert(ITEMS), [{"name": str(number)} for number in range(5)])
            assert made.rowcount == 5
        steps.clear()
        async with prefects.connect() as there:
            found = await there.execute(select(ITEMS.c.name).order_by(ITEMS.c.id))
            assert [*found.keys()] == ["name"] and found.scalars().all() == ["0", "1", "2", "3", "4"]
        assert steps == {"step": 1}  # and no end of a transaction that has not begun
        token = SQLITE_BEGIN_MODE.set("IMMEDIATE")
        async with prefects.begin() as there:
            assert (await there.execute(insert(ITEMS).values(name="5").returning(ITEMS.c.id))).scalar_one() == 6
            assert (await there.execute(update(ITEMS).where(ITEMS.c.id > 3).values(name=None))).rowcount == 3
            assert (await there.execute(insert(ITEMS).values(name="6"))).inserted_primary_key == (7,)
        assert steps == {"step": 5, "commit": 1}
        with pytest.raises(IntegrityError):
            async with prefects.begin() as there:
                await there.execute(insert(ITEMS).values(name="7"))
                await there.execute(insert(ITEMS).values(name="7"))
        assert steps["rollback"] == 1
        SQLITE_BEGIN_MODE.reset(token)
        async with prefects.connect() as there:
            assert (await there.execute(select(func.count()).select_from(ITEMS))).scalar_one() == 7
        await prefects.dispose()

    asyncio.run(work())


def test_a_statement_that_nobody_waits_for_any_more_holds_no_lock(tmp_path: Path) -> None:
    onestep.make_statements_one_step()
    path = tmp_path / "some.db"

    async def given_up() -> None:
        prefects = await engine(path)
        async with prefects.begin() as there:
            await there.run_sync(ITEMS.metadata.create_all)
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            waits = threading.Event()

            async def write() -> None:
                SQLITE_BEGIN_MODE.set("IMMEDIATE")
                async with prefects.connect() as there:
                    waits.set()
                    await there.execute(insert(ITEMS).values(name="late"))

            writing = asyncio.create_task(write())
            await asyncio.to_thread(waits.wait)
            await asyncio.sleep(0)
            writing.cancel()
            ended = asyncio.ensure_future(asyncio.wait([writing]))
            await asyncio.sleep(0)
            other.execute("COMMIT")
            await ended
            # Whoever writes next does not wait for a transaction that began when nobody wanted it any more.
            await asyncio.to_thread(other.execute, "PRAGMA busy_timeout = 60000")
            await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
            assert other.execute("SELECT count(*) FROM item").fetchone() == (0,)
        await prefects.dispose()

    asyncio.run(given_up())


def test_dependencies_are_asked_where_requests_are_answered_and_studied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    studied: list[Any] = []
    theirs = utils.get_dependant

    def get_dependant(**asked: Any) -> Any:
        studied.append(asked["call"])
        return theirs(**asked)

    monkeypatch.setattr(utils, "get_dependant", get_dependant)
    app = FastAPI()

    def who(name: str = "nobody") -> str:
        return name

    def where(mine: str = Depends(who)) -> tuple[str, int]:
        return mine, threading.get_ident()

    @app.get("/one")
    async def one(found: tuple[str, int] = Depends(where)) -> Any:
        return found

    app.dependency_overrides[who] = lambda name="somebody": name
    leaner.ask_dependencies_here()

    async def answers(*paths: str) -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return [(await client.get(path)).json() for path in paths]

    here = threading.get_ident()
    assert asyncio.run(answers("/one", "/one?name=x")) == [["somebody", here], ["x", here]]
    count = len(studied)
    assert asyncio.run(answers("/one?name=y")) == [["y", here]] and len(studied) == count
    leaner.ask_dependencies_here()
    assert asyncio.run(answers("/one?name=z")) == [["z", here]] and len(studied) == count


def test_the_database_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    leaner.look_up_the_database_once()

    @dependencies.db_injector
    async def given(db: Any) -> Any:
        return db

    first = asyncio.run(given())
    monkeypatch.setattr(dependencies, "get_dialect", None)
    assert asyncio.run(given()) is first


def test_a_schema_is_checked_once_and_values_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    theirs = validation._VALIDATOR.check_schema

    def check_schema(schema: Any, **others: Any) -> None:
        checked.append(schema)
        theirs(schema, **others)

    monkeypatch.setattr(validation._VALIDATOR, "check_schema", check_schema)
    leaner.check_schemas_once()
    schema: dict[str, Any] = {"type": "object", "properties": {"paths": {"type": "array"}}, "required": ["paths"]}
    for _ in range(3):
        assert validation.validate({"paths": []}, schema, raise_on_error=True) == []
        with pytest.raises(validation.ValidationError):
            validation.validate({"paths": 1}, schema, raise_on_error=True)
    assert len(checked) == 1
    for _ in range(2):
        with pytest.raises(Exception, match="is not valid under any of the given schemas"):
            validation.validate({}, {"type": "nothing"}, raise_on_error=True)
        with pytest.raises(ValueError, match="Invalid schema"):
            validation.is_valid_schema({"type": "nothing"})
    assert len(checked) == 5


def test_events_are_written_once_each_with_all_that_they_are_about(tmp_path: Path, steps: Counter[str]) -> None:
    let_types_name_their_operators()
    assert list(inspect.signature(events._write_sqlite_events).parameters) == ["db", "session", "events"]  # injected
    leaner.write_events_alike()
    db = dependencies.provide_database_interface()
    tables = [db.Event.__table__, db.EventResource.__table__]
    some = [
        ReceivedEvent.model_validate(
            {
                "id": uuid4(),
                "occurred": datetime.now(UTC) - timedelta(seconds=number),
                "event": f"talaria.test.{number}",
                "resource": {"prefect.resource.id": f"talaria.target.{number}"},
                "related": [{"prefect.resource.id": "prefect.flow-run.x", "prefect.resource.role": "flow-run"}] * 2,
                "payload": {"number": number},
            }
        )
        for number in range(4)
    ]

    async def write() -> tuple[list[Any], int]:
        prefects = await engine(tmp_path / "events.db")
        async with prefects.begin() as there:
            await there.run_sync(lambda sync: db.Event.metadata.create_all(sync, tables=tables))
        for part in (some[:2], some[:1], some):  # an event may come twice
            async with AsyncSession(prefects) as session, session.begin():
                await events._write_sqlite_events(session=session, events=part)
        async with AsyncSession(prefects) as session:
            found = await session.execute(select(db.Event.event, db.Event.payload, db.Event.resource_id))
            count = await session.scalar(select(func.count()).select_from(db.EventResource))
        await prefects.dispose()
        return sorted(map(tuple, found)), int(count or 0)

    found, count = asyncio.run(write())
    assert found == [(f"talaria.test.{n}", {"number": n}, f"talaria.target.{n}") for n in range(4)]
    assert count == 3 * 4


@pytest.fixture
def password() -> Iterator[str]:
    with temporary_settings({PREFECT_SERVER_API_AUTH_STRING: "worker:secret"}):
        yield "Basic " + base64.b64encode(b"worker:secret").decode()


def test_each_request_still_needs_the_password_and_old_clients_are_understood(password: str) -> None:
    from prefect.server.api.server import create_api_app

    app = create_api_app(ignore_cache=True)

    @app.post("/echo")
    async def echo(body: dict[str, Any]) -> Any:
        return body

    class Made:
        api_app = app

    known = [one.kwargs["dispatch"].__name__ for one in app.user_middleware if one.cls is BaseHTTPMiddleware]
    assert sorted(known) == sorted([leaner.TYPE, leaner.TOKEN])
    leaner.look_at_requests_plainly(Made)
    assert not [one for one in app.user_middleware if one.cls is BaseHTTPMiddleware]

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            wrong = "Basic " + base64.b64encode(b"worker:other").decode()
            tried = ({}, *({"Authorization": one} for one in ("", "Basic", "Basic %%", wrong, password.split()[1])))
            found = [(await client.get("/version", headers=one)).status_code for one in tried]
            found += [(await client.get(path)).status_code for path in ("/health", "/x/health")]
            found += [(await client.post("/health")).status_code]
            known = {"Authorization": password}
            found += [(await client.get("/version", headers=known)).status_code]
            answer = await client.post("/echo", headers=known, content=json.dumps({"a": 1}))
            return [*found, answer.status_code]

    assert asyncio.run(statuses()) == [401] * 6 + [200, 401, 401, 200, 200]


def test_where_results_lie_is_known_without_a_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Any] = []
    theirs = ssl.create_default_context

    def create_default_context(*args: Any, **kwargs: Any) -> ssl.SSLContext:
        made.append(args)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(ssl, "create_default_context", create_default_context)

    @flow(persist_result=False)
    async def nothing() -> None:
        pass

    nothing.result_storage = tmp_path
    lanes._know_storage()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        stores: list[Any] = [results.get_result_store().update_for_flow(nothing, _sync=True) for _ in range(3)]
    assert {str(one.result_storage.basepath) for one in stores} == {str(tmp_path)} and len(made) <= 1


def test_polls_are_noted_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Prefect's routes give to its task queue, by names of theirs, and what else they give it."""
    for route in (polls.get_scheduled_flow_runs, work_queues.read_work_queue_runs):
        assert {"mark_work_queues_ready", "mark_deployments_ready"} <= {*inspect.unwrap(route).__code__.co_names}
    given: list[tuple[str, Any]] = []

    class Queue:
        def add(self, function: Any, key: str = "") -> Any:
            async def noted(**asked: Any) -> None:
                given.append((function.__name__, asked))

            return noted

    app = FastAPI()
    leaner.note_polls_seldom(SimpleNamespace(api_app=app))
    docket = app.dependency_overrides[api_dependencies.docket]
    request = cast(Any, SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(docket=Queue()))))
    queue, other = uuid4(), uuid4()

    def polled(*queues: Any, ready: tuple[Any, ...] = ()) -> list[str]:
        async def poll() -> None:
            theirs = docket(request)
            mark = {"polled_work_queue_ids": [*queues], "ready_work_queue_ids": [*ready]}
            await theirs.add(mark_work_queues_ready, key="queues")(**mark)
            await theirs.add(mark_deployments_ready, key="deployments")(work_queue_ids=[*queues])
            await theirs.add(delete_flow_run_logs, key="logs")(flow_run_id=queue)

        given.clear()
        asyncio.run(poll())
        return [name for name, _ in given]

    every = ["mark_work_queues_ready", "mark_deployments_ready", "delete_flow_run_logs"]
    assert polled(queue) == every and polled(queue) == every[2:]
    assert polled(queue, other) == every  # which have not been polled
    assert polled(queue, ready=(queue,)) == [every[0], every[2]]  # it was not ready: that is noted at once
    monkeypatch.setattr(leaner, "POLLED_S", 0.0)
    assert polled(other) == every and polled(other) == every


def test_tasks_that_are_due_are_looked_for_seldom_and_what_is_not_begins_at_once() -> None:
    assert vars(background_workers)["Worker"] is Worker
    leaner.look_for_due_tasks_seldom()
    leaner.look_for_due_tasks_seldom()

    async def looks() -> tuple[timedelta, bool]:
        began = asyncio.Event()

        async def task() -> None:
            began.set()

        async with (
            Docket(name=f"talaria-{uuid4()}", url="memory://") as docket,
            background_workers.Worker(docket) as one,
        ):
            working = asyncio.create_task(one.run_forever())
            await docket.add(task)()
            await began.wait()
            working.cancel()
            return one.scheduling_resolution, began.is_set()

    assert asyncio.run(looks()) == (timedelta(seconds=leaner.DUE_S), True)
