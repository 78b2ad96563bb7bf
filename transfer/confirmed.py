"""What each place at an endpoint holds, as it confirmed it last: item by item, whichever dispatch sent it.

The key is (endpoint, place there, item, content). A place that took another content of an item since, or that turned
out not to have it, no longer holds the earlier one: sent again, it really is sent. So of two senders that deliver the
same content in turn, nothing is sent twice; of two that overwrite each other, each content that isn't there is.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transfer.outcome import ARRIVED, Kind, Outcome, outcome_of
from transfer.plan import Item

TABLES = """
CREATE TABLE IF NOT EXISTS confirmed (
  endpoint TEXT NOT NULL, place TEXT NOT NULL, item TEXT NOT NULL, size BIGINT NOT NULL, mtime_ns BIGINT NOT NULL,
  sha256 TEXT NOT NULL, outcome TEXT NOT NULL, detail TEXT NOT NULL, dispatch_id TEXT NOT NULL, path TEXT NOT NULL,
  time DOUBLE PRECISION NOT NULL, PRIMARY KEY (endpoint, place, item, size, mtime_ns)) WITHOUT ROWID;
"""
# Of the ledgers that had no such table: rows count for what keeps instances by their UID, whose place is "". The last
# content of each, as nobody knows what became of those before.
OF_OLD_ROWS = (
    "INSERT INTO confirmed SELECT endpoint, '', sop_instance_uid, size, mtime_ns, '', outcome, detail, dispatch_id,"
    " path, time FROM (SELECT *, row_number() OVER (PARTITION BY endpoint, sop_instance_uid ORDER BY time DESC) AS last"
    " FROM items WHERE sop_instance_uid<>'' AND outcome<>'skipped') WHERE last=1"
    " AND outcome IN ('delivered', 'warning', 'already')"
)
NOTHING = -1  # the size in a row that says that a place does not hold what it had confirmed
SECOND = 1_000_000_000  # nanoseconds
_HERE = "endpoint=? AND place=? AND item=?"


class Statements(Protocol):
    """What executes statements: an open database."""

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Spot:
    """Where an item belongs at an endpoint.

    Attributes:
        place: mark of the place, "" where the endpoint has only one.
        name: what the item is there: its SOP Instance UID, or its path.
    """

    place: str
    name: str


@dataclass(frozen=True, slots=True)
class Confirmation:
    """One content that a place has confirmed of an item; `sha256` is "" if nobody has read it.

    Attributes:
        time: when it was confirmed last, in seconds since the epoch.
    """

    size: int
    mtime_ns: int
    sha256: str
    outcome: Outcome
    time: float = field(default=0.0, compare=False)

    def is_file(self, item: Item) -> bool:
        """Return True if length and time are those of a file."""
        return (self.size, self.mtime_ns) == (item.size, item.mtime_ns)

    def proves(self, item: Item) -> bool:
        """Return True if length and time say that a file has this content.

        A time in whole seconds doesn't: what unpacks archives, or copies from some file systems, makes such times.
        """
        return self.is_file(item) and item.mtime_ns % SECOND != 0


def find(db: Statements, listed: str, endpoint: str, spots: Iterable[Spot]) -> dict[Spot, list[Confirmation]]:
    """Return what an endpoint has confirmed of each spot; a spot that nothing is known of has no entry.

    Args:
        listed: the database's query of the elements of a JSON list.
    """
    by_place: dict[str, list[str]] = defaultdict(list)
    for spot in dict.fromkeys(spots):
        by_place[spot.place].append(spot.name)
    found: dict[Spot, list[Confirmation]] = defaultdict(list)
    statement = (
        "SELECT item, size, mtime_ns, sha256, outcome, detail, time FROM confirmed"  # noqa: S608 - ours
        f" WHERE endpoint=? AND place=? AND item IN ({listed}) ORDER BY time DESC"
    )
    for place, names in by_place.items():
        for name, size, mtime_ns, sha256, outcome, detail, time in db.execute(
            statement, (endpoint, place, json.dumps(names))
        ):
            found[Spot(place, name)].append(Confirmation(size, mtime_ns, sha256, outcome_of(outcome, detail), time))
    return found


def record(
    db: Statements,
    endpoint: str,
    spot: Spot,
    dispatch_id: str,
    item: Item,
    outcome: Outcome,
    since: float,
    now: float,
    *,
    by_uid: bool = False,
) -> None:
    """Save what an outcome says about what is at a spot.

    A rejection of what had been confirmed means that it isn't there. A delivery replaces what other dispatches put
    there; if one of them did so while this one was pushing, nobody knows which content came last.

    Args:
        since: when this push began, in seconds since the epoch.
        by_uid: whether a target that has something "already" knows it by its UID only: where other contents of it were
            confirmed, that says nothing about this one.
    """
    here = (endpoint, spot.place, spot.name)
    file = (item.size, item.mtime_ns)
    if outcome.kind not in ARRIVED:
        if db.execute(f"DELETE FROM confirmed WHERE {_HERE} AND size=? AND mtime_ns=?", (*here, *file)).rowcount:  # noqa: S608
            withdraw(db, endpoint, (spot,), now)
        return
    if outcome.kind is Kind.ALREADY or outcome.found:
        db.execute(f"DELETE FROM confirmed WHERE {_HERE} AND size=?", (*here, NOTHING))  # noqa: S608
        if by_uid and _holds_others(db, here, file, dispatch_id, item):
            return
    if outcome.kind is not Kind.ALREADY:
        # Files of one dispatch that share a UID, the same instance in other wrapping, don't replace each other.
        rows = db.execute(
            f"DELETE FROM confirmed WHERE {_HERE} AND NOT (size=? AND mtime_ns=?)"  # noqa: S608
            " AND NOT (dispatch_id=? AND path<>?) RETURNING size, time",
            (*here, *file, dispatch_id, item.shown),
        )
        gone = [(size, time) for size, time in rows]
        if any(time >= since and size != NOTHING for size, time in gone):
            withdraw(db, endpoint, (spot,), now)
            return
    row = (*here, *file, "", str(outcome.kind), outcome.detail, dispatch_id, item.shown, now)
    db.execute(
        "INSERT INTO confirmed VALUES (?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (endpoint, place, item, size, mtime_ns)"
        " DO UPDATE SET sha256=CASE WHEN excluded.outcome='already' THEN confirmed.sha256 ELSE '' END,"
        " outcome=excluded.outcome, detail=excluded.detail, dispatch_id=excluded.dispatch_id, path=excluded.path,"
        " time=excluded.time",
        row,
    )


def _holds_others(
    db: Statements, here: tuple[str, str, str], file: tuple[int, int], dispatch_id: str, item: Item
) -> bool:
    """Return True if a spot has confirmed contents, and a file's own is not known to be among them."""
    rows = db.execute(
        f"SELECT size, mtime_ns FROM confirmed WHERE {_HERE} AND NOT (dispatch_id=? AND path<>?)",  # noqa: S608
        (*here, dispatch_id, item.shown),
    ).fetchall()
    return bool(rows) and file not in {tuple(row) for row in rows}


def withdraw(db: Statements, endpoint: str, spots: Iterable[Spot], now: float) -> None:
    """Note that an endpoint does not hold any content of these spots, as far as is known."""
    for spot in spots:
        here = (endpoint, spot.place, spot.name)
        db.execute(f"DELETE FROM confirmed WHERE {_HERE}", here)  # noqa: S608
        db.execute(
            "INSERT INTO confirmed VALUES (?,?,?,?,0,'','rejected','','','',?)"
            " ON CONFLICT (endpoint, place, item, size, mtime_ns) DO UPDATE SET time=excluded.time",
            (*here, NOTHING, now),
        )


def holds(db: Statements, endpoint: str, spot: Spot, one: Confirmation) -> bool:
    """Return True if what has been found is still there, and see to it that it is until the end of the transaction."""
    here = (endpoint, spot.place, spot.name)
    touched = db.execute(
        f"UPDATE confirmed SET time=time WHERE {_HERE} AND size=? AND mtime_ns=? AND ? IN ('', sha256)",  # noqa: S608
        (*here, one.size, one.mtime_ns, one.sha256),
    )
    return int(touched.rowcount) == 1


def sum_up(db: Statements, endpoint: str, dispatch_id: str, sums: Iterable[tuple[Spot, Item, str]]) -> None:
    """Add the SHA-256 of a dispatch's files to what it has confirmed, unless another has confirmed it since."""
    for spot, item, sha256 in sums:
        db.execute(
            f"UPDATE confirmed SET sha256=? WHERE {_HERE} AND size=? AND mtime_ns=?"  # noqa: S608
            " AND dispatch_id=? AND path=?",
            (sha256, endpoint, spot.place, spot.name, item.size, item.mtime_ns, dispatch_id, item.shown),
        )


def same(
    confirmations: Iterable[Confirmation],
    item: Item,
    sha256: Iterator[str],
    is_doubtful: Callable[[Confirmation], bool] = lambda one: False,
) -> Confirmation | None:
    """Return the confirmation that is about a file's content.

    Args:
        sha256: yields the file's sum, or nothing; asked only where length and time don't decide.
        is_doubtful: whether these say nothing, as something has happened to the file since.
    """
    alike = [one for one in confirmations if one.size == item.size]
    found = next((one for one in alike if one.proves(item) and not is_doubtful(one)), None)
    if found is None and any(one.sha256 for one in alike):
        value = next(sha256, "")
        found = next((one for one in alike if one.sha256 and one.sha256 == value), None)
    return found
