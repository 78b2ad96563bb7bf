"""Pages of dispatches: the newest, one with its reasons, and what its buttons do; and the home page."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.acting import act, actions
from talaria.front.pages.site import Site, fields, is_part, moment, saved_as, shown, who
from talaria.front.pages.targets import rows
from talaria.front.pages.texts import text
from transfer.errors import Misconfigured

LIST = "/talaria/dispatches"
SHOWN = 50  # dispatches a page
ITEMS = 200  # of one target, on a page
KINDS = ("dispatch",)
FILTERS = {
    "": (),
    "failed": ("FAILED", "CRASHED"),
    "waiting": ("SCHEDULED", "PENDING", "PAUSED"),
    "running": ("RUNNING",),
}
DELIVERED = ("delivered", "already")


class DispatchPages:
    """Home, the list of dispatches, and each of them."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        one = f"{LIST}/{{id}}"
        return [
            Route("/talaria", self.root, methods=["GET"]),
            Route("/talaria/", self.home, methods=["GET"]),
            Route(LIST, self.every, methods=["GET"]),
            Route(one, self.one, methods=["GET"]),
            Route(f"{one}/receipt", self.receipt, methods=["GET"]),
            Route(f"{one}/send", self.send, methods=["POST"]),
            Route(f"{one}/{{action}}", self.act, methods=["POST"]),
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
        from talaria.service import overview
        from talaria.service.jobs import line

        office = await self.site.office(request)
        day, targets = await overview.last_day(office), await rows(office)
        bad = sum(1 for run in day if run.state and run.state.type.value in overview.ENDED_BADLY)
        attention = [(row["path"], _attention(row)) for row in targets if row["state"] in ("open", "broken", "failing")]
        attention += [(f"{LIST}?state=failed", text("home.failed", count=bad))] if bad else []
        return self.site.page(
            request,
            "home.html",
            attention=attention,
            first=not targets,
            jobs=[line(run) for run in day if run.state and not run.state.is_final()][:20],
            good=sum(1 for run in day if run.state and run.state.is_completed()),
            bad=bad,
            workers=len(await workers(office.client)),
        )

    @needs(Role.VIEWER)
    @shown
    async def every(self, request: Request) -> Response:
        """Show the newest dispatches, or those in one state."""
        from prefect.client.schemas.objects import StateType

        from talaria.engine import runs
        from talaria.service.jobs import line

        office = await self.site.office(request)
        state, offset = request.query_params.get("state", ""), request.query_params.get("offset", "0")
        if state not in FILTERS or not offset.isdecimal():
            raise Misconfigured(text("dispatches.nothing"))
        states = tuple(StateType(one) for one in FILTERS[state])
        found = await runs.jobs(office.client, SHOWN + 1, int(offset), flows=("dispatch",), states=states)
        return self.site.page(
            request,
            "dispatches.html",
            jobs=[line(run) for run in found[:SHOWN]],
            state=state,
            states=[(one, text(f"filter.{one}")) for one in FILTERS],
            offset=int(offset),
            more=len(found) > SHOWN,
        )

    @needs(Role.VIEWER)
    @shown
    async def one(self, request: Request) -> Response:
        """Show a dispatch: how far it is at each target, and why what is missing is missing."""
        return await self._shown(request)

    async def _shown(self, request: Request, problem: str = "", status: int = 200) -> Response:
        from talaria.service import jobs

        office, job = await self.site.office(request), request.path_params["id"]
        document = await jobs.show_job(office, job, all_items=True, kinds=KINDS)
        run = document["run"]
        asked = who(request).role >= Role.OPERATOR and not is_part(request)
        others = [row["name"] for row in await rows(office) if _may_get(row, run)] if asked else []
        return self.site.page(
            request,
            "dispatch.html",
            status=status,
            run=run,
            parts=[_part(name, one) for name, one in document["targets"].items()],
            progress=document["progress"],
            live=run["ended"] is None,
            actions=actions(run),
            others=others,
            problem=problem,
        )

    @needs(Role.VIEWER)
    @shown
    async def receipt(self, request: Request) -> Response:
        """Return the receipt with every item, to be saved."""
        from talaria.service import jobs

        office, job = await self.site.office(request), request.path_params["id"]
        document = await jobs.job_receipt(office, job, kinds=KINDS)
        name = f"receipt-{document['dispatch_id'] or document['flow_run_id']}.json"
        return saved_as(name, "application/json", json.dumps(document, indent=1))

    @needs(Role.OPERATOR)
    @shown
    async def act(self, request: Request) -> Response:
        """Retry, cancel, pause or resume a dispatch."""
        job = request.path_params["id"]
        try:
            await act(await self.site.office(request), job, request.path_params["action"], KINDS)
        except Misconfigured as exc:  # it has ended meanwhile, perhaps
            return await self._shown(request, exc.message, 409)
        return RedirectResponse(f"{LIST}/{quote(job)}", 303)

    @needs(Role.OPERATOR)
    @shown
    async def send(self, request: Request) -> Response:
        """Send the files of a dispatch to another target."""
        from talaria.service import jobs

        name = (await fields(request)).get("to", "")
        try:
            done = await jobs.send_job(await self.site.office(request), request.path_params["id"], [name])
        except Misconfigured as exc:
            return await self._shown(request, exc.message, 422)
        return RedirectResponse(f"{LIST}/{done['flow_run_id']}", 303)


def _attention(row: dict[str, Any]) -> str:
    if row["state"] == "broken":
        return text("home.broken", name=row["name"], why=row["broken"])
    if row["state"] == "open":
        return text("home.open", name=row["name"], time=moment(row["breaker"]["next_test"]))
    return text("home.failing", name=row["name"])


def _may_get(row: dict[str, Any], run: dict[str, Any]) -> bool:
    return bool(row["enabled"] and row["direction"] != "query" and row["name"] not in run["targets"])


def _part(name: str, receipt: dict[str, Any]) -> dict[str, Any]:
    """Return the receipt of one target as the page shows it: reasons are counted, the most frequent first."""
    items = [item for item in receipt["items"] if item["outcome"] not in DELIVERED]
    reasons = Counter((item["outcome"], item["detail"]) for item in items)
    return {
        "name": name,
        "state": receipt["state"],
        "error": receipt.get("error") or "",
        "delivered": sum(1 for item in receipt["items"] if item["outcome"] in DELIVERED),
        "total": len(receipt["items"]),
        "reasons": [(*key, count) for key, count in reasons.most_common(20)],
        "items": items[:ITEMS],
        "cut": len(items) > ITEMS,
    }
