"""What to look for, as options of the commands that search: `query` and `retrieve`."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

LISTS = "separated by commas"


@dataclass(frozen=True)
class Keys:
    """The options, each as it was given."""

    accession: Annotated[str, typer.Option(help=f"Accession numbers, {LISTS}.", metavar="A,B")] = ""
    patient_id: Annotated[str, typer.Option(help="Patient ID; * and ? are wild cards.", metavar="P")] = ""
    patient_name: Annotated[str, typer.Option(help="Patient's name; * and ? are wild cards.", metavar="N")] = ""
    study_date: Annotated[str, typer.Option(help="As 20240131, or FROM-TO, FROM- or -TO.", metavar="FROM-TO")] = ""
    modality: Annotated[str, typer.Option(help="Modality, as in CT.", metavar="M")] = ""
    study_uid: Annotated[str, typer.Option(help="Study Instance UID.", metavar="U")] = ""
    series_uid: Annotated[str, typer.Option(help="Series Instance UID.", metavar="U")] = ""
    study_description: Annotated[
        list[str], typer.Option(help=f"Study descriptions, {LISTS}; may be given several times.", metavar="D,...")
    ] = field(default_factory=list)
    series_description: Annotated[
        list[str], typer.Option(help=f"Series descriptions, {LISTS}; may be given several times.", metavar="D,...")
    ] = field(default_factory=list)

    def given(self) -> dict[str, Any]:
        """Return the options by name, as `talaria.service.retrievals` takes them, lists of descriptions as lists."""
        of_study, of_series = _values(self.study_description), _values(self.series_description)
        return asdict(self) | {"study_description": of_study, "series_description": of_series}


def _values(given: Iterable[str]) -> list[str]:
    """Return the descriptions that an option lists; one that holds a comma stands in quotes, as in CSV."""
    return list(dict.fromkeys(part.strip() for row in csv.reader(given, skipinitialspace=True) for part in row))


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
