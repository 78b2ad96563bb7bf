"""Checks of targets, and where their results are kept."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import acreate_table_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactCollectionSort, ArtifactSort
from prefect.context import FlowRunContext

from blocks.base import Target
from protocols.net.ping import Ping
from tasks import DRIVERS
from tasks.documents import Broken
from tasks.quiet import Quiet
from transfer import live
from transfer.health import FAILED, OK, SKIPPED, Health, Probe, watched
from transfer.home import Home
from transfer.ledger import write_json

KEY = "check-"  # before a target's name: the key of its checks' artifacts
HEALTHY = "healthy"
NEW = 20  # artifacts a request of a look for new ones
PAGE = 50  # the same, of all: meanwhile a server answers nobody else
WHOLE_S = 600.0  # between two readings of all: what was removed is known until then
COLUMNS = ("name", "result", "ms", "detail")
MORE: dict[str, Any] = {"error": "", "remedy": "", "facts": {}}  # what older checks don't have


def check_target(target: Target, move: bool = False) -> Health:
    """Run a target's staged probes; ping its host meanwhile, which people want to see.

    Args:
        move: whether one that can move instances is to move one to us, which only shows whether it knows us.

    Raises:
        Misconfigured: its type has no driver.
    """
    driver = DRIVERS.of(target)
    ping = Ping(target.node) if target.node else None
    health = driver.check(target)
    if move and target.moves and driver.check_move is not None:
        if health.ok:
            driver.check_move(target, health)
        else:
            health.skip("move")
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
    over = threading.Event()

    def show(probe: Probe) -> None:
        probes.append(probe.to_json())
        if not over.is_set():  # else somebody has stopped the run, and the probe only ended later
            live.write(home, run_id, live.PROBES, [json.dumps({"probes": probes}).encode()])

    try:
        with watched(show):
            yield
    finally:
        over.set()
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


class LastChecks:
    """The last checks of all targets, for whoever asks for them again and again: only new ones are read again."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, dict[str, Any] | None]] = {}  # by key: the artifact's id, and the check
        self._whole = float("-inf")  # when all were read

    async def read(self, client: PrefectClient, targets: Iterable[Target | Broken]) -> dict[str, dict[str, Any]]:
        """Return them as `last_checks` does."""
        made, now = {target.name: target.made for target in targets}, time.monotonic()
        whole = now - self._whole > WHOLE_S
        known = {} if whole else dict(self._known)
        limit, offset = PAGE if whole else NEW, 0
        body = {"artifacts": {"key": {"like_": KEY}}, "sort": ArtifactCollectionSort.UPDATED_DESC, "limit": limit}
        while True:
            page = (await client.request("POST", "/artifacts/latest/filter", json=body | {"offset": offset})).json()
            news = [one for one in page if known.get(one["key"], ("",))[0] != one["latest_id"]]
            known |= {one["key"]: (one["latest_id"], _collected(one)) for one in news}
            if len(page) < limit or not news:  # the newest come first
                break
            offset += limit
        self._known, self._whole = known, now if whole else self._whole  # only now: a part is not all
        return _latest({one["name"]: one for _, one in known.values() if one and one["name"] in made}, made)


def _collected(newest: dict[str, Any]) -> dict[str, Any] | None:
    """Return the check in the newest artifact of a key, as the server answers it; None if it is a stranger's.

    `created` is that of the first artifact with this key.
    """
    if not newest["key"].startswith(KEY):
        return None
    with suppress(ValueError, TypeError):  # whoever makes artifacts may give them any key
        return _document(Artifact.model_construct(**newest | {"created": datetime.fromisoformat(newest["updated"])}))
    return None


async def last_checks(client: PrefectClient, targets: Iterable[Target | Broken]) -> dict[str, dict[str, Any]]:
    """Return the last check, by name, of the targets that were checked since they were made: by a run, or from here."""
    return await LastChecks().read(client, targets)


def _latest(found: dict[str, dict[str, Any]], made: Mapping[str, datetime | None]) -> dict[str, dict[str, Any]]:
    """Return those of targets that were made at such a time, with what is kept here."""
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


def _document(artifact: Artifact) -> dict[str, Any]:
    probes = artifact.data if isinstance(artifact.data, list) else json.loads(str(artifact.data))
    time = (artifact.created or datetime.now(UTC)).isoformat()
    name = str(artifact.key).removeprefix(KEY)
    if not isinstance(probes, list) or not all(isinstance(probe, dict) for probe in probes):
        raise TypeError("not the table of a check")
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
        document: dict[str, Any] = json.loads(_path(name).read_text(encoding="utf-8"))
        _time(document)
        return document | {"probes": [MORE | probe for probe in document["probes"]]}
    except (OSError, ValueError, TypeError, KeyError):  # none, or a damaged one: that says nothing, and ends no list
        return None


def _path(name: str) -> Path:
    return Home.current().root / "checks" / f"{name}.json"
