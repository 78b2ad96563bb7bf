"""What a sweep asks of the dispatch of some units, and whether their source would ask the same now.

It is kept beside the list of units before the run is created. A sweep that is killed, or ended, in between leaves the
run to the next one, before which somebody may have edited the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blocks.list_source import ListSource
from blocks.source import FileSource, Source
from tasks.sources import units
from transfer.accessions import pasted
from transfer.plan import Origin
from transfer.unitlist import ListedUnit

ORIGIN = ("sender_aet", "receiver_aet", "sender_host")  # parameters of a dispatch, in the order of an `Origin`


def parameters(
    source: Source, path: Path, targets: Iterable[str], origin: Origin, *, force: bool = False
) -> dict[str, Any]:
    """Return the parameters of the dispatch of the units that a list names."""
    return {
        "paths": [str(path)],
        "targets": list(targets),
        **_settings(source),
        **dict(zip(ORIGIN, (origin.sender_aet, origin.receiver_aet, origin.sender_host), strict=True)),
        "force": force,
        "each": "unit",
    }


def _settings(source: Source) -> dict[str, Any]:
    """Return those that a source gives to all its dispatches."""
    return {
        "exclude": source.exclude,
        "priority": str(source.priority),
        "copy_first": isinstance(source, FileSource) and source.copy_first,
    }


def of_numbers(query: str, numbers: Iterable[str], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of the retrieval of accession numbers from a target, in the place of a dispatch's."""
    return {
        "source": query,
        "accessions": pasted(numbers),
        **{name: asked[name] for name in ("targets", "priority")},
    }


def origin_of(asked: Mapping[str, Any]) -> Origin:
    """Return where the units of a dispatch come from."""
    return Origin(*(str(asked.get(name, "")) for name in ORIGIN))


def has_same_targets(source: Source, asked: Mapping[str, Any]) -> bool:
    """Return True if a source would send units now to whom it has sent them.

    Of a listener's routes nobody knows which of them took these units: all that got them must be there still.
    """
    return {*source.targets} <= {*asked.get("targets", ())} <= {*source.reaches}


def is_still_so(source: Source, asked: Mapping[str, Any], listed: Iterable[ListedUnit]) -> bool:
    """Return True if a source would ask for a dispatch now as it did before."""
    if asked.get("source", "") != (source.query if isinstance(source, ListSource) else ""):
        return False
    if any(asked.get(name, value) != value for name, value in _settings(source).items()):
        return False
    if not has_same_targets(source, asked):
        return False
    if isinstance(source, FileSource) and "sender_aet" in asked and origin_of(asked) != source.origin:
        return False
    folder = units.root(source)
    return all(one.within in ("", folder) for one in listed)
