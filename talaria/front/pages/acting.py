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
