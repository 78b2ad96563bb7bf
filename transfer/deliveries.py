"""How each delivery of a run stood when the run last rested or ended, in the ledger's database: what lists show.

Receipts say it item by item; a row says it in a line, so that many runs are read at once. Statements are understood by
SQLite and PostgreSQL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transfer.database import Database

TABLES = """
CREATE TABLE IF NOT EXISTS deliveries (
  flow_run_id TEXT NOT NULL, target TEXT NOT NULL, state TEXT NOT NULL, items BIGINT NOT NULL, arrived BIGINT NOT NULL,
  words TEXT NOT NULL, time DOUBLE PRECISION NOT NULL, PRIMARY KEY (flow_run_id, target)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS deliveries_by_state ON deliveries (target, state, time);
"""
WHOLE = ""  # the target of the row of a run as a whole


@dataclass(frozen=True, slots=True)
class Standing:
    """How a delivery stood.

    Attributes:
        state: as in a receipt.
        items: of the plan.
        arrived: items that are there.
        words: why what is missing is missing; "" if nothing is.
    """

    target: str
    state: str
    items: int
    arrived: int
    words: str


class Deliveries:
    """The table of a ledger that is open; as safe to share as that is."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def stand(self, run: str, state: str, standings: Iterable[Standing]) -> None:
        """Note how the deliveries of a run stand, and the run as a whole."""
        found = list(standings)
        items, arrived = sum(one.items for one in found), sum(one.arrived for one in found)
        now = self._db.time()
        with self._db.writing():
            for one in (*found, Standing(WHOLE, state, items, arrived, "")):
                self._db.execute(
                    "INSERT INTO deliveries VALUES (?,?,?,?,?,?,?) ON CONFLICT (flow_run_id, target) DO UPDATE SET"
                    " state=excluded.state, items=excluded.items, arrived=excluded.arrived, words=excluded.words,"
                    " time=excluded.time",
                    (run, one.target, one.state, one.items, one.arrived, one.words, now),
                )

    def of(self, runs: Sequence[str]) -> dict[str, dict[str, Standing]]:
        """Return how the deliveries of some runs stood, by run and target; the run as a whole as target WHOLE."""
        found: dict[str, dict[str, Standing]] = {}
        with self._db.reading():
            rows = self._db.execute(
                "SELECT flow_run_id, target, state, items, arrived, words FROM deliveries"  # noqa: S608 - ours
                f" WHERE flow_run_id IN ({self._db.LISTED})",
                (json.dumps([*runs]),),
            ).fetchall()
        for run, *row in rows:
            one = Standing(*row)
            found.setdefault(run, {})[one.target] = one
        return found

    def newest(self, state: str, limit: int, target: str = WHOLE, since: float = 0.0) -> list[str]:
        """Return the ids of the dispatches that stand so, as a whole or at a target; those that came to it last.

        Retrievals, which have a row as a whole only, are none.

        Args:
            since: only those that came to it since then, in seconds since the epoch.
        """
        with self._db.reading():
            rows = self._db.execute(
                "SELECT flow_run_id FROM deliveries AS one WHERE target=? AND state=? AND time>=? AND EXISTS"
                " (SELECT 1 FROM deliveries AS part WHERE part.flow_run_id=one.flow_run_id AND part.target<>?)"
                " ORDER BY time DESC LIMIT ?",
                (target, state, since, WHOLE, limit),
            ).fetchall()
        return [str(row[0]) for row in rows]

    def prune(self, before: float, keep: Iterable[str] = ()) -> int:
        """Forget what was noted before a time (seconds since the epoch); return how many rows.

        Args:
            keep: ids of flow runs that go on later.
        """
        return self._db.execute(
            f"DELETE FROM deliveries WHERE time < ? AND flow_run_id NOT IN ({self._db.LISTED})",  # noqa: S608 - ours
            (before, json.dumps([*keep])),
        ).rowcount
