"""Takes from the ledger what is old, some rows a time: whoever delivers meanwhile records between two portions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transfer.database import Database

PORTION = 5000  # rows deleted, or looked at, with one commit: some 20 ms, in which nobody else writes
_LAST_KEY = "SELECT endpoint, place, item FROM confirmed WHERE (endpoint, place, item) > (?,?,?)"
_LAST_KEY += " ORDER BY endpoint, place, item LIMIT 1 OFFSET ?"


def prune_dispatches(db: Database, before: float, keep: Iterable[str]) -> int:
    """Delete dispatches that ended before a time (seconds since the epoch); return how many rows.

    One that begins again meanwhile stays, or what is left of it.

    Args:
        keep: ids of flow runs that go on later: their dispatches stay.
    """
    kept, count = json.dumps([*keep]), 0
    on = f"ended IS NULL OR flow_run_id IN ({db.LISTED})"
    old = (
        f" GROUP BY dispatch_id HAVING MAX(time) < ? AND dispatch_id NOT IN (SELECT dispatch_id FROM runs WHERE {on}"  # noqa: S608 - ours
        f" UNION ALL SELECT dispatch_id FROM studies WHERE flow_run_id IN (SELECT flow_run_id FROM runs WHERE {on}))"
    )
    still_old = f"SELECT dispatch_id FROM items WHERE dispatch_id IN ({db.LISTED}){old}"  # noqa: S608 - ours
    rows = (
        "DELETE FROM items WHERE (dispatch_id, destination, path) IN (SELECT dispatch_id, destination, path"  # noqa: S608
        f" FROM items WHERE dispatch_id IN ({db.LISTED}) LIMIT ?)"
    )
    with db.reading():  # all of it is looked at, which takes seconds where there are millions, and holds up nobody
        found = db.execute(f"SELECT dispatch_id, COUNT(*) FROM items{old}", (before, kept, kept)).fetchall()  # noqa: S608
    for portion in _portions(found):
        gone = PORTION
        while gone == PORTION:  # else they are all gone
            with _in_turn(db):
                asked = json.dumps(portion), before, kept, kept
                ids = json.dumps([row[0] for row in db.execute(still_old, asked).fetchall()])
                for table in ("hooks", "runs"):
                    statement = f"DELETE FROM {table} WHERE dispatch_id IN ({db.LISTED})"  # noqa: S608 - ours
                    count += db.execute(statement, (ids,)).rowcount
                gone = db.execute(rows, (ids, PORTION)).rowcount
                count += gone
    return count


@contextmanager
def _in_turn(db: Database) -> Iterator[None]:
    """Write a portion, and wait as long as it took: who waits for SQLite's lock looks for it every 0.1 s only."""
    begun = time.monotonic()
    with db.writing():
        yield
    time.sleep(time.monotonic() - begun)


def _portions(dispatches: Iterable[tuple[str, int]]) -> Iterator[list[str]]:
    """Yield dispatches together that have no more rows than a portion, and larger ones alone."""
    portion, rows = list[str](), 0
    for dispatch, count in dispatches:
        if portion and rows + count > PORTION:
            yield portion
            portion, rows = [], 0
        portion.append(dispatch)
        rows += count
    if portion:
        yield portion


def prune_runs(db: Database, before: float, keep: Iterable[str]) -> int:
    """Delete runs that ended before a time and of whose dispatch nothing is kept; return how many.

    Such are checks and queries, floods, whose studies are dispatches of their own, and what never sent anything.

    Args:
        keep: ids of flow runs that go on later.
    """
    listed = f"flow_run_id IN ({db.LISTED})"
    with db.reading():
        found = db.execute(
            f"SELECT flow_run_id FROM runs WHERE ended < ? AND NOT {listed}"  # noqa: S608 - ours
            " AND NOT EXISTS (SELECT 1 FROM items WHERE items.dispatch_id=runs.dispatch_id)",
            (before, json.dumps([*keep])),
        ).fetchall()
    count = 0
    still = f"SELECT flow_run_id FROM runs WHERE {listed} AND ended < ?"  # noqa: S608 - ours
    studies = (
        "DELETE FROM studies WHERE (flow_run_id, dispatch_id) IN (SELECT flow_run_id, dispatch_id"  # noqa: S608
        f" FROM studies WHERE flow_run_id IN ({still}) LIMIT ?)"
    )
    for at in range(0, len(found), PORTION):
        ids, gone = json.dumps([row[0] for row in found[at : at + PORTION]]), PORTION
        while gone == PORTION:
            with _in_turn(db):
                gone = db.execute(studies, (ids, before, PORTION)).rowcount
        with _in_turn(db):
            count += db.execute(f"DELETE FROM runs WHERE {listed} AND ended < ?", (ids, before)).rowcount  # noqa: S608
    return count


def prune_confirmed(db: Database, before: float) -> int:
    """Delete what was confirmed before a time, unless the dispatch that says so is remembered; return how many rows."""
    last, count = ("", "", ""), 0
    while True:
        with db.reading():
            bound = db.execute(_LAST_KEY, (*last, PORTION)).fetchone()
        within = "(endpoint, place, item) > (?,?,?)" + (" AND (endpoint, place, item) <= (?,?,?)" if bound else "")
        with _in_turn(db):
            count += db.execute(
                f"DELETE FROM confirmed WHERE {within} AND time < ?"  # noqa: S608 - ours
                " AND NOT EXISTS (SELECT 1 FROM items WHERE items.dispatch_id=confirmed.dispatch_id)",
                (*last, *(bound or ()), before),
            ).rowcount
        if not bound:
            return count
        last = bound
