"""The check of a target, where dispatches run."""

from __future__ import annotations

import asyncio
from typing import Any

from prefect import flow, get_client
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from tasks.checking import check_target, report_health, shown_live
from tasks.dispatch import breaker, running
from tasks.dispatch.asked import name_run
from tasks.dispatch.ends import Paused
from tasks.dispatch.stoppable import in_thread
from tasks.targets import load
from transfer.errors import Cancelled as CheckCancelled
from transfer.errors import DispatchError
from transfer.home import Home


@flow(name="check", persist_result=False)
async def check(target: str, move: bool = False) -> State[Any]:
    """Check a target: from name resolution to what a push needs.

    Args:
        target: name of the target.
        move: also have a DICOM node that is queried move one instance to Talaria, which is removed at once: it shows
            whether the node knows where C-MOVE is to send to.
    """
    try:
        await name_run(f"check of {target.strip()}")
        async with get_client() as client:
            (found,) = await load(client, [target])
        with shown_live():
            health = await in_thread("check", check_target, found, move)
    except Paused as error:
        return running.paused(error.message)
    except CheckCancelled as error:
        return Cancelled(message=error.message)
    except DispatchError as error:
        return Failed(message=str(error))
    await report_health(found, health)
    if health.ok:
        await asyncio.to_thread(breaker.has_answered, Home.current(), found)
    bad = ", ".join(probe.name for probe in health.probes if probe.result == "failed" and not probe.informative)
    return Completed(message="healthy") if health.ok else Failed(message=f"failed: {bad}")
