"""Staging: keeps the files of a plan unchanged in a folder of our own while the dispatch runs.

Nothing is copied where a hard link or a reflink does; a hard link keeps a file from vanishing but not from being
written to, so it is watched, and whoever reads it asks `Plan.check` before its last byte counts.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from imaging.header import Damaged, NotDicom, read_header
from transfer.beneath import is_link_error, resolved
from transfer.content import copy_bytes, same_content
from transfer.errors import Busy, NotFound
from transfer.oserrors import FULL, kind_of, words_of
from transfer.plan import CHANGED, Item, Plan
from transfer.source import LeadsOut, Sources

FICLONE = 0x40049409  # ioctl_ficlone(2)


def stage(plan: Plan, into: Path, check: Callable[[], None] = lambda: None) -> Plan:
    """Bring the plan's files into the folder `into`; return the plan of the staged files.

    A file that changed since it was planned, or can't be read, keeps its place in the plan with a `problem`.
    The folder must not exist, or be left over from this dispatch; the caller removes it with `discard`.

    Args:
        check: called between files, and between pieces of those that are copied; may raise to stop.

    Raises:
        Busy: no room for copies.
        NotFound: the source is gone altogether. Denied: it lies where nothing may be sent from.
        Denied, Misconfigured and others: the folder can't be made, as `transfer.oserrors` says.
    """
    if not plan.root.is_dir():
        raise NotFound(f"{plan.root}: the source is gone")
    discard(into)
    try:
        into.mkdir(parents=True, mode=0o700)
    except OSError as exc:
        kind = kind_of(exc)
        if kind is None:
            raise
        raise kind(f"can't stage files in {into.parent}: {words_of(exc)}") from exc
    made: set[Path] = set()
    items = []
    with Sources(plan.sources or (resolved(plan.root),)) as sources:
        for item in plan.items:
            check()
            items.append(item if item.problem else _stage_item(plan, item, sources, into, made, check))
    return replace(plan, root=into, items=tuple(items), sources=())


def discard(folder: Path) -> None:
    """Remove a staging folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def _stage_item(
    plan: Plan, item: Item, sources: Sources, into: Path, made: set[Path], check: Callable[[], None]
) -> Item:
    copy = into / item.path
    if copy.parent not in made:
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made.add(copy.parent)
    try:
        with sources.above(str(plan.file(item))) as (folder, name):
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                return _brought(plan, item, _Found(folder, name, fd), copy, check)
            finally:
                os.close(fd)
    except LeadsOut:
        return replace(item, problem=CHANGED)  # it was looked at, and then became a link
    except OSError as exc:
        if exc.errno in FULL:
            raise Busy(f"no room for staging in {into.parent}") from exc
        return replace(item, problem=CHANGED if is_link_error(exc) else f"can't be read: {exc.strerror}")


class _Found(NamedTuple):
    """A file of the source: the opened folder that it is in, its name there, and it, opened."""

    folder: int
    name: str
    fd: int


def _brought(plan: Plan, item: Item, found: _Found, copy: Path, check: Callable[[], None]) -> Item:
    """Link or copy what was opened, if it still is what was planned."""
    before = os.fstat(found.fd)
    watched = before.st_ctime_ns == item.ctime_ns
    if not stat.S_ISREG(before.st_mode) or not (watched or _is_still(plan, item, found.fd)):
        return replace(item, problem=CHANGED)
    try:
        os.link(found.name, copy, src_dir_fd=found.folder, follow_symlinks=False)
    except OSError:  # another file system, too many links, or not ours to link
        watched = False
        _copy(found.fd, copy, check)
        if not _is_whole(found.fd, copy, before):
            return replace(item, problem=CHANGED)
    else:
        if not os.path.samestat(os.lstat(copy), before):  # another file has its name by now
            os.unlink(copy)
            return replace(item, problem=CHANGED)
    now = os.lstat(copy)
    if (now.st_size, now.st_mtime_ns) != (item.size, item.mtime_ns):
        return replace(item, problem=CHANGED)
    if plan.watch and not watched:
        plan.watch.add(item.path, str(copy))
    return replace(item, ctime_ns=now.st_ctime_ns, links=now.st_nlink)


def _is_still(plan: Plan, item: Item, fd: int) -> bool:
    """Return True if a file that something happened to since it was planned has not been written to.

    Other dispatches link it, somebody moves it, or changes its permissions. Where that is not known, nobody knows of
    its old content but the header.
    """
    written = plan.watch.is_written(item.path) if plan.watch else None
    if written is not None or item.header is None or not item.ctime_ns:
        return not written
    with suppress(NotDicom, Damaged):
        return read_header(fd, os.fstat(fd).st_size) == item.header
    return False


def _is_whole(source: int, copy: Path, before: os.stat_result) -> bool:
    """Return True if a copy is what the source was all the time that it was made."""
    now = os.fstat(source)
    if now.st_mtime_ns != before.st_mtime_ns:
        return False
    return now.st_ctime_ns == before.st_ctime_ns or same_content(source, copy)


def _copy(source: int, copy: Path, check: Callable[[], None]) -> None:
    """Copy content and times, sharing blocks where the file system can; the copy has the source's final time."""
    with open(copy, "xb") as writer:
        try:
            fcntl.ioctl(writer, FICLONE, source)
        except OSError:
            os.lseek(source, 0, os.SEEK_SET)
            copy_bytes(source, writer.fileno(), lambda count: check())
        info = os.fstat(source)
    os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))
