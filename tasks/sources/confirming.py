"""Whether every target of a unit has confirmed a file of it, where it is now and at the level that it demands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from blocks import Source, Target
from tasks import DRIVERS
from tasks.dispatch.known import is_own_place
from tasks.names import split
from tasks.sources import after, asked
from transfer.ledger import Ledger
from transfer.receipt import Level, State
from transfer.unitlist import FileFacts, ListedUnit

LEVELS = list(Level)


def confirmed(
    source: Source,
    targets: Mapping[str, Target],
    ledger: Ledger,
    unit: ListedUnit,
    study: Mapping[str, Any],
    parameters: Mapping[str, Any],
) -> Callable[[FileFacts], bool]:
    """Return what says whether every target has confirmed a file: those it was sent to, and those of its source now.

    Args:
        targets: those that are saved, by name.
        study: the unit's row in the receipts of its dispatch.
        parameters: of its dispatch.
    """
    held = []
    origin = asked.origin_of(parameters)
    names = {*source.targets, *parameters.get("targets", ()), *study.get("targets", ())}
    for name in {split(one)[1] for one in names}:
        target, receipt = targets.get(name), study.get("targets", {}).get(name)
        if target is None or receipt is None or receipt["state"] != State.DELIVERED:
            return lambda one: False
        if LEVELS.index(Level(receipt["verified"])) < LEVELS.index(target.verify):
            return lambda one: False
        what = str(study["dispatch_id"]), name, target.endpoint_for(origin)
        held.append(ledger.arrived(*what, own_place=is_own_place(target, DRIVERS.of(target).facts)))
    shown = after.shown_in(unit)
    return lambda one: bool(held) and all(after.holds(there.get(shown(one.path)), one) for there in held)
