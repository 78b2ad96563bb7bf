"""The ledger: what arrived where, item by item, in a database that survives the process.

One row per (dispatch, destination, item), committed after the peer's confirmation, and with it what the place holds
now (`transfer.confirmed`), whichever dispatch asks. The tables lie in one SQLite file,
or in PostgreSQL (`transfer.database`); every statement is understood by both.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

from transfer import confirmed, deliveries, happenings, held, messages, rests, runs, sourcebook, waits
from transfer.confirmed import Confirmation, Spot
from transfer.database import BUSY_S, Tables, opened
from transfer.deliveries import Deliveries
from transfer.errors import LedgerFull
from transfer.happenings import Happenings
from transfer.held import HeldSlots
from transfer.messages import Messages
from transfer.oserrors import FULL
from transfer.outcome import ARRIVED, Kind, Outcome, outcome_of
from transfer.plan import Item
from transfer.pruning import prune_confirmed, prune_dispatches, prune_runs
from transfer.receipt import ItemResult
from transfer.rests import Rests
from transfer.runs import Runs
from transfer.sourcebook import Sourcebook
from transfer.waits import Waits
from transfer.writable import NO_ROOM

SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
  dispatch_id TEXT NOT NULL, destination TEXT NOT NULL, path TEXT NOT NULL,
  endpoint TEXT NOT NULL, size BIGINT NOT NULL, mtime_ns BIGINT NOT NULL, sop_instance_uid TEXT NOT NULL,
  outcome TEXT NOT NULL, detail TEXT NOT NULL, attempts INTEGER NOT NULL, time DOUBLE PRECISION NOT NULL,
  PRIMARY KEY (dispatch_id, destination, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hooks (
  dispatch_id TEXT NOT NULL, destination TEXT NOT NULL, endpoint TEXT NOT NULL,
  outcome TEXT NOT NULL, exit_code INTEGER, output TEXT NOT NULL, attempts INTEGER NOT NULL,
  time DOUBLE PRECISION NOT NULL, PRIMARY KEY (dispatch_id, destination)) WITHOUT ROWID;
"""
# Rows about the script of a folder belong to the place, not to the dispatch that ran it: their dispatch_id is this
# and the endpoint, their destination is the target's name, a slash, and a mark of the folder.
AT = "at "
OF_OLD = (
    confirmed.OF_OLD_ROWS,
    f"INSERT OR REPLACE INTO hooks SELECT '{AT}'||endpoint, destination, endpoint, outcome, exit_code, output,"  # noqa: S608
    f" attempts, time FROM hooks WHERE destination LIKE '%/%' AND dispatch_id NOT LIKE '{AT}%' ORDER BY time",
    f"DELETE FROM hooks WHERE destination LIKE '%/%' AND dispatch_id NOT LIKE '{AT}%'",  # noqa: S608
)
# 0: ledgers before they had one; 1 had no tables of what happened, 2 none of sources, 3 none of hours, 4 none of waits,
# 5 none of deliveries, 6 none of the studies of floods, 7 none of rests, 8 none of slots that are held,
# 9 none of trials
VERSION = 10
OTHERS = runs, confirmed, happenings, messages, sourcebook, waits, deliveries, rests, held
TABLES = Tables(SCHEMA + "".join(one.TABLES for one in OTHERS), VERSION, OF_OLD)


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
        where: the file of SQLite's, made, with mode 0600, if it isn't there; or the URL of a PostgreSQL database.
        answer_s: the longest time that its server may be silent, in seconds, until another connection is tried.

    Raises:
        OSError, sqlite3.Error: the file can't be opened or is damaged.
        DispatchError: the database can't be used, or was made by a newer Talaria.

    Attributes:
        happenings: what people want to hear of, and totals.
        messages: what is written to them.
        sources: what is known of sources.
        waits: who waits at a target, and which targets do not answer.
        deliveries: how those of each run stood last, in a line.
        runs: which process runs what.
        rests: what runs that wait have left behind.
        held: who holds slots of targets.
    """

    def __init__(self, where: Path | str, answer_s: float = BUSY_S) -> None:
        self._db = opened(where, TABLES, answer_s)
        self.happenings, self.messages = Happenings(self._db), Messages(self._db)
        self.sources, self.waits = Sourcebook(self._db), Waits(self._db)
        self.deliveries, self.runs = Deliveries(self._db), Runs(self._db, self.happenings)
        self.rests, self.held = Rests(self._db), HeldSlots(self._db)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def now(self) -> float:
        """Return the time by the database's clock, in seconds since the epoch."""
        return self._db.time()

    def check_room(self) -> None:
        """Check that there is room for what is to be noted.

        Raises:
            LedgerAway: there is none, or nothing can be written there.
        """
        self._db.check_room()

    def exclusive(self, name: str, check: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a lock that other hosts share, if they share the ledger; `check`, called while waiting, may raise."""
        return self._db.exclusive(name, check)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Save what the block records with one commit, at its end; nothing of it if it raises."""
        with self._db.writing():
            yield

    def begin(
        self, dispatch_id: str, destination: str, endpoint: str, *, force: bool = False, spots: Iterable[Spot] = ()
    ) -> None:
        """Prepare a run of a dispatch: forget rejections, so that they are tried again; with `force`, everything.

        Rows about another endpoint are forgotten as well: the target has been pointed elsewhere since.

        Args:
            spots: where its items belong: with `force`, what any dispatch brought there counts no more.
        """
        below = len(destination) + 1, f"{destination}/"
        with self._db.writing():
            if force:
                self._db.execute("DELETE FROM items WHERE dispatch_id=? AND destination=?", (dispatch_id, destination))
                self._db.execute(
                    "DELETE FROM hooks WHERE dispatch_id=? AND (destination=? OR substr(destination, 1, ?)=?)",
                    (dispatch_id, destination, *below),
                )
                confirmed.withdraw(self._db, endpoint, spots, self.now())
            else:
                arrived = json.dumps([str(kind) for kind in ARRIVED])
                self._db.execute(
                    "DELETE FROM items WHERE dispatch_id=? AND destination=?"  # noqa: S608 - ours
                    f" AND (endpoint<>? OR outcome NOT IN ({self._db.LISTED}))",
                    (dispatch_id, destination, endpoint, arrived),
                )
                self._db.execute(
                    "DELETE FROM hooks WHERE dispatch_id=? AND (destination=? OR substr(destination, 1, ?)=?)"
                    " AND endpoint<>?",
                    (dispatch_id, destination, *below, endpoint),
                )

    def record(
        self,
        dispatch_id: str,
        destination: str,
        endpoint: str,
        item: Item,
        outcome: Outcome,
        spot: Spot | None = None,
        since: float = 0.0,
        *,
        by_uid: bool = False,
    ) -> None:
        """Save an item's outcome; return when it is committed.

        Args:
            spot: where the item belongs, if other dispatches may find it there.
            since: when this push began, in seconds since the epoch.
            by_uid: whether the target looks at UIDs, and not at contents, to see what it has already.
        """
        if spot is None:
            with self._db.reading():
                self._record(dispatch_id, destination, endpoint, item, outcome)
            return
        with self._db.writing():
            self._record(dispatch_id, destination, endpoint, item, outcome)
            confirmed.record(self._db, endpoint, spot, dispatch_id, item, outcome, since, self.now(), by_uid=by_uid)

    def _record(self, dispatch_id: str, destination: str, endpoint: str, item: Item, outcome: Outcome) -> None:
        with self._db.reading():
            self._db.execute(
                "INSERT INTO items VALUES (?,?,?,?,?,?,?,?,?,1,?)"
                " ON CONFLICT (dispatch_id, destination, path) DO UPDATE SET"
                " endpoint=excluded.endpoint, size=excluded.size, mtime_ns=excluded.mtime_ns,"
                " sop_instance_uid=excluded.sop_instance_uid, outcome=excluded.outcome, detail=excluded.detail,"
                " attempts=items.attempts+1, time=excluded.time",
                (dispatch_id, destination, item.shown, endpoint, item.size, item.mtime_ns, item.sop_instance_uid,
                 str(outcome.kind), outcome.detail, self.now()),
            )  # fmt: skip

    def settle(
        self,
        dispatch_id: str,
        destination: str,
        endpoint: str,
        there: Iterable[tuple[Item, Outcome, Spot, Confirmation]],
        gone: Iterable[Item],
    ) -> set[str]:
        """Note as a dispatch's own what others have brought; forget what it brought, and is not there any more.

        Returns:
            The paths of those that are not there any more either: somebody has replaced or withdrawn them meanwhile.
        """
        late = set[str]()
        with self._db.writing():
            for item, outcome, spot, one in there:
                if confirmed.holds(self._db, endpoint, spot, one):
                    self.record(dispatch_id, destination, endpoint, item, outcome, spot)
                else:
                    late.add(item.path)
            key = dispatch_id, destination
            for item in gone:
                self._db.execute(
                    "DELETE FROM items WHERE dispatch_id=? AND destination=? AND path=?", (*key, item.shown)
                )
        return late

    def confirmed(self, endpoint: str, spots: Iterable[Spot]) -> dict[Spot, list[Confirmation]]:
        """Return what an endpoint has confirmed of each spot; a spot that nothing is known of has no entry."""
        with self._db.reading():
            return confirmed.find(self._db, self._db.LISTED, endpoint, spots)

    def sum_up(self, endpoint: str, dispatch_id: str, sums: Iterable[tuple[Spot, Item, str]]) -> None:
        """Add the SHA-256 of a dispatch's files to what it has confirmed."""
        with self._db.writing():
            confirmed.sum_up(self._db, endpoint, dispatch_id, sums)

    def outcomes(
        self,
        dispatch_id: str,
        destination: str,
        items: tuple[Item, ...],
        endpoint: str | None = None,
        since: float = 0.0,
        is_touched: Callable[[Item, float], bool] = lambda item, since: False,
    ) -> dict[str, Outcome]:
        """Return the outcomes, by path, of the items whose file is still the one that the row is about.

        Args:
            endpoint: count only rows about this one; None for any.
            since: count only rows that were written since then, in seconds since the epoch.
            is_touched: whether something has happened to a file since a row was written, which counts no more then.
        """
        found = {}
        with self._db.reading():
            rows = iter(
                self._db.execute(
                    "SELECT path, size, mtime_ns, outcome, detail, time FROM items WHERE dispatch_id=?"
                    " AND destination=? AND endpoint=coalesce(?,endpoint) AND time>=?",
                    (dispatch_id, destination, endpoint, since),
                )
            )
            if (first := next(rows, None)) is None:  # as of most dispatches
                return {}
            by_name = {item.shown: item for item in items}
            for path, size, mtime_ns, outcome, detail, time in chain((first,), rows):
                item = by_name.get(path)
                if item is None or is_touched(item, time):
                    continue
                if (size, mtime_ns) == (item.size, item.mtime_ns):
                    found[item.path] = outcome_of(outcome, detail)
        return found

    def confirmed_instances(
        self, uids: Iterable[str], destination: str, endpoint: str, place: str | None = None
    ) -> set[str]:
        """Return those of some SOP Instance UIDs that a target has confirmed at an endpoint, in any dispatch.

        What it keeps under another UID, or has confirmed without naming it, is not among them.

        Args:
            place: mark of the place where the endpoint keeps instances by their UIDs: what it was found not to have
                since is not among them, either. None where it keeps files; of many dispatches, each row is looked at
                then.
        """
        asked, arrived = json.dumps(sorted(set(uids))), json.dumps(sorted(ARRIVED))
        if place is None:
            statement = "SELECT sop_instance_uid, outcome, detail FROM items WHERE destination=? AND endpoint=?"
            statement += " AND sop_instance_uid"
            where = destination, endpoint
        else:
            statement = "SELECT item, outcome, detail FROM confirmed WHERE endpoint=? AND place=? AND item"
            where = endpoint, place
        found = set()
        with self._db.reading():
            for uid, outcome, detail in self._db.execute(
                f"{statement} IN ({self._db.LISTED}) AND outcome IN ({self._db.LISTED})", (*where, asked, arrived)
            ):
                if not Outcome(Kind(outcome), detail).elsewhere:
                    found.add(uid)
        return found

    def arrived(
        self, dispatch_id: str, destination: str, endpoint: str, *, own_place: bool
    ) -> dict[str, tuple[int, int, str]]:
        """Return what an endpoint has confirmed of a dispatch's files, and holds as far as is known.

        Args:
            own_place: whether the dispatch has a place of its own there, into which no other one puts anything.

        Returns:
            By path: length, time, and the SHA-256 of the content that is there, "" where the dispatch itself has
            brought it. Not what another content has replaced since, or may have.
        """
        arrived = json.dumps([str(kind) for kind in ARRIVED])
        brought = (
            "''" if own_place else "CASE WHEN c.dispatch_id=i.dispatch_id AND c.path=i.path THEN '' ELSE c.sha256 END"
        )
        held = (
            ""
            if own_place
            else " JOIN confirmed c ON c.endpoint=i.endpoint AND c.item IN (i.path, i.sop_instance_uid)"
            " AND c.size=i.size AND c.mtime_ns=i.mtime_ns AND (c.sha256<>'' OR c.dispatch_id=i.dispatch_id AND"
            f" c.path=i.path) AND c.outcome IN ({self._db.LISTED})"
        )
        asked = (dispatch_id, destination, endpoint, arrived)
        with self._db.reading():
            rows = self._db.execute(
                f"SELECT i.path, i.size, i.mtime_ns, {brought} FROM items i{held}"  # noqa: S608
                f" WHERE i.dispatch_id=? AND i.destination=? AND i.endpoint=? AND i.outcome IN ({self._db.LISTED})"
                " ORDER BY 4 DESC",  # what the dispatch itself has brought comes last, and counts
                asked if own_place else (arrived, *asked),
            )
            return {path: (size, mtime_ns, sha256) for path, size, mtime_ns, sha256 in rows}

    def results(self, dispatch_id: str) -> dict[str, list[ItemResult]]:
        """Return all rows of a dispatch by destination."""
        found: dict[str, list[ItemResult]] = {}
        with self._db.reading():
            for destination, path, uid, outcome, detail in self._db.execute(
                "SELECT destination, path, sop_instance_uid, outcome, detail FROM items WHERE dispatch_id=?"
                " ORDER BY destination, path",
                (dispatch_id,),
            ):
                found.setdefault(destination, []).append(ItemResult(path, uid, Kind(outcome), detail))
        return found

    def hook(self, dispatch_id: str, destination: str) -> HookRow | None:
        """Return the last run of the target's hook for this dispatch."""
        with self._db.reading():
            row = self._db.execute(
                "SELECT outcome, exit_code, output, attempts FROM hooks WHERE dispatch_id=? AND destination=?",
                (dispatch_id, destination),
            ).fetchone()
        return HookRow(*row) if row else None

    def record_hook(
        self, dispatch_id: str, destination: str, endpoint: str, outcome: str, exit_code: int | None, output: str
    ) -> None:
        """Save a run of the hook."""
        with self._db.reading():
            self._db.execute(
                "INSERT INTO hooks VALUES (?,?,?,?,?,?,1,?) ON CONFLICT (dispatch_id, destination) DO UPDATE SET"
                " endpoint=excluded.endpoint, outcome=excluded.outcome, exit_code=excluded.exit_code,"
                " output=excluded.output, attempts=hooks.attempts+1, time=excluded.time",
                (dispatch_id, destination, endpoint, outcome, exit_code, output, self.now()),
            )

    @property
    def shared(self) -> bool:
        """Whether several hosts share it, so that leases say who is alive."""
        return self._db.shared

    def prune(self, before: float, keep: Iterable[str] = ()) -> int:
        """Delete dispatches and other runs that ended before a time (seconds since the epoch); return how many rows.

        Others may write meanwhile: it is done in portions (`transfer.pruning`).

        Args:
            keep: ids of flow runs that go on later: what they have sent is not forgotten.
        """
        keep = [*keep]
        dispatches = prune_dispatches(self._db, before, keep) + prune_runs(self._db, before, keep)
        self.runs.prune_owners(before)
        others = self.happenings, self.messages, self.waits
        scripts = "DELETE FROM hooks WHERE substr(dispatch_id, 1, ?)=? AND time < ?"
        return (
            dispatches
            + sum(one.prune(before) for one in others)
            + self.deliveries.prune(before, keep)
            + self._db.execute(scripts, (len(AT), AT, before)).rowcount
            + prune_confirmed(self._db, before)
        )


@contextmanager
def noted() -> Iterator[None]:
    """Let a block write into the state directory whose disk may be full.

    Raises:
        LedgerFull: it is: what is to be noted there can be once there is room.
    """
    try:
        yield
    except OSError as exc:
        if exc.errno not in FULL:
            raise
        raise LedgerFull(NO_ROOM) from exc


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
