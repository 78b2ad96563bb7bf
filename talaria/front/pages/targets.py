"""Pages of targets: all of them, one of them, and what its buttons do."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.checks import Checks, begun
from talaria.front.pages.editing import TARGET
from talaria.front.pages.plot import plotted
from talaria.front.pages.site import Site, fields, is_part, kind_of, ref_of, render, said_of, shown, templates, who
from talaria.front.pages.texts import text
from transfer.errors import Misconfigured, NotFound

if TYPE_CHECKING:
    from markupsafe import Markup

    from talaria.service.uses import Uses

LIST = TARGET.pages
ROWS = 2000  # of the list, that are kept as they were shown
DAYS = 14  # of the plot
STATES = ("open", "failing", "broken", "unchecked", "ready", "off")  # the order in which people want to see them
SORTS = ("state", "name", "type")
SAID = ("changed", "added", "renamed", "enabled", "disabled", "removed")


class TargetPages:
    """The list of targets, each target, and its buttons but for Add and Edit."""

    def __init__(self, site: Site, checks: Checks) -> None:
        self.site, self.checks = site, checks

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        one = f"{LIST}/{{name}}"
        return [
            Route(LIST, self.every, methods=["GET"]),
            Route(one, self.one, methods=["GET"]),
            Route(f"{one}/test", self.test, methods=["POST"]),
            Route(f"{one}/enable", self.enable, methods=["POST"]),
            Route(f"{one}/rename", self.rename, methods=["POST"]),
            Route(f"{one}/delete", self.delete, methods=["POST"]),
            Route("/talaria/checks/{id}", self.check, methods=["GET"]),
        ]

    @needs(Role.VIEWER)
    @shown
    async def every(self, request: Request) -> Response:
        """Show all targets, or those that the filter leaves; the filter stands in the address."""
        from talaria.service import overview

        office = await self.site.office(request)
        activity = await self.site.activity(office)
        found = [
            row | {"activity": activity.get(row["name"], overview.Activity())} for row in await self.site.rows(office)
        ]
        given = {name: request.query_params.get(name, "") for name in ("q", "type", "direction", "state", "sort")}
        return self.site.page(
            request,
            "targets.html",
            every=len(found),
            rows=[_in_list(row) for row in _sorted([row for row in found if _matches(row, given)], given["sort"])],
            filter=given,
            choices=_choices(found),
            said=said_of(request, "said", SAID),
        )

    @needs(Role.VIEWER)
    @shown
    async def one(self, request: Request) -> Response:
        """Show a target."""
        return await self._shown(request)

    async def _shown(self, request: Request, problem: str = "", status: int = 200, **more: Any) -> Response:
        from talaria.front.pages.shown_settings import settings
        from talaria.listener import is_loopback
        from talaria.service import overview, standings

        office, ref = await self.site.office(request), ref_of(request)
        row, target = _found(await self.site.rows(office), ref)
        recent = await standings.lines(office, await overview.to_target(office, row["name"], 10))
        last = next((part["state"] for one in recent[:1] for part in one["at"] if part["name"] == row["name"]), "")
        return self.site.page(
            request,
            "target.html",
            status=status,
            row=row,
            target=target,
            loops=bool(target and is_loopback(target.node)),
            groups=settings(target) if target else [],
            recent=recent,
            last=last,
            activity=(await self.site.activity(office)).get(row["name"], overview.Activity()),
            plot=plotted(await overview.days(office, row["name"], DAYS)),
            said=said_of(request, "said", SAID),
            problem=problem,
            **{"used": None, **more},
        )

    @needs(Role.OPERATOR)
    @shown
    async def test(self, request: Request) -> Response:
        """Start a test of a saved target; show its steps as they are made."""
        from talaria.front.pages.shown_settings import in_labels
        from talaria.service import targets

        office, ref = await self.site.office(request), ref_of(request)
        row, target = _found(await self.site.rows(office), ref)
        contact = target.contact if target else ""
        events = targets.test_targets(office, ref, (await fields(request)).get("move") == "true")
        words = in_labels(type(target)) if target else str
        return begun(request, self.checks.start(row["name"], who(request).name, row["path"], contact, events, words))

    @needs(Role.OPERATOR)
    @shown
    async def check(self, request: Request) -> Response:
        """Show how far a test is: in the page that has started it, or as a page of its own."""
        found = self.checks.find(request.path_params["id"], who(request).name)
        if found is None:
            raise NotFound(text("test.gone"))
        if is_part(request):
            return render("check.html", check=found)
        answer = self.site.page(request, "check_page.html", check=found)
        if not found.over:
            answer.headers["refresh"] = "2"  # without scripts
        return answer

    @needs(Role.ADMIN)
    @shown
    async def enable(self, request: Request) -> Response:
        """Let a target take part, or take it out."""
        from talaria.service import targets

        on = (await fields(request)).get("enabled") == "true"
        done = await targets.enable_target(await self.site.office(request), ref_of(request), on)
        return _to(done["name"], kind_of(request), said="enabled" if on else "disabled")

    @needs(Role.ADMIN)
    @shown
    async def rename(self, request: Request) -> Response:
        """Give a target another name."""
        from talaria.service import targets
        from talaria.service.uses import InUse

        name = (await fields(request)).get("to", "").strip()
        try:
            done = await targets.rename_target(await self.site.office(request), ref_of(request), name)
        except InUse as exc:
            return await self._used(request, exc.uses, "target.rename_used")
        except ValueError as exc:
            return await self._shown(request, str(exc), 422)
        return _to(done["name"], said="renamed")

    @needs(Role.ADMIN)
    @shown
    async def delete(self, request: Request) -> Response:
        """Delete a target that nothing uses."""
        from talaria.service import targets
        from talaria.service.uses import InUse

        try:
            done = await targets.remove_target(await self.site.office(request), ref_of(request))
        except InUse as exc:
            return await self._used(request, exc.uses, "target.delete_used")
        return RedirectResponse(f"{LIST}?{urlencode({'said': 'removed', 'name': done['name']})}", 303)

    async def _used(self, request: Request, uses: Uses, why: str) -> Response:
        """Return the page of a target that something uses, with what does."""
        from talaria.service import standings

        runs = await standings.lines(await self.site.office(request), uses.runs)
        used = {"runs": runs, "sources": uses.sources, "schedules": uses.schedules, "rules": uses.rules}
        return await self._shown(request, text(why), 409, used=used)


def _to(name: str, kind: str = "", **words: str) -> RedirectResponse:
    """Return the way to a target's page, which says what has been done."""
    return RedirectResponse(TARGET.one(name, kind, **words), 303)


def _found(every: list[dict[str, Any]], ref: str) -> tuple[dict[str, Any], Any]:
    """Return one target as the list shows it, and itself with its secrets masked; None for one that is broken."""
    kind, _, name = ref.rpartition("/")
    found = [row for row in every if row["name"] == name and kind in ("", row["type"])]
    if not found:
        raise NotFound(f"no target named {name}")
    if len(found) > 1:
        raise Misconfigured(f"several targets are named {name}: rename or remove one of each in the list")
    return found[0], found[0]["target"]


def _matches(row: dict[str, Any], given: dict[str, str]) -> bool:
    words = " ".join(str(row[key]) for key in ("name", "leads_to", "contact")).casefold()
    return all(word in words for word in given["q"].casefold().split()) and all(
        not given[key] or given[key] == str(row[key]) for key in ("type", "direction", "state")
    )


def _sorted(found: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    if by == "type":
        return sorted(found, key=lambda row: (row["type"], row["name"]))
    return sorted(found, key=lambda row: row["name"] if by == "name" else (STATES.index(row["state"]), row["name"]))


def _in_list(row: dict[str, Any]) -> Markup:
    """Return a target's row in the list."""
    check, did = row["last_check"], row["activity"]
    told = (check["ok"], check["time"]) if check else None
    words = (str(row[key]) for key in ("state", "name", "path", "type", "leads_to", "direction"))
    return _row(*words, told, did.last, did.waiting, did.good, did.bad)


@functools.lru_cache(ROWS)
def _row(
    state: str,
    name: str,
    path: str,
    type_name: str,
    leads_to: str,
    direction: str,
    check: tuple[bool, str] | None,
    last: str,
    waiting: int,
    good: int,
    bad: int,
) -> Markup:
    """Return a row: of five hundred, to make them anew was four fifths of the page's time, and few change."""
    from markupsafe import Markup

    return Markup(templates().get_template("target_row.html").render(**locals()))  # noqa: S704 - a template has made it


def _choices(found: list[dict[str, Any]]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    every = ("", text("all"))
    kinds = sorted({str(row["type"]) for row in found})
    return [
        ("type", text("targets.type"), [every, *((one, one) for one in kinds)]),
        (
            "direction",
            text("targets.direction"),
            [every, *((one, text(f"direction.{one}")) for one in ("store", "query", "both"))],
        ),
        ("state", text("targets.state"), [every, *((one, text(f"state.{one}")) for one in STATES)]),
        ("sort", text("targets.sort"), [(one, text(f"sort.{one}")) for one in SORTS]),
    ]
