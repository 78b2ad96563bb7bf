"""What to look for, as options of the commands that search: `query` and `retrieve`."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from talaria.cli.output import given_value

LISTS = "separated by commas"


@dataclass(frozen=True)
class Keys:
    """The options, each as it was given; None if it was not.

    One that is empty, as of a script's variable that is not set, would ask for nothing, and the others find more.
    """

    accession: Annotated[str | None, typer.Option(help=f"Accession numbers, {LISTS}.", metavar="A,B")] = None
    patient_id: Annotated[str | None, typer.Option(help="Patient ID; * and ? are wild cards.", metavar="P")] = None
    patient_name: Annotated[str | None, typer.Option(help="Patient's name; * and ? are wild cards.", metavar="N")] = (
        None
    )
    study_date: Annotated[
        str | None, typer.Option(help="As 20240131, or FROM-TO, FROM- or -TO.", metavar="FROM-TO")
    ] = None
    modality: Annotated[str | None, typer.Option(help="Modality, as in CT, or several: CT,MR.", metavar="M")] = None
    study_uid: Annotated[str | None, typer.Option(help="Study Instance UID.", metavar="U")] = None
    series_uid: Annotated[str | None, typer.Option(help="Series Instance UID.", metavar="U")] = None
    study_description: Annotated[
        list[str], typer.Option(help=f"Study descriptions, {LISTS}; may be given several times.", metavar="D,...")
    ] = field(default_factory=list)
    series_description: Annotated[
        list[str], typer.Option(help=f"Series descriptions, {LISTS}; may be given several times.", metavar="D,...")
    ] = field(default_factory=list)

    def given(self) -> dict[str, Any]:
        """Return the options that were given by name, as `talaria.service.retrievals` takes them.

        Raises:
            ValueError: one is empty.
        """
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if value is not None and value != []:
                found[name] = _values(value) if isinstance(value, list) else value
                given_value(f"--{name.replace('_', '-')}", "".join(found[name]).replace(",", ""))
        return found


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
