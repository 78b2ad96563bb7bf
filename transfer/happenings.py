"""What has happened that people want to hear of, and how often, in the ledger's database.

A change is recorded where it is made, in one transaction with the totals that it adds to. Who writes to people takes
it from there (`transfer.messages`), in this process or another one, on this host or another one, now or after a crash.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transfer.database import Database

TABLES = """
CREATE TABLE IF NOT EXISTS totals (
  host TEXT NOT NULL, name TEXT NOT NULL, target TEXT NOT NULL, label TEXT NOT NULL,
  value DOUBLE PRECISION NOT NULL, PRIMARY KEY (host, name, target, label)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ends (
  flow_run_id TEXT NOT NULL, target TEXT NOT NULL, state TEXT NOT NULL,
  PRIMARY KEY (flow_run_id, target)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hours (
  hour BIGINT NOT NULL, target TEXT NOT NULL, state TEXT NOT NULL, dispatches BIGINT NOT NULL,
  bytes DOUBLE PRECISION NOT NULL, last DOUBLE PRECISION NOT NULL, PRIMARY KEY (hour, target, state)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS standing (
  subject TEXT PRIMARY KEY, state TEXT NOT NULL, since DOUBLE PRECISION NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS happenings (
  id TEXT PRIMARY KEY, keyed INTEGER NOT NULL, time DOUBLE PRECISION NOT NULL, event TEXT NOT NULL,
  about TEXT NOT NULL, taken DOUBLE PRECISION NOT NULL) WITHOUT ROWID;
"""
# Names of totals. A label is what comes after the target: the outcome, or for SECONDS_WITHIN "outcome/bound".
DISPATCHES, ITEMS, BYTES, SECONDS, SECONDS_WITHIN = "dispatches", "items", "bytes", "seconds", "seconds_within"
BOUNDS_S = (1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 43_200.0)  # of a histogram: an upload, a night
BEYOND = "+Inf"
HOUR_S = 3600
CANCELLED = (
    "cancelled/"  # begins what stands of a run: the cancellation that was said, for which no process was at work
)


@dataclass(frozen=True)
class Happening:
    """Something that has happened.

    Attributes:
        id: the same for whoever reports the same.
        time: seconds since the epoch, by the database's clock.
        event: as in `dispatch.failed`.
        about: what is known of it; no patient's data and no secret.
    """

    id: str
    time: float
    event: str
    about: dict[str, Any]


@dataclass(frozen=True)
class HourSum:
    """What ended at a target within an hour, in one state.

    Attributes:
        hour: number of the hour since the epoch.
        bytes: that were sent.
        last: when the last of the dispatches ended, seconds since the epoch.
    """

    hour: int
    target: str
    state: str
    dispatches: int
    bytes: float
    last: float


@dataclass(frozen=True)
class Total:
    """A sum since the ledger was made."""

    name: str
    target: str
    label: str
    value: float


class Happenings:
    """The tables of a ledger that is open; as safe to share as that is."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # ---- recorded

    def happened(self, event: str, about: Mapping[str, Any], key: str = "") -> bool:
        """Record that something has happened; return False if that is known already.

        Args:
            key: names it for good: with the same key it is recorded once, whoever sees it. "" for what comes anew
                each time.
        """
        row = (key or uuid.uuid4().hex, int(bool(key)), self._db.time(), event, json.dumps(about))
        with self._db.reading():
            return (
                self._db.execute(
                    "INSERT INTO happenings VALUES (?,?,?,?,?,0) ON CONFLICT (id) DO NOTHING", row
                ).rowcount
                == 1
            )

    def ended(
        self,
        host: str,
        run: str,
        target: str,
        state: str,
        items: Mapping[str, int],
        size: int,
        seconds: float,
        event: str,
        about: Mapping[str, Any],
        *,
        at_first: bool = False,
    ) -> bool:
        """Record and count how a dispatch ended at a target; return False if this end of its run is known already.

        Args:
            at_first: whether it counts only where no other end is known, either.
            host: whose totals it adds to; "" where no other host shares the ledger.
            items: how many, by outcome.
            size: bytes that were sent.
        """
        with self._db.writing():
            otherwise = "NOTHING" if at_first else "UPDATE SET state=excluded.state WHERE ends.state<>excluded.state"
            new = self._db.execute(
                f"INSERT INTO ends VALUES (?,?,?) ON CONFLICT (flow_run_id, target) DO {otherwise}",  # noqa: S608
                (run, target, state),
            ).rowcount
            if new != 1:
                return False
            sums = {(DISPATCHES, state): 1.0, (BYTES, state): float(size), (SECONDS, state): seconds}
            sums[SECONDS_WITHIN, f"{state}/{_bound(seconds)}"] = 1.0
            sums |= {(ITEMS, outcome): float(count) for outcome, count in items.items()}
            for (name, label), value in sums.items():
                if value:
                    self._add(host, name, target, label, value)
            now = self._db.time()
            self._db.execute(
                "INSERT INTO hours VALUES (?,?,?,1,?,?) ON CONFLICT (hour, target, state) DO UPDATE SET"
                " dispatches=hours.dispatches+1, bytes=hours.bytes+excluded.bytes, last=excluded.last",
                (int(now // HOUR_S), target, state, float(size), now),
            )
            return self.happened(event, about)

    def _add(self, host: str, name: str, target: str, label: str, value: float) -> None:
        self._db.execute(
            "INSERT INTO totals VALUES (?,?,?,?,?) ON CONFLICT (host, name, target, label)"
            " DO UPDATE SET value=totals.value+excluded.value",
            (host, name, target, label, value),
        )

    def run_over(self, run: str, owner: str | None) -> None:
        """Forget which ends of a run are known: it is over, and if it runs again, that is another time.

        Args:
            owner: only if the run is still this one's; None for whoever has it.
        """
        with self._db.reading():
            self._db.execute(
                "DELETE FROM ends WHERE flow_run_id=? AND EXISTS (SELECT 1 FROM runs"
                " WHERE runs.flow_run_id=ends.flow_run_id AND owner=coalesce(?,owner))",
                (run, owner),
            )

    def may_end_again(self, run: str, state: str) -> None:
        """Forget where a run has ended in a state: the same may be said of it again."""
        self._db.execute("DELETE FROM ends WHERE flow_run_id=? AND state=?", (run, state))

    def stands(self, subject: str, state: str, *, at_first: bool = True) -> bool:
        """Note the state of something that all hosts see; return True if it was another one.

        Args:
            at_first: whether a state is to be noted where none is known; that counts as another one.
        """
        now = self._db.time()
        with self._db.reading():
            changed = self._db.execute(
                "UPDATE standing SET state=?, since=? WHERE subject=? AND state<>?", (state, now, subject, state)
            ).rowcount
            if not changed and at_first:
                changed = self._db.execute(
                    "INSERT INTO standing VALUES (?,?,?) ON CONFLICT (subject) DO NOTHING", (subject, state, now)
                ).rowcount
        return changed == 1

    def standing(self, subject: str) -> str:
        """Return the state of something; "" if none is known."""
        with self._db.reading():
            row = self._db.execute("SELECT state FROM standing WHERE subject=?", (subject,)).fetchone()
        return str(row[0]) if row else ""

    def standings(self, begins: str) -> dict[str, str]:
        """Return the states of all subjects that begin so."""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT subject, state FROM standing WHERE substr(subject, 1, ?)=?", (len(begins), begins)
            ).fetchall()
        return {str(row[0]): str(row[1]) for row in rows}

    # ---- read

    def totals(self, host: str) -> list[Total]:
        """Return all sums of a host."""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT name, target, label, value FROM totals WHERE host=? ORDER BY name, target, label", (host,)
            ).fetchall()
        return [Total(*row) for row in rows]

    def hours(self, since: float, target: str = "") -> list[HourSum]:
        """Return what ended at targets, hour by hour, since a time (seconds since the epoch); at all hosts.

        Args:
            target: only at this one.
        """
        with self._db.reading():
            rows = self._db.execute(
                "SELECT hour, target, state, dispatches, bytes, last FROM hours WHERE hour>=? AND (?='' OR target=?)"
                " ORDER BY hour, target, state",
                (int(since // HOUR_S), target, target),
            ).fetchall()
        return [HourSum(*row) for row in rows]

    def days(self, since: float) -> list[HourSum]:
        """Return what ended at each target since a time, summed up; `hour` is the first one's."""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT min(hour), target, state, sum(dispatches), sum(bytes), max(last) FROM hours WHERE hour>=?"
                " GROUP BY target, state ORDER BY target, state",
                (int(since // HOUR_S),),
            ).fetchall()
        return [HourSum(hour, target, state, int(count), size, last) for hour, target, state, count, size, last in rows]

    def waiting(self, limit: int) -> list[Happening]:
        """Return what nobody has taken, the oldest first."""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT id, time, event, about FROM happenings WHERE taken=0 ORDER BY time, id LIMIT ?", (limit,)
            ).fetchall()
        return [Happening(one, time, event, json.loads(about)) for one, time, event, about in rows]

    def take(self, found: Iterable[Happening]) -> list[Happening]:
        """Take what has happened, within a block of `writing`; return what nobody else has taken meanwhile.

        What has a key stays, so that it does not happen twice; the rest is forgotten.
        """
        mine = []
        for one in found:
            statements = (
                ("DELETE FROM happenings WHERE id=? AND taken=0 AND keyed=0", (one.id,)),
                ("UPDATE happenings SET taken=? WHERE id=? AND taken=0 AND keyed=1", (self._db.time(), one.id)),
            )
            if any(self._db.execute(statement, values).rowcount for statement, values in statements):
                mine.append(one)
        return mine

    def prune(self, before: float) -> int:
        """Forget what happened before a time (seconds since the epoch); return how many rows."""
        self._db.execute("DELETE FROM hours WHERE hour < ?", (int(before // HOUR_S),))
        self._db.execute("DELETE FROM ends WHERE flow_run_id NOT IN (SELECT flow_run_id FROM runs)")
        self._db.execute(
            "DELETE FROM standing WHERE since < ? AND substr(subject, 1, ?)=?", (before, len(CANCELLED), CANCELLED)
        )
        return self._db.execute("DELETE FROM happenings WHERE time < ?", (before,)).rowcount


def _bound(seconds: float) -> str:
    return next((f"{bound:g}" for bound in BOUNDS_S if seconds <= bound), BEYOND)
