"""Routes of jobs: the same for dispatches, retrievals and queries, and for `jobs`, which are the first two together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import StreamingResponse
from pydantic import Field

from talaria.front.access import Role, needs
from talaria.front.api import answers
from talaria.front.api.asking import Asked, RequestBody, add, streamed

COLLECTIONS = {
    "jobs": ("dispatch", "retrieval"),
    "dispatches": ("dispatch",),
    "retrievals": ("retrieval",),
    "queries": ("query",),
}
LONGEST_S = 36_500 * 86_400  # as `keep_days`
All = Annotated[bool, Query(description="List delivered items too.")]
GivenUp = Annotated[bool, Query(description="List only those that were given up.")]
Only = Annotated[str, Query(description="Of a dispatch, the one target that is tried again.")]
Limit = Annotated[int, Query(ge=1, le=200, description="How many, newest first.")]


def add_to(app: FastAPI) -> None:
    """Add the routes. `{job}`: the id of the run or its beginning, or of the dispatch."""
    for collection, kinds in COLLECTIONS.items():
        _add(app, collection, kinds)
    for collection, one in {"jobs": "job", "dispatches": "dispatch"}.items():
        add(
            app,
            "POST",
            f"/{collection}/{{job}}/send",
            send_job,
            name=f"send_{one}",
            answer=answers.CreatedDispatchAnswer,
        )
    add(app, "POST", "/recover", recover_jobs, answer=answers.RecoveredAnswer)
    add(app, "POST", "/prune", prune, answer=answers.ForgottenAnswer)


class Destinations(RequestBody):
    """Where to send what a dispatch sent."""

    to: list[str] = Field(min_length=1, description="Names of targets.")


class Age(RequestBody):
    """What is old."""

    older_than_s: float = Field(ge=0, le=LONGEST_S, description="Seconds.")


@needs(Role.OPERATOR)
async def send_job(asked: Asked, job: str, body: Destinations) -> dict[str, Any]:
    """Send the files of a dispatch to other targets, in a dispatch of its own; answers as if it had been created."""
    from talaria.service import jobs

    return await jobs.send_job(await asked(), job, body.to)


@needs(Role.OPERATOR)
async def recover_jobs(asked: Asked) -> dict[str, Any]:
    """Take up what a crash left unfinished."""
    from talaria.service import jobs

    return await jobs.recover_jobs(await asked())


@needs(Role.ADMIN)
async def prune(asked: Asked, body: Age) -> dict[str, Any]:
    """Forget at once what is older; what a job needs that has not ended stays."""
    from talaria.service import pruning

    return await pruning.prune(await asked(), body.older_than_s)


def _add(app: FastAPI, collection: str, kinds: tuple[str, ...]) -> None:
    one = "job" if collection == "jobs" else kinds[0]

    @needs(Role.VIEWER)
    async def list_jobs(asked: Asked, limit: Limit = 50, failed: GivenUp = False) -> dict[str, Any]:
        """List the newest, with their states."""
        from talaria.service import jobs

        return await jobs.list_jobs(await asked(), limit, kinds, failed)

    @needs(Role.VIEWER)
    async def show_job(asked: Asked, job: str, all_items: All = False) -> dict[str, Any]:
        """Return its result so far, its run, and how far it is."""
        from talaria.service import jobs

        return await jobs.show_job(await asked(), job, all_items, kinds)

    @needs(Role.VIEWER)
    async def job_receipt(asked: Asked, job: str) -> dict[str, Any]:
        """Return its result so far, with every item."""
        from talaria.service import jobs

        return await jobs.job_receipt(await asked(), job, kinds)

    @needs(Role.VIEWER)
    async def follow_job(asked: Asked, job: str, all_items: All = False) -> StreamingResponse:
        """Send server-sent events until it has ended or waits for long: `state`, `progress`, at the end `result`.

        `progress` has, for each target, `items` and `done`, `bytes` and `moved`, `percent`, `rate` (bytes a second) and
        `seconds_left` (null: not known).
        """
        from talaria.service import jobs

        return await streamed(jobs.follow_job(await asked(), job, all_items, kinds))

    @needs(Role.OPERATOR)
    async def retry_job(asked: Asked, job: str, only: Only = "") -> dict[str, Any]:
        """Run an ended one again: only what is missing is fetched or sent."""
        from talaria.service import jobs

        return await jobs.retry_job(await asked(), job, kinds, only)

    @needs(Role.OPERATOR)
    async def cancel_job(asked: Asked, job: str) -> dict[str, Any]:
        """Stop it: what was confirmed stays confirmed, a retry does the rest."""
        from talaria.service import jobs

        return await jobs.cancel_job(await asked(), job, kinds)

    @needs(Role.OPERATOR)
    async def pause_job(asked: Asked, job: str) -> dict[str, Any]:
        """Pause it: a retrieval stops after the current series; one that has not begun does not begin."""
        from talaria.service import jobs

        return await jobs.pause_job(await asked(), job, kinds)

    @needs(Role.OPERATOR)
    async def resume_job(asked: Asked, job: str) -> dict[str, Any]:
        """Let it go on after a pause."""
        from talaria.service import jobs

        return await jobs.resume_job(await asked(), job, kinds)

    def route(method: str, path: str, endpoint: Callable[..., Any], name: str, **more: Any) -> None:
        add(app, method, f"/{collection}{path}", endpoint, name=name, **more)

    route("GET", "", list_jobs, f"list_{collection}", answer=answers.JobListAnswer)
    route("GET", "/{job}", show_job, f"show_{one}", answer=answers.SHOWN[one])
    route("GET", "/{job}/receipt", job_receipt, f"{one}_receipt", answer=answers.RESULTS[one])
    route("GET", "/{job}/events", follow_job, f"follow_{one}", response_class=StreamingResponse)
    for action, endpoint in {
        "retry": retry_job,
        "cancel": cancel_job,
        "pause": pause_job,
        "resume": resume_job,
    }.items():
        route("POST", f"/{{job}}/{action}", endpoint, f"{action}_{one}", answer=answers.JobChangeAnswer)
