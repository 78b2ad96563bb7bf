"""A search as a flow run: its artifact names UIDs and accession numbers, never a patient."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from prefect import get_client
from prefect.artifacts import acreate_table_artifact
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.states import Completed, Failed

from blocks.base import Target
from imaging.query import Match, Query, counted
from tasks import DRIVERS
from tasks.dispatch import audited
from tasks.dispatch.patience import patiently
from tasks.quiet import Quiet
from tasks.targets import check_source, load
from transfer.errors import Unread

SHOWN = ("AccessionNumber", "StudyInstanceUID", "SeriesInstanceUID", "StudyDate", "Modality", "ModalitiesInStudy")
MOST_ROWS = 2000  # of the artifact


async def search(source: str, query: Query) -> State[Any]:
    """Ask a target what it has; leave a table of it on the run.

    Raises:
        DispatchError: the target can't be queried, or doesn't answer.
    """
    target = await patiently(lambda: _load(source))
    check_source(target)
    found = await asyncio.to_thread(_find, target, query, getattr(FlowRunContext.get(), "flow_run", None))
    words = f"{counted(len(found), query.level)} at {target.name}"
    rows = [_row(match) for match in found[:MOST_ROWS]]
    await patiently(lambda: acreate_table_artifact(rows, "matches", words))
    return Completed(message=words) if found else Failed(message=f"nothing matches at {target.name}")


async def _load(name: str) -> Target:
    async with get_client() as client:
        (target,) = await load(client, [name])
        return target


def _find(target: Target, query: Query, flow_run: Any) -> list[Match]:
    find = DRIVERS.of(target).find
    assert find is not None  # noqa: S101 - `check_source` has seen it
    found: list[Match] | None = None
    try:
        with Quiet(target).errors():
            found = matches(find(target, query))
    finally:
        keys = [name for name, value in vars(query).items() if value and name != "level"]
        count = None if found is None else len(found)
        audited.queried(target, keys, count, str(getattr(flow_run, "id", "")), audited.requester(flow_run))
    return found


def matches(answers: Iterator[Match]) -> list[Match]:
    """Return all that a source finds.

    Raises:
        Unread: part of the source can't be read, and nothing is found elsewhere.
    """
    found: list[Match] = []
    try:
        found.extend(answers)  # keeps what came before an error
    except Unread:
        if not found:
            raise
    return found


def _row(match: Match) -> dict[str, Any]:
    shown = {key: match.attributes[key] for key in SHOWN if match.attributes.get(key)}
    return {key: ", ".join(value) if isinstance(value, list) else value for key, value in shown.items()} | {
        "instances": match.instances
    }
