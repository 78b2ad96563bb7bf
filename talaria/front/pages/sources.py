"""Pages of sources and of notifications: what there is, how it is, and what their buttons do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.site import Site, fields, shown
from talaria.front.pages.texts import text
from transfer.errors import DispatchError

LIST, RULES = "/talaria/sources", "/talaria/notifications"
SAID = ("paused", "resumed", "swept", "retried", "removed")


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
        return self.site.page(request, "sources.html", rows=[_row(one) for one in found], said=_said(request))

    @needs(Role.VIEWER)
    @shown
    async def one(self, request: Request) -> Response:
        """Show a source: its units, and those that need somebody."""
        return await self._shown(request)

    async def _shown(
        self, request: Request, problem: str = "", status: int = 200, tested: dict[str, Any] | None = None
    ) -> Response:
        from talaria.service import sources

        office, name = await self.site.office(request), request.path_params["name"]
        document = await sources.show_source(office, name, given=True)
        row = next(one for one in (await sources.list_sources(office))["sources"] if one["name"] == document["name"])
        return self.site.page(
            request,
            "source.html",
            status=status,
            source=document,
            row=_row(row),
            settings=[(key, _words(value)) for key, value in document["settings"].items() if key != "type"],
            tested=tested,
            said=_said(request),
            problem=problem,
        )

    @needs(Role.OPERATOR)
    @shown
    async def test(self, request: Request) -> Response:
        """Look whether a source can be used, and what the next sweep would find."""
        from talaria.service import sources

        office = await self.site.office(request)
        return await self._shown(request, tested=await sources.test_source(office, request.path_params["name"]))

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

        await sources.remove_source(await self.site.office(request), request.path_params["name"])
        return RedirectResponse(f"{LIST}?{urlencode({'said': 'removed'})}", 303)

    async def _done(
        self, request: Request, call: Callable[..., Awaitable[dict[str, Any]]], word: str, *arguments: Any
    ) -> Response:
        name = request.path_params["name"]
        try:
            await call(await self.site.office(request), name, *arguments)
        except DispatchError as exc:  # its state does not allow that
            return await self._shown(request, exc.message, 409)
        return RedirectResponse(f"{LIST}/{quote(name, safe='')}?{urlencode({'said': word})}", 303)


class NotificationPages:
    """Rules that write to people."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        one = f"{RULES}/{{name}}"
        return [
            Route(RULES, self.every, methods=["GET"]),
            Route(one, self.one, methods=["GET"]),
            Route(f"{one}/test", self.test, methods=["POST"]),
            Route(f"{one}/remove", self.remove, methods=["POST"]),
        ]

    @needs(Role.VIEWER)
    @shown
    async def every(self, request: Request) -> Response:
        """Show all rules, each with its last message."""
        from talaria.service import rules

        found = (await rules.list_rules(await self.site.office(request)))["rules"]
        return self.site.page(request, "notifications.html", rows=found, said=_said(request))

    @needs(Role.VIEWER)
    @shown
    async def one(self, request: Request) -> Response:
        """Show a rule and its newest messages."""
        return await self._shown(request)

    async def _shown(self, request: Request, tested: dict[str, Any] | None = None, problem: str = "") -> Response:
        from talaria.service import rules

        office = await self.site.office(request)
        document = await rules.show_rule(office, request.path_params["name"])
        hidden = ("name", "type", "messages")
        settings = [(key, _words(value)) for key, value in document.items() if key not in hidden and _words(value)]
        return self.site.page(
            request, "notification.html", rule=document, settings=settings, tested=tested, problem=problem
        )

    @needs(Role.ADMIN)
    @shown
    async def test(self, request: Request) -> Response:
        """Send a test message by a rule."""
        from talaria.service import rules

        office, to = await self.site.office(request), (await fields(request)).get("to", "").strip()
        try:
            tested = await rules.test_rule(office, request.path_params["name"], to)
        except (DispatchError, ValueError) as exc:
            return await self._shown(request, problem=str(exc))
        return await self._shown(request, tested)

    @needs(Role.ADMIN)
    @shown
    async def remove(self, request: Request) -> Response:
        """Remove a rule, and what it has not sent yet."""
        from talaria.service import rules

        await rules.remove_rule(await self.site.office(request), request.path_params["name"])
        return RedirectResponse(f"{RULES}?{urlencode({'said': 'removed'})}", 303)


def _row(one: dict[str, Any]) -> dict[str, Any]:
    """Return a source as lists show it."""
    state = "broken" if one["broken"] else "off" if not one["enabled"] else "failing" if one["problem"] else "ready"
    units = {name: count for name, count in one["units"].items() if count}
    return one | {"state": state, "units": units, "targets": one.get("targets", [])}


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_words(one) for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_words(one)}" for key, one in value.items())
    return "" if value is None else str(value)


def _said(request: Request) -> str:
    word = request.query_params.get("said", "")
    return text(f"sources.said.{word}") if word in SAID else ""
