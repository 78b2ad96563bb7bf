"""Which runs have not ended, by the embedded server's database: for commands where no server runs, which takes seconds.

Imports no Prefect.
"""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from talaria.engine.freed import opened
from transfer import deadletters
from transfer.home import Home

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")  # Prefect's terminal states
SETTINGS = ("prefect.toml", "pyproject.toml", ".env")  # where Prefect looks for settings in the current folder


def unended(home: Home) -> set[str] | None:
    """Return the ids of runs that have not ended, and of those whose kept files they are to send.

    Returns:
        None if that can't be known here: the database is not in the state directory, or of another Prefect.
    """
    database = home.root / "prefect" / "prefect.db"
    if not database.exists() or _may_be_elsewhere(home):
        return None
    marks = ",".join("?" * len(ENDED))
    query = f"SELECT id, parameters FROM flow_run WHERE state_type IS NULL OR state_type NOT IN ({marks})"  # noqa: S608
    try:
        with opened(database, "ro") as db:
            rows = db.execute(query, ENDED).fetchall()
    except sqlite3.Error:
        return None
    found = set[str]()
    for run_id, parameters in rows:
        paths = None
        with suppress(ValueError, TypeError, AttributeError):
            paths = json.loads(parameters).get("paths")
        found |= {str(run_id), *deadletters.read_by(paths if isinstance(paths, list) else ())}
    return found


def _may_be_elsewhere(home: Home) -> bool:
    """Return True if Prefect's settings may name another database (see docs/operations.md)."""
    if any(name.startswith("PREFECT_") and "DATABASE" in name for name in os.environ):
        return True
    for path in (home.root / "prefect" / "profiles.toml", *(Path.cwd() / name for name in SETTINGS)):
        with suppress(OSError):
            if b"database" in path.read_bytes().lower():
                return True
    return False
