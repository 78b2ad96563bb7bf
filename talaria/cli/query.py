"""`talaria query`: what a target has. Answers hold patients' data: they go to stdout and nowhere else."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Annotated, Any

import typer

from talaria.cli.access import api
from talaria.cli.keys import Keys, with_keys
from talaria.cli.output import DONE, NOT_ALL, Json, print_json, table
from talaria.console import say

COLUMNS = {
    "study": ("StudyDate", "AccessionNumber", "PatientID", "PatientName", "ModalitiesInStudy", "StudyDescription",
              "instances", "StudyInstanceUID"),
    "series": ("StudyDate", "AccessionNumber", "PatientID", "PatientName", "Modality", "SeriesDescription", "instances",
               "SeriesInstanceUID"),
}  # fmt: skip


class QueryLevel(StrEnum):
    """What one match is."""

    STUDY = "study"
    SERIES = "series"


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: talaria query pacs --accession A1,A2 --level series --json")(with_keys(query))


def query(
    name: Annotated[str, typer.Argument(help="Name of the target.", metavar="NAME")],
    keys: Keys,
    level: Annotated[QueryLevel, typer.Option(help="What one match is.")] = QueryLevel.STUDY,
    as_json: Json = False,
) -> int:
    """List the studies or series that a target has."""
    from imaging.query import counted

    with api() as access:
        document = access.call("find_matches", source=name, level=str(level), **keys.given())
    found, unread = document["matches"], document.get("unread")  # which an older server doesn't say
    if as_json:
        print_json({"matches": found, "unread": unread})
    else:
        columns = COLUMNS[str(level)]
        table("", list(columns), [[_shown(one.get(column)) for column in columns] for one in found])
        say(counted(len(found), str(level)))
    for note, count in Counter(one["note"] for one in found if "note" in one).items():
        say(f"{count} of them: {note}")
    if unread:
        say(str(unread))
    return DONE if found and not unread else NOT_ALL


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
