"""`talaria send`: a dispatch from the command line."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from talaria.cli.access import Access, api, say_queued
from talaria.cli.follow import follow
from talaria.cli.output import Json, code_of, given_path, print_json, table
from transfer.errors import NotFound


class Priority(StrEnum):
    """How urgent a dispatch is."""

    URGENT = "urgent"
    NORMAL = "normal"
    OFFPEAK = "offpeak"


class EachOption(StrEnum):
    """What is a study of its own, as `transfer.studies` has it; spelled out, so that nothing is loaded for it."""

    FOLDER = "folder"
    PATH = "path"
    LINE = "line"


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: talaria send /data/study --to pacs,archive --exclude '*.png,*.json'")(send)


def send(
    path: Annotated[list[str], typer.Argument(help="Files and folders to send.", metavar="PATH")],
    to: Annotated[
        list[str], typer.Option("--to", help="Names of targets, separated by commas.", metavar="NAME[,NAME...]")
    ],
    exclude: Annotated[
        str, typer.Option(help="Comma-separated globs of names that are not sent.", metavar="GLOBS")
    ] = "",
    priority: Annotated[
        Priority, typer.Option(help="urgent ignores windows, offpeak waits for the off-peak hours.")
    ] = Priority.NORMAL,
    sender_aet: Annotated[
        str, typer.Option(help="AE title that the study came from, for targets that pass it on.")
    ] = "",
    receiver_aet: Annotated[
        str, typer.Option(help="AE title that the sender called, for targets that pass it on.")
    ] = "",
    sender_host: Annotated[str, typer.Option(help="Host that the study came from, for targets that send back.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Send again what has arrived before.")] = False,
    copy_first: Annotated[
        bool, typer.Option("--copy-first", help="Copy the files first, so that they may be changed meanwhile.")
    ] = False,
    each: Annotated[
        EachOption | None,
        typer.Option(
            help="Many studies in one run: each folder directly below PATH, each PATH, or each line of PATH, a list."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be sent.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as the dispatch is queued.")] = False,
    all_items: Annotated[
        bool, typer.Option("--all-items", help="List every item in the JSON, delivered ones too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send files and folders to one or more targets, and wait for the receipts."""
    names = list(dict.fromkeys(name.strip() for part in to for name in part.split(",") if name.strip()))
    if not names:
        raise ValueError("--to names no target")
    paths = [given_path(one) for one in path]
    what: dict[str, Any] = {
        "paths": [str(path.absolute()) for path in paths],
        "targets": names,
        "exclude": exclude,
        "sender_aet": sender_aet,
        "receiver_aet": receiver_aet,
        "sender_host": sender_host,
        "each": str(each or ""),
    }
    if not os.environ.get("TALARIA_URL"):  # else they are on another machine
        _check_there(paths, each is EachOption.PATH)
    with api() as access:
        if dry_run:
            _show_plan(access.call("plan_dispatch", **what), as_json)
            return
        # The worker reads the files, once; whoever wants to know at once what will be sent waits for that.
        queued = access.call(
            "create_dispatch",
            **what,
            priority=str(priority),
            force=force,
            copy_first=copy_first,
            planned=no_wait and as_json,
        )
        if no_wait:
            say_queued(access)
            if as_json:
                print_json({key: value for key, value in queued.items() if key != "run"})
            else:
                print(f"dispatch queued as run {queued['flow_run_id']}")
            return
        finish(access, queued["flow_run_id"], all_items=all_items, as_json=as_json)


def _check_there(paths: list[Path], one_is_enough: bool) -> None:
    """Raise if a path is not there, before anything is queued.

    Args:
        one_is_enough: where each is a study of its own, and one that is not there fails alone.
    """
    missing = [problem for path in paths if (problem := _problem(path))]
    if missing and not (one_is_enough and len(missing) < len(paths)):
        raise NotFound(missing[0])


def _problem(path: Path) -> str:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return f"{path}: no such file or folder"
    except OSError as exc:
        return f"{path}: {exc.strerror}"
    return ""


def finish(access: Access, run_id: str, *, all_items: bool, as_json: bool) -> None:
    """Follow a dispatch to its end, show its receipts, and exit with the code for them."""
    document = follow(access, run_id, all_items=all_items)
    if as_json:
        print_json(document)
    else:
        show_receipt(document)
    raise typer.Exit(code_of(document))


def show_receipt(document: dict[str, Any]) -> None:
    """Print receipts for people."""
    from transfer.receipt import trimmed  # takes a moment

    columns = [
        "delivered",
        "warnings",
        "already",
        "rejected",
        "skipped",
        "unsent",
        "bytes",
        "seconds",
        "verified",
        "hook",
    ]
    rows = [[name, one["state"], *(one[column] for column in columns)] for name, one in document["targets"].items()]
    table(f"Dispatch {document['dispatch_id']}: {document['state']}", ["target", "state", *columns], rows)
    if document.get("error"):
        print(document["error"])
    if studies := document.get("studies"):
        print(f"{sum(one['state'] == 'delivered' for one in studies)} of {len(studies)} studies delivered")
    for name, one in trimmed(document)["targets"].items():
        for line in ([one["error"]] if one["error"] else []) + one["notes"]:
            print(f"{name}: {line}")
        shown = [item for item in one["items"] if item["outcome"] != "already"]
        for item in shown[:50]:
            print(f"{name}: {item['path']}: {item['outcome']}: {item['detail']}")
        if len(shown) > 50:
            print(f"{name}: … and {len(shown) - 50} more: talaria jobs show {document['flow_run_id']} --json")


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    print(f"dispatch {plan['dispatch_id']} would send:")
    for study in plan.get("studies") or ():
        what = study["error"] or f"{study['files']} files, {study['bytes']} bytes, dispatch {study['dispatch_id']}"
        print(f"{study['study']}: {what}")
    for name, one in plan["targets"].items():
        print(f"{name}: {one['files']} files, {one['bytes']} bytes")
        for item in one["items"]:
            print(f"{name}: {item['path']}: {item['outcome']}: {item['detail']}")
