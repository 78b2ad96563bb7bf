"""The page that sends files of the server's machine: what would go, and then that it goes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.api.errors import answer_to
from talaria.front.pages.site import Site, fields, shown, size
from talaria.front.pages.texts import text
from talaria.service import Conflict, Office
from transfer import roots, silent
from transfer.roots import Roots

if TYPE_CHECKING:
    from talaria.service.folders import Listing

PATH = "/talaria/send"
PRIORITIES = ("normal", "urgent", "offpeak")
SHOWN = 200  # items of a plan
ASKED = ("exclude", "sender_aet", "receiver_aet", "sender_host")
EACH = ("", "folder", "path", "line")
FIELDS = ("paths", "priority", "each", "key", *ASKED)


class SendingPages:
    """One form: paths and targets, the plan before it is sent, and the dispatch."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [Route(PATH, self.empty, methods=["GET"]), Route(PATH, self.sent, methods=["POST"])]

    @needs(Role.OPERATOR)
    @shown
    async def empty(self, request: Request) -> Response:
        """Show the form."""
        return await self._form(request, {"key": secrets.token_urlsafe(12)})

    @needs(Role.OPERATOR)
    @shown
    async def sent(self, request: Request) -> Response:
        """Show what would be sent, or send it; or show what lies in a folder, to choose from it."""
        from talaria.service import dispatches

        sent = await fields(request, several=("to",))
        office = await self.site.office(request)
        asked: dict[str, Any] = {name: sent.get(name, "").strip() for name in ASKED}
        asked["each"] = sent.get("each", "") if sent.get("each") in EACH else ""
        if sent.get("add"):
            sent["paths"] = "\n".join(dict.fromkeys([*_paths(sent), sent["add"]]))
        if "open" in sent or "add" in sent:
            return await self._form(request, sent, browsed=sent.get("open", sent.get("at", "")))
        paths, targets = _paths(sent), [one for one in sent.get("to", "").split("\n") if one]
        try:
            _check(paths, targets)
            if sent.get("do") == "plan":
                plan = await dispatches.plan_dispatch(office, paths, targets, **asked)
                return await self._form(request, sent, plan=plan)
            priority = sent.get("priority", "")
            done = await dispatches.create_dispatch(
                office,
                paths,
                targets,
                priority=priority if priority in PRIORITIES else "normal",
                key=sent.get("key", ""),  # a double click sends once
                **asked,
            )
        except Exception as exc:
            status, words = answer_to(exc)
            if isinstance(exc, Conflict):  # a page that was gone back to, with another study in it
                sent["key"] = secrets.token_urlsafe(12)
            return await self._form(request, sent, problem=words, status=status)
        return RedirectResponse(f"/talaria/dispatches/{done['flow_run_id']}", 303)

    async def _form(
        self,
        request: Request,
        sent: dict[str, str],
        *,
        plan: Any = None,
        problem: str = "",
        status: int = 200,
        browsed: str | None = None,
    ) -> Response:
        office = await self.site.office(request)
        chosen = sent.get("to", "").split("\n")
        targets = [row for row in await self.site.rows(office) if row["enabled"] and row["direction"] != "query"]
        listing, wrong = await browse(office, roots.sources, browsed)
        return self.site.page(
            request,
            "send.html",
            status=status,
            values={name: sent.get(name, "") for name in FIELDS},
            targets=[(row["name"], row["type"], row["leads_to"], row["name"] in chosen) for row in targets],
            priorities=PRIORITIES,
            each=[(one, text(f"send.each.{one}")) for one in EACH],
            **planned(plan),
            planned=plan is not None,
            browsable=office.embedded,  # else the paths are another machine's
            listing=listing,
            problem=problem or wrong,
        )


async def browse(office: Office, places: Callable[[], Roots], path: str | None) -> tuple[Listing | None, str]:
    """Return what lies in a folder, and what was wrong with that; nothing if no folder is asked for.

    Args:
        places: returns the folders below which may be looked.
    """
    from talaria.service.dispatches import ANSWER_S
    from talaria.service.folders import listing

    if path is None or not office.embedded:
        return None, ""
    try:
        await silent.check([path] if path else [], ANSWER_S)
        return await asyncio.to_thread(lambda: listing(places(), path)), ""
    except Exception as exc:
        return None, answer_to(exc)[1]


def _paths(sent: dict[str, str]) -> list[str]:
    return [line.strip() for line in sent.get("paths", "").splitlines() if line.strip()]


def _check(paths: list[str], targets: list[str]) -> None:
    """Raise ValueError if a request can't be meant."""
    if not paths:
        raise ValueError(text("send.no_path"))
    if not targets:
        raise ValueError(text("send.no_target"))
    if wrong := [path for path in paths if not Path(path).is_absolute()]:
        raise ValueError(text("send.relative", path=wrong[0]))


def planned(plan: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a page shows of a plan, None if there is none: the studies, and what goes to each target."""
    return {
        "parts": [_part(name, one) for name, one in (plan or {"targets": {}})["targets"].items()],
        "studies": (plan or {}).get("studies", [])[:SHOWN],
    }


def _part(name: str, planned: dict[str, Any]) -> dict[str, Any]:
    """Return what would happen at one target."""
    return {
        "name": name,
        "items": planned["items"][:SHOWN],
        "cut": max(0, len(planned["items"]) - SHOWN),
        "words": text("send.counts", files=planned["files"], size=size(planned["bytes"])),
    }
