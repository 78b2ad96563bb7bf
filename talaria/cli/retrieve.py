"""`talaria retrieve`: studies from a target that can be queried, to other targets or into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from talaria.cli.access import Access, api, say_queued
from talaria.cli.follow import follow
from talaria.cli.keys import Keys, with_keys
from talaria.cli.output import DONE, Json, code_of, given_path, print_json, table


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: talaria retrieve pacs --accession-file list.csv --to archive,cloud")(
        with_keys(retrieve)
    )


def retrieve(
    name: Annotated[str, typer.Argument(help="Name of the target to pull from.", metavar="NAME")],
    keys: Keys,
    accession_file: Annotated[
        Path | None,
        typer.Option(help="File with accession numbers: text or CSV; - for standard input.", metavar="FILE"),
    ] = None,
    to: Annotated[
        list[str], typer.Option("--to", help="Targets to deliver to, separated by commas.", metavar="NAME[,NAME...]")
    ] = [],  # noqa: B006 - Typer's way
    into: Annotated[
        str | None, typer.Option(help="Folder for <accession>/<series>/<instance>.dcm.", metavar="FOLDER")
    ] = None,
    off_peak: Annotated[bool, typer.Option("--off-peak", help="Fetch within the off-peak hours only.")] = False,
    studies_per_hour: Annotated[int, typer.Option(min=0, help="Fetch no more studies than this in an hour.")] = 0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as it is queued.")] = False,
    as_json: Json = False,
) -> int:
    """Find studies, fetch them, and deliver each as soon as it is whole."""
    from transfer.accessions import STANDARD_INPUT, from_file

    numbers = from_file(accession_file) if accession_file else ()
    if accession_file and not numbers:
        raise ValueError(
            f"{'standard input' if accession_file == STANDARD_INPUT else accession_file} holds no accession number"
        )
    targets = list(dict.fromkeys(one.strip() for part in to for one in part.split(",") if one.strip()))
    if bool(targets) == (into is not None):
        raise ValueError("give either --to NAME or --into FOLDER")
    with api() as access:
        queued = access.call(
            "create_retrieval",
            source=name,
            numbers=list(numbers),
            targets=targets,
            into="" if into is None else str(given_path(into).absolute()),
            off_peak=off_peak,
            studies_per_hour=studies_per_hour,
            **keys.given(),
        )
        if not no_wait:
            return finish(access, queued["flow_run_id"], as_json=as_json)
        say_queued(access)
        if as_json:
            print_json({key: value for key, value in queued.items() if key != "run"})
        else:
            print(f"retrieval queued as run {queued['flow_run_id']}")
    return DONE


def finish(access: Access, run_id: str, *, as_json: bool) -> int:
    """Follow a retrieval to its end, show its result, and return the exit code for it."""
    document = follow(access, run_id)
    if as_json:
        print_json(document)
    else:
        show_result(document)
    return code_of(document)


def show_result(document: dict[str, Any]) -> None:
    """Print the result of a retrieval for people."""
    columns = ["accession", "study", "state", "instances", "missing", "reason"]
    rows = [[one[column] for column in columns] for one in (*document["studies"], *document["accessions"])]
    table(f"Retrieval from {document['source']}: {document['state']}", columns, rows)
    if document.get("error"):
        print(document["error"])
