"""`talaria jobs`: dispatches and retrievals, running and done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from talaria.cli.access import api
from talaria.cli.output import print_json, table
from talaria.cli.retrieve import finish as follow
from talaria.cli.retrieve import result, show_result
from talaria.cli.send import finish, receipt, show_receipt, trimmed

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from talaria.cli.access import ServerAccess

app = typer.Typer(
    no_args_is_help=True,
    help="List, show, retry, pause, resume and cancel dispatches and retrievals.\n\nExample: talaria jobs list",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
Job = Annotated[str, typer.Argument(help="Id of the run (or its beginning), or of the dispatch.")]


@app.command("list", epilog="Example: talaria jobs list --json")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many, newest first.")] = 50, as_json: Json = False
) -> None:
    """The newest dispatches and retrievals."""
    from talaria.engine import runs

    with api() as access:
        found = [_line(flow_run) for flow_run in access.run(runs.jobs, limit)]
    if as_json:
        print_json({"jobs": found})
        return
    rows = [
        [
            one["id"],
            one["state"],
            one["dispatch_id"] or f"from {one['source']}",
            ", ".join(one["targets"]),
            one["begun"] or "",
        ]
        for one in found
    ]
    table("", ["run", "state", "dispatch", "targets", "begun"], rows)


@app.command(epilog="Example: talaria jobs show 3f2a --json")
def show(
    job: Job,
    all_items: Annotated[bool, typer.Option("--all-items", help="List delivered items too.")] = False,
    as_json: Json = False,
) -> None:
    """One dispatch or retrieval: its receipts, and what its targets said."""
    from talaria.engine import runs

    with api() as access:
        flow_run = access.run(runs.find, job)
        pulls = runs.is_retrieval(flow_run)
        document = result(access, flow_run) if pulls else trimmed(receipt(access, flow_run), all_items)
        document["run"] = _line(flow_run)
        shown = access.run(runs.progress, access.home, flow_run.id)
        document["progress"] = {name: round(percent, 1) for name, (percent, _) in shown.items()}
    if as_json:
        print_json(document)
        return
    print(f"run {flow_run.id}: {flow_run.state_name}")
    if flow_run.state and flow_run.state.message:
        print(flow_run.state.message)
    if pulls:
        show_result(document)
    else:
        show_receipt(document)


@app.command(epilog="Example: talaria jobs retry 3f2a")
def retry(
    job: Job,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as it is queued.")] = False,
    as_json: Json = False,
) -> None:
    """Run what has ended again: only what is missing is fetched or sent, only a failed hook is run."""
    from talaria.engine import runs

    with api() as access:
        flow_run = access.run(runs.retry, access.run(runs.find, job).id)
        if not no_wait:
            _wait(access, flow_run, as_json)
    _done(flow_run, "queued", as_json)


@app.command(epilog="Example: talaria jobs cancel 3f2a")
def cancel(job: Job, as_json: Json = False) -> None:
    """Stop a dispatch or retrieval: what was confirmed stays confirmed, a retry does the rest."""
    from talaria.engine import runs

    with api() as access:
        flow_run = access.run(runs.find, job)
        state = access.run(runs.cancel, flow_run.id)
    _done(flow_run, state, as_json)


@app.command(epilog="Example: talaria jobs pause 3f2a")
def pause(job: Job, as_json: Json = False) -> None:
    """Let a dispatch end after the items under way, a retrieval after the series, to go on there when resumed."""
    from talaria.engine import runs

    with api() as access:
        flow_run = access.run(runs.find, job)
        state = access.run(runs.pause, flow_run.id)
    _done(flow_run, state, as_json)


@app.command(epilog="Example: talaria jobs resume 3f2a")
def resume(
    job: Job,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as it is queued.")] = False,
    as_json: Json = False,
) -> None:
    """Let a paused dispatch or retrieval go on where it ended."""
    from talaria.engine import runs

    with api() as access:
        flow_run = access.run(runs.resume, access.run(runs.find, job).id)
        if not no_wait:
            _wait(access, flow_run, as_json)
    _done(flow_run, "queued", as_json)


def _wait(access: ServerAccess, flow_run: FlowRun, as_json: bool) -> None:
    """Follow a retrieval or a dispatch to its end and exit with the code that its result deserves."""
    from talaria.engine.runs import is_retrieval

    if is_retrieval(flow_run):
        raise typer.Exit(follow(access, flow_run, as_json=as_json))
    finish(access, flow_run, all_items=False, as_json=as_json)


def _done(flow_run: FlowRun, state: str, as_json: bool) -> None:
    if as_json:
        print_json({"id": str(flow_run.id), "action": state.lower()})
    else:
        print(f"{flow_run.id}: {state}")


def _line(flow_run: FlowRun) -> dict[str, Any]:
    from talaria.engine.runs import dispatch_of, is_retrieval

    begun = flow_run.start_time or flow_run.expected_start_time
    return {
        "id": str(flow_run.id),
        "state": flow_run.state_name,
        "kind": "retrieval" if is_retrieval(flow_run) else "dispatch",
        "source": flow_run.parameters.get("source", ""),
        "dispatch_id": dispatch_of(flow_run),
        "targets": list(flow_run.parameters.get("targets", [])),
        "paths": list(flow_run.parameters.get("paths", [])),
        "begun": begun.isoformat(timespec="seconds") if begun else None,
        "ended": flow_run.end_time.isoformat(timespec="seconds") if flow_run.end_time else None,
        "runs": flow_run.run_count,
        "message": flow_run.state.message if flow_run.state else None,
    }
