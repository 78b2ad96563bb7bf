"""Pages of notifications: the rules that write to people, what each has written, and what their buttons do."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.editing import RULE, with_paths
from talaria.front.pages.site import Site, fields, kind_of, ref_of, said_of, shown
from talaria.front.pages.texts import text
from transfer.errors import DispatchError, NotFound

LIST = RULE.pages
SAID = ("added", "changed", "paused", "resumed", "removed")


class NotificationPages:
    """Rules that write to people. Add and Edit are in `editing.py`."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        one = f"{LIST}/{{name}}"
        return [
            Route(LIST, self.every, methods=["GET"]),
            Route(one, self.one, methods=["GET"]),
            Route(f"{one}/test", self.test, methods=["POST"]),
            Route(f"{one}/enable", self.enable, methods=["POST"]),
            Route(f"{one}/remove", self.remove, methods=["POST"]),
        ]

    @needs(Role.VIEWER)
    @shown
    async def every(self, request: Request) -> Response:
        """Show all rules, each with its last message."""
        from talaria.service import rules

        found = (await rules.list_rules(await self.site.office(request)))["rules"]
        rows = with_paths(RULE, [one | {"state": _state(one)} for one in found])
        return self.site.page(
            request, "notifications.html", rows=rows, said=said_of(request, "notifications.said", SAID)
        )

    @needs(Role.VIEWER)
    @shown
    async def one(self, request: Request) -> Response:
        """Show a rule and its newest messages."""
        return await self._shown(request)

    async def _shown(
        self, request: Request, tested: dict[str, Any] | None = None, problem: str = "", status: int = 200
    ) -> Response:
        from talaria.front.pages.shown_settings import settings, title_of
        from talaria.service import rules

        office, ref = await self.site.office(request), ref_of(request)
        kind, _, name = ref.rpartition("/")
        found = (await rules.list_rules(office))["rules"]
        row = next((one for one in found if one["name"] == name and kind in ("", one["type"])), None)
        if row is None:
            raise NotFound(text("notifications.no_such", name=ref))
        rule = None if row["broken"] else await rules.load_rule(office, ref)
        return self.site.page(
            request,
            "notification.html",
            status=status,
            row=row | {"state": _state(row)},
            rule=rule,
            type_title=title_of(type(rule)) if rule else row["type"],
            groups=settings(rule) if rule else [],
            messages=await rules.messages_of(office, name),
            query=f"?{urlencode({'type': kind})}" if kind else "",
            tested=tested,
            said=said_of(request, "notifications.said", SAID),
            problem=problem,
        )

    @needs(Role.ADMIN)
    @shown
    async def test(self, request: Request) -> Response:
        """Send a test message by a rule."""
        from talaria.service import rules

        office, to = await self.site.office(request), (await fields(request)).get("to", "").strip()
        try:
            tested = await rules.test_rule(office, ref_of(request), to)
        except (DispatchError, ValueError) as exc:
            return await self._shown(request, problem=str(exc), status=422)
        return await self._shown(request, tested)

    @needs(Role.ADMIN)
    @shown
    async def enable(self, request: Request) -> Response:
        """Pause a rule, or let it write again."""
        from talaria.service import rules

        on = (await fields(request)).get("enabled") == "true"
        try:
            await rules.enable_rule(await self.site.office(request), ref_of(request), on)
        except DispatchError as exc:
            return await self._shown(request, problem=str(exc), status=409)
        said = "resumed" if on else "paused"
        return RedirectResponse(RULE.one(request.path_params["name"], kind_of(request), said=said), 303)

    @needs(Role.ADMIN)
    @shown
    async def remove(self, request: Request) -> Response:
        """Remove a rule, and what it has not sent yet."""
        from talaria.service import rules

        await rules.remove_rule(await self.site.office(request), ref_of(request))
        return RedirectResponse(f"{LIST}?{urlencode({'said': 'removed'})}", 303)


def _state(row: dict[str, Any]) -> str:
    """Return how a rule is: one whose last message was not sent needs somebody."""
    if row["broken"]:
        return "broken"
    if not row["enabled"]:
        return "off"
    return "failing" if row["last"] and row["last"]["error"] else "ready"
