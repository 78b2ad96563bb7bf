"""The API as an application, to be mounted at `PATH`; it imports Prefect at the first request that needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Mount

from talaria import __version__
from talaria.front.api import dispatches, errors, events, jobs, queries, rules, sources, targets
from talaria.front.api import health as healths
from talaria.front.api.asking import Reach
from transfer.home import Home

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

    from talaria.front.gate import Message, Receive, Send
    from talaria.front.upstream import Upstream

PATH = "/talaria/api/v1"


def routes(reach: Reach) -> list[BaseRoute]:
    """Return the API as a route of the front door."""
    return [Mount(PATH, app=_application(reach))]


def shared(upstream: Upstream) -> Callable[[], Awaitable[PrefectClient]]:
    """Return a function that returns this process's one client of Prefect's API, which uses no socket."""
    made: list[PrefectClient] = []
    turn = asyncio.Lock()

    async def prefect(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # others start it; the client waits for that with its first request
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await upstream(scope, receive, send)

    async def client() -> PrefectClient:
        async with turn:
            if not made:
                made.append(await asyncio.to_thread(_client, prefect, upstream.credential))
                await made[0].__aenter__()  # until this process ends
        return made[0]

    return client


def _client(prefect: Any, credential: str) -> PrefectClient:
    from prefect.client.orchestration import PrefectClient  # takes a second or two

    from talaria.service import operations  # noqa: F401 - and the drivers as long again

    plain = {"headers": {"Accept-Encoding": "identity"}}  # within a process nothing gets sooner there for being packed
    return PrefectClient(prefect, auth_string=credential or None, httpx_settings=plain)


def application(
    client: Callable[[], Awaitable[PrefectClient]], home: Home, *, embedded: bool = True, url: str = ""
) -> FastAPI:
    """Return the API.

    Args:
        client: returns a client of the Prefect server, which this process shares; waits until that server answers.
        embedded: whether the Prefect server is ours, so that its workers are on this machine.
        url: of the Prefect server, as `status` shows it.
    """
    return _application(Reach(client, home, embedded, url))


def _application(reach: Reach) -> FastAPI:
    app = FastAPI(
        title="Talaria",
        version=__version__,
        description="Delivers DICOM studies, and results made from them, to targets, and proves the delivery.",
        openapi_url="/openapi.json",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # behind a proxy with TLS, it would lead to http
        root_path_in_servers=False,
        servers=[{"url": PATH}],
    )
    app.router.route_class = errors.Answering
    app.state.reach = reach
    for part in (healths, targets, sources, rules, dispatches, queries, jobs, events):
        part.add_to(app)
    healths.open_to_viewers(app)
    errors.add_to(app)
    return app
