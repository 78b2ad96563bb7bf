"""`talaria query`: what a target has. Answers hold patients' data: they go to stdout and nowhere else."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talaria.cli.access import api
from talaria.cli.output import DONE, NOT_ALL, print_json, say, table

if TYPE_CHECKING:
    from imaging.query import Query

LISTS = "separated by commas"
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


Accession = Annotated[str, typer.Option("--accession", help=f"Accession numbers, {LISTS}.", metavar="A,B")]
PatientID = Annotated[str, typer.Option(help="Patient ID; * and ? are wild cards.", metavar="P")]
PatientName = Annotated[str, typer.Option(help="Patient's name; * and ? are wild cards.", metavar="N")]
StudyDate = Annotated[str, typer.Option(help="A date, or FROM-TO, FROM- or -TO.", metavar="FROM-TO")]
Modality = Annotated[str, typer.Option(help="Modality, as in CT.", metavar="M")]
StudyUid = Annotated[str, typer.Option(help="Study Instance UID.", metavar="U")]
SeriesUid = Annotated[str, typer.Option(help="Series Instance UID.", metavar="U")]
StudyDescription = Annotated[
    list[str], typer.Option(help=f"Study descriptions, {LISTS}; may be given several times.", metavar="D,...")
]
SeriesDescription = Annotated[
    list[str], typer.Option(help=f"Series descriptions, {LISTS}; may be given several times.", metavar="D,...")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: talaria query pacs --accession A1,A2 --level series --json")(query)


def query(
    name: Annotated[str, typer.Argument(help="Name of the target.", metavar="NAME")],
    accession: Accession = "",
    patient_id: PatientID = "",
    patient_name: PatientName = "",
    study_date: StudyDate = "",
    modality: Modality = "",
    study_uid: StudyUid = "",
    series_uid: SeriesUid = "",
    study_description: StudyDescription = [],  # noqa: B006 - Typer's way
    series_description: SeriesDescription = [],  # noqa: B006
    level: Annotated[QueryLevel, typer.Option(help="What one match is.")] = QueryLevel.STUDY,
    as_json: Json = False,
) -> int:
    """Ask a target what it has: studies, or series."""
    wanted = keys(
        accession, patient_id, patient_name, study_date, modality, study_uid, series_uid, study_description,
        series_description, str(level),
    )  # fmt: skip
    from tasks import DRIVERS
    from tasks.targets import check_source, load

    with api() as access:
        (target,) = access.run(load, [name])
    check_source(target)
    find = DRIVERS.of(target).find
    assert find is not None  # noqa: S101 - check_source has seen it
    found = [match.to_json() for match in find(target, wanted)]
    if as_json:
        print_json({"matches": found})
    else:
        columns = COLUMNS[str(level)]
        table("", list(columns), [[_shown(one.get(column)) for column in columns] for one in found])
        many = "study" if len(found) == 1 else "studies"
        say(f"{len(found)} {many if level is QueryLevel.STUDY else 'series'}")
    return DONE if found else NOT_ALL


def keys(
    accession: str,
    patient_id: str,
    patient_name: str,
    study_date: str,
    modality: str,
    study_uid: str,
    series_uid: str,
    study_description: list[str],
    series_description: list[str],
    level: str,
) -> Query:
    """Return the query that the options of a command line make.

    Raises:
        ValueError: a study date that is not one.
    """
    from imaging.match import of_study
    from imaging.query import Query
    from transfer.accessions import accessions

    made = Query(
        AccessionNumber=accessions(accession),
        PatientID=patient_id,
        PatientName=patient_name,
        StudyDate=study_date,
        Modality=modality,
        StudyInstanceUID=study_uid,
        SeriesInstanceUID=series_uid,
        StudyDescription=_values(study_description),
        SeriesDescription=_values(series_description),
        level=level,
    )
    list(of_study(made))
    return made


def _values(given: list[str]) -> tuple[str, ...]:
    """Return the descriptions of an option; one with a comma in it is written in quotes, as in a spreadsheet's file."""
    import csv

    return tuple(dict.fromkeys(part.strip() for row in csv.reader(given, skipinitialspace=True) for part in row))


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
