"""Prefect's server in this process: loaded in the background, while the front door already answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse

from talaria.front.access import ACTING, Role
from talaria.front.gate import Application, Message, Receive, Send
from talaria.imports import staying

WAIT_S = 120  # longest that a request waits for the server to start; a first start migrates the database
_logger = logging.getLogger("talaria.front")


class EmbeddedPrefect:
    """Prefect's server, made by `load`, which returns the application and Prefect's own FastAPI within it.

    It expects `credential`, which its environment sets. `failed` is called if it can't be started.
    """

    def __init__(
        self, credential: str, load: Callable[[], tuple[Application, Any]], failed: Callable[[], None] = lambda: None
    ) -> None:
        self.credential, self._load, self._failed = credential, load, failed
        self._app: Application | None = None
        self._ready, self._stop = asyncio.Event(), asyncio.Event()
        self._wrong = ""
        name, _, password = credential.partition(":")
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self, raise_app_exceptions=False),
            base_url="http://127.0.0.1/api",
            auth=(name, password),
            timeout=WAIT_S,
        )

    @property
    def state(self) -> str:
        return self._wrong or ("ready" if self._app else "starting")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._serve())
        try:
            yield
        finally:
            self._stop.set()
            await task
            await self.client.aclose()

    async def _serve(self) -> None:
        try:
            app, prefect = await asyncio.to_thread(self._load)
            async with prefect.router.lifespan_context(prefect):
                self._app = app
                self._ready.set()
                await self._stop.wait()
        except Exception as exc:
            _logger.exception("Prefect's server ended")
            self._wrong = f"failed: {type(exc).__name__}"
            self._ready.set()
            self._failed()
        finally:
            self._app = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if self._app is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), WAIT_S)
        if self._app is None:
            await _not_yet(scope, receive, send, self.state)
            return
        await self._app(scope, receive, send)


async def _not_yet(scope: Message, receive: Receive, send: Send, state: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1013})
        return
    await JSONResponse({"error": f"the server is {state}"}, 503, {"Retry-After": "5"})(scope, receive, send)


def load() -> tuple[Application, Any]:
    """Return the engine's Prefect application, which refuses targets that are not valid, and the FastAPI within it.

    It records who creates what.
    """
    with staying():
        from talaria.engine.api import create_app
        from talaria.front.saved import ValidTargets

        app, prefect = create_app()
        say_who(prefect)
    return ValidTargets(app), prefect


def is_sqlite() -> bool:
    """Return True if the embedded server's database is a file of SQLite's, which no other server has."""
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

    return str(PREFECT_API_DATABASE_CONNECTION_URL.value()).startswith("sqlite")


def say_who(prefect: Any) -> None:
    """Let Prefect record in `created_by` who creates a run, a deployment or the like."""
    from prefect.server.api import dependencies
    from prefect.server.schemas.core import CreatedBy, UpdatedBy

    def answered(kind: type[CreatedBy] | type[UpdatedBy], otherwise: Callable[..., Any]) -> Callable[..., Any]:
        async def by(request: Request) -> Any:
            who = ACTING.get()
            if Role.NOBODY < who.role < Role.WORKER:
                return kind(id=None, type="USER", display_value=who.name)
            number, name = (request.headers.get(f"prefect-automation-{part}") for part in ("id", "name"))
            return otherwise(UUID(number) if number else None, name)

        by.__annotations__["request"] = Request
        return by

    # Both of them: the route that creates deployments asks for both, and may use either.
    for kind, theirs in ((CreatedBy, dependencies.get_created_by), (UpdatedBy, dependencies.get_updated_by)):
        prefect.api_app.dependency_overrides[theirs] = answered(kind, theirs)
