"""The dispatch: files from a folder to one or more targets."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.dispatch.asked import Naming, check_asked, unplanned
from tasks.dispatch.ends import refusal
from tasks.dispatch.run import dispatching
from transfer.errors import DispatchError
from transfer.plan import Origin


@flow(name="dispatch", persist_result=False)
async def dispatch(
    paths: list[str],
    targets: list[str],
    exclude: str = "",
    priority: Literal["urgent", "normal", "offpeak"] = "normal",
    sender_aet: str = "",
    receiver_aet: str = "",
    sender_host: str = "",
    force: bool = False,
    copy_first: bool = False,
    each: Literal["", "folder", "path", "line", "unit"] = "",
) -> State[Any]:
    """Deliver the files below `paths` to every target, all targets at once.

    Run again (Retry in the UI, or a second dispatch of the same files), it sends only what is missing.

    Args:
        paths: files and folders on the worker's machine.
        targets: names of targets, as pacs or dicom-target/pacs.
        exclude: comma-separated globs of names of files and folders that are not sent to any target.
        priority: urgent ignores the windows of targets, offpeak waits for the off-peak hours.
        sender_aet: AE title of whom the study came from, for targets that pass it on.
        receiver_aet: AE title that the sender called, for targets that pass it on.
        sender_host: host of whom the study came from, for targets that send back.
        force: send again what the ledger says has arrived.
        copy_first: copy the files before they are sent, so that they may be changed meanwhile.
        each: what is a study of its own: each folder directly below the paths, each path, each line of the
            paths, which list studies, or each unit of a source, for sweeps; empty if all is one.
    """
    try:
        async with Naming(unplanned(targets)) as naming:
            check_asked(paths, targets)
            origin = Origin(sender_aet, receiver_aet, sender_host)
            async with dispatching(targets, priority, naming, origin) as running:
                if not await running.goes_on(paths, exclude, each):
                    return await running.conclude()
                plan = await running.stage(paths, exclude, origin, copy_first, each)
                receipts = await running.deliver(plan, force)
                return await running.conclude(plan.dispatch_id, receipts)
    except DispatchError as error:
        return refusal(error)
