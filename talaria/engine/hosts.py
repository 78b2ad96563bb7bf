"""Which host may run what, where several share a ledger: a run starts where its files are.

A run whose files lie in folders that every host has (TALARIA_SHARED_SOURCES) goes into the pool's ordinary queues. Any
other one goes into a queue of the host that was asked for it, `normal@HOST`, of which only that host's workers take.
What somebody puts into an ordinary queue by Prefect's own means is begun by a host that has its files, and stays there;
so does a retrieval, which has fetched studies there, and goes on elsewhere only if that host dies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import FlowRun

from transfer import roots
from transfer.home import host_name

HOST = "talaria.host"  # label of a run: where its files are, whatever its queue
AT = "@"  # between a queue's name and its host's
SHARED = "TALARIA_SHARED_SOURCES"


def several() -> bool:
    """Return True if several hosts share a ledger."""
    return bool(os.environ.get("TALARIA_LEDGER"))


def own(queue: str) -> str:
    """Return the name of this host's own queue beside an ordinary one."""
    return f"{queue}{AT}{host_name()}"


def of_queue(queue: str | None) -> str:
    """Return the host whose queue it is; "" for a queue of all."""
    return (queue or "").rpartition(AT)[2] if AT in (queue or "") else ""


def queue_for(queue: str, parameters: Mapping[str, Any]) -> str:
    """Return the queue for a run of these parameters that this host is asked for."""
    return own(queue) if several() and not _everywhere(_paths(parameters)) else queue


def is_here(flow_run: FlowRun) -> bool:
    """Return True if a run may begin on this host: its files are here, as far as they aren't everywhere."""
    if not several() or of_queue(flow_run.work_queue_name):
        return True
    bound = str(flow_run.labels.get(HOST, ""))
    if bound:
        return bound == host_name()
    paths = _paths(flow_run.parameters)
    return _everywhere(paths) or all(os.path.lexists(one) for one in paths)


def must_stay(flow_run: FlowRun) -> bool:
    """Return True if a run that begins here may go on nowhere else, and nothing says so yet."""
    if not several() or of_queue(flow_run.work_queue_name) or flow_run.labels.get(HOST):
        return False
    return _fetches(flow_run.parameters) or not _everywhere(_paths(flow_run.parameters))


def may_leave(flow_run: FlowRun) -> bool:
    """Return True if a run stays with its host only for what it has fetched there, and may begin anew on another."""
    bound = flow_run.labels.get(HOST) and not of_queue(flow_run.work_queue_name)
    return bool(bound) and _everywhere(_paths(flow_run.parameters))


def where_it_waits(flow_run: FlowRun) -> str:
    """Return the other host that a run waits for; "" if this one, or any, may run it."""
    host = of_queue(flow_run.work_queue_name) or str(flow_run.labels.get(HOST, ""))
    return "" if host == host_name() or not several() else host


def _paths(parameters: Mapping[str, Any]) -> list[str]:
    """Return the paths of this machine that a run reads, or writes to."""
    found = parameters.get("paths") or []
    into = parameters.get("into")
    return [*([found] if isinstance(found, str) else map(str, found)), *([str(into)] if into else [])]


def _fetches(parameters: Mapping[str, Any]) -> bool:
    """Return True for a retrieval, whose next part needs what the one before has fetched, and where it was."""
    return bool(parameters.get("source") and (parameters.get("targets") or parameters.get("into")))


def _everywhere(paths: list[str]) -> bool:
    """Return True if paths lie in folders that every host has; links count as what they point at."""
    shared = [os.path.realpath(one) for one in roots.parse(SHARED, os.environ.get(SHARED, ""))]
    real = [os.path.realpath(Path(one).expanduser()) for one in paths]
    return all(any(one == root or one.startswith(root.rstrip("/") + "/") for root in shared) for one in real)
