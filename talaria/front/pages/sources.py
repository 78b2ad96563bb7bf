"""Pages of sources: what there is, how it is, and what their buttons do. Add and Edit are in `editing.py`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.editing import SOURCE, with_paths
from talaria.front.pages.site import Site, fields, kind_of, ref_of, said_of, shown
from talaria.front.pages.texts import text
from transfer.errors import DispatchError, NotFound

LIST = SOURCE.pages
SAID = ("added", "changed", "paused", "resumed", "swept", "retried", "removed")


class SourcePages:
    """Sources: where studies come from by themselves."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        one = f"{LIST}/{{name}}"
        return [
            Route(LIST, self.every, methods=["GET"]),
            Route(one, self.one, methods=["GET"]),
            Route(f"{one}/test", self.test, methods=["POST"]),
            Route(f"{one}/sweep", self.sweep, methods=["POST"]),
            Route(f"{one}/retry", self.retry, methods=["POST"]),
            Route(f"{one}/enable", self.enable, methods=["POST"]),
            Route(f"{one}/remove", self.remove, methods=["POST"]),
        ]

    @needs(Role.VIEWER)
    @shown
    async def every(self, request: Request) -> Response:
        """Show all sources."""
        from talaria.service import sources

        found = (await sources.list_sources(await self.site.office(request)))["sources"]
        return self.site.page(
            request,
            "sources.html",
            rows=with_paths(SOURCE, [_row(one) for one in found]),
            said=said_of(request, "sources.said", SAID),
        )

    @needs(Role.VIEWER)
    @shown
    async def one(self, request: Request) -> Response:
        """Show a source: its units, and those that need somebody."""
        return await self._shown(request)

    async def _shown(
        self, request: Request, problem: str = "", status: int = 200, tested: dict[str, Any] | None = None
    ) -> Response:
        from talaria.front.pages.shown_settings import settings, title_of
        from talaria.service import sources

        office, ref = await self.site.office(request), ref_of(request)
        row = next((_row(one) for one in await _alike(office, ref)), None)
        if row is None:
            raise NotFound(text("sources.no_such", name=ref))
        source = None if row["broken"] else await sources.load_source(office, ref)
        document = await sources.show_source(office, ref, given=True) if source else {"attention": []}
        return self.site.page(
            request,
            "source.html",
            status=status,
            document=document,
            row=row,
            source=source,
            type_title=title_of(type(source)) if source else row["type"],
            groups=settings(source) if source else [],
            query=f"?{urlencode({'type': kind})}" if (kind := kind_of(request)) else "",
            tested=tested,
            said=said_of(request, "sources.said", SAID),
            problem=problem,
        )

    @needs(Role.OPERATOR)
    @shown
    async def test(self, request: Request) -> Response:
        """Look whether a source can be used, and what the next sweep would find."""
        from talaria.service import sources

        office = await self.site.office(request)
        return await self._shown(request, tested=await sources.test_source(office, ref_of(request)))

    @needs(Role.OPERATOR)
    @shown
    async def sweep(self, request: Request) -> Response:
        """Look through a source now."""
        from talaria.service import sources

        return await self._done(request, sources.sweep_source, "swept")

    @needs(Role.OPERATOR)
    @shown
    async def retry(self, request: Request) -> Response:
        """Dispatch again what failed, or is held: one unit or all."""
        from talaria.service import sources

        unit = (await fields(request)).get("unit", "")
        return await self._done(request, sources.retry_source, "retried", unit)

    @needs(Role.ADMIN)
    @shown
    async def enable(self, request: Request) -> Response:
        """Pause a source, or let it go on."""
        from talaria.service import sources

        on = (await fields(request)).get("enabled") == "true"
        return await self._done(request, sources.enable_source, "resumed" if on else "paused", on)

    @needs(Role.ADMIN)
    @shown
    async def remove(self, request: Request) -> Response:
        """Remove a source; no file is touched."""
        from talaria.service import sources

        try:
            await sources.remove_source(await self.site.office(request), ref_of(request))
        except DispatchError as exc:  # it has received what is not delivered yet
            return await self._shown(request, exc.message, 409)
        return RedirectResponse(f"{LIST}?{urlencode({'said': 'removed'})}", 303)

    async def _done(
        self, request: Request, call: Callable[..., Awaitable[dict[str, Any]]], word: str, *arguments: Any
    ) -> Response:
        try:
            await call(await self.site.office(request), ref_of(request), *arguments)
        except DispatchError as exc:  # its state does not allow that
            return await self._shown(request, exc.message, 409)
        return RedirectResponse(SOURCE.one(request.path_params["name"], kind_of(request), said=word), 303)


async def _alike(office: Any, ref: str) -> list[dict[str, Any]]:
    """Return the sources that a name, perhaps with its type before it, means."""
    from talaria.service import sources

    kind, _, name = ref.rpartition("/")
    found = (await sources.list_sources(office))["sources"]
    return [one for one in found if one["name"] == name and kind in ("", one["type"])]


def _row(one: dict[str, Any]) -> dict[str, Any]:
    """Return a source as lists show it."""
    state = "broken" if one["broken"] else "off" if not one["enabled"] else "failing" if one["problem"] else "ready"
    units = {name: count for name, count in one["units"].items() if count}
    return one | {"state": state, "units": units, "targets": one.get("targets", [])}
