"""The one application: Talaria's pages and API, and Prefect's API and UI, behind the gate."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from talaria.front import prefect_rules, static
from talaria.front.access import SCOPE_KEY, Identity
from talaria.front.gate import Application, Gate, Message, Receive, Send, is_api, is_own
from talaria.front.keys import Door, KeyRing
from talaria.front.login import Pages
from talaria.front.plain import refusal, wants_page
from talaria.front.upstream import Upstream

Heard = Callable[[str, str, str], None]  # what happened, to or by whom, and where or why


def build(
    keys: KeyRing,
    door: Door,
    upstream: Upstream,
    routes: Sequence[BaseRoute] = (),
    heard: Heard = lambda what, who, more: None,
    behind: Application | None = None,
) -> Gate:
    """Return the application.

    Args:
        routes: of Talaria's API, each with the role that it needs (`access.needs`); paths begin with `/talaria/`.
            `request.app.state.upstream.client` is a client of Prefect's API, `request.scope["talaria.user"]` the
            Identity of whoever asks.
        behind: what answers all but our own paths; `upstream` as it is if none.
        heard: called with logins, logouts, refusals, and what people change through Prefect's API.
    """
    own = [*static.routes(), *Pages(keys, lambda: upstream.state, heard).routes(), *routes]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with upstream.running():
            yield

    ours = Starlette(routes=own, lifespan=lifespan, exception_handlers={404: _nothing})
    ours.state.upstream = upstream
    ours.router.redirect_slashes = False

    async def split(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or is_own(scope["path"]):
            await ours(scope, receive, send)
            return
        who: Identity = scope[SCOPE_KEY]
        if scope["type"] == "http" and (what := prefect_rules.recorded(scope["method"], scope["path"], who.role)):
            send = _noted(send, lambda: heard(what, who.name, f"{scope['method']} {scope['path']}"))
        await (behind or upstream)(scope, receive, send)

    def refused(who: Identity, what: str, why: str) -> None:
        heard("refused", who.name, f"{what}: {why}")

    return Gate(split, own, keys, door, upstream.credential, refused)


async def _nothing(request: Request, exc: Exception) -> Response:
    """Answer that there is nothing at an address."""
    if wants_page(request.scope) and not is_api(request.scope["path"]):
        return refusal("there is no such page", 404)
    return JSONResponse({"error": "there is nothing here", "detail": "Not Found"}, 404)


def _noted(send: Send, done: Callable[[], None]) -> Send:
    """Call `done` when the answer says that what was asked for has been done."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 300:
            done()
        await send(message)

    return sent
