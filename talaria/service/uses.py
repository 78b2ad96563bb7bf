"""What uses a target: nobody deletes or renames one that runs, sources or schedules name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prefect.client.schemas.objects import FlowRun

from blocks import Source
from talaria.engine.runs import jobs
from talaria.service import Office
from talaria.service.names import NAMED
from talaria.service.overview import NOT_ENDED, PAGE
from tasks.paging import every
from tasks.sources.saved import KEPT

RUNS = ("dispatch", "retrieve")


@dataclass(frozen=True)
class Uses:
    """What needs a target to be there under its name.

    Attributes:
        runs: dispatches and retrievals that have not ended.
        sources: names of those that send to it, or fetch from it.
        schedules: id, and flow and name, of each deployment whose schedule names it, one that is paused, too.
    """

    runs: list[FlowRun]
    sources: list[str]
    schedules: list[tuple[str, str]]

    def __bool__(self) -> bool:
        return bool(self.runs or self.sources or self.schedules)


async def uses_of(office: Office, name: str) -> Uses:
    """Return what uses a target."""
    waiting, offset = list[FlowRun](), 0
    while page := await jobs(office.client, PAGE, offset, flows=RUNS, states=NOT_ENDED):
        waiting += [run for run in page if name in _named(run.parameters, NAMED["retrieve"])]
        offset += len(page)
        if len(page) < PAGE:
            break
    sources = [one for one in await KEPT.all(office.client) if isinstance(one, Source)]
    flows = {one.id: one.name for one in await every(office.client.read_flows)}
    schedules = [
        (str(one.id), f"{flow}/{one.name}")
        for one in await every(office.client.read_deployments)
        for flow in (flows.get(one.flow_id, ""),)
        for given in [[{**one.parameters, **(each.parameters or {})} for each in one.schedules]]
        if any(name in _named(each, NAMED.get(flow, ())) for each in given)
    ]
    return Uses(waiting, [one.name for one in sources if name in _of_source(one)], schedules)


def _of_source(source: Source) -> set[str]:
    return _named({"targets": [*source.reaches, getattr(source, "query", "")]}, ("targets",))


def _named(parameters: Mapping[str, Any], keys: Iterable[str]) -> set[str]:
    """Return the names in a run's parameters, without their types; whoever made it may have written anything."""
    found: set[str] = set()
    for key in keys:
        value = parameters.get(key)
        found |= {str(one).rpartition("/")[2] for one in (value if isinstance(value, list) else [value]) if one}
    return found
