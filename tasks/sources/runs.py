"""The dispatches and retrievals of sources as Prefect's runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.states import Scheduled

from blocks.source import SourcePriority
from tasks.crashed import is_over
from tasks.dispatch import kept, rest
from tasks.dispatch.hours import off_peak
from tasks.sources.ways import EndedRun
from transfer import live
from transfer.home import Home

PAGE = 200  # runs a request; Prefect's own limit


class PrefectDispatching:
    """Creates and looks at runs, by a client of the server; as `tasks.sources.ways.Dispatching`.

    Args:
        source: name of the source.
        host: end of the names of the queues whose runs stay on this host; "" where any may have them.
    """

    def __init__(self, client: PrefectClient, home: Home, source: str, host: str = "") -> None:
        self.client, self.home, self.source, self.host = client, home, source, host

    async def create(self, batch: str, parameters: Mapping[str, Any]) -> str:
        flow = "retrieve" if "source" in parameters else "dispatch"
        deployment = await self.client.read_deployment_by_name(f"{flow}/talaria")
        flow_run = await self.client.create_flow_run_from_deployment(
            deployment.id,
            parameters=dict(parameters),
            name=f"to {', '.join(parameters['targets'])} from {self.source}",
            work_queue_name=f"{parameters['priority']}{self.host}",
            state=Scheduled(scheduled_time=datetime.now(UTC)),
            idempotency_key=f"source:{batch}",
            labels={live.BY: f"source {self.source}"},
            tags=["talaria", f"source:{self.source}"],
        )
        return str(flow_run.id)

    async def ended(self, runs: Collection[str]) -> Mapping[str, EndedRun]:
        there = {str(one.id): one for one in await self._read(runs)}
        found = {}
        for run in runs:
            flow_run = there.get(run)
            if flow_run is None:
                found[run] = EndedRun(gone=True)
            elif is_over(flow_run.state):
                message = (flow_run.state and flow_run.state.message) or ""
                document = await self._receipts(flow_run)
                if "accessions" in document:
                    found[run] = EndedRun(False, message, numbers=_of_numbers(document))
                else:
                    studies = {str(row["study"]): row for row in _rows(document.get("studies", ()))}
                    found[run] = EndedRun(False, message, studies)
        return found

    async def any_ended(self, runs: Collection[str]) -> bool:
        """Return True if one of some runs has ended, or is gone."""
        there = await self._read(runs)
        return len(there) < len(set(runs)) or any(is_over(one.state) for one in there)

    async def going(self, runs: Collection[str]) -> set[str]:
        found = await self._read(runs)
        return {str(one.id) for one in found if one.state and (one.state.is_completed() or not is_over(one.state))}

    async def resting(self, runs: Collection[str]) -> set[str]:
        found = await self._read(runs)
        return {str(one.id) for one in found if one.state and one.state.is_scheduled() and one.run_count}

    async def waits(self, runs: Collection[str]) -> Mapping[str, str]:
        now = datetime.now(UTC)
        return {str(one.id): words for one in await self._read(runs) if (words := _waits(one, now))}

    async def _read(self, runs: Collection[str]) -> list[FlowRun]:
        ids, found = [UUID(one) for one in runs], list[FlowRun]()
        for at in range(0, len(ids), PAGE):
            page = FlowRunFilter(id=FlowRunFilterId(any_=ids[at : at + PAGE]))
            found += await self.client.read_flow_runs(flow_run_filter=page, limit=PAGE)
        return found

    async def _receipts(self, flow_run: FlowRun) -> dict[str, Any]:
        """Return a run's receipts, or the result of a retrieval: those on this machine, or else the server's."""
        return kept.here(self.home, str(flow_run.id)) or await kept.read(self.client, flow_run.id) or {}


def _waits(flow_run: FlowRun, now: datetime) -> str:
    """Return what a run waits for that is to begin, or go on, within hours that people have set; "" if it doesn't."""
    state = flow_run.state
    if state is None or not state.is_scheduled():
        return ""
    said = state.message or ""
    if said.startswith(rest.WAITS):
        return said.partition("; ")[0]
    if flow_run.run_count or flow_run.parameters.get("priority") != SourcePriority.OFFPEAK:
        return ""
    opens = off_peak().opens(now)  # it has just been made
    return rest.until([rest.Wait(opens, "the off-peak hours", soon=False)]) if opens else ""


def _of_numbers(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of a retrieval by accession number, in lower case: one is delivered if all its studies are."""
    found: dict[str, dict[str, Any]] = {}
    for row in (*document.get("studies", ()), *document["accessions"]):
        number, state = str(row["accession"]).strip().casefold(), str(row["state"])
        before = found.get(number)
        if before is None or state != "delivered":
            outcome = {"state": state, "error": str(row["reason"]) or state}
            found[number] = {"study": number, "dispatch_id": "", "targets": {str(document["source"]): outcome}}
    return found


def _rows(rows: Iterable[Any]) -> Iterable[dict[str, Any]]:
    return (row for row in rows if isinstance(row, dict) and "study" in row)
