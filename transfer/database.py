"""Where a ledger's tables lie: in a file of SQLite's, or in PostgreSQL, where several hosts share them.

The ledger's statements are the same for both: parameters are `?`, conflicts are named by their columns, numbers are
BIGINT or DOUBLE PRECISION, and lists come as JSON (`LISTED`).
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transfer.answers import limit, limited, usual
from transfer.errors import DispatchError, LedgerAway, LedgerFull, Misconfigured
from transfer.writable import NO_ROOM, UNUSABLE, check_room, was_refused

if TYPE_CHECKING:
    from sqlalchemy import Connection, CursorResult, Engine

BUSY_S = 30  # how long a writer waits for another process's commit, or for a server that is away
AT_ONCE_S = 0.02  # between two attempts to change a new file of SQLite's that another process changes as well
AGAIN_S = 0.5  # between two attempts to reach one
LONG_S = 600.0  # for a statement that makes tables, brings them up to date, or looks through all of their rows
WAIT_S = 0.2  # between two attempts to take a lock that another host holds
SET_UP = 0x74616C61  # key of the advisory lock under which tables are made
PREFIXES = ("postgresql://", "postgres://", "postgresql+psycopg://")
# A server that is gone without a word is noticed within these; one that is silent, and whose machine, or a proxy before
# it, goes on to take what it is sent, by the limit on each answer.
KEEPALIVE = {"connect_timeout": 10, "keepalives_idle": 5, "keepalives_interval": 3, "keepalives_count": 3}
KEEPALIVE |= {"tcp_user_timeout": 15_000}  # milliseconds
# What a ledger raises whose database is away, or whose disk is: nothing that it is asked says that it is wrong.
LOST = (DispatchError, OSError, sqlite3.Error)
HELD = f"another process has held the ledger's database for more than {BUSY_S} seconds"
LEASE_S = 30.0  # how long a host's runs are its own without a word of it, unless TALARIA_LEASE says otherwise


@dataclass(frozen=True)
class Tables:
    """The tables that a database has.

    Attributes:
        schema: the statements that make them where they aren't there.
        version: their version; that of a database which keeps none, and has tables, is 0.
        of_old: the statements that bring a file of version 0 up to date, once the tables are there.
    """

    schema: str
    version: int
    of_old: tuple[str, ...]

    @property
    def statements(self) -> list[str]:
        return [one for one in self.schema.split(";") if one.strip()]

    def check(self, version: int) -> None:
        """Raise Misconfigured if a database has a version that is not known here."""
        if version > self.version:
            raise Misconfigured(
                f"the ledger was made by a newer Talaria (version {version}; {self.version} is the latest known "
                "here): use that one, or another ledger"
            )


class Rows(Protocol):
    """What a statement has found, or how many rows it has changed."""

    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


class Database(Protocol):
    """An open database; may be used from several threads, and by several processes at once.

    Attributes:
        NOW: its clock's time, in seconds since the epoch, within a statement.
        LISTED: a query of the elements of a parameter, which is a JSON list of texts.
        shared: whether processes of other hosts use it as well.
    """

    NOW: str
    LISTED: str
    shared: bool

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Rows:
        """Execute a statement; return when it is committed, unless it is part of a block of `writing`."""

    def writing(self) -> Any:
        """Save what the block executes with one commit, at its end, or that of the block around it; or nothing."""

    def reading(self) -> Any:
        """Keep other threads from this connection during the block, in which rows are fetched."""

    def exclusive(self, name: str, check: Callable[[], None]) -> AbstractContextManager[None]:
        """Wait for a lock that processes of other hosts may hold, and hold it during the block.

        It ends with the process, or its connection. Processes of one state directory have their own (`Home.exclusive`).

        Args:
            check: called while waiting; may raise to give up.
        """

    def check_room(self) -> None:
        """Raise LedgerAway if it is a file here for which there is no room, or which can't be written to."""

    def time(self) -> float:
        """Return what the database's clock says, in seconds since the epoch."""

    def close(self) -> None: ...


class Sqlite:
    """A file, with write-ahead logging.

    `synchronous=NORMAL`: a killed process loses nothing that was committed; a power cut may lose the last commits,
    never the file, and what is lost is sent again.

    Raises:
        OSError, sqlite3.Error: the file can't be opened or is damaged. LedgerFull: there is no room for it.
        LedgerAway: it has been held for BUSY_S, or its disk has a fault. Misconfigured: it was made by a newer Talaria.
    """

    NOW = "((julianday('now') - 2440587.5) * 86400.0)"
    LISTED = "SELECT value FROM json_each(?)"
    shared = False

    def __init__(self, path: Path, tables: Tables) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Never opened when it is there: closing a descriptor of it drops the locks of every connection of this
        # process (fcntl(2)), and then another process, when it closes, takes the log away that these still use.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        except sqlite3.OperationalError as exc:
            raise (_passes(exc) or exc) from exc
        try:
            if not self._db.execute("PRAGMA page_count").fetchone()[0]:  # a new file: what goes can be given back
                self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._write_ahead()
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._set_up(tables)
        except BaseException as exc:
            self._db.close()
            if away := _passes(exc):
                raise away from exc
            raise

    def _write_ahead(self) -> None:
        """Begin write-ahead logging; of processes that do so at once with a new file, SQLite may refuse one at once."""
        end = time.monotonic() + BUSY_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
            time.sleep(AT_ONCE_S)

    def _set_up(self, tables: Tables) -> None:
        """Make the tables, or bring those of an older Talaria up to date: at once, or not at all."""
        if self._version() == tables.version:
            return
        with self.writing():
            version = self._version()  # another process may have done it
            tables.check(version)
            for statement in (*tables.statements, *(() if version else tables.of_old)):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={tables.version}")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Rows:
        with self._lock:
            try:
                return self._db.execute(statement, parameters)
            except sqlite3.OperationalError as exc:
                if away := _passes(exc):
                    was_refused(self._path)
                    raise away from exc
                raise

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._lock:
            if self._db.in_transaction:  # within another block
                yield
                return
            self.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite may have ended it; left open, it would take in all that follows
                    self.execute("ROLLBACK")
                raise

    def reading(self) -> Any:
        return self._lock

    def exclusive(self, name: str, check: Callable[[], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def check_room(self) -> None:
        check_room(self._path)

    def time(self) -> float:
        return time.time()

    def close(self) -> None:
        with self._lock:
            self._db.close()


class Postgresql:
    """A database of a PostgreSQL server, in which the tables lie in a schema of their own, `talaria`.

    Raises:
        Misconfigured: the URL is none of PostgreSQL's, or the server refuses what it asks for.
        LedgerAway: the server can't be reached.
    """

    NOW = "CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION)"
    LISTED = "SELECT json_array_elements_text(CAST(? AS json))"
    shared = True

    def __init__(self, url: str, tables: Tables, answer_s: float) -> None:
        self._engine, self._ahead = _set_up(url, tables)
        self._answer_s = answer_s
        self._lock = threading.RLock()
        self._held: Connection | None = None  # taken once: to take one for each statement costs as much as it does
        self._within = False  # a block of `writing`

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Rows:
        with self._lock:
            end = time.monotonic() + BUSY_S
            while True:
                try:
                    return self._executed(statement, parameters)
                except _lost() as exc:
                    self._let_go()
                    # Done twice, each of the ledger's statements leaves what it leaves done once.
                    if self._within or time.monotonic() > end:
                        raise _away(exc) from exc
                    time.sleep(AGAIN_S)

    def _executed(self, statement: str, parameters: Sequence[Any] = ()) -> Rows:
        if self._held is None:
            if self._within:  # the connection is gone, and what had been done in the block
                raise LedgerAway("the connection to the ledger's database broke")
            self._held = self._connected()
        # PostgreSQL's texts hold no NUL; nothing but a peer's own words could have one.
        given = tuple(one.replace("\0", "") if isinstance(one, str) else one for one in parameters)
        return _Fetched(self._held.exec_driver_sql(_prepared(statement), given))

    def _connected(self) -> Connection:
        """Take a connection of this process, which is given up if an answer takes too long."""
        connection = self._engine.connect()
        limit(connection, self._answer_s)
        return connection

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            with suppress(*_lost()):
                held.invalidate()
                held.close()
            self._engine.dispose()  # those that lead to the same server, which may be another's standby by now

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._lock:
            if self._within:  # another block
                yield
                return
            self.execute("BEGIN")
            self._within = True
            try:
                yield
                self.execute("COMMIT")
            except BaseException:
                with suppress(LedgerAway):  # then nothing of it is there either
                    self.execute("ROLLBACK")
                raise
            finally:
                self._within = False

    def reading(self) -> Any:
        return self._lock

    @contextmanager
    def exclusive(self, name: str, check: Callable[[], None]) -> Iterator[None]:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        try:
            held = self._connected()  # the lock is the connection's
        except _lost() as exc:
            raise _away(exc) from exc
        with held:
            try:
                while not held.exec_driver_sql("SELECT pg_try_advisory_lock(%s)", (key,)).scalar_one():
                    check()
                    time.sleep(WAIT_S)
            except _lost() as exc:
                raise _away(exc) from exc
            try:
                yield
            finally:
                try:
                    held.exec_driver_sql("SELECT pg_advisory_unlock(%s)", (key,))
                except _lost():
                    held.invalidate()  # it broke meanwhile, and the lock went with it

    def check_room(self) -> None:
        """Its server has a disk of its own."""

    def time(self) -> float:
        # Its own clock goes on by ours, not to be asked for each row.
        return self._ahead + _now()

    def close(self) -> None:
        """Leave the connection to the next ledger of this process."""
        with self._lock:
            held, self._held = self._held, None
            if held is not None:
                held.close()


def _passes(exc: BaseException) -> LedgerAway | None:
    """Return what an error of SQLite's is that time, or who looks after the disk, mends; None for another one.

    A used-up quota is an input error there, as is a file system that has just been made read-only for one.
    """
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return LedgerFull(NO_ROOM)
    unusable = code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
    held = LedgerAway(HELD) if code == sqlite3.SQLITE_BUSY else None
    return LedgerAway(f"{UNUSABLE}: {exc}") if unusable else held


def opened(where: Path | str, tables: Tables, answer_s: float = BUSY_S) -> Database:
    """Open the database that a path or a URL names; make its tables if they aren't there.

    Args:
        answer_s: the longest time that a PostgreSQL server may be silent, in seconds, until another way is tried.
    """
    return Sqlite(where, tables) if isinstance(where, Path) else Postgresql(where, tables, answer_s)


class _Fetched:
    def __init__(self, result: CursorResult[Any]) -> None:
        self._rows = [tuple(row) for row in result] if result.returns_rows else []
        self.rowcount = result.rowcount

    def fetchone(self) -> Any:
        return self._rows[0] if self._rows else None

    def fetchall(self) -> list[Any]:
        return self._rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


@functools.cache
def _prepared(statement: str) -> str:
    return statement.replace("%", "%%").replace("?", "%s")


@functools.cache
def _lost() -> tuple[type[Exception], ...]:
    """Return the errors that say that a connection is of no use: the next one may lead to a server that is well.

    An InternalError is, of a database that others have set to read-only: a standby, or a disk that is nearly full.
    """
    from sqlalchemy.exc import InterfaceError, InternalError, OperationalError

    return OperationalError, InterfaceError, InternalError


def _away(exc: Exception) -> LedgerAway:
    return LedgerAway(f"the ledger's database can't be used now: {_words(exc)}")


def _words(exc: Exception) -> str:
    """Return what PostgreSQL says, without the statement and its parameters."""
    return str(getattr(exc, "orig", None) or type(exc).__name__).strip().partition("\n")[0]


def lease_s() -> float:
    """Return the seconds after which another host takes up the runs of one that is silent."""
    return float(os.environ.get("TALARIA_LEASE") or LEASE_S)


def _options() -> dict[str, Any]:
    """Return how the server is to serve a connection of ours.

    That a client's host has lost power, the server finds out by itself, after two hours unless it is asked to look
    sooner, and holds the client's locks until then. Here it does after two thirds of a lease at the earliest, when a
    host that is only cut off has stopped sending (`transfer.lease`), and before the lease ends.
    """
    each = math.ceil(lease_s() / 6)
    times = {"tcp_keepalives_idle": each, "tcp_keepalives_interval": each, "tcp_keepalives_count": 4}
    return {"search_path": "talaria", **times, "tcp_user_timeout": 5 * each * 1000}


@functools.cache
def _engine(url: str) -> Engine:
    """Return this process's connections to a database."""
    from sqlalchemy import create_engine, event, make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    if not url.startswith(PREFIXES):
        raise Misconfigured("the ledger's URL must begin with postgresql://")
    options = " ".join(f"-c {name}={value}" for name, value in _options().items())
    try:
        parts = make_url(url).set(drivername="postgresql+psycopg")
        engine = create_engine(
            parts,
            isolation_level="AUTOCOMMIT",
            pool_pre_ping=True,
            pool_size=4,
            max_overflow=-1,  # who waits for another's connection would wait for what it holds; the server has a limit
            hide_parameters=True,  # in messages of errors
            connect_args=KEEPALIVE | {"options": options, "application_name": "talaria"},
        )
        event.listen(engine, "checkin", lambda driver, _record: usual(driver))
        event.listen(engine, "do_connect", lambda _dialect, _record, given, named: limited().connect(*given, **named))
        return engine
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, ValueError) as exc:
        why = "install the extra `postgresql`" if isinstance(exc, ModuleNotFoundError) else "it is not a valid URL"
        raise Misconfigured(f"the ledger's database can't be used: {why}") from None  # its URL may hold a password


_setting_up = threading.Lock()


def _set_up(url: str, tables: Tables) -> tuple[Engine, float]:
    """Return the connections to a database whose tables are there, and how far its clock is ahead of our monotonic."""
    from sqlalchemy import text
    from sqlalchemy.exc import ProgrammingError

    engine = _engine(url)
    with _setting_up:
        try:
            if (url, tables) not in _known:
                with engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
                    limit(connection, LONG_S)
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({SET_UP})"))
                    connection.execute(text("CREATE SCHEMA IF NOT EXISTS talaria"))
                    connection.execute(text("CREATE TABLE IF NOT EXISTS version (number INTEGER PRIMARY KEY)"))
                    tables.check(connection.execute(text("SELECT max(number) FROM version")).scalar_one() or 0)
                    connection.execute(text(f"INSERT INTO version VALUES ({tables.version}) ON CONFLICT DO NOTHING"))  # noqa: S608
                    for statement in tables.statements:
                        connection.execute(text(_dialect(statement)))
            if _known.get((url, tables), (0.0, 0.0))[0] < _now() - SYNC_S:
                with engine.connect() as connection:
                    asked = _now()
                    now = connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
                    _known[url, tables] = _now(), float(now) - (asked + _now()) / 2
        except _lost() as exc:
            engine.dispose()
            raise _away(exc) from exc
        except ProgrammingError as exc:  # no right to make the tables
            raise Misconfigured(f"the ledger's tables can't be made: {_words(exc)}") from exc
        return engine, _known[url, tables][1]


SYNC_S = 60.0  # for how long it is known how far a database's clock is ahead
_known: dict[tuple[str, Tables], tuple[float, float]] = {}  # when that was asked, and the answer


def _now() -> float:
    """Return a clock that knows no steps and goes on while the machine sleeps, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _dialect(schema: str) -> str:
    """Return the statements that make the tables as PostgreSQL has them: texts are compared byte by byte."""
    return schema.replace("TEXT", 'TEXT COLLATE "C"').replace("BLOB", "BYTEA").replace("WITHOUT ROWID", "")
