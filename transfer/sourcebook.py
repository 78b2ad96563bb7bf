"""What is known of sources: which of their units were dispatched and what became of them, in the ledger's database.

A unit has one row as soon as it has been dispatched, or held. Headers of loose files are remembered, so that each is
read once. Statements are understood by SQLite and PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from transfer.database import Database

TABLES = """
CREATE TABLE IF NOT EXISTS units (
  source TEXT NOT NULL, unit TEXT NOT NULL, shown TEXT NOT NULL, state TEXT NOT NULL, fingerprint TEXT NOT NULL,
  files BIGINT NOT NULL, batch TEXT NOT NULL, run TEXT NOT NULL, detail TEXT NOT NULL, time DOUBLE PRECISION NOT NULL,
  PRIMARY KEY (source, unit)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS headers (
  source TEXT NOT NULL, folder TEXT NOT NULL, name TEXT NOT NULL, size BIGINT NOT NULL, mtime_ns BIGINT NOT NULL,
  ctime_ns BIGINT NOT NULL, uid TEXT NOT NULL, PRIMARY KEY (source, folder, name)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS headers_by_uid ON headers (source, uid, folder, name);
CREATE TABLE IF NOT EXISTS sweeps (
  source TEXT NOT NULL PRIMARY KEY, mount TEXT NOT NULL, time DOUBLE PRECISION NOT NULL, next DOUBLE PRECISION NOT NULL,
  waiting BIGINT NOT NULL, detail TEXT NOT NULL) WITHOUT ROWID;
"""
PAGE = 2000  # rows that are read at once
_OLDER = "\n"  # ends a unit's key, before a run's, in the row of an older dispatch of it; no key of a unit has it


class UnitState(StrEnum):
    """What has become of a unit."""

    DISPATCHED = "dispatched"
    DELIVERED = "delivered"  # at every target; what is to become of its files is still to be done
    DONE = "done"
    FAILED = "failed"  # as `detail` says; told once, and not dispatched again until it changes or somebody retries it
    HELD = "held"  # files came after it was dispatched, and a person decides


@dataclass(frozen=True, slots=True)
class UnitRow:
    """A unit as it was when it was dispatched.

    Attributes:
        batch: mark of the list of units that it was dispatched with; it is there before the run.
        run: id of the flow run of its dispatch; "" if nobody knows whether it was created.
        detail: what was said of it, for people.
        time: of the last change of its state, in seconds since the epoch.
    """

    unit: str
    shown: str
    state: UnitState
    fingerprint: str
    files: int = 0
    batch: str = ""
    run: str = ""
    detail: str = ""
    time: float = 0.0

    def now(self, state: UnitState, detail: str = "", **more: Any) -> UnitRow:
        """Return the row in another state."""
        return replace(self, state=state, detail=detail, **more)


def older_key(unit: str, run: str) -> str:
    """Return the key of a row for an older dispatch of a unit, by a run that has not ended."""
    return f"{unit}{_OLDER}{run}"


def is_older(key: str) -> bool:
    """Return True if a row's key is that of an older dispatch of a unit, which has another row."""
    return _OLDER in key


def unit_of(key: str) -> str:
    """Return the key of the unit that a row belongs to."""
    return key.partition(_OLDER)[0]


@dataclass(frozen=True, slots=True)
class LooseFile:
    """A file whose header was read; `uid` is "" if it belongs to no unit."""

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int
    uid: str
    folder: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class SweepRow:
    """The last look through a source.

    Attributes:
        mount: the file system that its folder lay on; another one means that a share is not mounted.
        next: when something that had not settled may be ready, in seconds since the epoch; 0 if there is nothing.
        waiting: how many units had not settled.
        detail: why it could not be looked through; "" if it could.
    """

    mount: str = ""
    time: float = 0.0
    next: float = 0.0
    waiting: int = 0
    detail: str = ""


class Sourcebook:
    """The rows of sources in an open database; may be used from several threads."""

    def __init__(self, database: Database) -> None:
        self._db = database

    # ---- units

    def units(self, source: str, *states: UnitState) -> dict[str, UnitRow]:
        """Return the rows of a source by unit, all or those in some states."""
        which = f" AND state IN ({','.join('?' * len(states))})" if states else ""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT unit, shown, state, fingerprint, files, batch, run, detail, time FROM units"  # noqa: S608 - ours
                f" WHERE source=?{which} ORDER BY unit",
                (source, *map(str, states)),
            )
            return {row[0]: UnitRow(row[0], row[1], UnitState(row[2]), *row[3:]) for row in rows}

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many units of each source are in each state; each is counted once."""
        found: dict[str, dict[str, int]] = {}
        with self._db.reading():
            for source, state, count in self._db.execute(
                "SELECT source, state, count(*) FROM units WHERE unit NOT LIKE ? GROUP BY source, state",
                (f"%{_OLDER}%",),
            ):
                found.setdefault(source, {})[state] = int(count)
        return found

    def under_way(self) -> dict[str, set[str]]:
        """Return the runs of each source whose end has not been seen yet; "" for one that may not have been created."""
        found: dict[str, set[str]] = {}
        with self._db.reading():
            for source, run in self._db.execute(
                "SELECT DISTINCT source, run FROM units WHERE state=?", (str(UnitState.DISPATCHED),)
            ):
                found.setdefault(source, set()).add(run)
        return found

    def run_again(self) -> dict[str, set[str]]:
        """Return the runs of each source that have ended once more since a unit of theirs was seen to have failed.

        Of some it was only a part that ended, and they go on.
        """
        found: dict[str, set[str]] = {}
        with self._db.reading():
            for source, run in self._db.execute(
                "SELECT DISTINCT units.source, units.run FROM units JOIN runs ON runs.flow_run_id=units.run"
                " WHERE units.state=? AND runs.ended > units.time",
                (str(UnitState.FAILED),),
            ):
                found.setdefault(source, set()).add(run)
        return found

    def save(self, source: str, rows: Iterable[UnitRow]) -> None:
        """Save rows, all of them or none."""
        now = self._db.time()
        with self._db.writing():
            for one in rows:
                self._db.execute(
                    "INSERT INTO units VALUES (?,?,?,?,?,?,?,?,?,?) ON CONFLICT (source, unit) DO UPDATE SET"
                    " shown=excluded.shown, state=excluded.state, fingerprint=excluded.fingerprint,"
                    " files=excluded.files, batch=excluded.batch, run=excluded.run, detail=excluded.detail,"
                    " time=excluded.time",
                    (source, one.unit, one.shown, str(one.state), one.fingerprint, one.files, one.batch, one.run,
                     one.detail, now),
                )  # fmt: skip

    def run_created(self, source: str, batch: str, run: str) -> None:
        """Note which run dispatches the units of a batch."""
        self._db.execute("UPDATE units SET run=? WHERE source=? AND batch=?", (run, source, batch))

    def forget(self, source: str, units: Iterable[str] | None = None) -> int:
        """Forget units, or all that is known of a source but what is under way; return how many units."""
        with self._db.writing():
            if units is not None:
                return sum(
                    self._db.execute("DELETE FROM units WHERE source=? AND unit=?", (source, one)).rowcount
                    for one in units
                )
            for table in ("headers", "sweeps"):
                self._db.execute(f"DELETE FROM {table} WHERE source=?", (source,))  # noqa: S608 - ours
            going = str(UnitState.DISPATCHED)
            return self._db.execute("DELETE FROM units WHERE source=? AND state<>?", (source, going)).rowcount

    # ---- headers of loose files

    def folders(self, source: str) -> set[str]:
        """Return the folders in which files of a source were."""
        with self._db.reading():
            return {row[0] for row in self._db.execute("SELECT DISTINCT folder FROM headers WHERE source=?", (source,))}

    def files(self, source: str, folder: str) -> dict[str, LooseFile]:
        """Return the files of a folder by name, as they were."""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT name, size, mtime_ns, ctime_ns, uid FROM headers WHERE source=? AND folder=?", (source, folder)
            )
            return {row[0]: LooseFile(*row) for row in rows}

    def note(self, source: str, folder: str, files: Iterable[LooseFile], gone: Iterable[str]) -> None:
        """Save what files of a folder are, and forget those that are there no more."""
        with self._db.writing():
            for name in gone:
                self._db.execute("DELETE FROM headers WHERE source=? AND folder=? AND name=?", (source, folder, name))
            for one in files:
                self._db.execute(
                    "INSERT INTO headers VALUES (?,?,?,?,?,?,?) ON CONFLICT (source, folder, name) DO UPDATE SET"
                    " size=excluded.size, mtime_ns=excluded.mtime_ns, ctime_ns=excluded.ctime_ns, uid=excluded.uid",
                    (source, folder, one.name, one.size, one.mtime_ns, one.ctime_ns, one.uid),
                )

    def by_uid(self, source: str) -> Iterator[LooseFile]:
        """Yield the files of a source that belong to a unit, those of one UID together."""
        uid = folder = name = ""
        while True:
            with self._db.reading():
                rows = self._db.execute(
                    "SELECT name, size, mtime_ns, ctime_ns, uid, folder FROM headers WHERE source=? AND uid<>''"
                    " AND (uid, folder, name) > (?, ?, ?) ORDER BY uid, folder, name LIMIT ?",
                    (source, uid, folder, name, PAGE),
                ).fetchall()
            for row in rows:
                yield LooseFile(*row)
            if len(rows) < PAGE:
                return
            name, uid, folder = rows[-1][0], rows[-1][4], rows[-1][5]

    # ---- sweeps

    def sweep(self, source: str) -> SweepRow:
        """Return the last look through a source."""
        return self.sweeps().get(source, SweepRow())

    def sweeps(self) -> dict[str, SweepRow]:
        """Return the last look through each source."""
        with self._db.reading():
            rows = self._db.execute("SELECT source, mount, time, next, waiting, detail FROM sweeps")
            return {row[0]: SweepRow(*row[1:]) for row in rows}

    def moved(self, source: str) -> None:
        """Forget on which file system the folder of a source lay."""
        self._db.execute("UPDATE sweeps SET mount='' WHERE source=?", (source,))

    def swept(self, source: str, row: SweepRow) -> None:
        """Save what a look through a source has found."""
        self._db.execute(
            "INSERT INTO sweeps VALUES (?,?,?,?,?,?) ON CONFLICT (source) DO UPDATE SET mount=excluded.mount,"
            " time=excluded.time, next=excluded.next, waiting=excluded.waiting, detail=excluded.detail",
            (source, row.mount, row.time or self._db.time(), row.next, row.waiting, row.detail),
        )
