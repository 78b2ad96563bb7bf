"""A search as a flow run: its artifact names UIDs and accession numbers, never a patient."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from prefect import get_client
from prefect.artifacts import acreate_table_artifact
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.states import AwaitingRetry, Completed, Failed

from blocks.base import Target
from imaging.query import Match, Query, counted
from tasks import DRIVERS
from tasks.dispatch import audited, kept, rest
from tasks.dispatch.patience import patiently
from tasks.dispatch.report import has_run_before
from tasks.dispatch.slots import NoSlot
from tasks.dispatch.stoppable import in_thread
from tasks.quiet import Quiet
from tasks.retrieve.turn import Turn
from tasks.targets import check_source, load
from transfer.errors import Unread
from transfer.home import Home

SHOWN = ("AccessionNumber", "StudyInstanceUID", "SeriesInstanceUID", "StudyDate", "Modality", "ModalitiesInStudy")
MOST_ROWS = 2000  # of the table, which Prefect's pages show whole


class SearchResult(NamedTuple):
    """What a search has found.

    Attributes:
        unread: why what was not found may be there all the same; "" if it isn't.
    """

    matches: list[Match]
    unread: str = ""


@dataclass
class _InLine:
    """Since when the run of this context waits for a slot, in seconds since the epoch; 0 if it doesn't."""

    since: float = 0.0

    @classmethod
    def of(cls, flow_run: Any) -> _InLine:
        begun = flow_run.start_time if flow_run and has_run_before() else None
        return cls(begun.timestamp() if begun else 0.0)


async def search(source: str, query: Query) -> State[Any]:
    """Ask a target what it has, in one of its slots, for which the run may rest; leave a table of it on the run.

    Raises:
        DispatchError: the target can't be queried, or doesn't answer; Paused, Cancelled: somebody has stopped the run.
    """
    target = await patiently(lambda: _load(source))
    check_source(target)
    flow_run = getattr(FlowRunContext.get(), "flow_run", None)
    turn = Turn(target, str(getattr(flow_run, "id", "")), _InLine.of(flow_run), Home.current(), "normal", count=1)
    try:
        await patiently(turn.take)
    except NoSlot:
        wait = await asyncio.to_thread(turn.wait)
        return AwaitingRetry(scheduled_time=wait.until, message=rest.message([wait], "nothing has been asked yet"))
    try:
        found = await in_thread("query", _find, target, query, flow_run)
    finally:
        await turn.give_back()
    words = f"{counted(len(found.matches), query.level)} at {target.name}"
    rows = [_row(match) for match in found.matches]
    await patiently(lambda: _keep(rows, words))
    if found.unread:
        return Failed(message=f"{words}; {found.unread}")
    return Completed(message=words) if found.matches else Failed(message=f"nothing matches at {target.name}")


async def _keep(rows: list[dict[str, Any]], words: str) -> None:
    """Leave matches on the run: all of them, and as many as a page can show as a table."""
    shown = words if len(rows) <= MOST_ROWS else f"{words}; the first {MOST_ROWS} of them"
    again, context = has_run_before(), FlowRunContext.get()
    if context and context.flow_run and (len(rows) > MOST_ROWS or again):
        async with get_client() as client:
            await kept.keep(client, context.flow_run.id, [json.dumps({"matches": rows}).encode()], again=again)
    await acreate_table_artifact(rows[:MOST_ROWS], "matches", shown)


async def _load(name: str) -> Target:
    async with get_client() as client:
        (target,) = await load(client, [name])
        return target


def _find(target: Target, query: Query, flow_run: Any) -> SearchResult:
    found: SearchResult | None = None
    try:
        found = found_at(target, query)
    finally:
        keys = [name for name, value in vars(query).items() if value and name != "level"]
        count = None if found is None else len(found.matches)
        audited.queried(target, keys, count, str(getattr(flow_run, "id", "")), audited.requester(flow_run))
    return found


def found_at(target: Target, query: Query) -> SearchResult:
    """Return all that a target finds; blocks.

    Raises:
        DispatchError: as its `find`, in words that may be shown.
    """
    find = DRIVERS.of(target).find
    assert find is not None  # noqa: S101 - `check_source` has seen it
    matches: list[Match] = []
    try:
        with Quiet(target).errors():
            matches.extend(find(target, query))  # keeps what came before an error
    except Unread as exc:
        if not matches:
            raise
        return SearchResult(matches, exc.message)
    return SearchResult(matches)


def _row(match: Match) -> dict[str, Any]:
    shown = {key: match.attributes[key] for key in SHOWN if match.attributes.get(key)}
    return {key: ", ".join(value) if isinstance(value, list) else value for key, value in shown.items()} | {
        "instances": match.instances
    }
