"""The page that sends files of the server's machine: what would go, and then that it goes."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.api.errors import answer_to
from talaria.front.pages.site import Site, fields, shown
from talaria.front.pages.targets import rows
from talaria.front.pages.texts import text
from talaria.service import Conflict

PATH = "/talaria/send"
PRIORITIES = ("normal", "urgent", "offpeak")
SHOWN = 200  # items of a plan
ASKED = ("exclude", "sender_aet", "receiver_aet", "sender_host")
FIELDS = ("paths", "priority", "key", *ASKED)


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
        """Show what would be sent, or send it."""
        from talaria.service import dispatches

        sent = await fields(request, several=("to",))
        office = await self.site.office(request)
        asked: dict[str, Any] = {name: sent.get(name, "").strip() for name in ASKED}
        paths = [line.strip() for line in sent.get("paths", "").splitlines() if line.strip()]
        targets = [one for one in sent.get("to", "").split("\n") if one]
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
        self, request: Request, sent: dict[str, str], *, plan: Any = None, problem: str = "", status: int = 200
    ) -> Response:
        office = await self.site.office(request)
        chosen = sent.get("to", "").split("\n")
        targets = [row for row in await rows(office) if row["enabled"] and row["direction"] != "query"]
        return self.site.page(
            request,
            "send.html",
            status=status,
            values={name: sent.get(name, "") for name in FIELDS},
            targets=[(row["name"], row["type"], row["leads_to"], row["name"] in chosen) for row in targets],
            priorities=PRIORITIES,
            parts=[] if plan is None else [_part(name, one) for name, one in plan["targets"].items()],
            planned=plan is not None,
            problem=problem,
        )


def _check(paths: list[str], targets: list[str]) -> None:
    """Raise ValueError if a request can't be meant."""
    if not paths:
        raise ValueError(text("send.no_path"))
    if not targets:
        raise ValueError(text("send.no_target"))
    if wrong := [path for path in paths if not Path(path).is_absolute()]:
        raise ValueError(text("send.relative", path=wrong[0]))


def _part(name: str, planned: dict[str, Any]) -> dict[str, Any]:
    """Return what would happen at one target."""
    return {
        "name": name,
        "items": planned["items"][:SHOWN],
        "cut": max(0, len(planned["items"]) - SHOWN),
        "words": text("send.counts", files=planned["files"], size=_size(planned["bytes"])),
    }


def _size(count: int) -> str:
    """Return a number of bytes as people read it."""
    size, units = float(count), ["B", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:,.3g} {units[0]}" if size < 1000 else f"{size:,.0f} {units[0]}"
