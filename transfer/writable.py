"""Whether the ledger's file can be written to, and grow: what can't be noted would have to be sent again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from transfer.errors import LedgerAway, LedgerFull
from transfer.oserrors import FULL

ROOM_BYTES = 1 << 20  # without which nothing is begun
NO_ROOM = "the disk of the state directory is full: nothing can be noted there"
UNUSABLE = "the ledger's file can't be used: is it another user's, its file system read-only, or a quota used up?"

# Files to which a write has failed in this process. A quota shows by nothing else: `statvfs` says that there is room.
_refused: set[Path] = set()


def check_room(path: Path) -> None:
    """Check that a file that is there can be written to, and has room to grow.

    Raises:
        LedgerFull: its disk, or a quota, is full. LedgerAway: it can't be written to.
    """
    there = os.statvfs(path.parent)
    if there.f_flag & os.ST_RDONLY or not os.access(path, os.W_OK, effective_ids=True):
        raise LedgerAway(UNUSABLE)
    if there.f_blocks and (there.f_bavail if os.geteuid() else there.f_bfree) * there.f_frsize < ROOM_BYTES:
        raise LedgerFull(NO_ROOM)
    if path in _refused:
        try:
            with tempfile.TemporaryFile(dir=path.parent) as file:
                os.posix_fallocate(file.fileno(), 0, ROOM_BYTES)
        except OSError as exc:
            raise (LedgerFull(NO_ROOM) if exc.errno in FULL else LedgerAway(f"{UNUSABLE}: {exc.strerror}")) from exc
        _refused.discard(path)


def was_refused(path: Path) -> None:
    """Note that a write to a file has failed: the next check tries whether another one would."""
    _refused.add(path)
