"""Who waits at a target, and which targets do not answer, in the ledger's database: all its hosts see the same.

What follows from it is decided by who asks (`tasks.dispatch.line`, `tasks.dispatch.breaker`). Times are those of the
database's clock, in seconds since the epoch.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from transfer.database import Database

TABLES = """
CREATE TABLE IF NOT EXISTS breakers (
  target TEXT PRIMARY KEY, mark TEXT NOT NULL, failures BIGINT NOT NULL, opened DOUBLE PRECISION NOT NULL,
  tested DOUBLE PRECISION NOT NULL, until DOUBLE PRECISION NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trials (target TEXT PRIMARY KEY, run TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lines (
  line TEXT NOT NULL, run TEXT NOT NULL, turn DOUBLE PRECISION NOT NULL, until DOUBLE PRECISION NOT NULL,
  called DOUBLE PRECISION NOT NULL, PRIMARY KEY (line, run)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS lines_by_run ON lines (run);
"""
LATE_S = 10.0  # after its time, or after it was called, one that does not come is not waited for any more
_ROW = "b.target, b.mark, b.failures, b.opened, b.tested, b.until, b.reason, t.run"
_FROM = "breakers b LEFT JOIN trials t ON t.target=b.target"


AT = " at "  # between the names of a target, which have no blanks, and of one of its nodes


@dataclass
class Breaker:
    """What is known of a target that did not answer.

    Attributes:
        mark: of its settings then.
        failures: in a row.
        opened: when that were too many; 0 if they are not.
        tested: when it was tried last.
        until: when it is tested again.
        reason: what the last failure was.
        trial: None if an answer to a check says that it is back; else the last failure was a push that hung, and an
            answer to a push does: the run that tries one, or "".
    """

    target: str
    mark: str
    failures: int = 0
    opened: float = 0.0
    tested: float = 0.0
    until: float = 0.0
    reason: str = ""
    trial: str | None = None


class Waits:
    """The tables of a ledger that is open; as safe to share as that is."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # ---- targets that do not answer

    def breakers(self) -> dict[str, Breaker]:
        """Return what is known of all targets that did not answer, by name."""
        with self._db.reading():
            rows = self._db.execute(f"SELECT {_ROW} FROM {_FROM}").fetchall()  # noqa: S608 - ours
        return {row[0]: Breaker(*row) for row in rows}

    def breaker(self, target: str) -> Breaker | None:
        """Return what is known of a target; None if it answered."""
        with self._db.reading():
            row = self._db.execute(f"SELECT {_ROW} FROM {_FROM} WHERE b.target=?", (target,)).fetchone()  # noqa: S608
        return Breaker(*row) if row else None

    def count(self, target: str, mark: str, reason: str, *, hung: bool = False) -> Breaker:
        """Count a failure, within a block of `writing`: nobody else changes the row until it ends.

        Args:
            mark: of its settings; what is known of it under others is forgotten.
            hung: whether it was a push of what had been connected.
        """
        same = "CASE WHEN breakers.mark=excluded.mark THEN"
        self._db.execute(
            "INSERT INTO breakers VALUES (?,?,1,0,?,0,?) ON CONFLICT (target) DO UPDATE SET"  # noqa: S608 - ours
            f" failures={same} breakers.failures+1 ELSE 1 END, opened={same} breakers.opened ELSE 0 END,"
            f" until={same} breakers.until ELSE 0 END, mark=excluded.mark, tested=excluded.tested,"
            " reason=excluded.reason",
            (target, mark, self._db.time(), reason),
        )
        self._db.execute("DELETE FROM trials WHERE target=?", (target,))
        if hung:
            self._db.execute("INSERT INTO trials VALUES (?,'')", (target,))
        (row,) = self._db.execute(f"SELECT {_ROW} FROM {_FROM} WHERE b.target=?", (target,)).fetchall()  # noqa: S608
        return Breaker(*row)

    def save(self, one: Breaker) -> None:
        """Save what is known of a target, within the same block."""
        values = astuple(one)
        self._db.execute(
            "UPDATE breakers SET mark=?, failures=?, opened=?, tested=?, until=?, reason=? WHERE target=?",
            (*values[1:7], values[0]),
        )

    def tries(self, target: str, run: str, until: float) -> None:
        """Let a run try a push, and all others wait until a time; within the same block."""
        self._db.execute("UPDATE trials SET run=? WHERE target=?", (run, target))
        self._db.execute("UPDATE breakers SET until=? WHERE target=?", (until, target))

    def answers(self, target: str) -> Breaker | None:
        """Forget that a target did not answer; return what was known, to one of those who say so."""
        if self.breaker(target) is None:  # most often: nothing is written then
            return None
        with self._db.writing():
            found = self.breaker(target)
            gone = self._db.execute("DELETE FROM breakers WHERE target=?", (target,)).rowcount
            self._db.execute("DELETE FROM trials WHERE target=?", (target,))
        return found if gone else None

    def due(self, target: str) -> None:
        """Let a target that does not answer, and its nodes, be tested now, unless a run just tries a push."""
        node, now = f"{target}{AT}", self._db.time()
        self._db.execute(
            "UPDATE breakers SET until=? WHERE (target=? OR substr(target, 1, ?)=?) AND opened>0 AND until>?"
            " AND target NOT IN (SELECT target FROM trials WHERE run<>'')",
            (now, target, len(node), node, now),
        )

    def forget(self, target: str) -> None:
        """Forget what is known of a target that is gone, and of its nodes: another one may get its name."""
        node, where = f"{target}{AT}", "target=? OR substr(target, 1, ?)=?"
        for table in ("breakers", "trials"):
            self._db.execute(f"DELETE FROM {table} WHERE {where}", (target, len(node), node))  # noqa: S608 - ours

    # ---- lines of those who wait

    def join(self, line: str, run: str, turn: float, until: float) -> None:
        """Let a run stand in a line until its time comes; the lowest turn is the first."""
        self._db.execute(
            "INSERT INTO lines VALUES (?,?,?,?,0) ON CONFLICT (line, run) DO UPDATE SET"
            " turn=excluded.turn, until=excluded.until, called=0",
            (line, run, turn, until),
        )

    def leave(self, line: str, run: str) -> bool:
        """Take a run out of a line; return whether it stood there, to one of those who say so."""
        if not self._stands(run, line):  # most often: nothing is written then
            return False
        return self._db.execute("DELETE FROM lines WHERE line=? AND run=?", (line, run)).rowcount > 0

    def gone(self, run: str) -> list[str]:
        """Take a run out of every line; return their names."""
        found = self._stands(run)
        if found:
            self._db.execute("DELETE FROM lines WHERE run=?", (run,))
        return found

    def _stands(self, run: str, line: str = "") -> list[str]:
        with self._db.reading():
            rows = self._db.execute("SELECT line FROM lines WHERE run=? AND (?='' OR line=?)", (run, line, line))
            return [str(row[0]) for row in rows]

    def before(self, line: str, run: str, turn: float) -> int:
        """Return how many other runs stand in a line before this one."""
        with self._db.reading():
            (count,) = self._db.execute(
                "SELECT count(*) FROM lines WHERE line=? AND run<>? AND turn<? AND until>?",
                (line, run, turn, self._db.time() - LATE_S),
            ).fetchone()
        return int(count)

    def lines(self) -> set[str]:
        """Return the names of the lines in which somebody stands."""
        with self._db.reading():
            rows = self._db.execute("SELECT DISTINCT line FROM lines WHERE until>?", (self._db.time() - LATE_S,))
            return {str(row[0]) for row in rows}

    def call(self, line: str, count: int) -> list[str]:
        """Call the first runs of a line, so many of those that nobody has called; return them."""
        now = self._db.time()
        with self._db.reading():
            rows = self._db.execute(
                "SELECT run FROM lines WHERE line=? AND called=0 AND until>? ORDER BY turn, run LIMIT ?",
                (line, now - LATE_S, count),
            ).fetchall()
        return [run for (run,) in rows if self._called(line, run, now)]

    def _called(self, line: str, run: str, now: float) -> bool:
        """Note that a run was called; return False if somebody else has, or it has left."""
        changed = self._db.execute(
            "UPDATE lines SET called=?, until=CASE WHEN until<? THEN until ELSE ? END"
            " WHERE line=? AND run=? AND called=0",
            (now, now, now, line, run),
        )
        return changed.rowcount == 1

    def unheard(self, seconds: float) -> list[str]:
        """Return the runs that were called so long ago, and stand in line still."""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT DISTINCT run FROM lines WHERE called>0 AND called<?", (self._db.time() - seconds,)
            ).fetchall()
        return [str(row[0]) for row in rows]

    def heard(self, run: str) -> bool:
        """Return whether a run was called since it joined a line; that it was is told once."""
        with self._db.reading():
            called = self._db.execute("SELECT count(*) FROM lines WHERE run=? AND called>0", (run,)).fetchone()
        if not called[0]:
            return False
        now = self._db.time()
        return self._db.execute("UPDATE lines SET called=0, until=? WHERE run=? AND called>0", (now, run)).rowcount > 0

    def prune(self, before: float) -> int:
        """Forget who should have come before a time, and targets not tried since; return how many rows."""
        breakers = self._db.execute("DELETE FROM breakers WHERE tested < ? AND until < ?", (before, before)).rowcount
        self._db.execute("DELETE FROM trials WHERE target NOT IN (SELECT target FROM breakers)")
        return breakers + self._db.execute("DELETE FROM lines WHERE until < ?", (before,)).rowcount
