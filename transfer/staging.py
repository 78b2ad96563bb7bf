"""Staging: keeps the files of a plan at hand in a folder of our own while the dispatch runs.

Nothing is copied unless somebody asks for it: a file is linked; where it can't be, it is frozen by a reflink; where
that can't be done either, as on another file system, it is read in its place. A hard link keeps a file from vanishing
but not from being written to, so it is watched, and whoever reads it asks `Plan.check` before its last byte counts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple, Self

from imaging.header import Damaged, NotDicom, read_header
from transfer.beneath import WAY, is_link_error, resolved
from transfer.content import copy_bytes, same_content
from transfer.errors import Busy, NotFound
from transfer.fingerprint import modified_ns
from transfer.oserrors import FULL, kind_of, words_of
from transfer.plan import CHANGED, Item, Plan
from transfer.source import InPlace, LeadsOut, Sources

FICLONE = 0x40049409  # ioctl_ficlone(2)
STAGED_BY = "."  # in the name of a folder for a run's files, before the id of the process that has it


class Way(Enum):
    """How the files of a plan are kept for the time of a dispatch."""

    READ = auto()  # linked, or frozen by a reflink; where neither can be had, read in place
    NAME = auto()  # the same, but copied instead of read in place: some program opens them by their names
    COPY = auto()  # copied, so that the source may be written to meanwhile
    PLACE = auto()  # read in place, so that nothing of theirs changes: a link would change their ctime


def stage(plan: Plan, into: Path, check: Callable[[], None] = lambda: None, way: Way = Way.READ) -> Plan:
    """Bring the plan's files into the folder `into`; return the plan of the staged files.

    A file that changed since it was planned, or can't be read, keeps its place in the plan with a `problem`.
    The folder must not exist, or be left over from this dispatch; the caller removes it with `discard`. Of a plan that
    the caller keeps no name for, each item is forgotten as its file is brought: there are never two sets of them.

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
    sources = Sources(plan.sources or (resolved(plan.root),))
    items = list(plan.items)
    plan = replace(plan, items=())
    try:
        with _Staging(plan, into, sources, way, check) as staging:
            for number, item in enumerate(items):
                check()
                if plan.watch:
                    plan.watch.keep_up()
                items[number] = item if item.problem else staging.bring(item)
    except BaseException:
        sources.close()
        raise
    in_place = None
    if any(item.in_place for item in items):
        in_place = InPlace(plan.root, sources, way is Way.PLACE)  # closed with the last plan that has it
    else:
        sources.close()
    return replace(plan, root=into, items=tuple(items), sources=(), in_place=in_place)


def discard(folder: Path, staged: Plan | None = None) -> None:
    """Remove a staging folder, if it is there; of the plan that is staged there, nothing can be sent any more."""
    if staged and staged.watch:
        staged.watch.close()
    shutil.rmtree(folder, ignore_errors=True)


class _Found(NamedTuple):
    """A file of the source: the opened folder that it is in, and its name there."""

    folder: int
    name: str

    def open(self) -> int:
        return os.open(self.name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.folder)


class _Staging:
    """Stages one file after the other; keeps the folders open that the last one was in. A context manager."""

    def __init__(self, plan: Plan, into: Path, sources: Sources, way: Way, check: Callable[[], None]) -> None:
        self._plan, self._root, self._into, self._sources = plan, str(plan.root).rstrip("/"), into, sources
        self._way, self._check = way, check
        self._folder: str | None = None  # whose descriptors are open, relative to the root
        self._source = self._staged = -1
        self._apart: set[int] = set()  # devices whose files can't be linked
        self._unshared: set[int] = set()  # and those that can't be frozen

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in (self._source, self._staged):
            if fd >= 0:
                os.close(fd)
        self._folder, self._source, self._staged = None, -1, -1

    def bring(self, item: Item) -> Item:
        """Return the item as it is staged."""
        folder, _, name = item.path.rpartition("/")
        try:
            if folder != self._folder:
                self._enter(folder)
            if self._source >= 0:
                try:
                    return self._brought(item, _Found(self._source, name))
                except OSError as exc:
                    if not is_link_error(exc):
                        raise
            # It is a source itself, or a link to a file of one.
            with self._sources.above(f"{self._root}/{item.path}") as (other, name):
                return self._brought(item, _Found(other, name))
        except LeadsOut:
            return item.but(problem=CHANGED)  # it was looked at, and then became a link
        except OSError as exc:
            if exc.errno in FULL:
                raise Busy(f"no room for staging in {self._into.parent}") from exc
            return item.but(problem=CHANGED if is_link_error(exc) else f"can't be read: {exc.strerror}")

    def _enter(self, folder: str) -> None:
        self.close()
        staged = self._into / folder
        staged.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._staged = os.open(staged, WAY)
        with suppress(LeadsOut):  # only some of its files are sources
            self._source = self._sources.open(f"{self._root}/{folder}".rstrip("/") or "/", WAY)
        self._folder = folder

    def _brought(self, item: Item, found: _Found) -> Item:
        """Link, read in place or copy a file, if it still is what was planned; OSError with ELOOP if it is a link."""
        before = os.stat(found.name, dir_fd=found.folder, follow_symlinks=False)
        if stat.S_ISLNK(before.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), found.name)
        if not stat.S_ISREG(before.st_mode) or (before.st_size, modified_ns(before)) != (item.size, item.mtime_ns):
            return item.but(problem=CHANGED)
        if before.st_ctime_ns != item.ctime_ns and not _is_still(self._plan, item, found, before):
            return item.but(problem=CHANGED)
        if self._way is Way.PLACE:
            return item.seen(before, in_place=True)
        name = item.path.rpartition("/")[2]
        if self._way is not Way.COPY and before.st_dev not in self._apart:
            try:
                os.link(found.name, name, src_dir_fd=found.folder, dst_dir_fd=self._staged, follow_symlinks=False)
            except OSError as exc:  # another file system, too many links, or not ours to link
                if exc.errno == errno.EXDEV:
                    self._apart.add(before.st_dev)
            else:
                return self._linked(item, name, before)
        if self._way is Way.READ and before.st_dev in self._unshared:
            return item.seen(before, in_place=True)
        return self._opened(item, found, name, before)

    def _linked(self, item: Item, name: str, before: os.stat_result) -> Item:
        now = os.stat(name, dir_fd=self._staged, follow_symlinks=False)
        if not os.path.samestat(now, before):  # another file has its name by now
            os.unlink(name, dir_fd=self._staged)
            return item.but(problem=CHANGED)
        if (now.st_size, modified_ns(now)) != (item.size, item.mtime_ns):
            return item.but(problem=CHANGED)
        return item.seen(now, watch=item.watch or self._watched(f"{self._into}/{item.path}"))

    def _watched(self, file: str) -> int:
        return self._plan.watch.add(file) if self._plan.watch else 0

    def _opened(self, item: Item, found: _Found, name: str, before: os.stat_result) -> Item:
        """Freeze, copy or keep in its place what can't be linked."""
        fd = found.open()
        try:
            if not os.path.samestat(os.fstat(fd), before):
                return item.but(problem=CHANGED)
            copy = self._into / item.path
            shared = before.st_dev not in self._unshared and _clone(fd, copy)
            if not shared:
                self._unshared.add(before.st_dev)
            if not shared and self._way is Way.READ:
                return item.seen(before, in_place=True)
            if not shared:
                _copy(fd, copy, self._check)
            if not _is_whole(fd, copy, before):
                return item.but(problem=CHANGED)
            now = os.lstat(copy)
        finally:
            os.close(fd)
        if (now.st_size, modified_ns(now)) != (item.size, item.mtime_ns):
            return item.but(problem=CHANGED)
        return item.seen(now, watch=self._watched(str(copy)))


def _is_still(plan: Plan, item: Item, found: _Found, now: os.stat_result) -> bool:
    """Return True if a file that something happened to since it was planned has not been written to.

    Other dispatches link it, somebody moves it, or changes its permissions. Where that is not known, nobody knows of
    its old content but the header.
    """
    if item.inode and now.st_ino != item.inode:
        return False
    written = plan.watch.is_written(item.watch) if plan.watch else None
    if written is not None or item.header is None or not item.ctime_ns:
        return not written
    fd = found.open()
    try:
        return read_header(fd, os.fstat(fd).st_size) == item.header
    except (NotDicom, Damaged):
        return False
    finally:
        os.close(fd)


def _is_whole(source: int, copy: Path, before: os.stat_result) -> bool:
    """Return True if a copy is what the source was all the time that it was made."""
    now = os.fstat(source)
    if now.st_mtime_ns != before.st_mtime_ns:
        return False
    return now.st_ctime_ns == before.st_ctime_ns or same_content(source, copy)


def _clone(source: int, copy: Path) -> bool:
    """Freeze a file's content in another one that shares its blocks; return whether the file system can."""
    try:
        with open(copy, "xb") as writer:
            fcntl.ioctl(writer, FICLONE, source)
    except OSError:
        copy.unlink(missing_ok=True)
        return False
    _set_times(source, copy)
    return True


def _copy(source: int, copy: Path, check: Callable[[], None]) -> None:
    """Copy content and times; the copy has the source's final time."""
    with open(copy, "xb") as writer:
        os.lseek(source, 0, os.SEEK_SET)
        copy_bytes(source, writer.fileno(), lambda count: check())
    _set_times(source, copy)


def _set_times(source: int, copy: Path) -> None:
    info = os.fstat(source)
    os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))
