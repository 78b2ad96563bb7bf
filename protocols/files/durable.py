"""Files without a name whose data and then name survive a power cut, at the cost that their file system asks.

In this order, so that nothing half written ever has a name:

    part = way_of(folder)(folder)
    part.wrote(end)            # as often as something was written: the disk begins with it
    part.written()             # the data is on its way to the disk for good
    part.keep(name)
    part.named(folder)         # the name is there too
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from mmap import PAGESIZE
from pathlib import Path

from protocols.files import filesystem as fs
from protocols.files import partial
from protocols.files.partial import PartialFile
from transfer.spool import sync

FEW_FILES = 16  # which are flushed one by one: what others have written to the disk is not waited for
AHEAD_BYTES = 1 << 17  # of a file that is still being written, which the disk gets at once
# The same where other files keep the disk busy meanwhile: each piece is a call more, and nothing waits for less.
SHARED_BYTES = 1 << 22


class DurableFile(PartialFile):
    """A file that is flushed, and then its folder: what POSIX demands.

    Attributes:
        ahead_bytes: of what is written, after which the disk begins with it, if it begins before the file is whole.
    """

    ahead_bytes = AHEAD_BYTES

    def wrote(self, end: int) -> None:
        """Note that all is written up to this offset, behind which more may come.

        Raises:
            OSError: what came before can't be stored.
        """

    def written(self) -> None:
        """Write the data, all of which is there, to the disk.

        Raises:
            OSError: it can't be written.
        """
        os.fdatasync(self.fd)

    def named(self, folder: str) -> None:
        """Wait until the name that the file has got in a folder is on disk, and with it all that belongs to the file.

        Raises:
            OSError: it can't be written.
        """
        sync(folder)


class OneCommit(DurableFile):
    """Writes the data while it comes, and commits length and name together: takes half the time.

    The data has left our memory before the file has a name; fsync(2) then has the disk keep it, and the journal's
    commit, which holds length and name. A power cut before that leaves no name.
    """

    _ahead = 0  # offset up to which the disk was given the data

    def wrote(self, end: int) -> None:
        """Have the disk begin with whole pages; the last one may be written to again."""
        if end - self._ahead >= self.ahead_bytes:
            end -= end % PAGESIZE
            fs.begin_write_back(self.fd, self._ahead, end - self._ahead)
            self._ahead = end

    def written(self) -> None:
        """Wait for the data, without what describes it."""
        fs.write_back(self.fd)

    def named(self, folder: str) -> None:
        """Flush the file, and its name with it."""
        os.fsync(self.fd)


class VolatileFile(DurableFile):
    """A file that nobody waits for: on a file system in memory, or where all are flushed together later."""

    def written(self) -> None:
        """Do nothing."""

    def named(self, folder: str) -> None:
        """Do nothing."""


def way_of(folder: Path) -> type[DurableFile]:
    """Return how files become durable in a folder."""
    kind = fs.kind(folder)
    if kind in fs.VOLATILE:
        return VolatileFile
    if kind in fs.NAMED_WITH_FILE and _can_write_back(folder):
        return OneCommit
    return DurableFile


def settle(folder: Path, names: Sequence[str], check: Callable[[], None] = lambda: None) -> None:
    """Flush files that have got their names in a folder to disk, and the names with them.

    Many are flushed at once, which costs one commit of the file system's journal.

    Args:
        check: called now and then; may raise to stop.

    Raises:
        DiskFull: the disk is full. Misconfigured: it can't be written to.
    """
    if not names:
        return
    with partial.writing(folder):
        # Waits for what other writers left too; still less than a commit of the journal for each file.
        as_a_whole = len(names) >= FEW_FILES and fs.kind(folder) in fs.FLUSHED_AS_A_WHOLE
        if as_a_whole and fs.flush_all(folder, check):
            return
        for name in names:
            check()
            fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        sync(folder)


def _can_write_back(folder: Path) -> bool:
    try:
        part = PartialFile(folder)
    except OSError:
        return False
    try:
        os.write(part.fd, b"\0")
        fs.write_back(part.fd)
    except OSError:
        return False
    finally:
        part.close()
    return True
