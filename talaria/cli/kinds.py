"""What the commands of targets, sources and rules have in common."""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from talaria.cli import remote
from talaria.cli.access import api
from talaria.cli.output import print_json, table


def apply_file(
    file: Path, kind: str, section: str, *, dry_run: bool, replace: bool, prune: bool, as_json: bool
) -> None:
    """Create or update what a file lists, and print what was done with each.

    Args:
        kind: `targets`, `sources` or `rules`, as the API calls them.
        section: the key of the file that they stand under.
    """
    from talaria.configfile import read_filled

    values = read_filled(file, section)
    options: dict[str, Any] = {"dry_run": dry_run, "replace": replace, "prune": prune}
    with api() as access:
        done = access.call(f"apply_{kind}", **{kind: values}, **options)
    if as_json:
        print_json(done)
        return
    for one in done[kind]:
        print(f"{one['name']}: {'would be ' if dry_run and one['action'] != 'unchanged' else ''}{one['action']}")


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
