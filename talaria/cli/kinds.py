"""What the commands of targets, sources and rules have in common."""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from talaria.cli import remote
from talaria.cli.access import api
from talaria.cli.output import Json, print_json, table
from talaria.console import say


def add_apply(app: typer.Typer, kind: str, section: str, example: str) -> None:
    """Add the command `apply`, which creates or updates what a file lists.

    Args:
        kind: `targets`, `sources` or `rules`, as the API calls them.
        section: the key of the file that they stand under.
        example: for its help.
    """
    words = f"Create or update the {kind} listed in a file under `{section}`; all of them or, if one is wrong, none."

    @app.command("apply", help=words, epilog=f"Example: {example}")
    def apply(
        file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="YAML file.")],
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
        replace: Annotated[
            bool, typer.Option("--replace", help="Replace those of another type that have the same name.")
        ] = False,
        prune: Annotated[bool, typer.Option("--prune", help="Remove those that the file doesn't list.")] = False,
        as_json: Json = False,
    ) -> None:
        from talaria.configfile import read_filled

        values = read_filled(file, section)
        options: dict[str, Any] = {"dry_run": dry_run, "replace": replace, "prune": prune}
        with api() as access:
            done = access.call(f"apply_{kind}", **{kind: values}, **options)
        print_applied(done, kind, as_json)


def print_applied(done: dict[str, Any], kind: str, as_json: bool) -> None:
    """Print what was done, or would be, with each of those that a file lists."""
    if as_json:
        print_json(done)
        return
    for one in done[kind]:
        would = "would be " if done["dry_run"] and one["action"] != "unchanged" else ""
        print(f"{one['name']}: {would}{one['action']}")
        if note := one.get("note"):
            say(f"{one['name']}: {note}")


def print_done(done: dict[str, Any], as_json: bool) -> None:
    """Print what was done with one of them."""
    if as_json:
        print_json(done)
    else:
        print(f"{done['name']}: {done['action']}")


def types_of(kind: str, module: str) -> dict[str, Any]:
    """Return what the server that runs says of the types of a kind; where none runs, what this process knows.

    Args:
        kind: `target`, `source` or `rule`.
        module: of `talaria.service`, which has the operation.
    """
    there = remote.found()
    if there is not None:
        with suppress(remote.NoApi), there:
            known: dict[str, Any] = there.call(f"{kind}_types")
            return known
    import asyncio

    operation = getattr(importlib.import_module(f"talaria.service.{module}"), f"{kind}_types")
    here: dict[str, Any] = asyncio.run(operation())
    return here


def print_types(types: dict[str, Any]) -> None:
    """Print a table of types with the names of their fields."""
    rows = [
        [name, ", ".join(field + ("*" if facts["required"] else "") for field, facts in one["fields"].items())]
        for name, one in types.items()
    ]
    table("Types (fields with * are required)", ["type", "fields"], rows)


def shown(value: Any) -> str:
    """Return a setting as it is written in a file; of peers and routes only what they say."""
    if isinstance(value, dict):
        return ", ".join(f"{field} {shown(one)}" for field, one in value.items() if one)
    if isinstance(value, list):
        return ("; " if any(isinstance(one, dict) for one in value) else ", ").join(map(shown, value))
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
