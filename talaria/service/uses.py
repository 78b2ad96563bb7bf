"""What uses a target: nobody deletes or renames one that runs, sources or schedules name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun

from blocks import Source
from talaria.engine.runs import jobs, kind_of
from talaria.service import Conflict
from talaria.service.names import NAMED
from talaria.service.overview import NOT_ENDED, PAGE
from tasks.names import split
from tasks.paging import every
from tasks.sources.saved import KEPT
from tasks.targets import documents

RUNS = ("dispatch", "retrieve")
SHOWN = 5  # runs that a message names


@dataclass(frozen=True)
class Uses:
    """What needs a target to be there under its name.

    Attributes:
        runs: dispatches and retrievals that have not ended.
        sources: names of those that send to it, or fetch from it.
        schedules: id, and flow and name, of each deployment whose schedule names it, one that is paused, too.
    """

    runs: list[FlowRun] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    schedules: list[tuple[str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.runs or self.sources or self.schedules)

    def __str__(self) -> str:
        """Return all of them in words, the runs up to SHOWN."""
        said = [f"{kind_of(run)} {str(run.id)[:8]}" for run in self.runs[:SHOWN]]
        said += [f"{len(self.runs) - SHOWN} more of them"] if len(self.runs) > SHOWN else []
        said += [f"source {name}" for name in self.sources]
        return ", ".join([*said, *(f"the schedule of deployment {name}" for _, name in self.schedules)])


class InUse(Conflict):
    """A target must stay, under its name, as long as something uses it. `uses` says what does."""

    uses: Uses = Uses()


async def check_unused(client: PrefectClient, names: Collection[str], done: str) -> None:
    """Refuse what would take targets from those who use them.

    Args:
        names: of targets, perhaps with their types; where two types have a name, either may go: it is refused
            everywhere until one of them has gone.
        done: what is to be done with them, as in "removed".

    Raises:
        InUse: something uses them; the message names all of them, and what uses each.
    """
    plain = {split(name)[1] for name in names}
    there = [str(document.name) for document in await documents(client, plain)]
    found = await uses_of(client, {name for name in plain if there.count(name) == 1})
    if not found:
        return
    lines = [f"{name} can't be {done} while it is used by {one}" for name, one in found.items()]
    error = InUse("; ".join(lines))
    error.uses = next(iter(found.values()))
    raise error


async def uses_of(client: PrefectClient, names: Collection[str]) -> dict[str, Uses]:
    """Return what uses targets, by the name of each that something uses."""
    found = {name: Uses() for name in sorted(names)}
    offset = 0
    while found and (page := await jobs(client, PAGE, offset, flows=RUNS, states=NOT_ENDED)):
        for run in page:
            for name in _named(run.parameters, NAMED["retrieve"]) & found.keys():
                found[name].runs.append(run)
        offset += len(page)
        if len(page) < PAGE:
            break
    for source in await KEPT.all(client) if found else ():
        for name in _of_source(source) & found.keys() if isinstance(source, Source) else ():
            found[name].sources.append(source.name)
    flows = {one.id: one.name for one in await every(client.read_flows)} if found else {}
    for one in await every(client.read_deployments) if found else ():
        flow = flows.get(one.flow_id, "")
        given = [{**one.parameters, **(each.parameters or {})} for each in one.schedules]
        for name in set[str]().union(*(_named(each, NAMED.get(flow, ())) for each in given)) & found.keys():
            found[name].schedules.append((str(one.id), f"{flow}/{one.name}"))
    return {name: uses for name, uses in found.items() if uses}


def _of_source(source: Source) -> set[str]:
    return _named({"targets": [*source.reaches, getattr(source, "query", "")]}, ("targets",))


def _named(parameters: Mapping[str, Any], keys: Iterable[str]) -> set[str]:
    """Return the names in a run's parameters, without their types; whoever made it may have written anything."""
    found: set[str] = set()
    for key in keys:
        value = parameters.get(key)
        found |= {str(one).rpartition("/")[2] for one in (value if isinstance(value, list) else [value]) if one}
    return found
