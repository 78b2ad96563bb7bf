"""Opens what lies below an opened folder, and never by way of a link (openat2(2), or step by step where it lacks).

A path that was looked at and then opened may have become a link in between, planted by whoever may write to a folder on
the way. Here the kernel refuses links while it opens; what is opened is below the folder, whatever anybody does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
PATH_ONLY = getattr(os, "O_PATH", os.O_RDONLY)  # to look at; need not be readable
WAY = PATH_ONLY | os.O_DIRECTORY | os.O_CLOEXEC  # to go through
AGAIN = 100  # how often a path is resolved whose links change meanwhile
OPENAT2 = 437  # the same on all architectures
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x02, 0x04, 0x08
_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
# How kernels before 5.6, and sandboxes that don't know the call, answer.
_LACKS = (errno.ENOSYS, errno.EPERM, errno.E2BIG)


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _call() -> ctypes._NamedFuncPointer | None:
    try:
        syscall = ctypes.CDLL(None, use_errno=True).syscall
    except (AttributeError, OSError):
        return None
    syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_How), ctypes.c_size_t)
    syscall.restype = ctypes.c_long
    return syscall


_syscall = _call()


def open_beneath(folder: int, path: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """Open a path relative to an opened folder; return the descriptor, which no program that is started inherits.

    Args:
        path: POSIX; without `..`.
        mode: as in open(2), for a file that is made.

    Raises:
        OSError: as open(2); ELOOP if a link is on the way or at its end, EXDEV if the path climbs.
    """
    if path.startswith("/") or ".." in path.split("/"):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    flags |= os.O_CLOEXEC
    if _syscall is not None:
        how = _How(flags, mode if flags & os.O_CREAT or _is_unnamed(flags) else 0, _RESOLVE)
        while True:
            fd = _syscall(OPENAT2, folder, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
            if fd >= 0:
                return int(fd)
            code = ctypes.get_errno()
            if code not in (errno.EINTR, errno.EAGAIN):  # EAGAIN: something was renamed meanwhile
                break
        # EPERM has other causes as well, which opening it step by step meets again.
        if code not in _LACKS:
            raise OSError(code, os.strerror(code), path)
    return _step_by_step(folder, path, flags, mode)


def _is_unnamed(flags: int) -> bool:
    return flags & os.O_TMPFILE == os.O_TMPFILE


def _step_by_step(folder: int, path: str, flags: int, mode: int) -> int:
    *above, last = [part for part in path.split("/") if part not in ("", ".")] or ["."]
    at = folder
    try:
        for part in above:
            below = _opened(at, part, WAY, 0)
            if at != folder:
                os.close(at)
            at = below
        return _opened(at, last, flags, mode)
    finally:
        if at != folder:
            os.close(at)


def _opened(folder: int, name: str, flags: int, mode: int) -> int:
    """Open one name; a link that should be a folder is ELOOP, not ENOTDIR."""
    try:
        return os.open(name, flags | os.O_NOFOLLOW, mode, dir_fd=folder)
    except NotADirectoryError:
        if stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from None
        raise


def is_link_error(exc: OSError) -> bool:
    """Return True if something was not opened because a link was on the way."""
    return exc.errno == errno.ELOOP


@contextmanager
def above(folder: int, path: str) -> Iterator[tuple[int, str]]:
    """Yield the opened folder that a path lies in, and its name there, for calls that take both.

    Raises:
        OSError: as `open_beneath`.
    """
    way, _, name = path.rpartition("/")
    if not way:
        if name in ("", ".", ".."):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
        yield folder, name
        return
    fd = open_beneath(folder, way, WAY)
    try:
        yield fd, name
    finally:
        os.close(fd)


def resolved(path: str | os.PathLike[str], strict: bool = False) -> str:
    """Return a path without links, also while somebody changes them.

    Raises:
        FileNotFoundError: it is not there (if `strict`), or its links never stop changing.
        OSError: it can't be looked at.
    """
    for _ in range(AGAIN):
        try:
            return os.path.realpath(path, strict=strict)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # a link became something else between two looks at it
                raise
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
