"""Dispatches, retrievals and queries as jobs: listed, shown, followed, retried, paused, resumed and cancelled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectException

from talaria.engine import hosts, recovery, runs
from talaria.service import Office, recorded
from talaria.service.dispatches import answer, create_dispatch
from talaria.service.results import line, result
from talaria.settings import POOL
from tasks.dispatch import breaker, progress, rest
from tasks.dispatch.asked import asked_list, check_asked
from tasks.dispatch.hours import check_hours
from tasks.names import split
from tasks.retrieve.ending import mark_ended
from tasks.sources.elsewhere import lent_studies, lent_units
from tasks.targets import check_destination, check_origin, load
from transfer import deadletters, shared, unitlist
from transfer.deadstudies import is_list
from transfer.errors import Misconfigured, NotFound
from transfer.ledger import Ledger
from transfer.plan import Origin
from transfer.receipt import trimmed
from transfer.studies import Each

KINDS = {"dispatch": "dispatch", "retrieval": "retrieve", "query": "find"}  # of jobs, and the flows that they run
JOBS = ("dispatch", "retrieval")
LOOK_S = 0.1  # between two looks at a run's progress, and at its state while it begins or ends
BUSY, BUSY_S = ("sending", "fetching"), 1.0  # at its state while its runner is in one of these phases
QUEUED_S = 0.5  # and while it waits in a queue, or runs elsewhere
QUICK_S = 5.0  # how long it is looked at often after somebody has begun to follow it
FAR_S = 1.0  # between two looks at the progress of a run of another machine


async def list_jobs(
    office: Office, limit: int = 50, kinds: tuple[str, ...] = JOBS, failed: bool = False
) -> dict[str, Any]:
    """Return the newest jobs of some kinds; with `failed`, of those that were given up."""
    states = runs.GIVEN_UP if failed else ()
    found = await runs.jobs(office.client, limit, flows=tuple(KINDS[kind] for kind in kinds), states=states)
    return {"jobs": [line(one) for one in found]}


async def show_job(
    office: Office, job: str, all_items: bool = False, kinds: tuple[str, ...] = tuple(KINDS)
) -> dict[str, Any]:
    """Return a job: its result so far, its run, and how far it is."""
    flow_run = await found(office, job, kinds)
    document = await result(office, flow_run)
    document = document if all_items else trimmed(document)
    look = await _look(office, flow_run, None)
    document["run"] = line(flow_run)
    document["progress"] = {name: part["percent"] for name, part in look.items()}
    return document


async def how_far(office: Office, flow_run: FlowRun) -> dict[str, dict[str, Any]]:
    """Return how far each part of a run is: what `follow_job` yields as `progress`, as far as its runner says."""
    return await _look(office, flow_run, None)


async def job_receipt(office: Office, job: str, kinds: tuple[str, ...] = tuple(KINDS)) -> dict[str, Any]:
    """Return a job's result so far, with every item."""
    return await result(office, await found(office, job, kinds))


async def found(office: Office, job: str, kinds: tuple[str, ...] = tuple(KINDS)) -> FlowRun:
    """Find a job by the id of its run, the beginning of it, or the id of its dispatch.

    Raises:
        NotFound, Misconfigured: there is none, or there are several, which the message lists; or it is of another kind.
    """
    try:
        flow_run = await runs.find(office.client, job, flows=tuple(KINDS[kind] for kind in kinds))
    except NotFound:
        flow_run = await runs.find(office.client, job, flows=tuple(KINDS.values()))
    if (kind := runs.kind_of(flow_run)) not in kinds:
        raise NotFound(f"{flow_run.id} is a {kind}, no {' or '.join(kinds)}")
    return flow_run


async def retry_job(office: Office, job: str, kinds: tuple[str, ...] = tuple(KINDS), only: str = "") -> dict[str, Any]:
    """Run an ended job again: only what is missing is fetched or sent, only a failed hook is run.

    Args:
        only: of a dispatch, the one target that is tried again.

    Raises:
        Misconfigured: it is not one of the job's targets, or its receipts are not there any more.
        NotFound: it is a source's, which has dispatched the same anew since.
    """
    flow_run = await found(office, job, kinds)
    run_id = str(flow_run.id)
    if only:
        only = split(only)[1]
        if (kind := runs.kind_of(flow_run)) != "dispatch":
            raise Misconfigured(f"{run_id} is a {kind}: only of a dispatch, one target alone can be tried again")
        targets = [split(name)[1] for name in asked_list(flow_run.parameters, "targets")]
        if only not in targets:
            raise Misconfigured(f"{only} is not one of the targets of {run_id}: {', '.join(targets)}")
    if flow_run.state and flow_run.state.is_final():
        if only and await rest.receipts(office.client, office.home, run_id) is None:
            raise Misconfigured(f"the receipts of {run_id} are not there any more: retry all of it")
        here = office.embedded and not hosts.where_it_waits(flow_run)  # else another machine has them
        for path in flow_run.parameters["paths"] if here and flow_run.parameters.get("each") == Each.UNIT else ():
            unitlist.check_there(Path(path))
        await asyncio.to_thread(_begin_anew, office, run_id, _reached(flow_run, only))
        if runs.kind_of(flow_run) == "retrieval":
            await asyncio.to_thread(mark_ended, office.home, run_id)
        if only or flow_run.labels.get(rest.ONLY):  # to whichever host runs it
            await office.client.update_flow_run_labels(flow_run.id, {rest.ONLY: only})
    return await _done(office, await runs.retry(office.client, flow_run.id), "retry", "queued")


def _reached(flow_run: FlowRun, only: str) -> list[str]:
    """Return the targets that a retry of a job asks something of."""
    asked = flow_run.parameters
    return [only] if only else [name for name in (asked.get("source"), *asked_list(asked, "targets")) if name]


def _begin_anew(office: Office, run_id: str, targets: list[str]) -> None:
    with Ledger(office.home.ledger) as ledger:
        rest.forget(ledger, run_id)
        breaker.look_now(ledger, targets)


async def send_job(office: Office, job: str, to: list[str]) -> dict[str, Any]:
    """Send the files of a dispatch to other targets, in a dispatch of its own.

    Raises:
        NotFound: all of what a source has dispatched has left it. Misconfigured: that source is another host's.
        SourceAway: the share of the files does not answer.
    """
    flow_run = await found(office, job)
    if (kind := runs.kind_of(flow_run)) != "dispatch":
        raise Misconfigured(f"{flow_run.id} is a {kind}: files of a dispatch alone can be sent, so retrieve again")
    asked = {key: value for key, value in flow_run.parameters.items() if key not in ("targets", "force")}
    check_asked(asked["paths"], to)
    origin = Origin(*(str(asked.get(name, "")) for name in ("sender_aet", "receiver_aet", "sender_host")))
    for target in await load(office.client, to, secrets=False):
        check_destination(target)  # before anything is kept for it
        check_origin(target, origin)
        check_hours(target, str(asked.get("priority", "")))
    host = hosts.where_it_waits(flow_run)
    if not host:  # else the files are another machine's
        await answer(asked["paths"])
    of_source = asked.get("each") == Each.UNIT and not all(map(is_list, asked["paths"]))
    if host:
        if of_source:
            raise Misconfigured(
                f"what it sent is in a source of the host {host}: `talaria jobs send {flow_run.id}` there"
            )
        if there := flow_run.labels.get(shared.KEPT):
            asked |= {"paths": [str(there)]} | ({"each": str(Each.UNIT)} if asked.get("each") else {})
    elif of_source:
        units = [str(row["study"]) for row in (await result(office, flow_run)).get("studies", ())]
        asked["paths"] = await lent_units(office.client, office.home, asked["paths"], units)
    elif (each := asked.get("each")) and (rows := (await result(office, flow_run)).get("studies")):
        names = [str(row["study"]) for row in rows]
        what = str(flow_run.id), asked["paths"], Each(each), asked.get("exclude", ""), names
        asked |= {"paths": await asyncio.to_thread(lent_studies, office.home, *what), "each": str(Each.UNIT)}
    else:
        asked["paths"] = await asyncio.to_thread(deadletters.lend, office.home, str(flow_run.id), asked["paths"])
    return await create_dispatch(office, targets=to, host=host, **asked)


async def cancel_job(office: Office, job: str, kinds: tuple[str, ...] = tuple(KINDS)) -> dict[str, Any]:
    """Stop a job: what was confirmed stays confirmed, a retry does the rest."""
    flow_run = await found(office, job, kinds)
    return await _done(office, flow_run, "cancel", await runs.cancel(office.client, flow_run.id))


async def pause_job(office: Office, job: str, kinds: tuple[str, ...] = tuple(KINDS)) -> dict[str, Any]:
    """Pause a job: a retrieval stops after the current series, to go on there; one that has not begun doesn't begin."""
    flow_run = await found(office, job, kinds)
    return await _done(office, flow_run, "pause", await runs.pause(office.client, flow_run.id))


async def resume_job(office: Office, job: str, kinds: tuple[str, ...] = tuple(KINDS)) -> dict[str, Any]:
    """Let a paused job go on."""
    flow_run = await runs.resume(office.client, (await found(office, job, kinds)).id)
    return await _done(office, flow_run, "resume", "queued")


async def recover_jobs(office: Office) -> dict[str, Any]:
    """Take up what a crash left unfinished."""
    return {"recovered": await recovery.recover(office.client, office.home, POOL, alone=False)}


async def _done(office: Office, flow_run: FlowRun, action: str, state: str) -> dict[str, Any]:
    await recorded.job(office, flow_run, action)
    return {"id": str(flow_run.id), "kind": runs.kind_of(flow_run), "action": state.lower()}


async def follow_job(
    office: Office,
    job: str,
    all_items: bool = False,
    kinds: tuple[str, ...] = tuple(KINDS),
    is_over: Callable[[FlowRun], bool] = runs.at_rest,
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Follow a job until it has ended, or waits for a time that is not soon.

    Args:
        is_over: asked at each look at the run.

    Yields:
        "state" with what a list shows of it, at once and whenever it changes; "progress" with how far each of its
        targets is; at the end "result".
    """
    flow_run = await found(office, job, kinds)
    loop = asyncio.get_running_loop()
    since = flow_run.state.timestamp if flow_run.state and not runs.under_way(flow_run) else None
    begun = looked = loop.time()
    state, shown, far = "", dict[str, Any](), 0.0
    while True:
        now = json.dumps(line(flow_run))
        if now != state:
            state = now
            yield "state", line(flow_run)
        phase, parts = await _look_live(office, flow_run, since)
        if not phase and runs.under_way(flow_run) and loop.time() - far >= FAR_S:
            parts, far = await _look_far(office, flow_run.id, since), loop.time()
        if parts and parts != shown:
            shown = parts
            yield "progress", {"targets": parts}
        if is_over(flow_run):
            break
        await asyncio.sleep(LOOK_S)
        if loop.time() - looked >= _pause(phase, loop.time() - begun):
            with suppress(PrefectException, OSError):  # the server is away for a moment
                flow_run = await office.client.read_flow_run(flow_run.id)
            looked = loop.time()
    document = await result(office, flow_run)
    yield "result", document if all_items else trimmed(document)


def _pause(phase: str, followed_s: float) -> float:
    """Return the seconds between two looks at the state of a run, which cost the server a call each."""
    if phase in BUSY:
        return BUSY_S  # its runner says when that is over
    return LOOK_S if phase or followed_s < QUICK_S else QUEUED_S


async def _look_live(
    office: Office, flow_run: FlowRun, since: datetime | None
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return a run's phase, and how far its parts are, as its runner on this machine reports; "" if it doesn't."""
    look = await asyncio.to_thread(progress.read, office.home, str(flow_run.id))
    if look and (since is None or look["time"] >= since.timestamp()):
        return look["phase"], look["parts"]
    return "", {}


async def _look(office: Office, flow_run: FlowRun, since: datetime | None) -> dict[str, dict[str, Any]]:
    _, parts = await _look_live(office, flow_run, since)
    return parts or await _look_far(office, flow_run.id, since)


async def _look_far(office: Office, run_id: UUID, since: datetime | None) -> dict[str, dict[str, Any]]:
    """Return how far a run of another machine is, as it reports to the server."""
    shown = await runs.shown_progress(office.client, run_id, since)
    return {
        name: {"percent": percent, "words": words.partition("\n")[0], "failures": words.split("\n")[1:]}
        for name, (percent, words) in shown.items()
    }
