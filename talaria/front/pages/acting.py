"""What the buttons of dispatches and retrievals do, one by one or many at once."""

from __future__ import annotations

from typing import Any

from talaria.front.pages.texts import text
from transfer.errors import Misconfigured

ACTIONS = ("retry", "resume", "pause", "cancel")


def actions(run: dict[str, Any]) -> list[str]:
    """Return what can be done with a run, the most likely first."""
    if run["ended"] is not None:
        return ["retry"]
    return ["resume", "cancel"] if str(run["state"]).lower() == "paused" else ["pause", "cancel"]


async def act(office: Any, job: str, action: str, kinds: tuple[str, ...]) -> None:
    """Retry, cancel, pause or resume a job.

    Raises:
        Misconfigured: its state does not allow that.
    """
    from talaria.service import jobs

    calls = {"retry": jobs.retry_job, "cancel": jobs.cancel_job, "pause": jobs.pause_job, "resume": jobs.resume_job}
    if action not in calls:
        raise Misconfigured(text("error"))
    await calls[action](office, job, kinds=kinds)


async def send_to(office: Any, job: str, name: str) -> str:
    """Send the files of a dispatch to another target; return the id of the new dispatch's run.

    Raises:
        NotFound, Misconfigured, ValueError: there is no such target, or it takes nothing.
    """
    from talaria.service import jobs

    if not name:
        raise Misconfigured(text("send.no_target"))
    return str((await jobs.send_job(office, job, [name]))["flow_run_id"])
