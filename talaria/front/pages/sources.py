"""Pages of sources: what there is, how it is, and what their buttons do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.editing import SOURCE
from talaria.front.pages.named import NamedPages, Row
from talaria.front.pages.site import fields, shown
from talaria.service import Office

if TYPE_CHECKING:
    from blocks.named import NamedBlock


class SourcePages(NamedPages):
    """Sources: where studies come from by themselves."""

    subject, texts, template = SOURCE, "sources", "source.html"
    said = (*NamedPages.said, "swept", "retried")

    def more(self, one: str) -> list[BaseRoute]:
        return [
            Route(f"{one}/sweep", self.sweep, methods=["POST"]),
            Route(f"{one}/retry", self.retry, methods=["POST"]),
        ]

    async def rows(self, office: Office) -> list[Row]:
        from talaria.service import sources

        return [_row(one) for one in (await sources.list_sources(office))["sources"]]

    async def loaded(self, office: Office, ref: str) -> NamedBlock:
        from talaria.service import sources

        return await sources.load_source(office, ref)

    async def about(self, office: Office, ref: str, row: Row) -> dict[str, Any]:
        from talaria.service import sources

        broken = bool(row["broken"])
        return {"attention": [] if broken else (await sources.show_source(office, ref, given=True))["attention"]}

    async def tested(self, office: Office, ref: str, sent: dict[str, str]) -> dict[str, Any]:
        from talaria.service import sources

        return await sources.test_source(office, ref)

    async def enabled(self, office: Office, ref: str, on: bool) -> dict[str, Any]:
        from talaria.service import sources

        return await sources.enable_source(office, ref, on)

    async def removed(self, office: Office, ref: str) -> dict[str, Any]:
        from talaria.service import sources

        return await sources.remove_source(office, ref)

    @needs(Role.OPERATOR)
    @shown
    async def sweep(self, request: Request) -> Response:
        """Look through a source now."""
        from talaria.service import sources

        return await self.done(request, sources.sweep_source, "swept")

    @needs(Role.OPERATOR)
    @shown
    async def retry(self, request: Request) -> Response:
        """Dispatch again what failed, or is held: one unit or all."""
        from talaria.service import sources

        unit = (await fields(request)).get("unit", "")
        return await self.done(request, sources.retry_source, "retried", unit)


def _row(one: Row) -> Row:
    """Return a source as lists show it."""
    state = "broken" if one["broken"] else "off" if not one["enabled"] else "failing" if one["problem"] else "ready"
    units = {name: count for name, count in one["units"].items() if count}
    routed = (name for route in one.get("routes", ()) for name in route["targets"])
    return one | {"state": state, "units": units, "targets": list(dict.fromkeys([*one.get("targets", ()), *routed]))}
