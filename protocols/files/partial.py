"""Files that are being written beside their final names, distinct from those that a killed process left.

The writer holds a lock on its file, which the kernel releases with the process: a file without a lock is a leftover.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transfer.errors import DiskFull, DispatchError, Misconfigured
from transfer.oserrors import FULL, words_of

NAME = re.compile(r"\.talaria-[0-9a-f]{16}")  # other files of ours begin alike
# What open(2) says of O_TMPFILE where a file system, or the kernel, has none; NFS and old overlays among them.
NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)
# linkat(2) of an open file takes a third less time without the way by /proc; Linux before 6.10 lets only root do that.
_HERE, _EMPTY_PATH = -100, 0x1000
_LINKAT: Any = None
try:
    _LINKAT = ctypes.CDLL(None).linkat  # without errno: to keep it for us takes as long as all the rest
    _LINKAT.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
except (AttributeError, OSError):
    pass
STALE_S = 3600  # where the file system has no locks, older ones count as left behind


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise an OSError of the written folder as our own error, so that it differs from one of a file that is read.

    Raises:
        DiskFull: it is full. Misconfigured: it can't be written to; the caller chose it.
    """
    try:
        yield
    except OSError as exc:
        raise failure(folder, exc) from exc


def failure(folder: Path, exc: OSError) -> DispatchError:
    """Return our error for an OSError of the folder; see `writing`."""
    kind = DiskFull if exc.errno in FULL else Misconfigured
    return kind(f"can't write to {folder}: {words_of(exc)}")


def create(folder: Path) -> tuple[Path, int]:
    """Make a file to write; return its path and its descriptor, which holds the lock as long as it is open."""
    while True:
        path = folder / f".talaria-{secrets.token_hex(8)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return path, fd
        except BlockingIOError:
            pass
        except OSError:  # no locks here
            return path, fd
        os.close(fd)  # somebody took it for a leftover before it was locked


class PartialFile:
    """A file without a name until it is whole: nobody sees it, and a killed process leaves nothing of it.

    Where the file system doesn't support that (or there is nothing to name it by), a file made by `create`.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = folder
        self._path: Path | None = None
        try:
            self.fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError as exc:
            if exc.errno not in NO_UNNAMED:
                raise
            self._path, self.fd = create(Path(folder))

    @property
    def is_hidden(self) -> bool:
        """Whether it has no name at all."""
        return self._path is None

    def keep(self, name: str, *, replace: bool = True) -> None:
        """Give the file its name, below its folder, replacing one that has it.

        Raises:
            FileExistsError: one has it, and is not to be replaced.
        """
        final = f"{self._folder}/{name}"
        if self._path is None:
            try:
                self._link(final)
                return
            except FileExistsError:
                if not replace:
                    raise
                self._path = Path(self._folder) / f".talaria-{secrets.token_hex(8)}"
                self._link(str(self._path))
            except FileNotFoundError:
                if not os.path.isdir(os.path.dirname(final)):
                    raise
                self._copy()
        assert self._path is not None  # noqa: S101 - it has a name by now
        if replace:
            os.rename(self._path, final)
        else:
            os.link(self._path, final)
            self._path.unlink()
        self._path = None

    def _link(self, path: str) -> None:
        if _LINKAT is not None and not _LINKAT(self.fd, b"", _HERE, os.fsencode(path), _EMPTY_PATH):
            return
        # By /proc, which also says why it fails: if the name is taken, for one. With a descriptor of a folder, which
        # an absolute path makes of no account, Python follows the link there.
        os.link(f"/proc/self/fd/{self.fd}", path, src_dir_fd=self.fd, follow_symlinks=True)

    def _copy(self) -> None:
        """Copy the file to its name, on a machine without /proc."""
        self._path, fd = create(Path(self._folder))
        size, done = os.fstat(self.fd).st_size, 0
        while done < size:
            done += os.sendfile(fd, self.fd, done, size - done)
        os.fdatasync(fd)
        os.close(self.fd)
        self.fd = fd

    def close(self) -> None:
        """Close the file; without a name it is gone."""
        os.close(self.fd)
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder."""
    for path in folder.glob(".talaria-*"):
        if NAME.fullmatch(path.name):
            with suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        info = os.fstat(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_left = True
        except BlockingIOError:
            is_left = False
        except OSError:
            is_left = info.st_mtime < time.time() - STALE_S
        if is_left and stat.S_ISREG(info.st_mode):
            path.unlink()
    finally:
        os.close(fd)
