"""`talaria source`: creates, shows, tests, pauses and removes sources."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from talaria.cli.access import api, say_queued
from talaria.cli.kinds import add_apply, print_done, print_types, shown, types_of
from talaria.cli.output import DONE, NOT_ALL, Json, given_value, print_json, table
from talaria.console import say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # Rich takes 0.2 s to print a help
    help="Create, show, test, pause and remove sources: inboxes, lists and DICOM listeners.\n\n"
    "Example: talaria source apply targets.yaml",
)
Name = Annotated[str, typer.Argument(help="Name of the source.")]


@app.command(epilog="Example: talaria source types --json")
def types(as_json: Json = False) -> None:
    """List the types of source, and their fields."""
    document = types_of("source", "sources")
    if as_json:
        print_json(document)
        return
    print_types(document["types"])


add_apply(app, "sources", "sources", "talaria source apply targets.yaml --dry-run")


@app.command("list", epilog="Example: talaria source list --json")
def list_(as_json: Json = False) -> None:
    """List all sources, with what became of their units."""
    with api() as access:
        document = access.call("list_sources")
    if as_json:
        print_json(document)
        return
    rows = [
        [
            one["name"],
            one["type"],
            "broken" if one["broken"] else "yes" if one["enabled"] else "paused",
            str(one.get("folder") or one.get("file") or one.get("port") or ""),
            ", ".join(dict.fromkeys([*one.get("targets", ()), *_routed(one)])),
            _counts(one),
            one["broken"] or one["problem"] or one["last_sweep"] or "never",
        ]
        for one in document["sources"]
    ]
    table("", ["name", "type", "enabled", "where", "targets", "units", "last sweep"], rows)


@app.command(epilog="Example: talaria source show inbox")
def show(name: Name, as_json: Json = False) -> None:
    """Show one source: settings, schedule, last sweep, and the units that need a person."""
    with api() as access:
        document = access.call("show_source", name=name, given=not as_json)
    if as_json:
        print_json(document)
        return
    print(f"name: {document['name']}")
    for field, value in document["settings"].items():
        print(f"{field}: {shown(value)}")
    if document.get("belongs_to"):
        print(f"belongs to the host: {document['belongs_to']}")
    print(f"schedule: {'; '.join(document['schedule']) or 'none'}")
    print(f"last sweep: {document['last_sweep'] or 'never'}")
    print(f"units: {_counts(document)}")
    if document["problem"]:
        say(f"talaria: {document['problem']}")
    for one in document["attention"]:
        print(f"{one['unit']}: {one['state']}: {one['detail']}")


@app.command(epilog="Example: talaria source test inbox")
def test(name: Name, as_json: Json = False) -> None:
    """Look whether a source can be used, and what its next sweep would find; nothing is sent or moved."""
    with api() as access:
        document = access.call("test_source", name=name)
    if as_json:
        print_json(document)
    else:
        for one in (*document["problems"], *(f"held: {one}" for one in document.get("held", ()))):
            print(f"{name}: {one}")
        found = ", ".join(f"{count} {what}" for what, count in document["units"].items())
        print(f"{name}: {'ok' if document['ok'] else 'not ok'}: {found}")
    raise typer.Exit(DONE if document["ok"] else NOT_ALL)


@app.command(epilog="Example: talaria source pause inbox")
def pause(name: Name, as_json: Json = False) -> None:
    """Pause a source: nothing of it is dispatched, moved or deleted; what is under way goes on."""
    with api() as access:
        print_done(access.call("enable_source", name=name, enabled=False), as_json)


@app.command(epilog="Example: talaria source resume inbox")
def resume(name: Name, as_json: Json = False) -> None:
    """Let a paused source take part again."""
    with api() as access:
        print_done(access.call("enable_source", name=name, enabled=True), as_json)


@app.command(epilog="Example: talaria source sweep inbox")
def sweep(name: Name, as_json: Json = False) -> None:
    """Look through a source now, whatever its schedule."""
    with api() as access:
        done = access.call("sweep_source", name=name)
        say_queued(access)
        print_done(done, as_json)


@app.command(epilog="Example: talaria source retry inbox")
def retry(
    name: Name,
    unit: Annotated[str | None, typer.Argument(help="One unit; all that failed or are held by default.")] = None,
    as_json: Json = False,
) -> None:
    """Have units that failed, or are held, dispatched again; also what stays of one that was delivered, if it is named.

    Of a DICOM source, all that stays.
    """
    one = "" if unit is None else given_value("the unit's name", unit)
    with api() as access:
        done = access.call("retry_source", name=name, unit=one)
        say_queued(access)
        print_done(done, as_json)


@app.command(epilog="Example: talaria source remove inbox")
def remove(name: Name, as_json: Json = False) -> None:
    """Remove a source; no file is touched, and what is under way goes on."""
    with api() as access:
        print_done(access.call("remove_source", name=name), as_json)


def _counts(one: dict[str, Any]) -> str:
    found = [f"{count} {state}" for state, count in one["units"].items() if count]
    found += [f"{one['waiting']} not settled"] if one["waiting"] else []
    return ", ".join(found) or "none"


def _routed(one: dict[str, Any]) -> list[str]:
    """Return the targets that routes of a source name."""
    return [target for route in one.get("routes", ()) for target in route["targets"]]
