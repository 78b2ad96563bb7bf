"""Whether a unit that failed is dispatched once more by itself: where its files could not be read, as of a share.

How often that was is part of its row's fingerprint, so that the next sweeps take the unit for one that has changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from transfer import unitlist
from transfer.errors import Retryable
from transfer.home import Home
from transfer.oserrors import ERRORS
from transfer.outcome import Kind
from transfer.receipt import State
from transfer.sourcebook import Sourcebook, UnitRow, UnitState

MOST = 3  # times: a share that has come back is read then, and a bad sector never
WORDS = "it is dispatched again by itself, if it is there and can be read then"
AGAIN = ":again"  # between a fingerprint and the number of tries
UNREAD = "can't be read: "  # in the detail of a unit of which something could not be
# What reading says while a share is away. Not that a file isn't there: a link that leads nowhere stays one.
_UNREAD = frozenset(f"{UNREAD}{os.strerror(number)}" for number, kind in ERRORS.items() if issubclass(kind, Retryable))


def marked(fingerprint: str, tries: int) -> str:
    """Return the fingerprint of a unit that is dispatched again, with the number of times that it has been."""
    return f"{fingerprint}{AGAIN}{tries}"


def parted(fingerprint: str) -> tuple[str, int]:
    """Return a unit's own fingerprint, and how often it was dispatched again."""
    mark, _, tries = fingerprint.partition(AGAIN)
    return mark, int(tries or 0)


def is_known(row: UnitRow, fingerprint: str, changed: float, now: float) -> bool:
    """Return True if a unit is as it was, so that nothing is to be done about it.

    Of one that failed as its files could not be read, an inode that has changed since says that they may be by now:
    whoever permits others to read a file changes neither its length nor its time.

    Args:
        changed: when something of it changed last, in seconds since the epoch.
    """
    unread = row.state is UnitState.FAILED and UNREAD in row.detail
    return row.fingerprint == fingerprint and not (unread and row.time < changed <= now)


def is_tried(row: UnitRow | None, fingerprint: str) -> bool:
    """Return True if a unit failed, and is to be dispatched again by itself, as it was."""
    return row is not None and row.fingerprint != fingerprint and parted(row.fingerprint)[0] == fingerprint


def was_by_force(home: Home, source: str, row: UnitRow | None) -> bool:
    """Return True if a unit has failed that was to be sent by force, as all of one is for which files came late."""
    if row is None or row.state is not UnitState.FAILED or not row.batch:
        return False
    return bool((unitlist.kept(unitlist.place(home, source, row.batch)) or {}).get("force"))


def forget(home: Home, book: Sourcebook, source: str, rows: Iterable[UnitRow]) -> None:
    """Let the next sweep dispatch units that failed, or are held, as new ones; by force those that were to be so."""
    rows = list(rows)
    forced = [one.now(one.state, one.detail, fingerprint="") for one in rows if was_by_force(home, source, one)]
    kept = {one.unit for one in forced}
    book.save(source, forced)
    book.forget(source, [one.unit for one in rows if one.unit not in kept])


def may_pass(study: Mapping[str, Any] | None, folder: str) -> bool:
    """Return True if nothing kept a unit from arriving but that its files could not be read then.

    Args:
        study: its row in the receipts of its dispatch.
        folder: that its files lie in; "" if they may lie anywhere.
    """
    bad = [one for one in (study or {}).get("targets", {}).values() if one["state"] != State.DELIVERED]
    return bool(bad) and all(_is_unread(one, folder) for one in bad)


def _is_unread(outcome: Mapping[str, Any], folder: str) -> bool:
    """Return True if a target got all that could be read.

    Of a unit that can't be looked through the error names the folder, as also of one on a share that is unmounted; no
    target's own errors do.
    """
    details = {str(one["detail"]) for one in outcome.get("items", ()) if one["outcome"] == Kind.REJECTED}
    if outcome.get("error"):
        return bool(folder) and f"{folder}/" in str(outcome["error"]) and details <= _UNREAD
    return bool(details) and details <= _UNREAD
