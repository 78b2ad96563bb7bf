"""`/metrics`: figures for Prometheus, to whoever may look; a scraper has a viewer's token."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.api.asking import Reach
from talaria.front.gate import METRICS


def routes(reach: Reach, certificate: str = "") -> list[BaseRoute]:
    """Return the route.

    Args:
        certificate: file of the front door's certificate, "" for none.
    """
    turn, made = asyncio.Lock(), list[Any]()

    @needs(Role.VIEWER)
    async def metrics(request: Request) -> Response:
        async with turn:
            if not made:  # the first who asks waits for the import of Prefect and of every driver
                made.append(await asyncio.to_thread(importlib.import_module, "talaria.metrics.gather"))
                made.append(await asyncio.to_thread(importlib.import_module, "talaria.metrics.families"))
                made.append(made[0].Gatherer(reach.client, reach.home, certificate))
        _, families, gatherer = made
        figures = await gatherer.figures()
        body, media_type = families.exposed(figures, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": media_type, "Cache-Control": "no-store"})

    return [Route(METRICS, metrics, methods=["GET"])]
