"""`talaria send`: a dispatch from the command line."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talaria.cli.access import ServerAccess, api
from talaria.cli.output import DONE, NOT_ALL, print_json, say, table

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from blocks import Target
    from transfer.plan import Plan


class Priority(StrEnum):
    """How urgent a dispatch is."""

    URGENT = "urgent"
    NORMAL = "normal"
    OFFPEAK = "offpeak"


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: talaria send /data/study --to pacs,archive --exclude '*.png,*.json'")(send)


def send(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders to send.", metavar="PATH...")],
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as the dispatch is queued.")] = False,
    all_items: Annotated[
        bool, typer.Option("--all-items", help="List every item in the JSON, delivered ones too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Send files and folders to one or more targets, and wait for the receipts."""
    from transfer.globs import patterns
    from transfer.plan import Origin, scan

    names = [name.strip() for part in to for name in part.split(",") if name.strip()]
    if not names:
        raise ValueError("--to names no target")
    plan = scan(paths, patterns(exclude), Origin(sender_aet, receiver_aet, sender_host))
    parameters = {
        "paths": [str(path.absolute()) for path in paths],
        "targets": list(dict.fromkeys(names)),
        "exclude": exclude,
        "priority": str(priority),
        "sender_aet": sender_aet,
        "receiver_aet": receiver_aet,
        "sender_host": sender_host,
        "force": force,
    }
    with api() as access:
        targets = _destinations(access, parameters["targets"])
        if dry_run:
            _show_plan(plan, targets, as_json)
            return
        _send(access, plan, targets, parameters, no_wait=no_wait, all_items=all_items, as_json=as_json)


def _destinations(access: ServerAccess, names: Any) -> list[Target]:
    """Load the targets and refuse those that nothing may be sent to, before anything is."""
    from tasks.targets import check_destination, load

    targets = access.run(load, names)
    for target in targets:
        check_destination(target)
    return targets


def _send(
    access: ServerAccess,
    plan: Plan,
    targets: list[Target],
    parameters: dict[str, Any],
    *,
    no_wait: bool,
    all_items: bool,
    as_json: bool,
) -> None:
    from talaria.engine import runs

    queue = parameters["priority"]
    name = runs.name_of(plan.dispatch_id, parameters["targets"])
    flow_run = access.run(runs.create, "dispatch", parameters, name, queue)
    if no_wait:
        if access.own:
            say("queued: it runs as soon as `talaria up` does")
        if as_json:
            print_json(trimmed(_queued(access, plan, targets, flow_run, force=parameters["force"]), all_items))
        else:
            print(f"dispatch {plan.dispatch_id} queued as run {flow_run.id}")
        return
    finish(access, flow_run, all_items=all_items, as_json=as_json)


def _queued(
    access: ServerAccess, plan: Plan, targets: list[Target], flow_run: FlowRun, *, force: bool
) -> dict[str, Any]:
    """Return the receipts of a dispatch that has not begun: everything waits, but for what is at a target already."""
    from threading import Event

    from tasks import DRIVERS
    from tasks.dispatch.delivery import Delivery
    from tasks.dispatch.report import document
    from transfer.ledger import Ledger
    from transfer.receipt import State

    receipts = []
    with Ledger(access.home.ledger) as ledger:
        for target in targets:
            delivery = Delivery(DRIVERS.of(target), target, plan, ledger, access.home, Event(), force=force)
            delivery.stopped = State.WAITING
            receipts.append(delivery.receipt())
    return document(plan.dispatch_id, str(flow_run.id), State.WAITING, receipts)


def finish(access: ServerAccess, flow_run: FlowRun, *, all_items: bool, as_json: bool) -> None:
    """Follow a dispatch to its end, show its receipts, and exit with the code that they deserve."""
    from talaria.engine.runs import result_of

    say(
        f"run {flow_run.id}"
        + (f": {access.address.ui}/runs/flow-run/{flow_run.id}" if access.address and not access.own else "")
    )
    with _bars() as show:
        ended = result_of(access, flow_run, show)
    document = receipt(access, ended)
    if as_json:
        print_json(trimmed(document, all_items))
    else:
        show_receipt(document)
    raise typer.Exit(DONE if document["state"] == "delivered" else NOT_ALL)


def receipt(access: ServerAccess, flow_run: FlowRun) -> dict[str, Any]:
    """Return the receipts of a run, with all items; a run that could not begin has none, but its state's message.

    They are the server's; the copy on this machine, if it has one, is read where the server has none (any more).
    """
    from talaria.engine.runs import dispatch_of
    from tasks.dispatch import kept

    state = flow_run.state
    document = access.run(kept.read, flow_run.id)
    if document is None:
        with suppress(OSError):
            document = json.loads(access.home.receipt(str(flow_run.id)).read_text(encoding="utf-8"))
    if document is None:
        under_way = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING")
        names = {"CANCELLED": "cancelled", "COMPLETED": "delivered"} | dict.fromkeys(under_way, "waiting")
        document = {
            "dispatch_id": dispatch_of(flow_run),
            "flow_run_id": str(flow_run.id),
            "state": names.get(str(state.type.value) if state else "", "failed"),
            "targets": {},
            "error": state.message if state else None,
        }
    if state and state.type.value == "CANCELLED":  # what waited when it was cancelled waits no more
        parts = [document, *document["targets"].values()]
        for part in [part for part in parts if part["state"] == "waiting"]:
            part["state"] = "cancelled"
    return document


def trimmed(document: dict[str, Any], all_items: bool) -> dict[str, Any]:
    """Return the same receipts without the items that are plainly delivered, unless all are wanted."""
    if all_items:
        return document
    targets = {
        name: one | {"items": [item for item in one["items"] if item["outcome"] != "delivered"]}
        for name, one in document["targets"].items()
    }
    return document | {"targets": targets}


def show_receipt(document: dict[str, Any]) -> None:
    """Print receipts for people."""
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
    for name, one in trimmed(document, False)["targets"].items():
        for line in ([one["error"]] if one["error"] else []) + one["notes"]:
            print(f"{name}: {line}")
        shown = [item for item in one["items"] if item["outcome"] != "already"]
        for item in shown[:50]:
            print(f"{name}: {item['path']}: {item['outcome']}: {item['detail']}")
        if len(shown) > 50:
            print(f"{name}: … and {len(shown) - 50} more: talaria jobs show {document['flow_run_id']} --json")


def _show_plan(plan: Plan, targets: list[Target], as_json: bool) -> None:
    from tasks import DRIVERS
    from tasks.dispatch.delivery import sort_out

    found: dict[str, Any] = {}
    for target in targets:
        refused, wanted = sort_out(DRIVERS.of(target).facts, target, plan)
        found[target.name] = {
            "files": len(wanted),
            "bytes": sum(item.size for item in wanted),
            "items": [{"path": i.shown, "outcome": str(o.kind), "detail": o.detail} for i, o in refused.items()],
        }
    if as_json:
        print_json({"dispatch_id": plan.dispatch_id, "dry_run": True, "targets": found})
        return
    print(f"dispatch {plan.dispatch_id} would send:")
    for name, one in found.items():
        print(f"{name}: {one['files']} files, {one['bytes']} bytes")
        for item in one["items"]:
            print(f"{name}: {item['path']}: {item['outcome']}: {item['detail']}")


class _bars:
    """Progress bars on stderr, one per target, while the block runs, and a line for each attempt that failed."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn("{task.fields[name]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=not sys.stderr.isatty(),
        )
        self.tasks: dict[str, Any] = {}
        self.said: set[tuple[str, str]] = set()
        self.progress.start()
        return self.show

    def show(self, now: dict[str, tuple[float, str]]) -> None:
        for name, (percent, words) in now.items():
            words, *failures = words.split("\n")
            for line in [line for line in failures if (name, line) not in self.said]:
                self.said.add((name, line))
                self.progress.console.print(f"{name}: {line}", markup=False, highlight=False, soft_wrap=True)
            if name not in self.tasks:
                self.tasks[name] = self.progress.add_task(words, total=100, name=name)
            self.progress.update(self.tasks[name], completed=percent, description=words)

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()
