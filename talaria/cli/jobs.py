"""`talaria jobs`: dispatches, running and done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from talaria.cli.access import api
from talaria.cli.output import print_json, table
from talaria.cli.send import finish, receipt, show_receipt, trimmed

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

app = typer.Typer(no_args_is_help=True, help="List, show, retry and cancel dispatches.\n\nExample: talaria jobs list")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
Job = Annotated[str, typer.Argument(help="Id of the run (or its beginning), or of the dispatch.")]


@app.command("list", epilog="Example: talaria jobs list --json")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many, newest first.")] = 50, as_json: Json = False
) -> None:
    """The newest dispatches."""
    from talaria.engine import runs

    with api() as access:
        found = [_line(flow_run) for flow_run in access.run(runs.dispatches, limit)]
    if as_json:
        print_json({"jobs": found})
        return
    rows = [
        [one["id"], one["state"], one["dispatch_id"], ", ".join(one["targets"]), one["begun"] or ""] for one in found
    ]
    table("", ["run", "state", "dispatch", "targets", "begun"], rows)


@app.command(epilog="Example: talaria jobs show 3f2a --json")
def show(
    job: Job,
    all_items: Annotated[bool, typer.Option("--all-items", help="List delivered items too.")] = False,
    as_json: Json = False,
) -> None:
    """One dispatch: its receipts, and what its targets said."""
    from talaria.engine import runs

    with api() as access:
        flow_run = access.run(runs.find, job)
        document = trimmed(receipt(access, flow_run), all_items)
        document["run"] = _line(flow_run)
        document["progress"] = {name: percent for name, (percent, _) in access.run(runs.progress, flow_run.id).items()}
    if as_json:
        print_json(document)
        return
    print(f"run {flow_run.id}: {flow_run.state_name}")
    if flow_run.state and flow_run.state.message:
        print(flow_run.state.message)
    show_receipt(document)


@app.command(epilog="Example: talaria jobs retry 3f2a")
def retry(
    job: Job,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as it is queued.")] = False,
    as_json: Json = False,
) -> None:
    """Run a dispatch that has ended again: only what is missing is sent, only a failed hook is run."""
    from talaria.engine import runs

    with api() as access:
        flow_run = access.run(runs.retry, access.run(runs.find, job).id)
        if not no_wait:
            finish(access, flow_run, all_items=False, as_json=as_json)
    if as_json:
        print_json({"id": str(flow_run.id), "action": "queued"})
    else:
        print(f"{flow_run.id}: queued")


@app.command(epilog="Example: talaria jobs cancel 3f2a")
def cancel(job: Job, as_json: Json = False) -> None:
    """Stop a dispatch: what was confirmed stays confirmed, a retry sends the rest."""
    from talaria.engine import runs

    with api() as access:
        flow_run = access.run(runs.find, job)
        state = access.run(runs.cancel, flow_run.id)
    if as_json:
        print_json({"id": str(flow_run.id), "action": state.lower()})
    else:
        print(f"{flow_run.id}: {state}")


def _line(flow_run: FlowRun) -> dict[str, Any]:
    from talaria.engine.runs import dispatch_of

    begun = flow_run.start_time or flow_run.expected_start_time
    return {
        "id": str(flow_run.id),
        "state": flow_run.state_name,
        "dispatch_id": dispatch_of(flow_run),
        "targets": list(flow_run.parameters.get("targets", [])),
        "paths": list(flow_run.parameters.get("paths", [])),
        "begun": begun.isoformat(timespec="seconds") if begun else None,
        "ended": flow_run.end_time.isoformat(timespec="seconds") if flow_run.end_time else None,
        "runs": flow_run.run_count,
        "message": flow_run.state.message if flow_run.state else None,
    }
