"""What uses a target: nobody deletes or renames one that runs, sources or schedules name, or renames a rule's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun

from blocks import Rule, Source
from talaria.engine.runs import jobs, kind_of
from talaria.service import Conflict
from talaria.service.names import NAMED
from talaria.service.overview import NOT_ENDED, PAGE
from tasks.documents import Broken
from tasks.names import SLUGS, split, type_of
from tasks.paging import every
from tasks.rules import SAVED_RULES
from tasks.sources.saved import KEPT
from tasks.targets import documents

RUNS = ("dispatch", "retrieve")
SHOWN = 5  # runs that a message names
RENAMED = "renamed"


@dataclass(frozen=True)
class Uses:
    """What needs a target to be there under its name.

    Attributes:
        runs: dispatches and retrievals that have not ended.
        sources: names of those that send to it, or fetch from it.
        schedules: id, and flow and name, of each deployment whose schedule names it, one that is paused, too.
        rules: names of those that hear of it by its name, where it is to have another.
    """

    runs: list[FlowRun] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    schedules: list[tuple[str, str]] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.runs or self.sources or self.schedules or self.rules)

    def __str__(self) -> str:
        """Return all of them in words, the runs up to SHOWN."""
        said = [f"{kind_of(run)} {run.id}" for run in self.runs[:SHOWN]]  # as `talaria jobs show` takes it
        said += [f"{len(self.runs) - SHOWN} more of them"] if len(self.runs) > SHOWN else []
        said += [f"source {name}" for name in self.sources] + [f"rule {name}" for name in self.rules]
        return ", ".join([*said, *(f"the schedule of deployment {name}" for _, name in self.schedules)])


class InUse(Conflict):
    """A target must stay, under its name, as long as something uses it. `uses` says what does."""

    uses: Uses = Uses()


async def check_unused(client: PrefectClient, names: Collection[str], done: str) -> None:
    """Refuse what would take targets from those who use them.

    Args:
        names: of targets, with their types where several have a name (one without a type is refused everywhere until
            the others have gone). Of those, one that is named with its type is used; by its name alone, all together.
        done: what is to be done with them: RENAMED or "removed". A rule that names one would hear nothing more of it
            under another name; of what is gone there is nothing to hear.

    Raises:
        InUse: something uses them; the message names all of them, and what uses each.
    """
    given = [split(name) for name in names]
    going: dict[str, set[str] | None] = {}
    there = await documents(client, {name for _, name in given})
    for name in {name for _, name in given}:
        types = {type_of(document) for document in there if document.name == name}
        named = {kind for kind, one in given if one == name}
        chosen = types if len(types) == 1 and None in named else {kind for kind in types if kind in named}
        if chosen:
            going[name] = None if chosen == types else chosen
    found = await _uses_of(client, going, heard=done == RENAMED)
    if not found:
        return
    lines = [f"{name} can't be {done} while it is used by {one}" for name, one in found.items()]
    error = InUse("; ".join(lines))
    error.uses = next(iter(found.values()))
    raise error


async def _uses_of(
    client: PrefectClient, going: Mapping[str, Collection[str] | None], *, heard: bool
) -> dict[str, Uses]:
    """Return what uses targets, by the name of each that something uses.

    Args:
        going: by name, the types of those whose uses count; None for all.
        heard: whether a rule's naming one counts, too.
    """
    found = {name: Uses() for name in sorted(going)}

    def meant(written: Iterable[Any]) -> set[str]:
        """Return which of them are named."""
        pairs = [
            (SLUGS.get(kind, kind), name) for kind, _, name in (str(one).strip().rpartition("/") for one in written)
        ]
        return {name for kind, name in pairs if name in going and ((types := going[name]) is None or kind in types)}

    offset = 0
    while found and (page := await jobs(client, PAGE, offset, flows=RUNS, states=NOT_ENDED)):
        for run in page:
            for name in meant(_named(run.parameters, NAMED["retrieve"])):
                found[name].runs.append(run)
        offset += len(page)
        if len(page) < PAGE:
            break
    for source, written in await _sources(client) if found else ():
        for name in meant(written):
            found[name].sources.append(source)
    for rule in await SAVED_RULES.all(client) if found and heard else ():
        for name in found.keys() & set(rule.targets if isinstance(rule, Rule) else ()):
            found[name].rules.append(rule.name)
    flows = {one.id: one.name for one in await every(client.read_flows)} if found else {}
    for one in await every(client.read_deployments) if found else ():
        flow = flows.get(one.flow_id, "")
        given = [{**one.parameters, **(each.parameters or {})} for each in one.schedules]
        for name in meant(name for each in given for name in _named(each, NAMED.get(flow, ()))):
            found[name].schedules.append((str(one.id), f"{flow}/{one.name}"))
    return {name: uses for name, uses in found.items() if uses}


async def _sources(client: PrefectClient) -> list[tuple[str, list[Any]]]:
    """Return the name of each source, and the targets that it names, as it writes them."""
    there = await KEPT.all(client)
    found = [(one.name, [*one.reaches, getattr(one, "query", "")]) for one in there if isinstance(one, Source)]
    broken = {one.name for one in there if isinstance(one, Broken)}
    for document in await KEPT.documents(client, broken) if broken else ():  # somebody may mend it
        routes = document.data.get("routes")
        parts = [document.data, *(one for one in (routes if isinstance(routes, list) else ()) if isinstance(one, dict))]
        found.append((str(document.name), [name for part in parts for name in _named(part, ("targets", "query"))]))
    return found


def _named(parameters: Mapping[str, Any], keys: Iterable[str]) -> list[Any]:
    """Return the names in a run's parameters, as written: whoever made it may have written anything."""
    found: list[Any] = []
    for key in keys:
        value = parameters.get(key)
        found += [one for one in (value if isinstance(value, list) else [value]) if one]
    return found
