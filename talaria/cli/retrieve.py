"""`talaria retrieve`: studies from a target that can be queried, to other targets or into a folder."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talaria.cli.access import ServerAccess, api
from talaria.cli.keys import Keys, with_keys
from talaria.cli.output import DONE, NOT_ALL, print_json, say, table
from talaria.cli.query import Json

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from imaging.query import Query


# Without one of these, a retrieval would fetch all that there is.
SELECTIVE = ("accessions", "study_uids", "series_uid", "study_date", "study_descriptions")


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: talaria retrieve pacs --accession-file list.csv --to archive,cloud")(
        with_keys(retrieve)
    )


def retrieve(
    name: Annotated[str, typer.Argument(help="Name of the target to pull from.", metavar="NAME")],
    keys: Keys,
    accession_file: Annotated[
        Path | None, typer.Option(help="File with accession numbers: text or CSV.", metavar="FILE")
    ] = None,
    to: Annotated[
        list[str], typer.Option("--to", help="Targets to deliver to, separated by commas.", metavar="NAME[,NAME...]")
    ] = [],  # noqa: B006 - Typer's way
    into: Annotated[
        Path | None, typer.Option(help="Folder for <accession>/<series>/<instance>.dcm.", metavar="FOLDER")
    ] = None,
    off_peak: Annotated[bool, typer.Option("--off-peak", help="Fetch within the off-peak hours only.")] = False,
    studies_per_hour: Annotated[int, typer.Option(min=0, help="Fetch no more studies than this in an hour.")] = 0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as it is queued.")] = False,
    as_json: Json = False,
) -> int:
    """Find studies, fetch them, and deliver each as soon as it is whole."""
    from imaging.query import listed
    from tasks.retrieve.place import check_place
    from transfer.accessions import from_file

    wanted = keys.query()
    numbers = list(dict.fromkeys((*wanted.AccessionNumber, *(from_file(accession_file) if accession_file else ()))))
    if accession_file and not numbers:
        raise ValueError(f"{accession_file} holds no accession number")
    targets = list(dict.fromkeys(one.strip() for part in to for one in part.split(",") if one.strip()))
    if bool(targets) == (into is not None):
        raise ValueError("give either --to NAME or --into FOLDER")
    parameters: dict[str, Any] = {
        "source": name,
        "accessions": "\n".join(f'"{one}"' if {",", ";", " "} & {*one} else one for one in numbers),
        "targets": targets,
        "into": str(into.absolute()) if into else "",
        "study_uids": listed(wanted.StudyInstanceUID),
        "series_uid": wanted.SeriesInstanceUID,
        "study_date": wanted.StudyDate,
        "modality": wanted.Modality,
        "study_descriptions": list(wanted.StudyDescription),
        "series_descriptions": list(wanted.SeriesDescription),
        "priority": "offpeak" if off_peak else "normal",
        "studies_per_hour": studies_per_hour,
    }
    with api() as access:
        if into and access.address:  # else the folder is another machine's
            check_place(into.absolute())
        _check(access, name, targets, parameters, wanted, numbers)
        from talaria.engine import runs

        queue = parameters["priority"]
        flow_run = access.run(runs.create, "retrieve", parameters, f"from {name}", queue)
        if not no_wait:
            return finish(access, flow_run, as_json=as_json)
        if access.own:
            say("queued: it runs as soon as `talaria up` does")
        if as_json:
            print_json(result(access, flow_run))
        else:
            print(f"retrieval queued as run {flow_run.id}")
    return DONE


def _check(
    access: ServerAccess, name: str, targets: list[str], parameters: dict[str, Any], wanted: Query, numbers: list[str]
) -> None:
    """Refuse what can't be done before anything is queued; no patient's name or ID gets into a run's parameters."""
    from dataclasses import replace

    from tasks import DRIVERS
    from tasks.targets import check_destination, check_source, load

    (source,) = access.run(load, [name])
    check_source(source)
    for target in access.run(load, targets):
        check_destination(target)
    if wanted.PatientID or wanted.PatientName:
        find = DRIVERS.of(source).find
        assert find is not None  # noqa: S101 - check_source has seen it
        query = replace(wanted, AccessionNumber=tuple(numbers))
        uids = [match.StudyInstanceUID for match in find(source, query)]
        if not uids:
            raise ValueError("nothing matches the query")
        parameters |= {"study_uids": uids, "accessions": ""}
    elif not any(parameters[key] for key in SELECTIVE):
        raise ValueError("nothing to look for: give accession numbers, UIDs, a date, a patient or a description")


def finish(access: ServerAccess, flow_run: FlowRun, *, as_json: bool) -> int:
    """Follow a retrieval to its end, show its result, and return the exit code that it deserves."""
    from talaria.cli.send import _bars
    from talaria.engine.runs import result_of

    say(
        f"run {flow_run.id}"
        + (f": {access.address.ui}/runs/flow-run/{flow_run.id}" if access.address and not access.own else "")
    )
    with _bars() as show:
        ended = result_of(access, flow_run, show)
    document = result(access, ended)
    if as_json:
        print_json(document)
    else:
        show_result(document)
    return DONE if document["state"] == "delivered" else NOT_ALL


def result(access: ServerAccess, flow_run: FlowRun) -> dict[str, Any]:
    """Return the result of a retrieval; of one that has not begun, what its state says."""
    from tasks.dispatch import kept

    state = flow_run.state
    kind = str(state.type.value) if state else ""
    document = access.run(kept.read, flow_run.id)
    if document is None:
        with suppress(OSError):
            document = json.loads(access.home.receipt(str(flow_run.id)).read_text(encoding="utf-8"))
    if document is None:
        names = {"CANCELLED": "cancelled"} | dict.fromkeys(("SCHEDULED", "PENDING", "RUNNING", "CANCELLING"), "waiting")
        document = {
            "flow_run_id": str(flow_run.id), "source": flow_run.parameters.get("source", ""),
            "state": names.get(kind, "failed"), "found": 0, "delivered": 0, "missing": [], "partial": [], "failed": [],
            "waiting": [], "error": state.message if state else None, "studies": [], "accessions": [],
        }  # fmt: skip
    if kind == "CANCELLED" and document["state"] in ("waiting", "paused"):
        document["state"] = "cancelled"
    return document


def show_result(document: dict[str, Any]) -> None:
    """Print the result of a retrieval for people."""
    columns = ["accession", "study", "state", "instances", "missing", "reason"]
    rows = [[one[column] for column in columns] for one in (*document["studies"], *document["accessions"])]
    table(f"Retrieval from {document['source']}: {document['state']}", columns, rows)
    if document.get("error"):
        print(document["error"])
