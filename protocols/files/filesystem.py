"""Writes files so that nobody ever sees half of one, and nothing is lost when the power fails.

POSIX calls only, no threads: a file is copied under one name, flushed, and given its final name by one rename.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from transfer.content import READ_BYTES
from transfer.question import Question

_WRITE, _WAIT_WRITE_WAIT = 2, 1 | 2 | 4  # flags of sync_file_range(2): 1 waits before, 4 after
_SYNC_FILE_RANGE: Any = None
try:
    _SYNC_FILE_RANGE = ctypes.CDLL(None, use_errno=True).sync_file_range
    _SYNC_FILE_RANGE.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
except (AttributeError, OSError):
    pass

# File systems that syncfs(2) flushes in full; others (CIFS, FUSE) want fsync(2) for each file.
FLUSHED_AS_A_WHOLE = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs", "ramfs", "overlay", "nfs", "nfs4")
)
# File systems where each call waits for a network: there many threads wait at once.
LOCAL = FLUSHED_AS_A_WHOLE - {"nfs", "nfs4", "overlay"}
# File systems whose fsync(2) of a file makes its new name durable too, in the same commit of their journal.
NAMED_WITH_FILE = frozenset(("ext4", "xfs"))
VOLATILE = frozenset(("tmpfs", "ramfs"))  # a power cut leaves nothing of these
CHECK_S = 0.2  # between two looks at the cancel flag while a flush goes on


class Silent(Exception):
    """A file system did not answer in time."""


_asked: dict[tuple[str, str], Question[os.stat_result]] = {}  # by folder and mount
_asking = threading.Lock()


def within(seconds: float, folder: Path) -> os.stat_result:
    """Return what is known of a folder, if its file system answers.

    Of one that does not, a single thread waits, however often that is asked: a target that is away for days is tested
    every few minutes, and the system has so many threads. It is asked anew when it is mounted anew.

    Raises:
        Silent: no answer in time.
        OSError: as stat(2).
    """
    path = os.path.abspath(folder)
    with _asking:
        for key in [key for key, one in _asked.items() if not one.is_open]:
            del _asked[key]
        key = path, _mounted(path)[0]
        question = _asked.get(key) or _asked.setdefault(key, Question(partial(_look, path), "folder"))
    question.wait(seconds)
    if question.error:
        raise question.error
    if question.answer is None:
        raise Silent
    return question.answer


def _look(folder: str) -> os.stat_result:
    with suppress(OSError):  # its server is asked for that: what the kernel remembers of a folder is no answer
        os.statvfs(folder)
    return os.stat(folder)


def kind(folder: Path) -> str:
    """Return the type of the file system that a folder lies on, as mount(8) shows it; "" if it is not known."""
    return _mounted(os.path.realpath(folder))[1]


def _mounted(real: str) -> tuple[str, str]:
    """Return the number and the type of the mount that a path lies on, by its name alone; "" for what is not known."""
    best, found = -1, ("", "")
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                left, _, right = line.partition(" - ")
                number, *_, point = left.split(" ")[:5]
                # proc(5): blanks and the like in a mount point are octal escapes.
                point = point.encode("latin-1", "surrogateescape").decode("unicode_escape")
                point = point.encode("latin-1").decode("utf-8", "surrogateescape")
                inside = real == point or real.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= best:  # of two mounts on one point, the later one is seen
                    best, found = len(point), (number, right.split(" ")[0])
    except (OSError, IndexError, ValueError):
        return "", ""
    return found


def flush_all(folder: Path | int, check: Callable[[], None]) -> bool:
    """Wait until all that was written to a file system is on disk; False if it has no such call.

    Args:
        folder: any of it, by its path or opened.
        check: called now and then; may raise to stop, and then the flush ends by itself.
    """
    try:
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except (AttributeError, OSError):
        return False
    fd = os.dup(folder) if isinstance(folder, int) else os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    failed: list[int] = []

    def run() -> None:
        try:
            if syncfs(fd):
                failed.append(ctypes.get_errno())
        finally:
            os.close(fd)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    check()
    while thread.is_alive():
        thread.join(CHECK_S)
        check()
    if failed:
        raise OSError(failed[0], os.strerror(failed[0]))
    return True


def flush_soon(fd: int) -> None:
    """Start writing a file's content to disk, so that a later flush waits less."""
    with suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def write_back(fd: int) -> None:
    """Wait until the data of a file, without what describes it, has been written to the disk, which may hold it back.

    Raises:
        OSError: it can't be written, or the system has no such call.
    """
    _sync_file_range(fd, 0, 0, _WAIT_WRITE_WAIT)


def begin_write_back(fd: int, begin: int, count: int) -> None:
    """Have a part of a file written to the disk, and don't wait for that, unless the disk has enough to do already.

    Raises:
        OSError: as of `write_back`, which fails as well then.
    """
    _sync_file_range(fd, begin, count, _WRITE)


def _sync_file_range(fd: int, begin: int, count: int, flags: int) -> None:
    if _SYNC_FILE_RANGE is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _SYNC_FILE_RANGE(fd, begin, count, flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def checksum(fd: int, check: Callable[[], None], *, from_disk: bool = False) -> bytes:
    """Return the SHA-256 of an open file, from its beginning.

    Args:
        check: called between pieces; may raise to stop.
        from_disk: drop what the page cache holds first, so that the disk, or the share, is really asked.
    """
    if from_disk:
        flush_soon(fd)
    digest, offset = hashlib.sha256(), 0
    while piece := os.pread(fd, READ_BYTES, offset):
        check()
        digest.update(piece)
        offset += len(piece)
    return digest.digest()


def check_writable(folder: Path | int) -> None:
    """Raise OSError (EROFS) if the file system is mounted read-only."""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def room(folder: Path | int) -> tuple[int, int, int]:
    """Free bytes, free inodes and the size of a block; -1 where the file system gives none."""
    info = os.statvfs(folder)
    free = info.f_bavail * info.f_frsize if info.f_blocks else -1
    return free, info.f_favail if info.f_files else -1, info.f_frsize or 4096


def readable(fd: int) -> bool:
    """Return True if an open file can be read to its end: then an input/output error was the other side's."""
    offset = 0
    try:
        while piece := os.pread(fd, READ_BYTES, offset):
            offset += len(piece)
    except OSError:
        return False
    return True


def size(count: int) -> str:
    """Return a number of bytes as text for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
