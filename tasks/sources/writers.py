"""Whether anybody has a file open for writing, as an upload that pauses has: nothing else of the file shows that.

The kernel grants a read lease only on files that nobody writes to. It is asked for one and gives it up at once.
Nothing is known where it grants none: to files of other owners (without CAP_LEASE), and on shares, whose writers may be
on other machines.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from protocols.files.filesystem import kind

LOOK = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
# These refuse leases with the words for a file that is written to, whether it is or not.
SHARES = frozenset(("nfs", "nfs4", "cifs", "smb3", "smbfs"))


def is_written(fd: int) -> bool:
    """Return True if a file, opened for reading, is surely open for writing somewhere; False also if nobody knows."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # is ignored; SIGIO, when somebody opens it now, would end us
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as exc:
        return exc.errno == errno.EAGAIN and kind(Path(f"/proc/self/fd/{fd}")) not in SHARES
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def name_is_written(name: str, folder: int | None = None) -> bool:
    """Return True as `is_written`, of a name in an opened folder, or a path.

    Raises:
        OSError: it can't be opened.
    """
    try:
        fd = os.open(name, LOOK, dir_fd=folder)
    except BlockingIOError:  # somebody holds a lease for writing
        return True
    try:
        return is_written(fd)
    finally:
        os.close(fd)


def any_is_written(folder: str, paths: Iterable[str]) -> bool:
    """Return True as `is_written` of any of the files of a folder; what can't be opened doesn't count."""
    return kind(Path(folder)) not in SHARES and any(map(_is_written, paths))


def _is_written(path: str) -> bool:
    try:
        return name_is_written(path)
    except OSError:
        return False
