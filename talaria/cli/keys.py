"""What to look for, as options of the commands that search: `query` and `retrieve`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from imaging.query import Query

LISTS = "separated by commas"


@dataclass(frozen=True)
class Keys:
    """The options, each as it was given."""

    accession: Annotated[str, typer.Option(help=f"Accession numbers, {LISTS}.", metavar="A,B")] = ""
    patient_id: Annotated[str, typer.Option(help="Patient ID; * and ? are wild cards.", metavar="P")] = ""
    patient_name: Annotated[str, typer.Option(help="Patient's name; * and ? are wild cards.", metavar="N")] = ""
    study_date: Annotated[str, typer.Option(help="A date, or FROM-TO, FROM- or -TO.", metavar="FROM-TO")] = ""
    modality: Annotated[str, typer.Option(help="Modality, as in CT.", metavar="M")] = ""
    study_uid: Annotated[str, typer.Option(help="Study Instance UID.", metavar="U")] = ""
    series_uid: Annotated[str, typer.Option(help="Series Instance UID.", metavar="U")] = ""
    study_description: Annotated[
        list[str], typer.Option(help=f"Study descriptions, {LISTS}; may be given several times.", metavar="D,...")
    ] = field(default_factory=list)
    series_description: Annotated[
        list[str], typer.Option(help=f"Series descriptions, {LISTS}; may be given several times.", metavar="D,...")
    ] = field(default_factory=list)

    def query(self, level: str = "study") -> Query:
        """Return the query that they make.

        Raises:
            ValueError: a study date that is not one.
        """
        from imaging.match import of_study
        from imaging.query import Query
        from transfer.accessions import accessions

        made = Query(
            AccessionNumber=accessions(self.accession),
            PatientID=self.patient_id,
            PatientName=self.patient_name,
            StudyDate=self.study_date,
            Modality=self.modality,
            StudyInstanceUID=self.study_uid,
            SeriesInstanceUID=self.series_uid,
            StudyDescription=_values(self.study_description),
            SeriesDescription=_values(self.series_description),
            level=level,
        )
        list(of_study(made))
        return made


def with_keys(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options of `Keys` after its argument, and pass them to it as `keys`."""
    hints = get_type_hints(Keys, include_extras=True)
    options = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=_default(one), annotation=hints[one.name])
        for one in fields(Keys)
    ]
    own = get_type_hints(command, include_extras=True)
    first, *rest = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own[one.name])
        for one in inspect.signature(command).parameters.values()
        if one.name != "keys"
    ]

    @wraps(command)
    def wrapped(**given: Any) -> int:
        keys = Keys(**{one.name: given.pop(one.name) for one in options})
        return command(keys=keys, **given)

    parameters = [first, *options, *rest]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {one.name: one.annotation for one in parameters}
    return wrapped


def _default(one: Any) -> Any:
    return one.default if one.default is not MISSING else one.default_factory()


def _values(given: list[str]) -> tuple[str, ...]:
    """Return the descriptions of an option; one with a comma in it is written in quotes, as in a spreadsheet's file."""
    import csv

    return tuple(dict.fromkeys(part.strip() for row in csv.reader(given, skipinitialspace=True) for part in row))
