"""Makes a file without a name, its data and then its name, survive a power cut, at the cost that its file system asks.

In this order, so that nothing half written ever has a name:

    way = way_of(folder)
    made = way(part)           # the data is on its way to the disk for good
    part.keep(name)
    made.named(folder)         # the name is there too
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from protocols.files import filesystem as fs
from protocols.files.partial import PartialFile
from transfer.spool import sync


class Named(Protocol):
    """A file whose data has been written."""

    def named(self, folder: str) -> None:
        """Wait until the name that it has got in a folder is on disk, and with it all that belongs to the file."""


class DurableWay(Protocol):
    """Writes the data of a file, which has no name yet.

    Raises:
        OSError: it can't be written.
    """

    def __call__(self, part: PartialFile, /) -> Named: ...


class AnyFileSystem:
    """Flushes the file, then its folder: what POSIX demands."""

    def __init__(self, part: PartialFile) -> None:
        os.fdatasync(part.fd)

    def named(self, folder: str) -> None:
        """Flush the folder."""
        sync(folder)


class OneCommit:
    """Writes the data, and commits length and name together: takes two thirds of the time.

    The data has left our memory before the file has a name; fsync(2) then has the disk keep it, and the journal's
    commit, which holds length and name. A power cut before that leaves no name.
    """

    def __init__(self, part: PartialFile) -> None:
        self._part = part  # whose descriptor may be another one, once it has its name
        fs.write_back(part.fd)

    def named(self, folder: str) -> None:
        """Flush the file, and its name with it."""
        os.fsync(self._part.fd)


class Volatile:
    """Does nothing, on a file system in memory."""

    def __init__(self, part: PartialFile) -> None: ...

    def named(self, folder: str) -> None:
        """Do nothing."""


def way_of(folder: Path) -> DurableWay:
    """Return how files become durable in a folder."""
    kind = fs.kind(folder)
    if kind in fs.VOLATILE:
        return Volatile
    if kind in fs.NAMED_WITH_FILE and _can_write_back(folder):
        return OneCommit
    return AnyFileSystem


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
