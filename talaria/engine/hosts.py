"""Which host may run what, where several share a ledger: a run starts where its files are.

A run whose files lie in folders that every host has (TALARIA_SHARED_SOURCES) goes into the pool's ordinary queues. Any
other one goes into a queue of the host that was asked for it, `normal@HOST`, of which only that host's workers take.
What somebody puts into an ordinary queue by Prefect's own means is begun by a host that has its files, and stays there;
so does a retrieval, which has fetched studies there, and goes on elsewhere only if that host dies. Of a list of studies
(`each: line`) its lines count as well: the same path may be another study on another host.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import FlowRun

from tasks.dispatch.asked import asked_list
from transfer import roots
from transfer.errors import DispatchError
from transfer.home import host_name
from transfer.shared import AT as AT
from transfer.shared import HOST as HOST
from transfer.shared import SOURCES as SHARED
from transfer.shared import of_queue as of_queue
from transfer.shared import several as several
from transfer.silent import looked
from transfer.studies import Each, listed


def own(queue: str) -> str:
    """Return the name of this host's own queue beside an ordinary one."""
    return queue_of(queue, host_name())


async def queue_for(queue: str, parameters: Mapping[str, Any]) -> str:
    """Return the queue for a run of these parameters that this host is asked for."""
    return queue if not several() or await _everywhere(parameters) else own(queue)


def queue_of(queue: str, host: str) -> str:
    """Return the queue of a host beside an ordinary one."""
    return f"{queue}{AT}{host}"


async def here(flow_runs: Iterable[FlowRun]) -> list[FlowRun]:
    """Return the runs that may begin on this host: their files are here, as far as they aren't everywhere.

    Those whose file system does not answer may not.
    """
    found = [*flow_runs]
    if not several():
        return found
    unsaid = {one.id: one.parameters for one in found if not _host(one)}
    lines = await _lines(unsaid.values())
    known = await _looked(path for one in unsaid.values() for path in _paths(one, lines))

    def is_here(one: FlowRun) -> bool:
        if one.id not in unsaid:
            return _host(one) == host_name()
        asked = unsaid[one.id]
        answers = [known.get(path, (False, False)) for path in _paths(asked, lines)]
        if all(shared for shared, _ in answers):
            return True
        count = len(_paths(asked))  # of a list's lines some may be missing on every host: they fail by themselves
        alone = [there for shared, there in answers[count:] if not shared]
        return all(there for _, there in answers[:count]) and (any(alone) or not alone)

    return [one for one in found if is_here(one)]


async def must_stay(*flow_runs: FlowRun) -> set[UUID]:
    """Return the ids of those of some runs that, once begun here, may go on nowhere else, where nothing says so yet."""
    unsaid = [one for one in flow_runs if several() and not _host(one)]
    lines = await _lines(one.parameters for one in unsaid)
    known = await _looked(path for one in unsaid for path in _paths(one.parameters, lines))
    shared = {path for path, (is_shared, _) in known.items() if is_shared}

    def may_leave(asked: Mapping[str, Any]) -> bool:
        return not _fetches(asked) and _is_read(asked, lines) and shared.issuperset(_paths(asked, lines))

    return {one.id for one in unsaid if not may_leave(one.parameters)}


async def may_leave(flow_run: FlowRun) -> bool:
    """Return True if a run stays with its host only for what it has fetched there, and may begin anew on another."""
    bound = flow_run.labels.get(HOST) and not of_queue(flow_run.work_queue_name)
    return bool(bound) and await _everywhere(flow_run.parameters)


def where_it_waits(flow_run: FlowRun) -> str:
    """Return the other host that has a run's files; "" if this one, or any, may run it."""
    host = _host(flow_run)
    return "" if host == host_name() or not several() else host


def _paths(parameters: Mapping[str, Any], lines: Mapping[str, list[str]] = MappingProxyType({})) -> list[str]:
    """Return the paths of this machine that a run reads, or writes to.

    Args:
        lines: what lists name, by their paths; it follows the paths that the run is asked for.
    """
    found, into = parameters.get("paths"), parameters.get("into")
    paths = [*([found] if isinstance(found, str) else asked_list(parameters, "paths")), *([str(into)] if into else [])]
    return [*paths, *(line for path in paths for line in lines.get(path, ()) if _is_of_lists(parameters))]


def _is_of_lists(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters.get("each") == Each.LINE)


async def _lines(every: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return what the lists name that runs of some parameters read, by their paths; of one that can't be read none."""

    def read(path: str) -> list[str] | None:
        try:
            return [one for study in listed([path], Each.LINE) for one in study.paths]
        except (DispatchError, OSError, ValueError):
            return None

    found = await looked(read, (path for one in every if _is_of_lists(one) for path in _paths(one)))
    return {path: lines for path, lines in found.items() if lines is not None}


def _is_read(parameters: Mapping[str, Any], lines: Mapping[str, list[str]]) -> bool:
    """Return True if it is known what the lists of a run name."""
    return not _is_of_lists(parameters) or all(path in lines for path in _paths(parameters))


def _fetches(parameters: Mapping[str, Any]) -> bool:
    """Return True for a retrieval, whose next part needs what the one before has fetched, and where it was."""
    return bool(parameters.get("source") and (parameters.get("targets") or parameters.get("into")))


def _host(flow_run: FlowRun) -> str:
    """Return the host that alone may run a run, by its queue or its label; "" if nothing says so."""
    return of_queue(flow_run.work_queue_name) or str(flow_run.labels.get(HOST) or "")


async def _everywhere(parameters: Mapping[str, Any]) -> bool:
    """Return True if what a run reads and writes lies in folders that every host has.

    Links count as what they point at.
    """
    lines = await _lines([parameters])
    paths = _paths(parameters, lines)
    known = await _looked(paths)
    return _is_read(parameters, lines) and all(path in known and known[path][0] for path in paths)


async def _looked(paths: Iterable[str]) -> dict[str, tuple[bool, bool]]:
    """Return of each path whose file system answers whether it lies in a folder that every host has, and is there."""
    named = roots.parse(SHARED, os.environ.get(SHARED, ""))
    _real.update(await looked(os.path.realpath, (one for one in named if one not in _real)))
    shared = [_real.get(one, one) for one in named]

    def look(path: str) -> tuple[bool, bool]:
        written = os.path.expanduser(path)  # noqa: PTH111 - leaves what names nobody's home as it is
        if not Path(written).is_absolute() or "\0" in written:
            return True, True  # it can lie nowhere: whoever begins it refuses it
        real = os.path.realpath(written)
        is_shared = any(real == root or real.startswith(root.rstrip("/") + "/") for root in shared)
        return is_shared, os.path.lexists(path)

    return await looked(look, paths)


_real: dict[str, str] = {}  # what folders that every host has are without links; asked once, as one may be silent later
