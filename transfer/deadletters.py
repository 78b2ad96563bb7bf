"""Dead letters: the files of dispatches that were given up, so that these can be tried again without their source.

    TALARIA_HOME/failed/<flow run id>/
    ├── source.json   the folder that the files' paths were relative to
    ├── lent          is there if another dispatch was to read these files
    └── files/        what was staged: links to the files, which cost no room while the source exists

Only what was staged as a whole is kept. It goes with the retention, or when the dispatch is delivered after all; where
another dispatch was to send it elsewhere, with the retention alone, and not while that one has not ended.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from transfer.home import Home
from transfer.live import replace
from transfer.plan import Plan
from transfer.staging import discard

FAILED, FILES, LENT = "failed", "files", "lent"


def keep(home: Home, run_id: str, plan: Plan, source: Path) -> bool:
    """Keep the staged files of a run that was given up; return False if not all of them can be.

    Args:
        plan: that of the staged files; its folder is taken away.
        source: the folder that their paths were relative to.
    """
    folder = _folder(home, run_id)
    if source == folder / FILES:
        return True  # it was read from here, and stays
    if not plan.items or any(item.in_place or item.problem for item in plan.items):
        return False
    lent = (folder / LENT).exists()
    discard(folder)
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
    if lent:
        (folder / LENT).touch(0o600)
    replace(folder / "source.json", {"source": os.fsencode(source).hex()})
    os.rename(plan.root, folder / FILES)
    return True


def instead(home: Home, run_id: str, paths: Sequence[str]) -> list[str]:
    """Return what to read instead of a run's paths: what was kept, if the source has not all of it any more."""
    folder = _folder(home, run_id)
    files = folder / FILES
    try:
        source = os.fsdecode(bytes.fromhex(json.loads((folder / "source.json").read_bytes())["source"]))
    except (OSError, ValueError, KeyError, TypeError):
        return list(paths)
    for above, _, names in os.walk(files):
        there = os.path.join(source, os.path.relpath(above, files))
        if not all(os.path.lexists(os.path.join(there, name)) for name in names):
            os.utime(folder)  # it is wanted: the time of its retention begins anew
            return [str(files)]
    return list(paths)


def lend(home: Home, run_id: str, paths: Sequence[str]) -> list[str]:
    """Return what another dispatch is to read, as `instead`; it may wait for long, and find it then all the same."""
    found = instead(home, run_id, paths)
    if found != list(paths):
        (_folder(home, run_id) / LENT).touch(0o600)
    return found


def read_by(paths: Iterable[str]) -> set[str]:
    """Return the ids of the runs whose kept files a dispatch of these paths reads."""
    found = set()
    for path in map(Path, paths):
        if path.name == FILES and path.parent.parent.name == FAILED:
            found.add(path.parent.name)
    return found


def forget(home: Home, run_id: str) -> None:
    """Remove what was kept of a run, unless another one may still read it."""
    folder = _folder(home, run_id)
    if not (folder / LENT).exists():
        discard(folder)


def clear(home: Home, before: float, keep: Collection[str] = ()) -> int:
    """Remove what was kept before a time (seconds since the epoch); return of how many runs.

    Args:
        keep: ids of runs that have not ended, or whose files are read by such.
    """
    old = []
    for folder in (home.root / FAILED).glob("*"):
        with suppress(FileNotFoundError):
            if folder.name not in keep and folder.stat().st_mtime < min(before, time.time()):
                old.append(folder)
    for folder in old:
        discard(folder)
    return len(old)


def kept(home: Home) -> set[str]:
    """Return the ids of the runs of which something is kept."""
    return {folder.name for folder in (home.root / FAILED).glob("*")}


def used(home: Home) -> int:
    """Return the bytes that are kept here alone: of files that their source has not any more.

    Of files that could not be linked, but frozen by a reflink, it is more: they share their blocks with the source's.
    """
    found = 0
    for above, _, names in os.walk(home.root / FAILED):
        for name in names:
            with suppress(FileNotFoundError):
                info = os.lstat(os.path.join(above, name))
                found += info.st_size if info.st_nlink == 1 else 0
    return found


def _folder(home: Home, run_id: str) -> Path:
    return home.root / FAILED / run_id
