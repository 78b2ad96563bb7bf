"""`talaria jobs`: dispatches and retrievals, running and done."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from talaria.cli.access import Access, api, say_queued
from talaria.cli.output import Json, given_value, print_json, table
from talaria.cli.retrieve import finish as finish_retrieval
from talaria.cli.retrieve import show_result
from talaria.cli.send import finish, show_receipt

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # Rich takes 0.2 s to print a help
    help="List, show, retry, send, pause, resume and cancel dispatches and retrievals.\n\nExample: talaria jobs list",
)
Job = Annotated[str, typer.Argument(help="Id of the run (or its beginning), or of the dispatch.")]


@app.command("list", epilog="Example: talaria jobs list --json")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many, newest first.")] = 50,
    failed: Annotated[bool, typer.Option("--failed", help="List only those that were given up.")] = False,
    as_json: Json = False,
) -> None:
    """List the newest dispatches and retrievals."""
    with api() as access:
        found = access.call("list_jobs", limit=limit, **({"failed": True} if failed else {}))
    if as_json:
        print_json(found)
        return
    ids = _beginnings([one["id"] for one in found["jobs"]])
    rows = [
        [
            ids[one["id"]],
            one["state"],
            one["dispatch_id"] or (f"from {one['source']}" if one["source"] else ""),
            ", ".join(one["targets"]),
            one["begun"] or "",
            *([one["message"] or ""] if failed else []),
        ]
        for one in found["jobs"]
    ]
    table("", ["run", "state", "dispatch", "targets", "begun", *(["reason"] if failed else [])], rows)


@app.command(epilog="Example: talaria jobs show 3f2a --json")
def show(
    job: Job,
    all_items: Annotated[bool, typer.Option("--all-items", help="List delivered items too.")] = False,
    as_json: Json = False,
) -> None:
    """Show one dispatch or retrieval: its receipts, and what its targets answered."""
    with api() as access:
        document = access.call("show_job", job=job, all_items=all_items)
    if as_json:
        print_json(document)
        return
    run = document["run"]
    print(f"run {run['id']}: {run['state']}")
    if run["message"]:
        print(run["message"])
    if run["kind"] == "dispatch":
        show_receipt(document)
    else:
        show_result(document)


@app.command(epilog="Example: talaria jobs retry 3f2a")
def retry(
    job: Job,
    only: Annotated[
        str | None, typer.Option(help="The one target of a dispatch that is tried again.", metavar="NAME")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as it is queued.")] = False,
    as_json: Json = False,
) -> None:
    """Run an ended job again: only what is missing is fetched or sent, only a failed hook is run."""
    asked = {} if only is None else {"only": given_value("--only", only)}
    with api() as access:
        _go_on(access, access.call("retry_job", job=job, **asked), no_wait, as_json)


@app.command(epilog="Example: talaria jobs send 3f2a --to archive")
def send(
    job: Job,
    to: Annotated[
        list[str], typer.Option("--to", help="Names of targets, separated by commas.", metavar="NAME[,NAME...]")
    ],
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as it is queued.")] = False,
    as_json: Json = False,
) -> None:
    """Send the files of a dispatch to other targets, in a dispatch of its own."""
    names = [name.strip() for part in to for name in part.split(",") if name.strip()]
    with api() as access:
        sent = access.call("send_job", job=job, to=names)
        done = {"id": sent["flow_run_id"], "kind": "dispatch", "action": "queued"}
        _go_on(access, done, no_wait, as_json)


@app.command(epilog="Example: talaria jobs cancel 3f2a")
def cancel(job: Job, as_json: Json = False) -> None:
    """Stop a dispatch or retrieval: what was confirmed stays confirmed, a retry does the rest."""
    with api() as access:
        _done(access.call("cancel_job", job=job), as_json)


@app.command(epilog="Example: talaria jobs pause 3f2a")
def pause(job: Job, as_json: Json = False) -> None:
    """Pause a job: a dispatch stops after the items under way, a retrieval after the series."""
    with api() as access:
        _done(access.call("pause_job", job=job), as_json)


@app.command(epilog="Example: talaria jobs resume 3f2a")
def resume(
    job: Job,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as it is queued.")] = False,
    as_json: Json = False,
) -> None:
    """Let a paused dispatch or retrieval continue where it stopped."""
    with api() as access:
        _go_on(access, access.call("resume_job", job=job), no_wait, as_json)


def _beginnings(ids: list[str]) -> dict[str, str]:
    """Return what stands for each id in a table: its beginning on a terminal, where a whole one would be folded."""
    length = 36
    if sys.stdout.isatty():
        length = next(one for one in range(8, 37) if one == 36 or len({part[:one] for part in ids}) == len(ids))
    return {one: one[:length] for one in ids}


def _go_on(access: Access, done: dict[str, Any], no_wait: bool, as_json: bool) -> None:
    """Follow a job that was queued again to its end, and exit with the code for its result."""
    if no_wait:
        say_queued(access)
        _done(done, as_json)
    elif done["kind"] == "dispatch":
        finish(access, done["id"], all_items=False, as_json=as_json)
    else:
        raise typer.Exit(finish_retrieval(access, done["id"], as_json=as_json))


def _done(done: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"id": done["id"], "action": done["action"]})
    else:
        print(f"{done['id']}: {done['action']}")
