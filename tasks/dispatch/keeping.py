"""What is kept of a run that was given up, so that it can be tried again without its source."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.context import FlowRunContext

from tasks.dispatch import running
from tasks.dispatch.patience import patiently
from tasks.dispatch.stage import Staged, plan_and_stage
from tasks.dispatch.studies import Studies, studies_of
from transfer import deadletters, deadstudies
from transfer.errors import DispatchError
from transfer.globs import patterns
from transfer.home import Home, host_name
from transfer.plan import Origin
from transfer.receipt import State
from transfer.shared import HOST, KEPT, several
from transfer.staging import Way
from transfer.studies import Each


@dataclass(frozen=True)
class Given:
    """What a flood leaves to be kept: its studies, None if the last part of the run had none, and their rows."""

    studies: Studies | None
    rows: Iterable[Mapping[str, Any]]


async def keep_files(
    home: Home,
    run_id: str,
    staged: Staged | None,
    staging: Path,
    cancelled: threading.Event,
    state: State,
    unsent: bool,
    flood: Given | None = None,
) -> None:
    """Keep the files of this context's run if it was given up, for a retry; forget what was kept of one that succeeded.

    Where several hosts share a ledger, the run stays with this one then, which has its files; and what was kept goes
    with the retention alone: another host may have been asked to send it elsewhere.

    Args:
        staged: what is staged; None if the last part of the run had no files.
        staging: where they are staged then.
        state: of the run.
        unsent: whether some of them have not been sent.
        flood: its studies, where it is one.
    """
    context = FlowRunContext.get()
    asked = (context and context.parameters) or {}
    kept = await asyncio.to_thread(_kept, home, run_id, asked, staged, staging, cancelled, state, unsent, flood)
    if kept and several():

        async def stays() -> None:
            async with get_client() as client:
                await client.update_flow_run_labels(UUID(run_id), {HOST: host_name(), KEPT: kept})

        await patiently(stays)


def _kept(
    home: Home,
    run_id: str,
    asked: dict[str, Any],
    staged: Staged | None,
    staging: Path,
    cancelled: threading.Event,
    state: State,
    unsent: bool,
    flood: Given | None = None,
) -> str:
    """Do so for the run of these parameters; return where its files are kept, "" if they aren't."""
    if state is State.DELIVERED and not several():
        deadletters.forget(home, run_id, asked.get("paths", []))
    if state in (State.DELIVERED, State.CANCELLED) or running.whole() or not unsent:
        return ""
    if asked.get("each"):
        return _kept_studies(home, run_id, asked, flood, staging, cancelled) if flood else ""
    with suppress(DispatchError, OSError):  # the source is gone, or there is no room
        if staged is None:
            paths = deadletters.instead(home, run_id, asked.get("paths", []))
            staged = plan_and_stage(paths, asked.get("exclude", ""), Origin(), staging, cancelled)
        return deadletters.keep(home, run_id, staged.plan, staged.source)
    return ""


def _kept_studies(
    home: Home, run_id: str, asked: dict[str, Any], flood: Given, staging: Path, cancelled: threading.Event
) -> str:
    """Keep the studies of a flood that some target has not got; return what to read of it, "" if nothing is kept."""
    paths, each, exclude = asked.get("paths", []), Each(asked["each"]), patterns(asked.get("exclude", ""))
    if each is Each.UNIT and not all(map(deadstudies.is_list, paths)):
        return ""  # they stay in their source
    failed = {str(row["study"]) for row in flood.rows if any(one["unsent"] for one in row["targets"].values())}
    letters = deadstudies.Letters(home, run_id)
    with suppress(DispatchError, OSError):  # the source is gone, or there is no room
        how = Origin(), staging, cancelled, Way.READ, False, 1
        studies = flood.studies or studies_of(home, run_id, paths, each, exclude, *how)
        for study in studies.all:
            if study.name in failed and not (study.name in letters and letters.instead(study) == study):
                studies.check()
                with suppress(DispatchError, OSError):
                    if left := studies.left(study):
                        letters.keep(study.name, *left)
        if letters.save({*failed, *(letters.names if several() else ())}):
            return letters.list_all(studies.all) if several() else str(letters.folder)
    return ""
