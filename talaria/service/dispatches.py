"""Dispatches: looked at, planned, and put into the queue."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from prefect.client.schemas.objects import FlowRun

from blocks import Target
from talaria.engine import runs
from talaria.engine.recovery import elsewhere
from talaria.service import Office
from talaria.service.queueing import queued
from talaria.service.results import line, outcome, result
from tasks import DRIVERS
from tasks.dispatch.asked import check_asked, name_of, unplanned
from tasks.dispatch.delivery import Delivery, sort_out
from tasks.dispatch.hours import check_hours
from tasks.dispatch.report import document as whole
from tasks.targets import check_destination, check_origin, load
from transfer import live, silent
from transfer.errors import DispatchError
from transfer.globs import patterns
from transfer.ledger import Ledger
from transfer.plan import Origin, Plan, look, scan
from transfer.receipt import State, trimmed
from transfer.studies import Each, flood_id, listed

ANSWER_S = 10.0  # for the server of a share: somebody waits for the answer
PLAN_S = 0.05  # between two looks for the plan of a dispatch
UNTAKEN_S = 5.0  # how long a plan is waited for while no worker has taken the dispatch
UNPLANNED_S = 60.0  # and while one has


async def create_dispatch(
    office: Office,
    paths: list[str],
    targets: list[str],
    exclude: str = "",
    priority: str = "normal",
    sender_aet: str = "",
    receiver_aet: str = "",
    sender_host: str = "",
    force: bool = False,
    copy_first: bool = False,
    each: str = "",
    key: str = "",
    planned: bool = False,
    host: str = "",
) -> dict[str, Any]:
    """Put a dispatch into the queue. The files are read where it is sent from, when its turn has come.

    Args:
        paths: absolute, on the machine that sends.
        each: what is a study of its own, as `transfer.studies.Each`; "" if all is one.
        key: idempotency key; the same key again gives the same dispatch, not a second one.
        planned: wait a little for the worker to read the files, and return what it is going to do.
        host: the one that has the files, if it is another one.

    Raises:
        NotFound, Misconfigured, Denied: there is no such target or path, or nothing to send. SourceAway: the share of
            the files does not answer.
    """
    targets = list(dict.fromkeys(targets))
    check_asked(paths, targets)
    for target in await load(office.client, targets, secrets=False):
        check_destination(target)
        check_origin(target, Origin(sender_aet, receiver_aet, sender_host))
        check_hours(target, priority)
    if office.embedded and not host:  # else the files are another machine's
        await answer(paths)
        await asyncio.to_thread(_look, paths, each, patterns(exclude))
    parameters = {
        "paths": paths,
        "targets": targets,
        "exclude": exclude,
        "priority": priority,
        "sender_aet": sender_aet,
        "receiver_aet": receiver_aet,
        "sender_host": sender_host,
        "force": force,
        "copy_first": copy_first,
        "each": each,
    }
    name = unplanned(targets)
    what = office, "dispatch", parameters, name, priority, key
    flow_run = await queued(*what, what="dispatch", show_plan=planned, host=host)
    fresh = not flow_run.run_count and not runs.under_way(flow_run)  # not made before, with the same key
    document = await _planned(office, flow_run) if planned and fresh and not each else None
    return {"run": line(flow_run)} | trimmed(document or await _of_queue(office, flow_run, targets))


async def answer(paths: list[str]) -> None:
    """Check that the shares answer that paths lie in: a look there would not end, and take a thread of the server.

    Raises:
        SourceAway: one does not.
    """
    await silent.check(paths, ANSWER_S)


def _look(paths: list[str], each: str, exclude: tuple[str, ...]) -> None:
    """Make sure that there is something to send; where each path is a study of its own, for one of them.

    Raises:
        NotFound, Misconfigured, Denied: as `look` does.
    """
    first: DispatchError | None = None
    for some in [[path] for path in paths] if each == Each.PATH else [paths]:
        try:
            look(some, exclude)
        except DispatchError as exc:
            first = first or exc
        else:
            return
    if first:
        raise first


async def _of_queue(office: Office, flow_run: FlowRun, targets: list[str]) -> dict[str, Any]:
    """Return the result of a dispatch that is not planned yet, or of one that was made before with the same key."""
    if flow_run.run_count:
        return await result(office, flow_run)
    waiting = {
        "state": "waiting", "delivered": 0, "warnings": 0, "already": 0, "rejected": 0, "skipped": 0, "unsent": 0,
        "bytes": 0, "seconds": 0.0, "attempts": 0, "verified": "accepted", "hook": "none", "error": None, "notes": [],
        "items": [],
    }  # fmt: skip
    return {
        "dispatch_id": runs.dispatch_of(flow_run),
        "flow_run_id": str(flow_run.id),
        "state": outcome(flow_run, "delivered"),
        "targets": {name: dict(waiting) for name in targets},
    }


async def _planned(office: Office, flow_run: FlowRun) -> dict[str, Any] | None:
    """Wait for the plan that a worker makes of a dispatch; read the files here if none takes it soon.

    Returns:
        What is known of the dispatch; None if a worker elsewhere has it.
    """
    loop = asyncio.get_running_loop()
    begun, run_id, is_here = loop.time(), str(flow_run.id), office.embedded
    while (waited := loop.time() - begun) < UNPLANNED_S:
        plan = await asyncio.to_thread(live.read, office.home, run_id, live.PLAN)
        if plan is not None:
            live.forget(office.home, run_id, live.PLAN)
            return plan
        if flow_run.state and flow_run.state.is_final():
            return await result(office, flow_run)
        if (office.alone or waited > UNTAKEN_S) and not runs.under_way(flow_run):
            return await _read_here(office, flow_run) if office.embedded else None
        if not is_here and runs.under_way(flow_run):
            if await elsewhere(office.client, flow_run, online=False):
                return None
            is_here = True
        await asyncio.sleep(PLAN_S)
        flow_run = await office.client.read_flow_run(flow_run.id)
    return None


async def _read_here(office: Office, flow_run: FlowRun) -> dict[str, Any]:
    """Read the files of a dispatch that no worker has begun; return what it is going to do."""
    asked = flow_run.parameters
    targets = await load(office.client, asked["targets"])
    origin = Origin(asked["sender_aet"], asked["receiver_aet"], asked["sender_host"])

    def read() -> dict[str, Any]:
        plan = scan(asked["paths"], patterns(asked["exclude"]), origin)
        with Ledger(office.home.ledger) as ledger:
            receipts = [
                Delivery(
                    DRIVERS.of(one), one, plan, ledger, office.home, threading.Event(), force=asked["force"]
                ).receipt(waiting=True)
                for one in targets
            ]
        return whole(plan.dispatch_id, str(flow_run.id), State.WAITING, receipts)

    document = await asyncio.to_thread(read)
    name = name_of(document["dispatch_id"], asked["targets"])
    await office.client.update_flow_run(flow_run.id, name=name)
    return document


async def plan_dispatch(
    office: Office,
    paths: list[str],
    targets: list[str],
    exclude: str = "",
    sender_aet: str = "",
    receiver_aet: str = "",
    sender_host: str = "",
    each: str = "",
) -> dict[str, Any]:
    """Return what a dispatch would send; the files are read on this machine."""
    check_asked(paths, targets)
    found: list[Target] = await load(office.client, list(dict.fromkeys(targets)), secrets=False)
    origin = Origin(sender_aet, receiver_aet, sender_host)
    for target in found:
        check_destination(target)
        check_origin(target, origin)
    await answer(paths)
    if each:
        return await asyncio.to_thread(_plan_flood, paths, Each(each), patterns(exclude), origin, found)
    plan = await asyncio.to_thread(scan, paths, patterns(exclude), origin)
    return {
        "dispatch_id": plan.dispatch_id,
        "dry_run": True,
        "targets": {target.name: _would_send(plan, target) for target in found},
    }


def _plan_flood(
    paths: list[str], each: Each, exclude: tuple[str, ...], origin: Origin, targets: list[Target]
) -> dict[str, Any]:
    """Return what a flood would send: of each study, and of all of them."""
    studies = listed(paths, each, exclude)
    whole_of: dict[str, dict[str, Any]] = {target.name: {"files": 0, "bytes": 0, "items": []} for target in targets}
    rows = []
    for study in studies:
        row: dict[str, Any] = {"study": study.name, "dispatch_id": "", "error": None, "files": 0, "bytes": 0}
        try:
            plan = study.read(exclude, origin)
        except DispatchError as exc:
            row["error"] = exc.message
        else:
            row |= {"dispatch_id": plan.dispatch_id, "files": len(plan.items), "bytes": plan.size}
            for target in targets:
                part, sum_ = _would_send(plan, target), whole_of[target.name]
                sum_["files"], sum_["bytes"] = sum_["files"] + part["files"], sum_["bytes"] + part["bytes"]
                sum_["items"] += [one | {"path": f"{study.name}/{one['path']}"} for one in part["items"]]
        rows.append(row)
    return {"dispatch_id": flood_id(studies), "dry_run": True, "targets": whole_of, "studies": rows}


def _would_send(plan: Plan, target: Target) -> dict[str, Any]:
    refused, wanted = sort_out(DRIVERS.of(target).facts, target, plan)
    return {
        "files": len(wanted),
        "bytes": sum(item.size for item in wanted),
        "items": [{"path": i.shown, "outcome": str(o.kind), "detail": o.detail} for i, o in refused.items()],
    }
