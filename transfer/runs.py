"""Which process runs which flow run, and which processes may, in the ledger's database.

A row for each run says who has it, and which dispatch it is, or which ones a flood has begun; one for each owner, until
when its lease lasts. What follows from it is decided by who asks (`transfer.lease`, `talaria.engine.recovery`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from transfer.database import Database
from transfer.happenings import Happenings
from transfer.plan import Plan

TABLES = """
CREATE TABLE IF NOT EXISTS runs (
  flow_run_id TEXT PRIMARY KEY, dispatch_id TEXT NOT NULL, owner TEXT NOT NULL,
  begun DOUBLE PRECISION NOT NULL, ended DOUBLE PRECISION) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS studies (
  flow_run_id TEXT NOT NULL, dispatch_id TEXT NOT NULL, PRIMARY KEY (flow_run_id, dispatch_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owners (
  owner TEXT PRIMARY KEY, home TEXT NOT NULL, host TEXT NOT NULL, until DOUBLE PRECISION NOT NULL) WITHOUT ROWID;
"""
APART_S = 1.0  # by which two hosts may differ in what they take for the database's time
STEP_S = 60.0  # an end that is further ahead was noted before the clock was set back


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has, or had, a lease (`transfer.lease`): who can say that it lives, and whether it has it still.

    Attributes:
        home: its kernel and state directory (`Home.kernel`).
    """

    home: str
    host: str
    live: bool


class Runs:
    """The tables of a ledger that is open; as safe to share as that is."""

    def __init__(self, db: Database, happenings: Happenings) -> None:
        self._db, self._happenings = db, happenings

    def begins(self, flow_run_id: str, owner: str) -> None:
        """Note which process runs a flow run; its dispatch id, if it has one, stays."""
        with self._db.reading():
            self._db.execute(
                "INSERT INTO runs VALUES (?,'',?,?,NULL) ON CONFLICT (flow_run_id) DO UPDATE SET"
                " owner=excluded.owner, begun=excluded.begun, ended=NULL",
                (flow_run_id, owner, self._db.time()),
            )

    def claimed(self, flow_run_id: str, owner: str, alive: Callable[[str], bool], found: float | None = None) -> bool:
        """Note that a process is about to run a flow run, unless a living one has it; return whether it may.

        Args:
            found: when it was asked for at the server, in monotonic seconds: what another process has ended since then
                only looked as if it were to be run.
        """
        row = self._db.execute("SELECT owner, ended FROM runs WHERE flow_run_id=?", (flow_run_id,)).fetchone()
        if row and row[1] is None and row[0] and alive(row[0]):
            return False
        if self._db.shared and not alive(owner):  # its lease has ended while it looked
            return False
        now = self._db.time()
        before = math.inf if found is None else now - (time.monotonic() - found) - (APART_S if self._db.shared else 0.0)
        claimed = self._db.execute(
            "INSERT INTO runs VALUES (?,'',?,?,NULL) ON CONFLICT (flow_run_id) DO UPDATE SET"
            " owner=excluded.owner, begun=excluded.begun, ended=NULL"
            " WHERE runs.ended<? OR runs.ended>?"
            # Not another's, who was faster; our own is there if the answer to the first attempt got lost.
            " OR (runs.ended IS NULL AND (runs.owner='' OR runs.owner=? OR runs.owner=excluded.owner))",
            (flow_run_id, owner, now, before, now + STEP_S, row[0] if row else ""),
        )
        return claimed.rowcount == 1

    def is_over(self, flow_run_id: str) -> bool:
        """Return True if a run, or a part of it, has been begun and has ended."""
        row = self._db.execute("SELECT ended FROM runs WHERE flow_run_id=?", (flow_run_id,)).fetchone()
        return bool(row and row[0] is not None)

    def same_dispatch(self, flow_run_id: str, plan: Plan) -> Plan:
        """Return the plan with the dispatch id that its flow run had when it first ran.

        A run that is taken up again continues its own dispatch, even if a file has changed since.
        """
        with self._db.reading():
            row = self._db.execute("SELECT dispatch_id FROM runs WHERE flow_run_id=?", (flow_run_id,)).fetchone()
            if row and row[0]:
                return replace(plan, dispatch_id=row[0])
            self._db.execute(
                "INSERT INTO runs VALUES (?,?,'',?,NULL)"
                " ON CONFLICT (flow_run_id) DO UPDATE SET dispatch_id=excluded.dispatch_id",
                (flow_run_id, plan.dispatch_id, self._db.time()),
            )
        return plan

    def begins_study(self, flow_run_id: str, dispatch_id: str) -> None:
        """Note a dispatch that a run has begun beside others: nothing of it is forgotten while the run goes on."""
        self._db.execute("INSERT INTO studies VALUES (?,?) ON CONFLICT DO NOTHING", (flow_run_id, dispatch_id))

    def newest(self) -> float:
        """Return when a run began last, in seconds since the epoch; 0 if none is known."""
        with self._db.reading():
            (found,) = self._db.execute("SELECT max(begun) FROM runs").fetchone()
        return float(found or 0)

    def dispatch_of(self, flow_run_id: str) -> str:
        """Return the id of a run's dispatch; "" if none is known."""
        with self._db.reading():
            row = self._db.execute("SELECT dispatch_id FROM runs WHERE flow_run_id=?", (flow_run_id,)).fetchone()
        return str(row[0]) if row else ""

    def ends(self, flow_run_id: str, owner: str | None = None, *, goes_on: bool = False) -> None:
        """Note that a flow run is over, however it ended.

        Args:
            owner: only if the run is still this one's; None for whoever has it.
            goes_on: whether it is only a part of it, or it goes on where its process was killed: what was said of its
                ends is not said again.
        """
        if not goes_on:
            self._happenings.run_over(flow_run_id, owner)
        self._db.execute(
            "UPDATE runs SET ended=? WHERE flow_run_id=? AND owner=coalesce(?,owner)",
            (self._db.time(), flow_run_id, owner),
        )

    def owner_of(self, flow_run_id: str) -> str | None:
        """Return the owner of a run that has begun and not ended; None for any other."""
        statement = "SELECT owner FROM runs WHERE flow_run_id=? AND ended IS NULL"
        with self._db.reading():
            row = self._db.execute(statement, (flow_run_id,)).fetchone()
        return str(row[0]) if row else None

    def unfinished(self) -> dict[str, str]:
        """Return the owner, by flow run id, of every run that has begun and not ended."""
        with self._db.reading():
            return dict(self._db.execute("SELECT flow_run_id, owner FROM runs WHERE ended IS NULL"))

    def enroll(self, owner: str, home: str, host: str, seconds: float) -> None:
        """Give a process a lease."""
        self._db.execute(
            f"INSERT INTO owners VALUES (?,?,?,{self._db.NOW}+?) ON CONFLICT (owner) DO NOTHING",  # noqa: S608 - ours
            (owner, home, host, seconds),
        )

    def renew(self, owner: str, seconds: float) -> bool:
        """Renew a lease; return False if it has ended, for ever."""
        now = self._db.NOW
        return (
            self._db.execute(
                f"UPDATE owners SET until={now}+? WHERE owner=? AND until>{now}",  # noqa: S608 - ours
                (seconds, owner),
            ).rowcount
            == 1
        )

    def resign(self, owner: str) -> None:
        """End a lease."""
        self._db.execute("UPDATE owners SET until=0 WHERE owner=?", (owner,))

    def holder(self, owner: str) -> Holder | None:
        """Return who has, or had, a lease."""
        row = self._db.execute(
            f"SELECT home, host, until>{self._db.NOW} FROM owners WHERE owner=?",  # noqa: S608 - ours
            (owner,),
        ).fetchone()
        return Holder(row[0], row[1], bool(row[2])) if row else None

    def hosts(self) -> set[str]:
        """Return the hosts of all that have a lease."""
        with self._db.reading():
            rows = self._db.execute(f"SELECT DISTINCT host FROM owners WHERE until>{self._db.NOW}")  # noqa: S608 - ours
            return {str(row[0]) for row in rows}

    def prune_owners(self, before: float) -> int:
        """Forget owners that ended before a time; return how many."""
        return self._db.execute(
            "DELETE FROM owners WHERE until < ? AND owner NOT IN (SELECT owner FROM runs WHERE ended IS NULL)",
            (before,),
        ).rowcount
