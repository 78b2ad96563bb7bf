"""Routes that create dispatches, or show what one would send."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import Field

from talaria.front.access import Role, needs
from talaria.front.api import answers
from talaria.front.api.asking import Asked, Key, RequestBody, add


class Files(RequestBody):
    """What to send, and to which targets."""

    paths: list[str] = Field(min_length=1, description="Files and folders on the machine that sends: absolute paths.")
    targets: list[str] = Field(min_length=1, description="Names of targets, as `pacs` or `dicom/pacs`.")
    exclude: str = Field(default="", description="Comma-separated globs of names that are not sent.")
    sender_aet: str = Field(default="", description="AE title that the study came from, for targets that pass it on.")
    receiver_aet: str = Field(default="", description="AE title that the sender called, for targets that pass it on.")
    sender_host: str = Field(default="", description="Host that the study came from, for targets that send back.")
    each: Literal["", "folder", "path", "line"] = Field(
        default="",
        description="What is a study of its own: each folder directly below the paths, each path, or each line of the "
        'paths, which list studies; "" if all is one.',
    )


class NewDispatch(Files):
    """A dispatch to create."""

    priority: Literal["urgent", "normal", "offpeak"] = Field(
        default="normal", description="urgent ignores windows, offpeak waits for the off-peak hours."
    )
    force: bool = Field(default=False, description="Send again what has arrived before.")
    copy_first: bool = Field(
        default=False, description="Copy the files before they are sent, so that they may be changed meanwhile."
    )
    planned: bool = Field(
        default=False,
        description="Answer when a worker has read the files, or after some seconds, with what will be sent.",
    )


@needs(Role.OPERATOR)
async def create_dispatch(asked: Asked, body: NewDispatch, idempotency_key: Key = "") -> dict[str, Any]:
    """Send files and folders to targets. It is in the queue when this answers.

    The answer has the keys of a receipt, all waiting; `flow_run_id` is the id by which it is asked for. `dispatch_id`
    is "" until a worker has read the files: it is derived from them.
    """
    from talaria.service import dispatches

    return await dispatches.create_dispatch(await asked(), **body.model_dump(), key=idempotency_key)


@needs(Role.OPERATOR)
async def plan_dispatch(asked: Asked, body: Files) -> dict[str, Any]:
    """Return what a dispatch would send, and what not: the files are read, nothing is sent."""
    from talaria.service import dispatches

    return await dispatches.plan_dispatch(await asked(), **body.model_dump())


def add_to(app: FastAPI) -> None:
    """Add the routes."""
    add(app, "POST", "/dispatches", create_dispatch, answer=answers.CreatedDispatchAnswer)
    add(app, "POST", "/dispatches/plan", plan_dispatch, answer=answers.DispatchPlanAnswer)
