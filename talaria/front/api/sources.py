"""Routes of sources. Secrets go in and never come out."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query
from pydantic import ConfigDict, Field

from talaria.front.access import Role, needs
from talaria.front.api.answers import ExactAnswer, TargetChangeAnswer, TypeFieldAnswer
from talaria.front.api.asking import Asked, RequestBody, Who, add


class ApplySources(RequestBody):
    """Sources to create or update."""

    sources: dict[str, Any] = Field(
        description="By name: `type` and fields, as in targets.yaml; texts as they are, no variable is filled in."
    )
    dry_run: bool = Field(default=False, description="Only say what would be done.")
    replace: bool = Field(default=False, description="Replace sources of another type that have the same name.")
    prune: bool = Field(default=False, description="Remove the sources that are not listed.")


class EnableSource(RequestBody):
    """Whether a source takes part."""

    enabled: bool = True


class RetryUnits(RequestBody):
    """Which units are dispatched again."""

    unit: str = Field(default="", description="One unit; empty for all that failed or are held.")


class ListedSourceAnswer(ExactAnswer):
    """A source in the list: also every field of its type that is not the default."""

    model_config = ConfigDict(extra="allow")

    name: str
    type: str
    enabled: bool | None
    broken: str | None = Field(description="Why its settings are not valid; null if they are.")
    units: dict[str, int] = Field(description="How many are dispatched, delivered, done, failed and held.")
    waiting: int = Field(description="How many had not settled at the last sweep.")
    last_sweep: str | None
    problem: str = Field(description="Why it can't be looked through, or does not listen; empty if it does.")
    belongs_to: str | None = Field(description="The other host that sweeps it, or listens; null if this one does.")


class SourceListAnswer(ExactAnswer):
    """All sources."""

    sources: list[ListedSourceAnswer]


class AttentionAnswer(ExactAnswer):
    """A unit that failed, is held, or of which files stay."""

    unit: str
    state: str
    detail: str
    run: str = Field(description="Of its dispatch.")
    time: str | None


class SourceAnswer(ExactAnswer):
    """One source, with what it is doing."""

    name: str
    settings: dict[str, Any]
    schedule: list[str] = Field(description="The schedules of its deployment, as Prefect has them now.")
    last_sweep: str | None
    problem: str
    belongs_to: str | None
    waiting: int
    units: dict[str, int]
    attention: list[AttentionAnswer]


class SourceTypeAnswer(ExactAnswer):
    """A type of source."""

    fields: dict[str, TypeFieldAnswer]


class SourceTypesAnswer(ExactAnswer):
    """The types, by name."""

    types: dict[str, SourceTypeAnswer]


class SourcesAppliedAnswer(ExactAnswer):
    """What was done with each source, or would be."""

    dry_run: bool
    sources: list[TargetChangeAnswer]


class SweepAnswer(TargetChangeAnswer):
    """The sweep that begins."""

    flow_run_id: str


class SourceTestAnswer(ExactAnswer):
    """Whether a source can be used, and what its next sweep would find."""

    name: str
    ok: bool
    problems: list[str]
    held: list[str] = Field(description="What of it would not be dispatched, each with the reason.")
    units: dict[str, int] = Field(description="How many are ready, settling, known, and how many files there are.")


@needs(Role.VIEWER)
async def list_sources(asked: Asked) -> dict[str, Any]:
    """List all sources; one whose settings are no longer valid is listed as broken, with the reason."""
    from talaria.service import sources

    return await sources.list_sources(await asked())


@needs(Role.ADMIN)
async def apply_sources(asked: Asked, body: ApplySources) -> dict[str, Any]:
    """Create or update sources; all of them or, if one is wrong, none."""
    from talaria.service import sources

    return await sources.apply_sources(await asked(), body.sources, body.dry_run, body.replace, body.prune)


@needs(Role.VIEWER)
async def source_types(who: Who) -> dict[str, Any]:
    """List the types of source, and their fields."""
    from talaria.service import sources

    return await sources.source_types()


@needs(Role.VIEWER)
async def show_source(
    asked: Asked,
    name: str,
    given: Annotated[bool, Query(description="Only settings that are not the defaults.")] = False,
) -> dict[str, Any]:
    """Return one source: settings, schedule, last sweep, and the units that need a person."""
    from talaria.service import sources

    return await sources.show_source(await asked(), name, given)


@needs(Role.ADMIN)
async def remove_source(asked: Asked, name: str) -> dict[str, Any]:
    """Remove a source; no file is touched, and what is under way goes on."""
    from talaria.service import sources

    return await sources.remove_source(await asked(), name)


@needs(Role.ADMIN)
async def enable_source(asked: Asked, name: str, body: EnableSource) -> dict[str, Any]:
    """Let a source take part again, or pause it: of a paused one nothing is dispatched, moved or deleted."""
    from talaria.service import sources

    return await sources.enable_source(await asked(), name, body.enabled)


@needs(Role.OPERATOR)
async def test_source(asked: Asked, name: str) -> dict[str, Any]:
    """Look whether a source can be used, and what its next sweep would find; nothing is dispatched or moved."""
    from talaria.service import sources

    return await sources.test_source(await asked(), name)


@needs(Role.OPERATOR)
async def sweep_source(asked: Asked, name: str) -> dict[str, Any]:
    """Begin a sweep of a source now."""
    from talaria.service import sources

    return await sources.sweep_source(await asked(), name)


@needs(Role.OPERATOR)
async def retry_source(asked: Asked, name: str, body: RetryUnits | None = None) -> dict[str, Any]:
    """Have units that failed, or are held, dispatched again."""
    from talaria.service import sources

    return await sources.retry_source(await asked(), name, body.unit if body else "")


def add_to(app: FastAPI) -> None:
    """Add the routes; those with a fixed end stand before those that take any name, which may hold a slash."""
    add(app, "GET", "/sources", list_sources, answer=SourceListAnswer)
    add(app, "POST", "/sources", apply_sources, answer=SourcesAppliedAnswer)
    add(app, "GET", "/source-types", source_types, answer=SourceTypesAnswer)
    add(app, "POST", "/sources/{name:path}/enable", enable_source, answer=TargetChangeAnswer)
    add(app, "POST", "/sources/{name:path}/test", test_source, answer=SourceTestAnswer)
    add(app, "POST", "/sources/{name:path}/sweep", sweep_source, answer=SweepAnswer)
    add(app, "POST", "/sources/{name:path}/retry", retry_source, answer=TargetChangeAnswer)
    add(app, "GET", "/sources/{name:path}", show_source, answer=SourceAnswer)
    add(app, "DELETE", "/sources/{name:path}", remove_source, answer=TargetChangeAnswer)
