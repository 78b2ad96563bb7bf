"""What Prefect's server does anew for each request, and what needs doing only once, or not at all.

Each function replaces a name of Prefect's or FastAPI's; tests/engine/test_leaner.py fails when one of them changes.
What the server answers stays the same.
"""

from __future__ import annotations

import base64
import functools
import hmac
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse

from talaria.engine.asgi import Application, Message, Receive, Send

if TYPE_CHECKING:
    from prefect.server.events.schemas.events import ReceivedEvent
    from sqlalchemy.ext.asyncio import AsyncSession

OPEN = ("/health", "/ready")  # below Prefect's API, for probes: they need no password
TYPE, TOKEN = "default_content_type", "token_validation"  # names of the functions that look at each request
MOST = 64  # schemas of parameters that are known to be valid, and sets of queues that are known to be polled
DUE_S = 1.0  # between two looks for tasks of the server's whose time has come, some 40 a minute
POLLED_S = 10.0  # for which queues and deployments count as just polled; after 60 Prefect takes them for not ready


def ask_dependencies_here() -> None:
    """Call what requests depend on in the event loop's thread, and study only once how it is to be called.

    None of Prefect's dependencies waits for anything, but FastAPI calls each that is no coroutine in another thread;
    and where one dependency of an application is replaced, it studies the signatures of all with each request.
    """
    from fastapi.dependencies import utils

    _replace(utils, "run_in_threadpool", _at_once)
    if not isinstance(utils.get_dependant, _Studied):
        _replace(utils, "get_dependant", _Studied(utils.get_dependant))


def _replace(module: Any, name: str, ours: Any) -> None:
    """Put something of ours in the place of a name that is there.

    Raises:
        AttributeError: it isn't.
    """
    getattr(module, name)
    setattr(module, name, ours)


async def _at_once(call: Callable[..., Any], *args: Any, **values: Any) -> Any:
    return call(*args, **values)


class _Studied:
    """FastAPI's `get_dependant`, which remembers what it has found; requests only read that."""

    def __init__(self, theirs: Callable[..., Any]) -> None:
        self._theirs, self._found = theirs, dict[Any, Any]()

    def __call__(self, **asked: Any) -> Any:
        key = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in asked.items())
        if key not in self._found:
            self._found[key] = self._theirs(**asked)
        return self._found[key]


def look_up_the_database_once() -> None:
    """Let all that asks for Prefect's database get it without a look at the settings; they are those of the process."""
    from prefect.server.database import dependencies

    theirs = dependencies.provide_database_interface
    if not hasattr(theirs, "cache_info"):
        _replace(dependencies, "provide_database_interface", functools.cache(theirs))


def check_schemas_once() -> None:
    """Let a schema of parameters that was valid be valid when it comes again, as it does with each run."""
    from prefect.utilities.schema_tools import validation

    theirs = validation._VALIDATOR.check_schema

    @functools.lru_cache(MOST)
    def valid(schema: str) -> None:
        theirs(json.loads(schema))

    def check_schema(schema: Any, **others: Any) -> None:
        if others:
            theirs(schema, **others)
        else:
            valid(json.dumps(schema))

    validation._VALIDATOR.check_schema = check_schema


def write_events_alike() -> None:
    """Let SQLite take events row by row, by a statement that is the same each time.

    Prefect makes a statement of all rows at once, which SQLAlchemy can't remember: to make one takes a hundred times as
    long as to execute it.
    """
    from prefect.server.events.storage import database

    _replace(database, "_write_sqlite_events", _write_events)


async def _write_events(session: AsyncSession, events: list[ReceivedEvent]) -> None:
    from prefect.server.database import provide_database_interface
    from prefect.server.events.storage.database import _in_safe_batches
    from sqlalchemy import select

    db = provide_database_interface()
    for batch in _in_safe_batches(events):
        known = set(await session.scalars(select(db.Event.id).where(db.Event.id.in_([one.id for one in batch]))))
        new = [one for one in batch if one.id not in known]
        for table, rows in (
            (db.Event, [one.as_database_row() for one in new]),
            (db.EventResource, [row for one in new for row in one.as_database_resource_rows()]),
        ):
            if rows:
                # Else it would be made into one statement of all rows again.
                insert = db.queries.insert(table).execution_options(dml_strategy="raw")
                await session.execute(insert, rows)


def look_for_due_tasks_seldom() -> None:
    """Let the server look each DUE_S for its own tasks that are to begin at a time, and not four times a second.

    A look costs a script of Redis's, in Python: a tenth of what an idle server took. What is to begin at once does so.
    """
    from prefect.server.api import background_workers

    theirs: Any = vars(background_workers)["Worker"]
    if not isinstance(theirs, functools.partial):
        seldom = functools.partial(theirs, scheduling_resolution=timedelta(seconds=DUE_S))
        _replace(background_workers, "Worker", seldom)


def note_polls_seldom(prefect: Any) -> None:
    """Let it be noted each POLLED_S, and not with each poll, that a worker polls its queues.

    Prefect notes it by two tasks of its task queue, with a transaction each: they took longer than the poll.
    """
    from prefect.server.api import dependencies

    noted: dict[tuple[str, ...], float] = {}

    def docket(request: Request) -> Any:
        return _Seldom(theirs(request), noted)

    theirs = dependencies.docket
    docket.__annotations__["request"] = Request  # FastAPI looks at it, and not at what its name stands for
    prefect.api_app.dependency_overrides[theirs] = docket


class _Seldom:
    """Prefect's task queue, which takes notes of the same polls once in a while.

    Args:
        noted: until when nothing has to be noted, by what has been polled.
    """

    def __init__(self, docket: Any, noted: dict[tuple[str, ...], float]) -> None:
        self._docket, self._noted = docket, noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._docket, name)

    def add(self, function: Any, *args: Any, **options: Any) -> Callable[..., Any]:
        from prefect.server.models.deployments import mark_deployments_ready
        from prefect.server.models.work_queues import mark_work_queues_ready

        theirs: Callable[..., Any] = self._docket.add(function, *args, **options)
        if function not in (mark_work_queues_ready, mark_deployments_ready):
            return theirs

        async def seldom(**asked: Any) -> Any:
            polled = [str(one) for name, ids in asked.items() if name != "ready_work_queue_ids" for one in ids]
            what, now = (function.__name__, *sorted(polled)), time.monotonic()
            if not asked.get("ready_work_queue_ids") and self._noted.get(what, 0.0) > now:
                return None
            if len(self._noted) >= MOST:
                self._noted.clear()
            self._noted[what] = now + POLLED_S
            return await theirs(**asked)

        return seldom


def look_at_requests_plainly(prefect: Any) -> None:
    """Look at the password and the type of each request without a task and two streams around it.

    That is how FastAPI does it for functions; here are ASGI applications that do the same as Prefect's functions.
    """
    app = prefect.api_app
    for number, one in enumerate(app.user_middleware):
        name = getattr(one.kwargs.get("dispatch"), "__name__", "") if one.cls is BaseHTTPMiddleware else ""
        if name == TYPE:
            app.user_middleware[number] = Middleware(_JsonByDefault)
        elif name == TOKEN:
            from prefect.settings import PREFECT_SERVER_API_AUTH_STRING

            expected = PREFECT_SERVER_API_AUTH_STRING.value()
            app.user_middleware[number] = Middleware(_WithPassword, expected=str(expected))


class _JsonByDefault:
    """An application of which a request with a body is JSON if it says nothing of its type: as old clients send it."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH"):
            headers = dict(scope["headers"])
            if b"content-type" not in headers and int(headers.get(b"content-length", b"0")) > 0:
                scope = {**scope, "headers": [*scope["headers"], (b"content-type", b"application/json")]}
        await self.app(scope, receive, send)


class _WithPassword:
    """An application that asks each request for a password, except the probes of its health."""

    def __init__(self, app: Application, expected: str) -> None:
        self.app, self._expected = app, expected.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope) or self._knows(dict(scope["headers"])):
            await self.app(scope, receive, send)
            return
        await JSONResponse({"exception_message": "Unauthorized"}, 401)(scope, receive, send)

    def _is_open(self, scope: Message) -> bool:
        return scope["method"] == "GET" and scope["path"].removeprefix(scope.get("root_path", "")) in OPEN

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme != b"Basic":
            return False
        try:
            return hmac.compare_digest(base64.b64decode(given), self._expected)
        except ValueError:
            return False
