"""Routes for the state of the server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request

from talaria import __version__
from talaria.front.access import Role, needs
from talaria.front.api import answers
from talaria.front.api.asking import Asked, Who, add


@needs(Role.NOBODY)
async def health(who: Who) -> dict[str, Any]:
    """Return whether this server answers, and its version."""
    return {"ok": True, "version": __version__}


@needs(Role.VIEWER)
async def status(request: Request, asked: Asked) -> dict[str, Any]:
    """Return what runs, what waits, and how the targets were when they were last checked."""
    from talaria.service.status import status

    url = request.app.state.reach.url or f"{request.url.scheme}://{request.url.netloc}/api"
    return await status(await asked(), url)


def add_to(app: FastAPI) -> None:
    """Add the routes."""
    add(app, "GET", "/health", health, answer=answers.HealthAnswer)
    app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)  # as monitors ask
    add(app, "GET", "/status", status, answer=answers.StatusAnswer)


def open_to_viewers(app: FastAPI) -> None:
    """Let every viewer read the description of the API."""
    for route in app.routes:
        if getattr(route, "path", "") == "/openapi.json":
            needs(Role.VIEWER)(route.endpoint)  # type: ignore[attr-defined]
