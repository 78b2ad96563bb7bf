"""The indexes of folders that can't hold their own: they are kept in the state directory."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

INDEXES = "indexes"  # their folder in the state directory
SUFFIX = ".sqlite"
OWN_INDEX = re.compile(r"[0-9a-f]{32}\.sqlite(\.[0-9a-f]{12}\.part)?")


def clear_indexes(state_dir: Path, before: float) -> int:
    """Remove indexes from the state directory that have not been used since; return how many there were.

    One that is needed again is made again from its folder: only time is lost.

    Args:
        before: seconds since the epoch.
    """
    count = 0
    folder = state_dir / INDEXES
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(OSError):
            info = path.lstat()
            if OWN_INDEX.fullmatch(path.name) and max(info.st_atime, info.st_mtime) < before:
                path.unlink()
                count += path.suffix == SUFFIX
    return count
