"""Pages of dispatches: the newest, and what is done with many of them; and the home page."""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.api.errors import AWAY, answer_to
from talaria.front.pages.acting import ACTIONS, act, send_to
from talaria.front.pages.site import Site, fields, moment, shown
from talaria.front.pages.texts import text
from transfer.errors import Misconfigured

LIST = "/talaria/dispatches"
KINDS = ("dispatch",)
SHOWN = 50  # dispatches a page
PAGE = 200  # runs that are asked for at once
RUNNING = 20  # on the home page
MOST = 500  # that one press of a button changes
MOST_LEFT = 5000  # that it can go on with: their ids stand in the page's form
FILTERS = {
    "": (),
    "failed": ("FAILED", "CRASHED"),
    "waiting": ("SCHEDULED", "PENDING", "PAUSED"),
    "running": ("RUNNING",),
    "delivered": ("COMPLETED",),
    "cancelled": ("CANCELLED",),
}
DAYS = ("", "1", "7", "30")


class DispatchPages:
    """Home, and the list of dispatches."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/talaria", self.root, methods=["GET"]),
            Route("/talaria/", self.home, methods=["GET"]),
            Route(LIST, self.every, methods=["GET"]),
            Route(LIST, self.many, methods=["POST"]),
        ]

    @needs(Role.VIEWER)
    async def root(self, request: Request) -> Response:
        """Redirect to the home page."""
        return RedirectResponse("/talaria/", 308)

    @needs(Role.VIEWER)
    @shown
    async def home(self, request: Request) -> Response:
        """Show what needs attention, what runs, and the last day."""
        from talaria.engine.registry import workers
        from talaria.service.jobs import line

        office = await self.site.office(request)
        targets, day = await self.site.rows(office), (await self.site.activity(office)).values()
        bad = sum(one.bad for one in day)
        attention = [(row["path"], _attention(row)) for row in targets if row["state"] in ("open", "broken", "failing")]
        attention += [(f"{LIST}?state=failed&days=1", text("home.failed", count=bad))] if bad else []
        return self.site.page(
            request,
            "home.html",
            attention=attention,
            first=not targets,
            jobs=[line(run) for run in (await self.site.waiting(office))[:RUNNING]],
            good=sum(one.good for one in day),
            bad=bad,
            workers=len(await workers(office.client)),
        )

    @needs(Role.VIEWER)
    @shown
    async def every(self, request: Request) -> Response:
        """Show the newest dispatches, or those that the filter leaves; the filter stands in the address."""
        from talaria.engine import runs
        from talaria.service.jobs import line

        office = await self.site.office(request)
        given = _given(dict(request.query_params))
        offset = request.query_params.get("offset", "0")
        if not offset.isdecimal():
            raise Misconfigured(text("dispatches.nothing"))
        wanted, targets = _wanted(given), await self.site.rows(office)
        found, count = await asyncio.gather(
            runs.jobs(office.client, SHOWN + 1, int(offset), flows=KINDS, **wanted),
            runs.count(office.client, KINDS, **wanted),
        )
        return self.site.page(
            request,
            "dispatches.html",
            jobs=[line(run) for run in found[:SHOWN]],
            count=count,
            given=given,
            query=urlencode({key: value for key, value in given.items() if value}),
            states=[(one, text(f"filter.{one}")) for one in FILTERS],
            days=[(one, text(f"days.{one}")) for one in DAYS],
            actions=ACTIONS,
            others=[row["name"] for row in targets if row["enabled"] and row["direction"] != "query"],
            offset=int(offset),
            more=len(found) > SHOWN,
        )

    @needs(Role.OPERATOR)
    @shown
    async def many(self, request: Request) -> Response:
        """Retry, cancel, pause, resume or send elsewhere what was picked, or all that the filter leaves now."""
        from talaria.engine import runs

        office, sent = await self.site.office(request), await fields(request, several=("pick",))
        given, action = _given(sent), sent.get("do", "")
        picked, others = list(dict.fromkeys(sent.get("pick", "").split())), 0
        if sent.get("all"):
            wanted = _wanted(given)
            picked = await _matching(office.client, wanted)
            others = max(0, await runs.count(office.client, KINDS, **wanted) - len(picked))
        ask = action == "cancel" and bool(sent.get("all"))
        done, refused, problem = list[str](), list[tuple[str, str]](), ""
        left = deque(picked)
        while left and not ask and not problem and len(done) + len(refused) < MOST:
            job = left.popleft()
            try:
                await (
                    send_to(office, job, sent.get("to", "")) if action == "send" else act(office, job, action, KINDS)
                )
                done.append(job)
            except Exception as exc:  # this one's state does not allow it; the others go on
                status, words = answer_to(exc)
                refused.append((job, words))
                problem = words if status == AWAY else ""  # so it would be for all that are left
        return self.site.page(
            request,
            "many.html",
            what=text(f"dispatch.{action}") if action in (*ACTIONS, "send") else "",
            done=done,
            refused=refused,
            left=list(left),
            next=min(MOST, len(left)),
            others=others,
            problem=problem,
            ask=ask,
            sent={name: sent.get(name, "") for name in ("do", "to")} | given,
            back=f"{LIST}?{urlencode(given)}",
        )


async def _matching(client: Any, wanted: dict[str, Any]) -> list[str]:
    """Return the ids of the runs that a filter leaves, the newest first, each once, at most MOST_LEFT."""
    from talaria.engine import runs

    found, offset = dict[str, None](), 0
    while len(found) < MOST_LEFT and (page := await runs.jobs(client, PAGE, offset, flows=KINDS, **wanted)):
        found |= {str(run.id): None for run in page}  # one that is made meanwhile moves the others on
        offset += len(page)
        if len(page) < PAGE:
            break
    return list(found)[:MOST_LEFT]


def _given(sent: dict[str, str]) -> dict[str, str]:
    """Return the filter of a request.

    Raises:
        Misconfigured: there is no such state or time.
    """
    given = {name: sent.get(name, "").strip() for name in ("state", "q", "days")}
    if given["state"] not in FILTERS or given["days"] not in DAYS:
        raise Misconfigured(text("dispatches.nothing"))
    return given


def _wanted(given: dict[str, str]) -> dict[str, Any]:
    from prefect.client.schemas.objects import StateType

    since = datetime.now(UTC) - timedelta(days=int(given["days"])) if given["days"] else None
    return {"states": tuple(StateType(one) for one in FILTERS[given["state"]]), "like": given["q"], "since": since}


def _attention(row: dict[str, Any]) -> str:
    if row["state"] == "broken":
        return text("home.broken", name=row["name"], why=row["broken"])
    if row["state"] == "open":
        return text("home.open", name=row["name"], time=moment(row["breaker"]["next_test"]))
    return text("home.failing", name=row["name"])
