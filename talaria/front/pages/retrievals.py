"""Pages of retrievals: how far each accession number is, its buttons, and its result as CSV."""

from __future__ import annotations

from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.acting import JobPage, actions
from talaria.front.pages.site import saved_as, shown
from transfer.tables import csv_text

LIST = "/talaria/retrievals"
KINDS = ("retrieval",)
SHOWN = 500  # studies on a page
COLUMNS = ("accession", "study", "state", "instances", "missing", "bytes", "reason")
STATES = (
    "failed",
    "missing",
    "partial",
    "cancelled",
    "waiting",
    "delivered",
)  # the order in which people want to see them


class RetrievalPages(JobPage):
    """One retrieval. Those who may not query do not see its accession numbers."""

    where, kinds = LIST, KINDS

    def more(self, one: str) -> list[BaseRoute]:
        return [Route(f"{one}/csv", self.table, methods=["GET"])]

    @needs(Role.OPERATOR)
    @shown
    async def one(self, request: Request) -> Response:
        """Show how far a retrieval is."""
        return await self._shown(request)

    async def _shown(self, request: Request, problem: str = "", status: int = 200) -> Response:
        from talaria.service import jobs, standings

        office, state = await self.site.office(request), request.query_params.get("state", "")
        job = request.path_params["id"]
        document = await jobs.show_job(office, job, kinds=KINDS)
        lines = rows(document)
        found = [one for one in lines if not state or one["state"] == state]
        counts = Counter(str(one["state"]) for one in lines)
        run, flow_run = document["run"], await jobs.found(office, job, KINDS)
        whole, _ = standings.by_receipt(flow_run, document)
        return self.site.page(
            request,
            "retrieval.html",
            status=status,
            run=run | {"standing": whole},
            into=flow_run.parameters.get("into", ""),
            error=document["error"],
            lines=found[:SHOWN],
            cut=max(0, len(found) - SHOWN),
            counts=[(one, counts[one]) for one in STATES if counts[one]],
            state=state,
            percent=next(iter(document["progress"].values()), 0.0),
            live=run["ended"] is None,
            actions=actions(whole, ended=run["ended"] is not None),
            problem=problem,
        )

    @needs(Role.OPERATOR)
    @shown
    async def table(self, request: Request) -> Response:
        """Return the result as CSV."""
        from talaria.service import jobs

        document = await jobs.job_receipt(await self.site.office(request), request.path_params["id"], kinds=KINDS)
        name = f"retrieval-{document['flow_run_id'][:13]}.csv"
        return saved_as(name, "text/csv", csv_text(COLUMNS, rows(document)))


def rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a line for each study, and for each accession number without one: what needs attention first."""
    found = [*document["studies"], *document["accessions"]]
    return sorted(found, key=lambda one: STATES.index(one["state"]) if one["state"] in STATES else len(STATES))
