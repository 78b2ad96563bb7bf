"""What runs that wait leave behind for their next part, in the ledger's database: whichever host has it next reads it.

What it says is known to who writes it (`tasks.dispatch.rest`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from transfer.database import Database

APART_S = 2.0  # by which a clock may be put right without having been wrong
TABLES = """
CREATE TABLE IF NOT EXISTS rests (
  flow_run_id TEXT PRIMARY KEY, home TEXT NOT NULL, kept TEXT NOT NULL, time DOUBLE PRECISION NOT NULL) WITHOUT ROWID;
"""


class Rests:
    """The table of a ledger that is open; as safe to share as that is."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def keep(self, run: str, home: str, kept: str) -> None:
        """Keep what a run leaves behind, instead of what it left before.

        Args:
            home: name of the state directory that has its receipts (`Home.identity`).
            kept: a JSON document.
        """
        self._db.execute(
            "INSERT INTO rests VALUES (?,?,?,?) ON CONFLICT (flow_run_id) DO UPDATE SET"
            " home=excluded.home, kept=excluded.kept, time=excluded.time",
            (run, home, kept, self._db.time()),
        )

    def of(self, run: str) -> tuple[str, str] | None:
        """Return the state directory that has a run's receipts, and what it has left behind; None for nothing."""
        with self._db.reading():
            row = self._db.execute("SELECT home, kept FROM rests WHERE flow_run_id=?", (run,)).fetchone()
        return (str(row[0]), str(row[1])) if row else None

    def is_ahead(self, run: str) -> bool:
        """Return True if what a run has left behind was noted before the clock was set back."""
        with self._db.reading():
            row = self._db.execute("SELECT time FROM rests WHERE flow_run_id=?", (run,)).fetchone()
        return row is not None and row[0] > self._db.time() + APART_S

    def runs(self) -> set[str]:
        """Return the ids of the runs that have left something behind."""
        with self._db.reading():
            return {str(row[0]) for row in self._db.execute("SELECT flow_run_id FROM rests")}

    def forget(self, run: str) -> None:
        """Remove what a run has left behind."""
        self._db.execute("DELETE FROM rests WHERE flow_run_id=?", (run,))

    def prune(self, before: float, keep: Iterable[str] = ()) -> int:
        """Forget what was left before a time (seconds since the epoch); return how many rows.

        Args:
            keep: ids of runs that have not ended.
        """
        return self._db.execute(
            f"DELETE FROM rests WHERE time < ? AND flow_run_id NOT IN ({self._db.LISTED})",  # noqa: S608 - ours
            (before, json.dumps([*keep])),
        ).rowcount
