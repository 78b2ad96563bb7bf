"""What the errors of a file system mean for a dispatch: one table for all that reads and writes files."""

from __future__ import annotations

import errno
import os
import pwd

from transfer.errors import (
    Busy,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    NotFound,
    Permanent,
    Retryable,
    Unreachable,
)

FULL = (errno.ENOSPC, errno.EDQUOT)

# For all that is read or written there.
ERRORS: dict[int, type[DispatchError]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: Misconfigured,
    errno.EEXIST: Misconfigured,
    errno.EISDIR: Misconfigured,
    errno.ELOOP: Misconfigured,
    errno.ENAMETOOLONG: Misconfigured,
    errno.EXDEV: Misconfigured,
    errno.EACCES: Denied,
    errno.EPERM: Denied,
    errno.EROFS: Denied,
    errno.ENOSPC: Busy,
    errno.EDQUOT: Busy,
    errno.EMFILE: Busy,
    errno.ENFILE: Busy,
    errno.ENOMEM: Busy,
    errno.EAGAIN: Busy,
    errno.EBUSY: Busy,
    errno.ENOLCK: Busy,
    errno.EIO: Interrupted,
    errno.ESTALE: Interrupted,
    errno.EREMOTEIO: Interrupted,
    errno.ECONNRESET: Interrupted,
    errno.ECONNABORTED: Interrupted,
    errno.ENODEV: Unreachable,
    errno.ENXIO: Unreachable,
    errno.ENOTCONN: Unreachable,
    errno.ECONNREFUSED: Unreachable,
    errno.EHOSTDOWN: Unreachable,
    errno.EHOSTUNREACH: Unreachable,
    errno.ENETUNREACH: Unreachable,
    errno.ENETDOWN: Unreachable,
    errno.ETIMEDOUT: Unreachable,
}

# Of one file, whose fault it then is.
ITEM_ERRORS = {
    errno.ENAMETOOLONG: "its name is too long for the file system",
    errno.EILSEQ: "the file system doesn't allow the characters of its name",
    errno.EINVAL: "the file system doesn't allow its name",
    errno.EFBIG: "it is larger than the file system allows",
    errno.EISDIR: "there is a folder with its name",
    errno.EEXIST: "there is a file where its folder should be",
    errno.ENOTDIR: "there is a file where its folder should be",
    errno.ELOOP: "there is a symbolic link where its folder should be: links below a target's folder are not followed",
}

# Of one file, or of everything: others show which.
DOUBTFUL_ERRORS = frozenset((errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EBUSY))

_REMEDIES = {
    errno.ENOENT: "make the folder, or mount the share that it lies on",
    errno.ENOTDIR: "there is a file where a folder is expected: name a folder, or move the file away",
    errno.EEXIST: "there is a file where a folder is expected: move it away",
    errno.EISDIR: "there is a folder where a file is expected: move it away",
    errno.ELOOP: "there is a symbolic link where a folder is expected: links below a target's folder are not followed",
    errno.EROFS: "mount it so that it can be written to",
    errno.EXDEV: "one folder of a dispatch must lie on one file system",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
}


def kind_of(exc: OSError) -> type[DispatchError] | None:
    """Return what an error means for the whole target; None if it is a bug of ours."""
    return ERRORS.get(exc.errno or 0)


def passes(exc: OSError) -> bool:
    """Return True if what a file system says may pass by itself: a full disk, a share that is away, an input error."""
    return issubclass(kind_of(exc) or Permanent, Retryable)


def words_of(exc: OSError) -> str:
    """Return the file system's words and what to do about it, without any path."""
    remedy = _REMEDIES.get(exc.errno or 0, "")
    if exc.errno in (errno.EACCES, errno.EPERM):
        remedy = f"user {user()} must be able to write to it"
    return f"{exc.strerror}" + (f": {remedy}" if remedy else "")


def user() -> str:
    """Return the name of the user who runs this process, or the number if there is no name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
