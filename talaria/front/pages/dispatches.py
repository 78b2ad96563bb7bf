"""Pages of dispatches: the newest, and what is done with many of them; and the home page."""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.api.errors import AWAY, answer_to
from talaria.front.pages.acting import ACTIONS, NothingMissing, act, send_to
from talaria.front.pages.editing import SOURCE, TARGET
from talaria.front.pages.site import Site, fields, moment, shown, size
from talaria.front.pages.texts import text
from talaria.service import Office
from transfer.errors import Misconfigured
from transfer.ledger import Ledger

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

if TYPE_CHECKING:
    from talaria.service.attention import Attention

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
    "partial": ("FAILED", "CRASHED"),  # and in part delivered, as the ledger knows
    "waiting": ("SCHEDULED", "PENDING", "PAUSED"),
    "running": ("RUNNING",),
    "delivered": ("COMPLETED",),
    "cancelled": ("CANCELLED",),
}
DAYS = ("", "1", "7", "30")
USUAL_DAYS = "7"  # where nobody has said otherwise: a search of years takes its time
OPEN = ("waiting", "running")  # however old they are
FIELDS = ("state", "q", "target", "days")  # of the filter


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
        from talaria.service import standings

        office = await self.site.office(request)
        targets, day = await self.site.rows(office), (await self.site.activity(office)).values()
        bad = sum(one.bad for one in day)
        attention = [(row["path"], _attention(row)) for row in targets if row["state"] in ("open", "broken", "failing")]
        attention += [(f"{LIST}?state=failed&days=1", text("home.failed", count=bad))] if bad else []
        attention += [_need(one) for one in await self.site.needs(office)]
        return self.site.page(
            request,
            "home.html",
            attention=attention,
            first=not targets,
            jobs=await standings.lines(office, (await self.site.waiting(office))[:RUNNING]),
            good=sum(one.good for one in day),
            bad=bad,
            workers=len(await workers(office.client)),
        )

    @needs(Role.VIEWER)
    @shown
    async def every(self, request: Request) -> Response:
        """Show the newest dispatches, or those that the filter leaves; the filter stands in the address."""
        from talaria.service import standings

        office = await self.site.office(request)
        given = _given(dict(request.query_params))
        offset = request.query_params.get("offset", "0")
        if not offset.isdecimal():
            raise Misconfigured(text("dispatches.nothing"))
        wanted, targets = await _wanted(office, given), await self.site.rows(office)
        (found, following), count = await asyncio.gather(
            _page(office.client, int(offset), given["target"], wanted),
            _count(office.client, given["target"], [row["name"] for row in targets], wanted),
        )
        return self.site.page(
            request,
            "dispatches.html",
            jobs=await standings.lines(office, found),
            count=count,
            names=sorted({row["name"] for row in targets} | {given["target"]} - {""}),
            given=given,
            query=urlencode({key: value for key, value in given.items() if value or key == "days"}),
            every=urlencode({**given, "days": ""}),
            states=[(one, text(f"filter.{one}")) for one in FILTERS],
            days=[(one, text(f"days.{one}")) for one in DAYS],
            actions=ACTIONS,
            others=[row["name"] for row in targets if row["enabled"] and row["direction"] != "query"],
            offset=int(offset),
            following=following,
        )

    @needs(Role.OPERATOR)
    @shown
    async def many(self, request: Request) -> Response:
        """Retry, cancel, pause, resume or send elsewhere what was picked, or all that the filter leaves now."""
        office, sent = await self.site.office(request), await fields(request, several=("pick",))
        given, action = _given(sent), sent.get("do", "")
        picked, others = list(dict.fromkeys(sent.get("pick", "").split())), 0
        if sent.get("all"):
            wanted = await _wanted(office, given)
            names = [row["name"] for row in await self.site.rows(office)] if given["target"] else []
            picked = await _matching(office.client, given["target"], wanted)
            others = max(0, (await _count(office.client, given["target"], names, wanted) or 0) - len(picked))
        ask = action == "cancel" and bool(sent.get("all"))
        done, skipped, refused, problem = list[str](), list[str](), list[tuple[str, str]](), ""
        left = deque(picked)
        while left and not ask and not problem and len(done) + len(skipped) + len(refused) < MOST:
            job = left.popleft()
            try:
                await (
                    send_to(office, job, sent.get("to", "")) if action == "send" else act(office, job, action, KINDS)
                )
                done.append(job)
            except NothingMissing:
                skipped.append(job)
            except Exception as exc:  # this one's state does not allow it; the others go on
                status, words = answer_to(exc)
                refused.append((job, words))
                problem = words if status == AWAY else ""  # so it would be for all that are left
        return self.site.page(
            request,
            "many.html",
            what=text(f"dispatch.{action}") if action in (*ACTIONS, "send") else "",
            done=done,
            skipped=skipped,
            refused=refused,
            left=list(left),
            next=min(MOST, len(left)),
            others=others,
            problem=problem,
            ask=ask,
            sent={name: sent.get(name, "") for name in ("do", "to")} | given,
            back=f"{LIST}?{urlencode(given)}",
        )


async def _page(client: Any, offset: int, target: str, wanted: dict[str, Any]) -> tuple[list[FlowRun], int]:
    """Return the runs of a page of the list that begins at an offset, and where the next one begins; 0 if nowhere."""
    from talaria.engine import runs
    from talaria.service.overview import names_of

    found: list[FlowRun] = []
    limit = SHOWN + 1
    while True:
        page = await runs.jobs(client, limit, offset, flows=KINDS, **wanted)
        for at, run in enumerate(page):
            if not target or target in names_of(run):  # other names may hold this one
                if len(found) == SHOWN:
                    return found, offset + at
                found.append(run)
        offset += len(page)
        if len(page) < limit:
            return found, 0
        limit = PAGE  # some are not to this target


async def _count(client: Any, target: str, names: list[str], wanted: dict[str, Any]) -> int | None:
    """Return how many runs a filter leaves; None where runs to targets of like names can't be told apart by it."""
    from talaria.engine import runs

    if target and (wanted["like"] != target or any(target in name for name in names if name != target)):
        return None
    return await runs.count(client, KINDS, **wanted)


async def _matching(client: Any, target: str, wanted: dict[str, Any]) -> list[str]:
    """Return the ids of the runs that a filter leaves, the newest first, each once, at most MOST_LEFT."""
    from talaria.engine import runs
    from talaria.service.overview import names_of

    found, offset = dict[str, None](), 0
    while len(found) < MOST_LEFT and (page := await runs.jobs(client, PAGE, offset, flows=KINDS, **wanted)):
        # One that is made meanwhile moves the others on.
        found |= {str(run.id): None for run in page if not target or target in names_of(run)}
        offset += len(page)
        if len(page) < PAGE:
            break
    return list(found)[:MOST_LEFT]


def _given(sent: dict[str, str]) -> dict[str, str]:
    """Return the filter of a request.

    Raises:
        Misconfigured: there is no such state or time.
    """
    given = {name: sent.get(name, "").strip() for name in FIELDS}
    if "days" not in sent and given["state"] not in OPEN:
        given["days"] = USUAL_DAYS
    if given["state"] not in FILTERS or given["days"] not in DAYS:
        raise Misconfigured(text("dispatches.nothing"))
    return given


async def _wanted(office: Office, given: dict[str, str]) -> dict[str, Any]:
    """Return what a filter asks Prefect for; runs to its target are those of these that name it."""
    from prefect.client.schemas.objects import StateType

    since = datetime.now(UTC) - timedelta(days=int(given["days"])) if given["days"] else None

    def partial() -> list[str]:
        with Ledger(office.home.ledger) as ledger:
            # Whatever was to begin since then stands so since a later time.
            return ledger.deliveries.newest("partial", MOST_LEFT, since=since.timestamp() if since else 0.0)

    return {
        "states": tuple(StateType(one) for one in FILTERS[given["state"]]),
        "like": given["q"] or given["target"],
        "since": since,
        "ids": await asyncio.to_thread(partial) if given["state"] == "partial" else None,
    }


def _need(one: Attention) -> tuple[str, str]:
    """Return where to look, "" where no page is, and what is the matter."""
    values = {"name": one.name, "why": one.why, "count": one.count, "percent": f"{one.percent:.1f}"}
    key = f"home.{one.need}"
    if one.need.endswith(("certificate", "authority")) or one.need.startswith("certificate."):
        key += ".over" if one.count < 0 else ""
    if one.need.startswith("source."):
        return SOURCE.one(one.name), text(key, **values)
    if one.need.startswith("certificate."):
        return TARGET.one(one.name) if one.name else "", text(key, **values)
    page = TARGET.one(one.name) if one.name else ""
    return page, text(key if one.name else f"{key}.own", size=size(one.free), **values)


def _attention(row: dict[str, Any]) -> str:
    if row["state"] == "broken":
        return text("home.broken", name=row["name"], why=row["broken"])
    if row["state"] == "open":
        return text("home.open", name=row["name"], time=moment(row["breaker"]["next_test"]))
    return text("home.failing", name=row["name"])
