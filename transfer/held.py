"""Which slots of targets are held, and by whom, in the ledger's database.

The Prefect server counts slots, and has a lease for whoever holds some. Here stands whose lease it is, so that what a
killed process held can be given back at once, and a count that no lease stands for be put right
(`talaria.engine.slots`).
"""

from __future__ import annotations

from dataclasses import dataclass

from transfer.database import Database

TABLES = """
CREATE TABLE IF NOT EXISTS held (
  lease TEXT PRIMARY KEY, target TEXT NOT NULL, run TEXT NOT NULL, owner TEXT NOT NULL, slots BIGINT NOT NULL
  ) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class SlotsHeld:
    """Slots that a run holds.

    Attributes:
        lease: its id at the Prefect server.
        owner: the process that took them.
        at_work: whether the run is still that one's.
    """

    lease: str
    target: str
    owner: str
    slots: int
    at_work: bool


class HeldSlots:
    """The table of a ledger that is open; as safe to share as that is."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def note(self, lease: str, target: str, run: str, slots: int) -> None:
        """Note that a run, which its owner is at work on, holds slots; again changes nothing."""
        self._db.execute(
            "INSERT INTO held SELECT ?, ?, flow_run_id, owner, ? FROM runs WHERE flow_run_id=? AND ended IS NULL"
            " ON CONFLICT (lease) DO NOTHING",
            (lease, target, slots, run),
        )

    def forget(self, lease: str) -> bool:
        """Forget slots that are given back; return whether they were known, to one of those who say so."""
        return self._db.execute("DELETE FROM held WHERE lease=?", (lease,)).rowcount > 0

    def all(self) -> list[SlotsHeld]:
        """Return all that is held."""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT h.lease, h.target, h.owner, h.slots, r.flow_run_id IS NOT NULL FROM held h"
                " LEFT JOIN runs r ON r.flow_run_id=h.run AND r.owner=h.owner AND r.ended IS NULL"
            ).fetchall()
        return [SlotsHeld(lease, target, owner, slots, bool(works)) for lease, target, owner, slots, works in rows]
