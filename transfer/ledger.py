"""The ledger: what arrived where, item by item, in one SQLite file that survives the process.

One row per (dispatch, destination, item), committed after the peer's confirmation. Write-ahead logging with
`synchronous=NORMAL`: a killed process loses nothing that was committed; a power cut may lose the last commits,
never the file, and what is lost is sent again.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from transfer.outcome import ARRIVED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import ItemResult

BUSY_S = 30  # how long a writer waits for another process's commit
SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
  dispatch_id TEXT NOT NULL, destination TEXT NOT NULL, path TEXT NOT NULL,
  endpoint TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sop_instance_uid TEXT NOT NULL,
  outcome TEXT NOT NULL, detail TEXT NOT NULL, attempts INTEGER NOT NULL, time REAL NOT NULL,
  PRIMARY KEY (dispatch_id, destination, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hooks (
  dispatch_id TEXT NOT NULL, destination TEXT NOT NULL, endpoint TEXT NOT NULL,
  outcome TEXT NOT NULL, exit_code INTEGER, output TEXT NOT NULL, attempts INTEGER NOT NULL, time REAL NOT NULL,
  PRIMARY KEY (dispatch_id, destination)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS runs (
  flow_run_id TEXT PRIMARY KEY, dispatch_id TEXT NOT NULL, owner TEXT NOT NULL, begun REAL NOT NULL, ended REAL
  ) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class HookRow:
    """The last run of a target's hook for a dispatch.

    `outcome` is `done`, `failed`, or `outdated` if something has arrived since; `output` is the end of what it printed.
    """

    outcome: str
    exit_code: int | None
    output: str
    attempts: int


class Ledger:
    """An open ledger; may be used from several threads, and by several processes at once.

    Args:
        path: the file; made, with mode 0600, if it isn't there.

    Raises:
        OSError, sqlite3.Error: the file can't be opened or is damaged.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Never opened when it is there: closing a descriptor of it drops the locks of every connection of this
        # process (fcntl(2)), and then another process, when it closes, takes the log away that these still use.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Save what the block records with one commit, at its end; nothing of it if it raises."""
        with self._writing():
            yield

    def begin(self, dispatch_id: str, destination: str, endpoint: str, *, force: bool = False) -> None:
        """Prepare a run of a dispatch: forget rejections, so that they are tried again; with `force`, everything.

        Rows about another endpoint are forgotten as well: the target has been pointed elsewhere since.
        """
        with self._writing() as db:
            if force:
                db.execute("DELETE FROM items WHERE dispatch_id=? AND destination=?", (dispatch_id, destination))
                db.execute(
                    "DELETE FROM hooks WHERE dispatch_id=? AND (destination=? OR destination GLOB ? || '/*')",
                    (dispatch_id, destination, destination),
                )
            else:
                arrived = json.dumps([str(kind) for kind in ARRIVED])
                db.execute(
                    "DELETE FROM items WHERE dispatch_id=? AND destination=?"
                    " AND (endpoint<>? OR outcome NOT IN (SELECT value FROM json_each(?)))",
                    (dispatch_id, destination, endpoint, arrived),
                )
                db.execute(
                    "DELETE FROM hooks WHERE dispatch_id=? AND (destination=? OR destination GLOB ? || '/*')"
                    " AND endpoint<>?",
                    (dispatch_id, destination, destination, endpoint),
                )

    def record(self, dispatch_id: str, destination: str, endpoint: str, item: Item, outcome: Outcome) -> None:
        """Save an item's outcome; return when it is committed."""
        uid = item.header.SOPInstanceUID if item.header else ""
        with self._lock:
            self._db.execute(
                "INSERT INTO items VALUES (?,?,?,?,?,?,?,?,?,1,?) ON CONFLICT DO UPDATE SET"
                " endpoint=excluded.endpoint, size=excluded.size, mtime_ns=excluded.mtime_ns,"
                " sop_instance_uid=excluded.sop_instance_uid, outcome=excluded.outcome, detail=excluded.detail,"
                " attempts=attempts+1, time=excluded.time",
                (dispatch_id, destination, item.shown, endpoint, item.size, item.mtime_ns, uid,
                 str(outcome.kind), outcome.detail, time.time()),
            )  # fmt: skip

    def outcomes(
        self,
        dispatch_id: str,
        destination: str,
        items: tuple[Item, ...],
        endpoint: str | None = None,
        since: float = 0.0,
    ) -> dict[str, Outcome]:
        """Return the outcomes, by path, of the items whose file is still the one that the row is about.

        Args:
            endpoint: count only rows about this one; None for any.
            since: count only rows that were written since then, in seconds since the epoch.
        """
        with self._lock:
            rows = {
                path: (size, mtime_ns, Outcome(Kind(outcome), detail))
                for path, size, mtime_ns, outcome, detail in self._db.execute(
                    "SELECT path, size, mtime_ns, outcome, detail FROM items WHERE dispatch_id=? AND destination=?"
                    " AND endpoint=coalesce(?,endpoint) AND time>=?",
                    (dispatch_id, destination, endpoint, since),
                )
            }
        found = {}
        for item in items:
            row = rows.get(item.shown)
            if row and row[:2] == (item.size, item.mtime_ns):
                found[item.path] = row[2]
        return found

    def results(self, dispatch_id: str) -> dict[str, list[ItemResult]]:
        """Return all rows of a dispatch by destination."""
        found: dict[str, list[ItemResult]] = {}
        with self._lock:
            for destination, path, uid, outcome, detail in self._db.execute(
                "SELECT destination, path, sop_instance_uid, outcome, detail FROM items WHERE dispatch_id=?"
                " ORDER BY destination, path",
                (dispatch_id,),
            ):
                found.setdefault(destination, []).append(ItemResult(path, uid, Kind(outcome), detail))
        return found

    def hook(self, dispatch_id: str, destination: str) -> HookRow | None:
        """Return the last run of the target's hook for this dispatch."""
        with self._lock:
            row = self._db.execute(
                "SELECT outcome, exit_code, output, attempts FROM hooks WHERE dispatch_id=? AND destination=?",
                (dispatch_id, destination),
            ).fetchone()
        return HookRow(*row) if row else None

    def record_hook(
        self, dispatch_id: str, destination: str, endpoint: str, outcome: str, exit_code: int | None, output: str
    ) -> None:
        """Save a run of the hook."""
        with self._lock:
            self._db.execute(
                "INSERT INTO hooks VALUES (?,?,?,?,?,?,1,?) ON CONFLICT DO UPDATE SET endpoint=excluded.endpoint,"
                " outcome=excluded.outcome, exit_code=excluded.exit_code, output=excluded.output,"
                " attempts=attempts+1, time=excluded.time",
                (dispatch_id, destination, endpoint, outcome, exit_code, output, time.time()),
            )

    def run_begins(self, flow_run_id: str, owner: str) -> None:
        """Note which process runs a flow run; its dispatch id, if it has one, stays."""
        with self._lock:
            self._db.execute(
                "INSERT INTO runs VALUES (?,'',?,?,NULL) ON CONFLICT DO UPDATE SET"
                " owner=excluded.owner, begun=excluded.begun, ended=NULL",
                (flow_run_id, owner, time.time()),
            )

    def run_claimed(self, flow_run_id: str, owner: str, alive: Callable[[str], bool]) -> bool:
        """Note that a process is about to run a flow run, unless a living one has it; return whether it may."""
        with self._writing() as db:
            row = db.execute("SELECT owner, ended FROM runs WHERE flow_run_id=?", (flow_run_id,)).fetchone()
            if row and row[1] is None and row[0] and alive(row[0]):
                return False
            self.run_begins(flow_run_id, owner)
        return True

    def same_dispatch(self, flow_run_id: str, plan: Plan) -> Plan:
        """Return the plan with the dispatch id that its flow run had when it first ran.

        A run that is taken up again continues its own dispatch, even if a file has changed since.
        """
        with self._lock:
            row = self._db.execute("SELECT dispatch_id FROM runs WHERE flow_run_id=?", (flow_run_id,)).fetchone()
            if row and row[0]:
                return replace(plan, dispatch_id=row[0])
            self._db.execute(
                "INSERT INTO runs VALUES (?,?,'',?,NULL) ON CONFLICT DO UPDATE SET dispatch_id=excluded.dispatch_id",
                (flow_run_id, plan.dispatch_id, time.time()),
            )
        return plan

    def run_ends(self, flow_run_id: str) -> None:
        """Note that a flow run is over, however it ended."""
        with self._lock:
            self._db.execute("UPDATE runs SET ended=? WHERE flow_run_id=?", (time.time(), flow_run_id))

    def unfinished(self) -> dict[str, str]:
        """Return the owner, by flow run id, of every run that has begun and not ended."""
        with self._lock:
            return dict(self._db.execute("SELECT flow_run_id, owner FROM runs WHERE ended IS NULL"))

    def prune(self, before: float, keep: Iterable[str] = ()) -> int:
        """Delete dispatches and other runs that ended before a time (seconds since the epoch); return how many rows.

        Args:
            keep: ids of flow runs that go on later: what they have sent is not forgotten.
        """
        with self._writing() as db:
            old = (
                "SELECT dispatch_id FROM items GROUP BY dispatch_id HAVING MAX(time) < ?"
                " EXCEPT SELECT dispatch_id FROM runs"
                " WHERE ended IS NULL OR flow_run_id IN (SELECT value FROM json_each(?))"
            )
            ids = [row[0] for row in db.execute(old, (before, json.dumps([*keep])))]
            deletions = (
                "DELETE FROM items WHERE dispatch_id=?",
                "DELETE FROM hooks WHERE dispatch_id=?",
                "DELETE FROM runs WHERE dispatch_id=?",
            )
            # Checks, queries and retrievals have a row as runs, and nothing else.
            others = db.execute("DELETE FROM runs WHERE dispatch_id='' AND ended < ?", (before,)).rowcount
            return others + sum(db.execute(delete, (one,)).rowcount for delete in deletions for one in ids)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all, readable by its owner only."""
    write_whole(path, [json.dumps(document, indent=1).encode()])


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file, piece by piece, whole or not at all, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    fd = os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as writer:
            writer.writelines(pieces)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
