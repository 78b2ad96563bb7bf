"""Units that are dispatched again while a run of theirs rests, as for a target that is dead or has its hours.

What came late would wait with it, and so would the other targets. The older run goes on: its row gets a key of its own
until it has ended, and what it brings is known to the newer one by the ledger. Until then, files of the unit stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from blocks.inbox import Late
from blocks.source import Source
from tasks.sources import again
from tasks.sources.units import Unit
from transfer.sourcebook import Sourcebook, UnitRow, is_older, older_key, unit_of

RESTS_S = 300.0  # since it was dispatched, after which a unit goes beside a run that rests
MOST = 10  # runs of one unit: each has all of its files
WORDS = "an older dispatch of it has not ended"


def older(unit: Unit, row: UnitRow, count: int, resting: Collection[str], now: float, source: Source) -> UnitRow | None:
    """Return the row of a unit's run that rests, with a key of its own, if the unit goes beside it; None if not.

    Args:
        count: of its older runs.
        resting: the runs that wait.
    """
    if row.run not in resting or again.parted(row.fingerprint)[0] == unit.fingerprint or unit.ahead or unit.problem:
        return None
    if getattr(source, "late", Late.APPEND) is Late.HOLD or not row.time + RESTS_S <= now:
        return None
    if count >= MOST:
        return None
    return replace(row, unit=older_key(unit.key, row.run))


def without_older(
    book: Sourcebook, source: str, by_run: Mapping[str, list[UnitRow]], ended: Collection[str]
) -> tuple[dict[str, list[UnitRow]], set[str]]:
    """Forget the rows of older runs that have ended.

    Returns:
        By run, the rows of the newest dispatches of units; and the keys of units that an older one is still to send.
    """
    every = [(run, row) for run, rows in by_run.items() for row in rows]
    if gone := [row.unit for run, row in every if is_older(row.unit) and run in ended]:
        book.forget(source, gone)
    left = {unit_of(row.unit) for run, row in every if is_older(row.unit) and run not in ended}
    return {run: [row for row in rows if not is_older(row.unit)] for run, rows in by_run.items()}, left
