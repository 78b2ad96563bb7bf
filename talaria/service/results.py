"""Runs as people know them: how lists show one, and what it has left behind."""

from __future__ import annotations

import asyncio
from typing import Any

from prefect.client.schemas.objects import FlowRun

from talaria.engine import runs
from talaria.service import Office
from tasks.crashed import is_over
from tasks.dispatch import kept, rest, running
from tasks.dispatch.asked import asked_list
from tasks.dispatch.audited import requester
from tasks.names import split
from tasks.retrieve.ending import numbers_of
from tasks.retrieve.job import Job, folder_of
from tasks.retrieve.report import cancelled, given_up, sentence
from tasks.retrieve.report import document as whole_of
from transfer.receipt import Receipt, State

NOT_OVER = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED")


def line(flow_run: FlowRun) -> dict[str, Any]:
    """Return a job as lists show it."""
    begun = flow_run.start_time or flow_run.expected_start_time
    return {
        "id": str(flow_run.id),
        "state": flow_run.state_name,
        "kind": runs.kind_of(flow_run),
        "source": flow_run.parameters.get("source", ""),
        "dispatch_id": runs.dispatch_of(flow_run),
        "targets": asked_list(flow_run.parameters, "targets"),
        "paths": asked_list(flow_run.parameters, "paths"),
        "by": requester(flow_run),
        "begun": begun.isoformat(timespec="seconds") if begun else None,
        "ended": flow_run.end_time.isoformat(timespec="seconds") if flow_run.end_time else None,
        "runs": flow_run.run_count,
        "message": flow_run.state.message if flow_run.state else None,
    }


async def result(office: Office, flow_run: FlowRun) -> dict[str, Any]:
    """Return what a run has left behind, with all items; of one that could not begin, its state's message.

    Receipts are the server's; the copy on this machine, if it has one, is read where the server has none (any more).
    """
    kind, state = runs.kind_of(flow_run), flow_run.state
    if kind == "query":
        return await _matches(office, flow_run)
    ended = state is not None and state.is_final()
    document = await asyncio.to_thread(_retrieved, office, flow_run) if kind == "retrieval" and not ended else None
    document = document or await kept.read(office.client, flow_run.id)
    document = document or kept.here(office.home, str(flow_run.id)) or _nothing(flow_run, kind)
    return settled(flow_run, kind, document)


def settled(flow_run: FlowRun, kind: str, document: dict[str, Any]) -> dict[str, Any]:
    """Return a result in which nothing waits any more, if its run was cancelled while it waited, or was given up.

    Of a run that failed before it came to that, as a retry whose files, or source, are gone, it says why: the result is
    that of the time before.
    """
    state = flow_run.state
    if state is None or state.is_completed() or not is_over(state):
        return document
    if kind == "retrieval":
        if state.is_cancelled() and document["waiting"]:
            return cancelled(document)
        if state.is_cancelled():  # which was too late where all had been delivered
            return document if document["state"] == "delivered" else document | {"state": "cancelled"}
        if document["waiting"]:
            return given_up(document, state.message or "failed")
        return document if state.message == sentence(document) else document | {"error": state.message or state.name}
    targets = document["targets"].items() if kind == "dispatch" else ()
    of_them = tuple(f"{name} {one['state']}: " for name, one in targets)
    if of_them and not state.is_cancelled() and not (state.message or "").startswith(of_them):
        document = document | {"error": state.message or state.name}
    parts = [document]
    for one in (document, *document.get("studies", ())) if kind == "dispatch" else ():
        parts += [one, *one["targets"].values()]
    for part in [part for part in parts if part["state"] in ("waiting", "paused")]:
        part["state"] = "cancelled" if state.is_cancelled() else "failed"
    return document


def _retrieved(office: Office, flow_run: FlowRun) -> dict[str, Any] | None:
    """Return how far each study of a retrieval is that has not ended; None if another machine runs it."""
    if not folder_of(office.home, str(flow_run.id)).is_dir():
        return None
    job = Job.load(office.home, str(flow_run.id), numbers_of(flow_run.parameters))
    return whole_of(job, str(flow_run.id), flow_run.parameters.get("source", ""), _stands(flow_run, "delivered"))


def _stands(flow_run: FlowRun, completed: str = "failed") -> str:
    """Return the state of a retrieval's run as `outcome` does; also that somebody has paused, or suspended, it."""
    paused = flow_run.state_name == running.PAUSED or bool(flow_run.state and flow_run.state.is_paused())
    return "paused" if paused else outcome(flow_run, completed)


def _nothing(flow_run: FlowRun, kind: str) -> dict[str, Any]:
    """Return the result of a run that has left none."""
    error = flow_run.state.message if flow_run.state else None
    common = {"flow_run_id": str(flow_run.id), "state": outcome(flow_run, "delivered"), "error": error}
    if kind == "dispatch":
        return {"dispatch_id": runs.dispatch_of(flow_run), **common, "targets": _unread(flow_run)}
    names = ("missing", "partial", "failed", "waiting", "cancelled", "studies", "accessions")
    lists: dict[str, Any] = {name: [] for name in names}
    more = {"source": flow_run.parameters.get("source", ""), "found": 0, "delivered": 0, "state": _stands(flow_run)}
    return {**common, **more, **lists}


def _unread(flow_run: FlowRun) -> dict[str, Any]:
    """Return the receipts of a dispatch that rests and has read no files; none if it doesn't rest."""
    if flow_run.state is None or not rest.awaited(flow_run.state.message or ""):
        return {}
    names = dict.fromkeys(split(name)[1] for name in asked_list(flow_run.parameters, "targets"))
    waiting = (Receipt(name, (), attempts=0, stopped=State.WAITING) for name in names)
    return {one.target: one.to_json(all_items=True) for one in waiting}


async def _matches(office: Office, flow_run: FlowRun) -> dict[str, Any]:
    whole = await kept.read(office.client, flow_run.id)  # where there are more than its table has
    return {
        "flow_run_id": str(flow_run.id),
        "source": flow_run.parameters.get("source", ""),
        "state": outcome(flow_run, "found"),
        "matches": whole["matches"] if whole else await runs.table_of(office.client, flow_run.id, "matches"),
        "error": flow_run.state.message if flow_run.state and not flow_run.state.is_completed() else None,
    }


def outcome(flow_run: FlowRun, completed: str = "failed") -> str:
    """Return a run's state as a result names it."""
    names = {"CANCELLED": "cancelled", "COMPLETED": completed} | dict.fromkeys(NOT_OVER, "waiting")
    return names.get(str(flow_run.state.type.value) if flow_run.state else "", "failed")
