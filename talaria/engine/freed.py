"""What a database of SQLite's takes of the disk, and what of that is given back when rows have gone."""

from __future__ import annotations

import sqlite3
import time
from contextlib import AbstractContextManager, closing
from pathlib import Path

SPARE = 0.1  # of all pages: what the next hours fill is not taken from the disk again each time
PORTION = 500  # pages moved with one commit, some 10 ms, in which nobody else writes
WAIT_S = 60  # for a lock
INCREMENTAL = 2  # the value of `auto_vacuum` with which Talaria makes its files; one that was made before has 0


def taken(database: Path) -> int:
    """Return the bytes of a database, without pages that are free again."""
    with opened(database, "ro") as db:
        return (_pragma(db, "page_count") - _pragma(db, "freelist_count")) * _pragma(db, "page_size")


def give_back(database: Path) -> int:
    """Give free pages back to the disk, all but a tenth, while others write; return how many.

    The file becomes shorter with the next checkpoint. One that was made without `auto_vacuum` stays as long as it is.
    """
    with opened(database, "rw") as db:
        before = _pragma(db, "page_count")
        while _pragma(db, "auto_vacuum") == INCREMENTAL:
            more = _pragma(db, "freelist_count") - int(_pragma(db, "page_count") * SPARE)
            if more <= 0:
                break
            begun = time.monotonic()
            # As a script: else Python takes the first step of it, which is one page.
            db.executescript(f"PRAGMA incremental_vacuum({min(more, PORTION)})")
            time.sleep(time.monotonic() - begun)  # who waits for the lock looks for it every 0.1 s only
        return before - _pragma(db, "page_count")


def opened(database: Path, mode: str) -> AbstractContextManager[sqlite3.Connection]:
    """Open a database of SQLite's: `ro` to read, `rw` to write as well; it is closed at the end."""
    where = f"{database.absolute().as_uri()}?mode={mode}"
    return closing(sqlite3.connect(where, uri=True, timeout=WAIT_S, isolation_level=None))


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])
