"""The room for what a retrieval has fetched and not handed on yet: `spool_limit`, and what the disk has free.

Several retrievals share a disk, in the state directory with the ledger and Prefect's database, without which nothing
goes on: none of them may fill it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tasks.retrieve.job import Job, Stage, Study, discard, size_of

SPOOL_LIMIT = 20 << 30  # bytes, unless TALARIA_SPOOL_LIMIT says otherwise
LOOKS = 128  # at what is here of others, at most, while as many bytes come
RESERVE_B = 1 << 30  # of the disk of the state directory, or a twentieth of a smaller one, which is left free
NO_ROOM = "room in the state directory"
SHORT_S = 60.0  # after which a run looks again whether there is room


class Room:
    """The room for the studies of one retrieval; one larger than all of it goes alone.

    Args:
        folders: holds a folder for each study that has been fetched and not handed on.
        state: the state directory, if they lie in it.
    """

    def __init__(self, folders: Path, state: Path | None = None) -> None:
        self._folders, self._state = folders, state
        self._limit = int(os.environ.get("TALARIA_SPOOL_LIMIT") or SPOOL_LIMIT)
        self._reserve = RESERVE_B

    def is_full(self, own: Path) -> bool:
        """Return True if no more is to come of a study, beside what is here of others."""
        return self._left(own, size_of(own)[1]) <= 0

    def is_short(self) -> bool:
        """Return True if the disk must not be filled any more, whoever has filled it."""
        return self._free() <= 0

    def _free(self) -> float:
        """Return how many bytes the disk has room for besides what is left free."""
        with suppress(OSError):
            if self._state and (there := os.statvfs(self._state)).f_blocks:
                self._reserve = min(RESERVE_B, there.f_blocks * there.f_frsize // 20)
                return there.f_bavail * there.f_frsize - self._reserve
        return math.inf

    def _left(self, own: Path, size: int) -> float:
        """Return how many bytes may come of a study of which so many are here; beside no other, as many as go in."""
        others = sum(size_of(folder)[1] for folder in self._folders.glob("*") if folder != own)
        return min(self._limit - others - size if others else math.inf, self._free())

    def watch(self, own: Path, halt: Callable[[], None]) -> Callable[[int], None]:
        """Return what is to be called with each count of bytes that come of a study; safe for several threads.

        It calls `halt` where they and what is here of others fill the room; not where that is full from the beginning,
        as then nothing will make room.
        """
        here, lock = size_of(own)[1], threading.Lock()
        left, unseen = self._left(own, here), 0
        step = self._reserve // LOOKS  # others fill the same disk meanwhile

        def moved(count: int) -> None:
            nonlocal left, here, unseen
            with lock:
                here, unseen = here + count, unseen + count
                if (left := left - count) > 0 and unseen < step:
                    return
                unseen = 0
                if left == math.inf or (left := min(left, self._free())) > 0:
                    return
                left = self._left(own, here)  # others may have gone
                if left <= 0:
                    left = math.inf
                    halt()
                else:
                    left = max(left, min(self._limit, self._reserve) // LOOKS)

        return moved if 0 < left < math.inf else lambda count: None


def drop_one(job: Job, folder_of: Callable[[Study], Path]) -> bool:
    """Delete the files of one failed study, to make room; a retry then fetches them again. Return False for none."""
    for one in job.studies.values():
        folder = folder_of(one)
        if one.stage in (Stage.FAILED, Stage.PARTIAL) and size_of(folder)[0]:
            discard(folder)
            one.dispatch = ""
            return True
    return False
