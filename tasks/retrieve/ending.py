"""Ends retrievals that were cancelled, or given up, while nobody was at work on them, or that can't go on.

Their results say then of what they did not come to that it was cancelled, or failed; and a retry does all that is left,
what was missing too, as after any other end.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext

from tasks.dispatch import audited, kept
from tasks.dispatch.ends import refusal, unsaid_is_no_failure
from tasks.dispatch.patience import patiently
from tasks.retrieve.dispatches import end_waiting
from tasks.retrieve.job import Job, Stage, folder_of
from tasks.retrieve.report import report
from tasks.targets import load
from transfer.accessions import accessions
from transfer.errors import DispatchError
from transfer.home import Home
from transfer.ledger import Ledger


async def refused(error: DispatchError) -> State[Any]:
    """Return the state of this context's run for an error that keeps it from beginning, or from going on.

    If it ends so, what an earlier part of it has left waits no more.
    """
    state, context, home = refusal(error), FlowRunContext.get(), Home.current()
    flow_run = context.flow_run if context else None
    if flow_run is not None and state.is_failed() and folder_of(home, str(flow_run.id)).is_dir():
        async with get_client() as client:
            await patiently(lambda: end_waiting(client, home, str(flow_run.id)))
            await patiently(lambda: end_at_rest(client, home, flow_run, str(error)))
    return state


async def end_at_rest(
    client: PrefectClient, home: Home, flow_run: FlowRun, why: str = "", *, dead: bool = False
) -> None:
    """Say of a retrieval which nobody executes, and which waited, that it has ended; nothing if that was said.

    What it has achieved is known to the host that ran it: only there, or of one that has never begun, it is said.

    Args:
        why: it was given up; "" if it was cancelled.
        dead: whether its process is known to have died, whatever the ledger says of it.
    """
    run_id, asked = str(flow_run.id), flow_run.parameters
    begun = folder_of(home, run_id).is_dir()
    if not begun and (flow_run.run_count or await kept.read(client, flow_run.id) is not None):
        return
    job = await asyncio.to_thread(_ended, home, run_id, numbers_of(asked), why, sure=dead or bool(why))
    if job is None:
        return
    state = "failed" if why else "cancelled"
    await report(client, home, job, run_id, str(asked.get("source", "")), state)
    with unsaid_is_no_failure(run_id), Ledger(home.ledger) as ledger:
        ledger.deliveries.stand(run_id, state, ())
    with suppress(DispatchError):  # the source may be gone
        (source,) = await load(client, [str(asked["source"])], secrets=False)
        brought = [one.study for one in job.studies.values() if one.stage is Stage.DELIVERED]
        who = audited.requester(flow_run)
        into = str(asked.get("into") or "")
        await asyncio.to_thread(audited.retrieval_ends, source, state, brought, into, run_id, who)


def mark_ended(home: Home, run_id: str) -> None:
    """Note that a retrieval has ended, if this host has run it and nobody executes it: what runs next is a retry."""
    if folder_of(home, run_id).is_dir():
        _ended(home, run_id, ())


def _ended(home: Home, run_id: str, numbers: tuple[str, ...], why: str = "", *, sure: bool = False) -> Job | None:
    """Note that a retrieval has ended; return what it has achieved, None if it had ended, or somebody executes it.

    Args:
        sure: whether nobody does, whatever the ledger says.
    """
    with Ledger(home.ledger) as ledger:
        if not sure and ledger.runs.owner_of(run_id) is not None:
            return None
        job = Job.load(home, run_id, numbers)
        if job.ended:
            return None
        job.ended, job.error = True, why or job.error
        if folder_of(home, run_id).is_dir():
            job.save()
        return job


def numbers_of(asked: dict[str, Any]) -> tuple[str, ...]:
    """Return the accession numbers among a run's parameters; none if they were refused."""
    with suppress(ValueError, DispatchError):
        return accessions(str(asked.get("accessions") or ""))
    return ()
