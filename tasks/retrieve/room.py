"""The room for what a retrieval has fetched and not handed on yet: `spool_limit`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from tasks.retrieve.job import size_of

SPOOL_LIMIT = 20 << 30  # bytes, unless TALARIA_SPOOL_LIMIT says otherwise
LOOKS = 128  # at what is here of others, at most, while as many bytes come


class Room:
    """The room for the studies of one retrieval; one larger than all of it goes alone.

    Args:
        folders: holds a folder for each study that has been fetched and not handed on.
    """

    def __init__(self, folders: Path) -> None:
        self._folders = folders
        self._limit = int(os.environ.get("TALARIA_SPOOL_LIMIT") or SPOOL_LIMIT)

    def is_full(self, own: Path) -> bool:
        """Return True if no more is to come of a study, beside what is here of others."""
        left = self._left(own, size_of(own)[1])
        return left is not None and left <= 0

    def _left(self, own: Path, size: int) -> int | None:
        """Return how many bytes may come of a study of which so many are here; None for any number: it is alone."""
        others = sum(size_of(folder)[1] for folder in self._folders.glob("*") if folder != own)
        return self._limit - others - size if others else None

    def watch(self, own: Path, halt: Callable[[], None]) -> Callable[[int], None]:
        """Return what is to be called with each count of bytes that come of a study; safe for several threads.

        It calls `halt` where they and what is here of others fill the room; not where that is full from the beginning,
        as then nothing will make room.
        """
        here, lock = size_of(own)[1], threading.Lock()
        left = self._left(own, here)

        def moved(count: int) -> None:
            nonlocal left, here
            with lock:
                here += count
                if left is None or (left := left - count) > 0:
                    return
                left = self._left(own, here)  # others may have gone
                if left is not None and left <= 0:
                    left = None
                    halt()
                elif left is not None:
                    left = max(left, self._limit // LOOKS)

        return moved if left is not None and left > 0 else lambda count: None
