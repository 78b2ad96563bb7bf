"""Units: what a source holds now, one for each study (series, folder, line) that is dispatched as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from blocks.source import Source
from transfer.errors import Misconfigured
from transfer.ledger import Ledger
from transfer.plan import Origin

AHEAD_S = 300.0  # by which a file's time may lie ahead of our clock, if `settle_s` is less
# Where the function `units` of each type is, and `root` where its files lie in a folder of its own.
_MODULES = {"dicom": "tasks.sources.dicom", "inbox": "tasks.sources.inbox", "list": "tasks.sources.lines"}


@dataclass(frozen=True, slots=True)
class Unit:
    """A study (or series, folder, line) of a source, as it is now.

    Attributes:
        key: names it within its source, and stays the same while files come: a folder's name, a UID, a line.
        paths: its files and folders, absolute.
        fingerprint: changes whenever a file comes, goes or changes, by names, sizes and times.
        newest: when something of it changed last, in seconds since the epoch.
        oldest: when the first of its files came, where files don't change after that; 0 if nobody knows.
        files: how many it has.
        origin: where it comes from, for targets that pass it on.
        targets: the names of those that get it.
        complete: whether its sender says so, so that it need not settle.
        problem: why it can't be dispatched, in a sentence; "" if nothing is wrong.
        shown: what people see of it; the key if empty.
        ahead: why its times don't say whether it has settled, in a sentence; "" if they do.
        after: the keys of those that must not be dispatched at the same time, or later: earlier versions of the same.
    """

    key: str
    paths: tuple[str, ...]
    fingerprint: str
    newest: float
    files: int
    origin: Origin
    targets: tuple[str, ...]
    complete: bool = False
    problem: str = ""
    shown: str = ""
    ahead: str = ""
    after: tuple[str, ...] = ()
    oldest: float = 0.0

    @property
    def name(self) -> str:
        """What people see of it."""
        return self.shown or self.key


def in_time(unit: Unit, source: Source) -> Unit:
    """Return a unit; with a reason if something of it changed in the future, so that it would not settle for long."""
    ahead = unit.newest - time.time()
    if unit.complete or ahead <= max(AHEAD_S, float(getattr(source, "settle_s", 0.0))):
        return unit
    when = datetime.fromtimestamp(unit.newest, UTC)
    why = f"it was changed in the future, at {when:%Y-%m-%d %H:%M} UTC: the clock of its server is wrong, or ours"
    return replace(unit, ahead=f"{why}; it goes when nothing of it has changed for as long as its source demands")


def units(source: Source, ledger: Ledger, check: Callable[[], None] = lambda: None) -> Iterable[Unit]:
    """Yield what a source holds now, ready or not; in no order, but after those units that one must come after.

    Args:
        check: called between folders; may raise to stop.

    Raises:
        DispatchError: the source can't be looked through: nothing is known of what it holds.
    """
    yield from _module(source).units(source, ledger, check)


def root(source: Source) -> str:
    """Return the folder, without links, that all files of a source lie in; "" if they may be moved or deleted never.

    Raises:
        DispatchError: it can't be looked through.
    """
    found = getattr(_module(source), "root", None)
    return str(found(source)) if found else ""


def reports(source: Source) -> bool:
    """Return True if a source has a file for what became of each unit."""
    return hasattr(_module(source), "report")


def report(source: Source, ledger: Ledger, waits: Mapping[str, str]) -> None:
    """Write what became of each unit.

    Args:
        waits: what runs wait for that are to begin, or go on, within hours that people have set; by run.

    Raises:
        Busy, Denied: it can't be written.
    """
    _module(source).report(source, ledger.sources.units(source.name), waits)


def _module(source: Source) -> Any:
    if source.type_name not in _MODULES:
        raise Misconfigured(f"sources of type {source.type_name} can't be looked through here", source.name)
    return import_module(_MODULES[source.type_name])
