"""What a run found before it ends, for whoever looks at this machine: small files, replaced as a whole.

What shall outlive the run, or be seen from elsewhere, is kept at Prefect; this costs no server anything. The folder is
that of the runs' progress (`tasks.dispatch.progress`), which is cleared there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transfer.home import Home

PLAN, PROBES = "plan", "probes"  # kinds: what a dispatch is going to do; the steps of a check that were made so far

BY = "talaria.by"  # label of a run: who asked for it
SETTLES = "talaria.settles"  # label of a sweep that only sees what has become of dispatches
SHOW_PLAN = "talaria.show-plan"  # label of a run that is to show its plan
FOLLOWED_HERE = "TALARIA_FOLLOWED_HERE"  # set where the front door that everybody comes in at is on this machine
SAVED = "Talaria-Saved"  # header of the server's answers to workers: a mark that changes when a saved block does


def is_followed_here() -> bool:
    """Return True if whoever follows a run of this process does so on this machine."""
    return bool(os.environ.get(FOLLOWED_HERE))


def write(home: Home, run_id: str, kind: str, pieces: Iterable[bytes]) -> None:
    """Replace what a run found, a JSON document in pieces. A full disk costs the sight of it, not the run."""
    with suppress(OSError):
        _replace(_path(home, run_id, kind), pieces)


def replace(path: Path, document: dict[str, Any]) -> None:
    """Write a file as a whole: whoever reads sees the old one or the new one. Only this user may read it."""
    _replace(path, [json.dumps(document).encode()])


def _replace(path: Path, pieces: Iterable[bytes]) -> None:
    part = path.with_suffix(".part")
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
    path.parent.mkdir(exist_ok=True, mode=0o700)
    with open(os.open(part, flags, 0o600), "wb") as file:
        file.writelines(pieces)
    part.replace(path)


def read(home: Home, run_id: str, kind: str) -> dict[str, Any] | None:
    """Return what a run found; None if it has found nothing yet, or not on this machine."""
    try:
        document: dict[str, Any] = json.loads(_path(home, run_id, kind).read_bytes())
    except (OSError, ValueError):
        return None
    return document


def forget(home: Home, run_id: str, kind: str) -> None:
    """Remove what a run found."""
    with suppress(OSError):
        _path(home, run_id, kind).unlink()


def _path(home: Home, run_id: str, kind: str) -> Path:
    return home.root / "progress" / f"{run_id}.{kind}.json"
