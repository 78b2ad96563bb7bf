"""Staging: the files of a plan, held still in a folder of our own while the dispatch runs.

Nothing is copied where a hard link or a reflink does; a hard link keeps a file from vanishing but not from being
written to, so whoever reads it asks `Plan.check` before its last byte counts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transfer.errors import Busy, NotFound
from transfer.plan import Item, Plan

FICLONE = 0x40049409  # ioctl_ficlone(2)
COPY_BYTES = 1 << 24  # one call of copy_file_range(2)
FULL = (errno.ENOSPC, errno.EDQUOT)
# How copy_file_range(2) says that these two file systems can't: then the bytes go through our hands.
NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


def stage(plan: Plan, into: Path, check: Callable[[], None] = lambda: None) -> Plan:
    """Bring the plan's files into the folder `into`; return the plan of the staged files.

    A file that changed since it was planned, or can't be read, keeps its place in the plan with a `problem`.
    The folder must not exist, or be left over from this dispatch; the caller removes it with `discard`.

    Args:
        check: called between files, and between pieces of those that are copied; may raise to stop.

    Raises:
        Busy: no room for copies.
        NotFound: the source is gone altogether.
    """
    if not plan.root.is_dir():
        raise NotFound(f"{plan.root}: the source is gone")
    discard(into)
    into.mkdir(parents=True, mode=0o700)
    made: set[Path] = set()
    items = []
    for item in plan.items:
        check()
        items.append(item if item.problem else _stage_item(plan, item, into, made, check))
    return replace(plan, root=into, items=tuple(items))


def discard(folder: Path) -> None:
    """Remove a staging folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def _stage_item(plan: Plan, item: Item, into: Path, made: set[Path], check: Callable[[], None]) -> Item:
    copy = into / item.path
    if copy.parent not in made:
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made.add(copy.parent)
    try:
        real = os.path.realpath(plan.file(item))
        try:
            os.link(real, copy)
        except OSError:  # another file system, too many links, or not ours to link
            _copy(real, copy, check)
        now = os.stat(copy)
    except OSError as exc:
        if exc.errno in FULL:
            raise Busy(f"no room for staging in {into.parent}") from exc
        return replace(item, problem=f"can't be read: {exc.strerror}")
    if (now.st_size, now.st_mtime_ns) != (item.size, item.mtime_ns):
        return replace(item, problem="changed since the dispatch was planned")
    return item


def _copy(source: str, copy: Path, check: Callable[[], None]) -> None:
    """Copy content and times, sharing blocks where the file system can; the copy has the source's final time."""
    with open(source, "rb") as reader, open(copy, "xb") as writer:
        try:
            fcntl.ioctl(writer, FICLONE, reader.fileno())
        except OSError:
            copy_bytes(reader.fileno(), writer.fileno(), lambda count: check())
        info = os.fstat(reader.fileno())
    os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))


def copy_bytes(
    reader: int, writer: int, moved: Callable[[int], None] = lambda count: None, piece_bytes: int = COPY_BYTES
) -> int:
    """Copy all bytes between two open files inside the kernel where it can; return how many.

    Args:
        moved: called with the count of every piece; may raise to stop.
        piece_bytes: the largest piece.
    """
    total, in_kernel = 0, True
    while True:
        if in_kernel:
            try:
                count = os.copy_file_range(reader, writer, piece_bytes)
            except OSError as exc:
                if total or exc.errno not in NOT_IN_KERNEL:
                    raise
                in_kernel = False
                continue
            if count == 0 and total == 0:  # some file systems answer so for "can't" (copy_file_range(2), BUGS)
                in_kernel = False
                continue
        else:
            piece = os.read(reader, min(piece_bytes, 1 << 20))
            count = len(piece)
            while piece:
                piece = piece[os.write(writer, piece) :]
        if count == 0:
            return total
        total += count
        moved(count)
