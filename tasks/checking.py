"""Checks of targets, and where their results are kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import acreate_table_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    ArtifactCollectionFilter,
    ArtifactCollectionFilterKey,
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import Artifact, ArtifactCollection
from prefect.client.schemas.sorting import ArtifactCollectionSort, ArtifactSort
from prefect.context import FlowRunContext

from blocks.base import Target
from protocols.net.ping import Ping
from tasks import DRIVERS
from tasks.documents import Broken
from tasks.paging import every
from tasks.quiet import Quiet
from transfer import live
from transfer.health import FAILED, OK, SKIPPED, Health, Probe, watched
from transfer.home import Home
from transfer.ledger import write_json

KEY = "check-"  # before a target's name: the key of its checks' artifacts
HEALTHY = "healthy"
COLUMNS = ("name", "result", "ms", "detail")
MORE: dict[str, Any] = {"error": "", "remedy": "", "facts": {}}  # what older checks don't have


def check_target(target: Target) -> Health:
    """Run a target's staged probes; ping its host meanwhile, which people want to see.

    Raises:
        Misconfigured: its type has no driver.
    """
    driver = DRIVERS.of(target)
    ping = Ping(target.node) if target.node else None
    health = driver.check(target)
    quiet = Quiet(target)
    for probe in health.probes:
        if probe.result == FAILED:
            probe.detail = quiet.text(probe.detail)
    if ping is not None:
        echo = ping.result()
        result = SKIPPED if echo.answered is None else OK if echo.answered else FAILED
        health.hint("ping", result, ping.ms, echo.detail, after="resolve")
    return health


@contextmanager
def shown_live() -> Iterator[None]:
    """Show the probes of the check that this run makes as they come, to whoever looks at this machine."""
    context, home = FlowRunContext.get(), Home.current()
    if context is None or context.flow_run is None:
        raise RuntimeError("a check runs inside a flow run")
    run_id, probes = str(context.flow_run.id), list[dict[str, Any]]()

    def show(probe: Probe) -> None:
        probes.append(probe.to_json())
        live.write(home, run_id, live.PROBES, [json.dumps({"probes": probes}).encode()])

    try:
        with watched(show):
            yield
    finally:
        live.forget(home, run_id, live.PROBES)


async def report_health(target: Target, health: Health) -> None:
    """Save the result of a check as an artifact of the run."""
    # What a step does not have is left out: a table in Prefect's UI shows a column for each key.
    probes = [
        {key: value for key, value in probe.items() if value not in ("", {}) or key in COLUMNS}
        for probe in health.to_json(target.name)["probes"]
    ]
    await acreate_table_artifact(probes, f"{KEY}{target.name}", HEALTHY if health.ok else "not healthy")


async def result_of_run(client: PrefectClient, flow_run_id: UUID, name: str) -> dict[str, Any] | None:
    """Return the result of a run that checked a target; None if the run did not get that far."""
    found = await client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]), key=ArtifactFilterKey(any_=[KEY + name])
        ),
        sort=ArtifactSort.CREATED_DESC,
        limit=1,
    )
    return _document(found[0]) if found else None


async def last_checks(client: PrefectClient, targets: Iterable[Target | Broken]) -> dict[str, dict[str, Any]]:
    """Return the last check, by name, of the targets that were checked since they were made: by a run, or from here."""
    made = {target.name: target.made for target in targets}
    latest = await every(
        client.read_latest_artifacts,
        artifact_filter=ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=[KEY + name for name in made])),
        sort=ArtifactCollectionSort.ID_DESC,
    )
    found = {str(one.key).removeprefix(KEY): _document(one) for one in latest}
    for name in made.keys() & _names_here():
        here = _kept_here(name)
        if here and (name not in found or _time(here) > _time(found[name])):
            found[name] = here
    return {
        name: one | {"time": _time(one).isoformat(timespec="seconds")}
        for name, one in found.items()
        if (since := made[name]) is None or _time(one) >= since
    }


def keep(target: Target, health: Health) -> dict[str, Any]:
    """Write the result of a check outside of any run into the state directory; return it."""
    document = health.to_json(target.name) | {"time": datetime.now(UTC).isoformat()}
    write_json(_path(target.name), document)
    return document


def _document(artifact: Artifact | ArtifactCollection) -> dict[str, Any]:
    probes = artifact.data if isinstance(artifact.data, list) else json.loads(str(artifact.data))
    time = (artifact.created or datetime.now(UTC)).isoformat()
    name = str(artifact.key).removeprefix(KEY)
    probes = [MORE | probe for probe in probes]
    return {"name": name, "ok": artifact.description == HEALTHY, "probes": probes, "time": time}


def _time(document: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(document["time"])


def _names_here() -> set[str]:
    """Return the names of the targets of which a check is kept here: one look instead of one for each target."""
    with suppress(OSError):
        return {one.stem for one in _path("any").parent.iterdir()}
    return set()


def _kept_here(name: str) -> dict[str, Any] | None:
    try:
        text = _path(name).read_text(encoding="utf-8")
    except OSError:
        return None
    document: dict[str, Any] = json.loads(text)
    return document | {"probes": [MORE | probe for probe in document["probes"]]}


def _path(name: str) -> Path:
    return Home.current().root / "checks" / f"{name}.json"
