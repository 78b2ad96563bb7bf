"""What the buttons of dispatches and retrievals do, one by one or many at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Any, ClassVar
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.site import Site, shown
from talaria.front.pages.texts import text
from transfer.errors import Misconfigured

DELIVERED = "delivered"  # as a whole: nothing is missing
ACTIONS = ("retry", "resume", "pause", "cancel")


class JobPage(ABC):
    """The page of one dispatch or retrieval: shown by `one`, and what its buttons do.

    Attributes:
        where: its address without the id.
        kinds: of jobs that it shows.
    """

    where: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        one = f"{self.where}/{{id}}"
        return [
            Route(one, self.one, methods=["GET"]),
            *self.more(one),
            Route(f"{one}/{{action}}", self.act, methods=["POST"]),
        ]

    @abstractmethod
    def more(self, one: str) -> list[BaseRoute]:
        """Return the routes that only this kind of job has, below its address."""

    @abstractmethod
    def one(self, request: Request) -> Awaitable[Response]:
        """Show the job; each kind for the role that may see it."""

    @abstractmethod
    async def _shown(self, request: Request, problem: str = "", status: int = 200) -> Response:
        """Return the page, with what was wrong about the last press of a button."""

    @needs(Role.OPERATOR)
    @shown
    async def act(self, request: Request) -> Response:
        """Retry, cancel, pause or resume the job."""
        job = request.path_params["id"]
        try:
            await act(await self.site.office(request), job, request.path_params["action"], self.kinds)
        except Misconfigured as exc:  # it has ended meanwhile, perhaps
            return await self._shown(request, exc.message, 409)
        return RedirectResponse(f"{self.where}/{quote(job)}", 303)


class NothingMissing(Misconfigured):
    """A retry would do nothing."""


def actions(standing: str, *, ended: bool) -> list[str]:
    """Return what can be done with a job that stands so, the most likely first."""
    if ended:
        return [] if standing == DELIVERED else ["retry"]
    return ["resume", "cancel"] if standing == "paused" else ["pause", "cancel"]


async def act(office: Any, job: str, action: str, kinds: tuple[str, ...]) -> None:
    """Retry, cancel, pause or resume a job.

    Raises:
        NothingMissing: it is to be retried, and everything has arrived.
        Misconfigured: its state does not allow that.
    """
    from prefect.client.schemas.objects import StateType

    from talaria.service import jobs, results, standings

    calls = {"retry": jobs.retry_job, "cancel": jobs.cancel_job, "pause": jobs.pause_job, "resume": jobs.resume_job}
    if action not in calls:
        raise Misconfigured(text("error"))
    if action == "retry" and (run := await jobs.found(office, job, kinds)).state_type is StateType.COMPLETED:
        whole, _ = standings.by_receipt(run, await results.result(office, run))
        if whole == DELIVERED:  # somebody may have set the state of a run that has not ended by itself
            raise NothingMissing(text("dispatch.nothing_missing"))
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
