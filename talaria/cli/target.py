"""`talaria target`: creates, shows, tests and removes targets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from talaria.cli.access import api
from talaria.cli.kinds import add_apply, print_applied, print_done, shown, types_of
from talaria.cli.output import DONE, NOT_ALL, Json, checked, enabled, given_value, print_json, table
from talaria.console import say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # Rich takes 0.2 s to print a help
    help="Create, show, test and remove targets.\n\nExample: talaria target apply targets.yaml",
)
Name = Annotated[str, typer.Argument(help="Name of the target, or its type and name as in dicom/pacs.")]


@app.command(epilog="Example: talaria target types --json")
def types(as_json: Json = False) -> None:
    """List the types of target: what each can do, and its fields."""
    document = types_of("target", "targets")
    found, refused = document["types"], document["refused"]
    if as_json:
        print_json(document)
        return
    rows = []
    for name, one in found.items():
        can = [word for word in ("push", "query", "pull", "hook") if one.get(word)]
        rows.append(
            [
                name,
                ", ".join(can) or "not yet",
                ", ".join(one.get("verifies", ())),
                ", ".join(f + ("*" if one["fields"][f]["required"] else "") for f in one["fields"]),
            ]
        )
    table("Types (fields with * are required)", ["type", "can", "verifies", "fields"], rows)
    for name, one in found.items():
        if "problem" in one:
            say(f"talaria: type {name}: {one['problem']}")
    for name, reason in refused.items():
        say(f"talaria: type {name} can't be used: {reason}")


add_apply(app, "targets", "targets", "talaria target apply targets.yaml --dry-run")


@app.command("import-mercure", epilog="Example: talaria target import-mercure mercure.json --dry-run")
def import_mercure(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Configuration of mercure's (mercure.json).")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace those of another type that have the same name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Create or update the targets of a mercure configuration; says what does not come along."""
    from talaria import mercure

    found, notes = mercure.targets(mercure.read(file))
    for note in notes:
        say(note)
    with api() as access:
        done = access.call("apply_targets", targets=found, dry_run=dry_run, replace=replace, prune=False)
    print_applied(done, "targets", as_json)


@app.command("list", epilog="Example: talaria target list --json")
def list_(as_json: Json = False) -> None:
    """List all targets; one whose settings are no longer valid is listed as broken, with the reason."""
    with api() as access:
        document = access.call("list_targets")
    if as_json:
        print_json(document)
        return
    rows = [
        [
            one["name"],
            one["type"],
            one["direction"] or "",
            enabled(one),
            _place(one),
            one["broken"] or one.get("description", ""),
            checked(one),
        ]
        for one in document["targets"]
    ]
    table("", ["name", "type", "direction", "enabled", "where", "description", "last check"], rows)


@app.command(epilog="Example: talaria target show pacs")
def show(name: Name, as_json: Json = False) -> None:
    """Show one target's settings; secrets are never shown."""
    with api() as access:
        values = access.call("show_target", name=name, given=not as_json)
    if as_json:
        print_json(values)
        return
    for field, value in values.items():
        print(f"{field}: {shown(value)}")


@app.command(epilog="Example: talaria target remove old-pacs")
def remove(name: Name, as_json: Json = False) -> None:
    """Remove a target; what was delivered stays in the ledger."""
    with api() as access:
        print_done(access.call("remove_target", name=name), as_json)


@app.command(epilog="Example: talaria target rename pacs archive-pacs")
def rename(
    old: Annotated[str, typer.Argument(help="Its name now.")],
    new: Annotated[str, typer.Argument(help="Its name from now on.")],
    as_json: Json = False,
) -> None:
    """Give a target another name."""
    with api() as access:
        print_done(access.call("rename_target", name=old, to=new), as_json)


@app.command(epilog="Example: talaria target enable pacs")
def enable(name: Name, as_json: Json = False) -> None:
    """Let a target take part again."""
    with api() as access:
        print_done(access.call("enable_target", name=name, enabled=True), as_json)


@app.command(epilog="Example: talaria target disable pacs")
def disable(name: Name, as_json: Json = False) -> None:
    """Take a target out: dispatches to it are refused, queued ones wait."""
    with api() as access:
        print_done(access.call("enable_target", name=name, enabled=False), as_json)


@app.command(epilog="Example: talaria target export > targets.yaml")
def export(as_json: Json = False) -> None:
    """Print all targets as `apply` reads them, without secrets."""
    with api() as access:
        document = access.call("export_targets")
    for name, reason in document.pop("left_out").items():
        say(f"talaria: {name} is left out: {reason}")
    if as_json:
        print_json(document)
    else:
        import yaml

        print(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), end="")


@app.command(epilog="Example: talaria target test pacs --json")
def test(
    name: Annotated[str | None, typer.Argument(help="Name of the target.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Test every enabled target.")] = False,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Test the targets of a file, saved or not.")
    ] = None,
    move: Annotated[
        bool,
        typer.Option(
            "--move", help="Also have a DICOM node move one instance here: does it know where C-MOVE sends to?"
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check targets step by step, where dispatches run; a probe is written where it can be removed again."""
    if name is not None:
        given_value("the target's name", name)
    if (name is not None) + all_ + (file is not None) != 1 and not (name and file):
        raise ValueError("say which: a NAME, --all, or --file FILE.yaml")
    values = _of_file(file, name) if file else {}
    found = []
    with api(saved=file is None) as access:
        given: dict[str, Any] = {"targets": values} if file else {"name": name}
        if move:  # else older servers would be asked what they don't know
            given["move"] = True
        events = access.stream("test_values" if file else "test_targets", **given)
        for kind, event in events:
            if kind == "result":
                found.append(event)
                if not as_json:
                    print(f"{event['name']}: {'ok' if event['ok'] else 'not ok'}")
            elif not as_json:
                probe = event["probe"]
                line = f"{event['name']}: {probe['name']}: {probe['result']}, {probe['ms']:.0f} ms"
                print(f"{line}: {probe['detail']}" if probe["detail"] else line, flush=True)
                if probe["remedy"]:
                    print(f"{event['name']}: {probe['name']}: {probe['remedy']}", flush=True)
    if as_json:
        print_json(found[0] if name and found else {"targets": found})
    if not found:
        say("there are no targets to test")
    raise typer.Exit(DONE if all(one["ok"] for one in found) else NOT_ALL)


def _of_file(file: Path, name: str | None) -> dict[str, Any]:
    from talaria.configfile import read_filled
    from transfer.errors import NotFound

    values = read_filled(file)
    if name is not None and name not in values:
        raise NotFound(f"{file} has no target named {name}; it has {', '.join(values)}")
    return {key: one for key, one in values.items() if name in (None, key)}


def _place(values: dict[str, Any]) -> str:
    """Return where a target is, in a few words."""
    parts = [str(values[key]) for key in ("host", "port", "url", "endpoint_url", "bucket", "folder") if values.get(key)]
    return " ".join(parts)
