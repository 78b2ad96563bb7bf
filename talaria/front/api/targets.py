"""Routes of targets. Secrets go in and never come out."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import StreamingResponse
from pydantic import Field

from talaria.front.access import Role, needs
from talaria.front.api import answers
from talaria.front.api.asking import Asked, RequestBody, Who, add, streamed

Values = Annotated[
    dict[str, Any],
    Field(description="By name: `type` and fields, as in targets.yaml; texts as they are, no variable is filled in."),
]


MOVE = "Also have DICOM nodes that are queried move one instance to Talaria, which is removed at once."


class Apply(RequestBody):
    """Targets to create or update."""

    targets: Values
    dry_run: bool = Field(default=False, description="Only say what would be done.")
    replace: bool = Field(default=False, description="Replace targets of another type that have the same name.")
    prune: bool = Field(default=False, description="Remove the targets that are not listed.")


class NewName(RequestBody):
    """A new name."""

    to: str = Field(description="Name from now on.")


class Enable(RequestBody):
    """Whether a target takes part."""

    enabled: bool = True


class Unsaved(RequestBody):
    """Targets that need not be saved."""

    targets: Values
    move: bool = Field(default=False, description=MOVE)


@needs(Role.VIEWER)
async def list_targets(asked: Asked) -> dict[str, Any]:
    """List all targets, secrets masked; one whose settings are no longer valid is listed as broken, with the reason."""
    from talaria.service import targets

    return await targets.list_targets(await asked())


@needs(Role.ADMIN)
async def apply_targets(asked: Asked, body: Apply) -> dict[str, Any]:
    """Create or update targets; all of them or, if one is wrong, none."""
    from talaria.service import targets

    return await targets.apply_targets(await asked(), body.targets, body.dry_run, body.replace, body.prune)


@needs(Role.VIEWER)
async def export_targets(asked: Asked) -> dict[str, Any]:
    """Return all targets as `apply` takes them, without secrets; and why others are left out."""
    from talaria.service import targets

    return await targets.export_targets(await asked())


@needs(Role.VIEWER)
async def target_types(who: Who) -> dict[str, Any]:
    """List the types of target: what each can do, and its fields."""
    from talaria.service import targets

    return await targets.target_types()


@needs(Role.VIEWER)
async def show_target(
    asked: Asked,
    name: str,
    given: Annotated[bool, Query(description="Only what is not a default.")] = False,
) -> dict[str, Any]:
    """Return one target's settings, secrets masked. `name`: its name, or its type and name as in dicom/pacs."""
    from talaria.service import targets

    return await targets.show_target(await asked(), name, given)


@needs(Role.ADMIN)
async def remove_target(asked: Asked, name: str) -> dict[str, Any]:
    """Remove a target; what was delivered stays in the ledger."""
    from talaria.service import targets

    return await targets.remove_target(await asked(), name)


@needs(Role.ADMIN)
async def rename_target(asked: Asked, name: str, body: NewName) -> dict[str, Any]:
    """Give a target another name."""
    from talaria.service import targets

    return await targets.rename_target(await asked(), name, body.to)


@needs(Role.ADMIN)
async def enable_target(asked: Asked, name: str, body: Enable) -> dict[str, Any]:
    """Let a target take part again, or take it out: dispatches to it are refused then, queued ones wait."""
    from talaria.service import targets

    return await targets.enable_target(await asked(), name, body.enabled)


@needs(Role.OPERATOR)
async def test_targets(
    asked: Asked,
    name: Annotated[str | None, Query(description="One target; else all enabled ones.")] = None,
    move: Annotated[bool, Query(description=MOVE)] = False,
) -> StreamingResponse:
    """Check saved targets where dispatches run. Server-sent events: `probe` as each is made, `result` per target."""
    from talaria.service import targets

    return await streamed(targets.test_targets(await asked(), name, move))


@needs(Role.ADMIN)
async def test_values(asked: Asked, body: Unsaved) -> StreamingResponse:
    """Check targets without saving them, on the server's machine. Events as of a test of saved ones."""
    from talaria.service import targets

    return await streamed(targets.test_values(await asked(), body.targets, body.move))


def add_to(app: FastAPI) -> None:
    """Add the routes; those with a fixed end stand before those that take any name, which may hold a slash."""
    add(app, "GET", "/targets", list_targets, answer=answers.TargetListAnswer)
    add(app, "POST", "/targets", apply_targets, answer=answers.AppliedAnswer)
    add(app, "GET", "/target-types", target_types, answer=answers.TargetTypesAnswer)
    add(app, "GET", "/target-export", export_targets, answer=answers.ExportedAnswer)
    add(app, "POST", "/target-tests", test_targets, response_class=StreamingResponse)
    add(app, "POST", "/target-tests/unsaved", test_values, response_class=StreamingResponse)
    add(app, "POST", "/targets/{name:path}/rename", rename_target, answer=answers.TargetChangeAnswer)
    add(app, "POST", "/targets/{name:path}/enable", enable_target, answer=answers.TargetChangeAnswer)
    add(app, "GET", "/targets/{name:path}", show_target, answer=answers.TargetSettingsAnswer)
    add(app, "DELETE", "/targets/{name:path}", remove_target, answer=answers.TargetChangeAnswer)
