"""The page of one dispatch: how far it is, what happened, each item, its receipt, and what its buttons do."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.acting import JobPage, actions, send_to
from talaria.front.pages.dispatches import KINDS, LIST
from talaria.front.pages.site import Site, fields, is_part, saved_as, shown, size, who
from talaria.front.pages.texts import happened, text
from transfer.errors import Misconfigured
from transfer.tables import csv_text

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from talaria.service import Office

ITEMS = 200  # on a page
STUDIES = 200  # of a flood
EVENTS = 200  # of the time line, the newest
REMEMBERED = 100  # runs whose pages are looked at, and the parts that change with their states only
DELIVERED = ("delivered", "warning", "already")  # outcomes of items that are there
PLAIN = ("delivered", "already")  # and of those of which there is nothing to say
COLUMNS = ("target", "item", "sop_instance_uid", "outcome", "reason")


class DispatchPage(JobPage):
    """One dispatch."""

    where, kinds = LIST, KINDS

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._parts: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()  # by run and its state's id

    def more(self, one: str) -> list[BaseRoute]:
        return [
            Route(f"{one}/receipt", self.receipt, methods=["GET"]),
            Route(f"{one}/receipt.csv", self.table, methods=["GET"]),
            Route(f"{one}/send", self.send, methods=["POST"]),
        ]

    @needs(Role.VIEWER)
    @shown
    async def one(self, request: Request) -> Response:
        """Show a dispatch: how far it is at each target, why what is missing is missing, and what happened."""
        return await self._shown(request)

    async def _shown(self, request: Request, problem: str = "", status: int = 200) -> Response:
        from talaria.engine.runs import under_way
        from talaria.service import jobs, results, standings
        from talaria.service.timeline import timeline

        office, job = await self.site.office(request), request.path_params["id"]
        flow_run = await jobs.found(office, job, KINDS)
        run = results.line(flow_run)
        live = run["ended"] is None
        asked = who(request).role >= Role.OPERATOR and not (live and is_part(request))
        # Of one that waits for its next part, what is there is the last one's.
        speeds = await jobs.how_far(office, flow_run) if under_way(flow_run) else {}
        others = [row["name"] for row in await self.site.rows(office) if _may_get(row, run)] if asked else []
        events, cut = await timeline(office, run["id"])
        given = {name: request.query_params.get(name, "") for name in ("target", "outcome", "q", "offset")}
        content = await self._content(office, flow_run, given, items=not (live and is_part(request)))
        whole, at = standings.by_receipt(flow_run, content["document"])
        return self.site.page(
            request,
            "dispatch.html",
            status=status,
            run=run | {"standing": whole},
            at=at,
            progress=[_speed(name, part) for name, part in speeds.items()],
            live=live,
            part=is_part(request),
            actions=actions(whole, ended=not live),
            others=others,
            events=[one | {"words": happened(one["words"])} for one in events[-EVENTS:]],
            more_events=cut or len(events) > EVENTS,
            given=given,
            query=urlencode({key: value for key, value in given.items() if value and key != "offset"}),
            targets=[part["name"] for part in content["parts"]],
            problem=problem,
            **{name: value for name, value in content.items() if name != "document"},
        )

    async def _content(
        self, office: Office, flow_run: FlowRun, given: dict[str, str], *, items: bool
    ) -> dict[str, Any]:
        """Return what the page shows of a receipt.

        Args:
            given: the filter of the items.
            items: whether they are shown. A part of a page that is asked for every two seconds has none, and its
                receipt is not read again: a run writes one when it ends or rests, and has another state then.
        """
        from talaria.service import results

        key = str(flow_run.id), str(flow_run.state_id)
        if not items and key in self._parts:
            self._parts.move_to_end(key)
            return self._parts[key]
        document = await results.result(office, flow_run)
        # In a thread: there may be a hundred thousand items, and this process answers workers, too.
        content = await asyncio.to_thread(_content, document, given, items=items)
        if not items:
            self._parts[key] = content
            while len(self._parts) > REMEMBERED:
                self._parts.popitem(last=False)
        return content

    @needs(Role.VIEWER)
    @shown
    async def receipt(self, request: Request) -> Response:
        """Return the receipt with every item, to be saved."""
        document = await self._receipt(request)
        return saved_as(
            f"{_name(document)}.json", "application/json", await asyncio.to_thread(json.dumps, document, indent=1)
        )

    @needs(Role.VIEWER)
    @shown
    async def table(self, request: Request) -> Response:
        """Return the receipt as CSV: a line for each item and target."""
        document = await self._receipt(request)
        return saved_as(f"{_name(document)}.csv", "text/csv", await asyncio.to_thread(_csv, document))

    async def _receipt(self, request: Request) -> dict[str, Any]:
        from talaria.service import jobs

        return await jobs.job_receipt(await self.site.office(request), request.path_params["id"], kinds=KINDS)

    @needs(Role.OPERATOR)
    @shown
    async def send(self, request: Request) -> Response:
        """Send the files of a dispatch to another target."""
        to = (await fields(request)).get("to", "")
        try:
            made = await send_to(await self.site.office(request), request.path_params["id"], to)
        except Misconfigured as exc:
            return await self._shown(request, exc.message, 422)
        return RedirectResponse(f"{LIST}/{made}", 303)


def _name(document: Mapping[str, Any]) -> str:
    return f"receipt-{document['dispatch_id'] or document['flow_run_id']}"


def _may_get(row: dict[str, Any], run: dict[str, Any]) -> bool:
    return bool(row["enabled"] and row["direction"] != "query" and row["name"] not in run["targets"])


def _part(name: str, receipt: dict[str, Any]) -> dict[str, Any]:
    """Return the receipt of one target as the page shows it: reasons are counted, the most frequent first."""
    items = [item for item in receipt["items"] if item["outcome"] not in PLAIN]
    skipped = sum(1 for item in items if item["outcome"] == "skipped")
    reasons = Counter((item["outcome"], item["detail"]) for item in items)
    return {
        "name": name,
        "error": receipt.get("error") or "",
        "notes": receipt.get("notes") or [],
        "hook": receipt.get("hook", "none"),
        "attempts": receipt.get("attempts", 0),
        "size": size(receipt.get("bytes", 0)),
        "delivered": sum(1 for item in receipt["items"] if item["outcome"] in DELIVERED),
        "total": len(receipt["items"]) - skipped,
        "skipped": skipped,
        "reasons": [(*key, count) for key, count in reasons.most_common(20)],
    }


def _content(document: Mapping[str, Any], given: dict[str, str], *, items: bool) -> dict[str, Any]:
    """Return what the page shows of a receipt.

    Args:
        given: the filter of the items.
        items: whether they are shown; a part of a page that is asked for every two seconds has none.
    """
    every = _items(document) if items else []
    found = [one for one in every if _matches(one, given)]
    offset = int(given["offset"]) if given["offset"].isdecimal() else 0
    studies = document.get("studies", ())
    states = {name: {"state": one["state"]} for name, one in document["targets"].items()}
    return {
        "document": {"state": document["state"], "targets": states},
        "parts": [_part(name, one) for name, one in document["targets"].items()],
        "studies": [_study(row) for row in sorted(studies, key=_is_delivered)[:STUDIES]],
        "more_studies": max(0, len(studies) - STUDIES),
        "items": found[offset : offset + ITEMS],
        "count": len(found),
        "offset": offset,
        "outcomes": sorted({one["outcome"] for one in every}),
    }


def _csv(document: Mapping[str, Any]) -> str:
    return csv_text(COLUMNS, _items(document))


def _items(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every item at every target, those that are not plainly delivered first."""
    found = [
        {"target": name, "item": item["path"], "sop_instance_uid": item["sop_instance_uid"]}
        | {"outcome": item["outcome"], "reason": item["detail"]}
        for name, receipt in document["targets"].items()
        for item in receipt["items"]
    ]
    return sorted(found, key=lambda one: one["outcome"] in PLAIN)


def _matches(item: dict[str, Any], given: dict[str, str]) -> bool:
    words = f"{item['item']} {item['reason']} {item['sop_instance_uid']}".casefold()
    same = all(not given[name] or given[name] == item[name] for name in ("target", "outcome"))
    return same and given["q"].strip().casefold() in words


def _is_delivered(row: dict[str, Any]) -> bool:
    return bool(row["state"] == "delivered")


def _study(row: dict[str, Any]) -> dict[str, Any]:
    """Return a study of a flood in a line."""
    errors = [f"{name}: {one['error']}" for name, one in row["targets"].items() if one.get("error")]
    return {"name": row["study"], "state": row["state"], "dispatch_id": row["dispatch_id"], "words": "; ".join(errors)}


def _speed(name: str, part: dict[str, Any]) -> dict[str, Any]:
    """Return how far one target is, in words: items, bytes, speed and time left, where they are known."""
    words = [part["words"]]
    if part.get("bytes"):
        words.append(text("dispatch.moved", moved=size(part["moved"]), all=size(part["bytes"])))
    if part.get("rate"):
        words.append(text("dispatch.rate", rate=size(part["rate"])))
    left = part.get("seconds_left")
    if left is not None and part.get("rate"):
        minutes, seconds = divmod(round(left), 60)
        words.append(text("dispatch.left", time=f"{minutes}:{seconds:02}"))
    return {"name": name, "percent": part["percent"], "words": ", ".join(words), "failures": part.get("failures", ())}
