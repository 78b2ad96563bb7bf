"""Writes the files of a plan, whole and flushed, into a hidden folder beside their final place.

    <root>/.incoming-<dispatch id>/<owner>/
    ├── parts/               files that are being written
    └── files/<name>/...     whole files: what a killed dispatch goes on with

Files here have not arrived yet: the caller gives them their final names when all are here.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
import unicodedata
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from protocols.files import filesystem as fs
from protocols.files.durable import FEW_FILES
from protocols.files.tree import NO_LINK, Tree, joined, parent
from transfer.beneath import FOLDER
from transfer.content import copy_bytes, same_content
from transfer.errors import Busy, Denied, Interrupted, Rejected
from transfer.fanout import each
from transfer.oserrors import DOUBTFUL_ERRORS, ITEM_ERRORS, kind_of, words_of
from transfer.outcome import Kind, Outcome
from transfer.plan import CHANGED, Item, Plan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

MARKER = ".complete"  # in a folder whose files are all there
PIECE_BYTES = 4 << 20  # between two looks at the cancel flag: a share of 1 MB/s is left within five seconds
BATCH_FILES = 64  # one thread's share at a time
ASIDE_IN_A_ROW = 6  # files that fail, and none in between that doesn't: then it is the disk, or the share
SMALL_BYTES = 128 << 10  # below that, on a local disk, threads only wait for the interpreter


class Stopped(Exception):
    """This thread stops because another one failed."""


@dataclass(frozen=True)
class Style:
    """How files are written.

    Attributes:
        threads: files written at once.
        bandwidth_limit: bytes per second, None for no limit.
        link: whether a hard link to the source may stand for a copy.
        mode, dir_mode: permissions of files and folders, None for what the umask gives.
        group: number of the group that they get, None for the user's own.
    """

    threads: int = 4
    bandwidth_limit: int | None = None
    link: bool = False
    mode: int | None = None
    dir_mode: int | None = None
    group: int | None = None


class Place:
    """One folder of the target: where its files are written, and where they shall be. Paths are relative to `tree`.

    Args:
        folder: its name; may have several parts.
        hidden: what is written goes below a folder of this name.
    """

    def __init__(self, tree: Tree, folder: str, hidden: str, owner: str) -> None:
        self.tree = tree
        self.items: list[Item] = []
        self.final = folder
        self.existed = tree.exists(folder)
        near = folder
        while near and not tree.is_folder(near):
            near = parent(near)
        # On the file system of the final name, which may be one of its own: a rename can't cross over.
        self.above = "" if tree.stat(near).st_dev == tree.stat("").st_dev else near
        self.base = joined(self.above, hidden, owner)
        self.parts = f"{self.base}/parts"
        self.files = f"{self.base}/files/{folder}"
        self._known: set[str] = set()
        self._caseless = False
        self._claimed: dict[str, str] = {}
        self._numbers = itertools.count()
        self._unique = uuid.uuid4().hex[:12]  # several processes may be at it
        self._lock = threading.Lock()

    def part(self) -> str:
        """Return the path of a file to write."""
        return f"{self.parts}/{self._unique}-{next(self._numbers)}"

    def make_for(self, kept: str, style: Style) -> None:
        """Make the folders that a whole file will be in."""
        folder, tree = parent(kept), self.tree
        if folder in self._known:
            return
        with self._lock:
            if not self._known:
                tree.make_folders(self.parts, self.above)
                tree.make_folders(parent(self.files), self.base)
                self._caseless = tree.is_caseless(parent(self.base))
            # Only what will be seen gets the permissions that the target asks for.
            tree.make_folders(folder, parent(self.files), style.dir_mode, style.group)
            self._known.add(folder)

    def claim(self, item: Item, kept: str) -> None:
        """Reserve a name for an item.

        Raises:
            Rejected: another file of the plan has it, on a file system that takes `ab` for `AB`.
        """
        if self._caseless:
            first = self._claimed.setdefault(unicodedata.normalize("NFC", kept.casefold()), item.shown)
            if first != item.shown:
                raise Rejected(f"{first} has its name there: the file system takes capitals for small letters")

    def unmark(self) -> None:
        """Take the marker away, whoever put it: the folder is not complete any more."""
        with _harmless(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EPERM, errno.EACCES, errno.ELOOP):
            self.tree.unlink(f"{self.final}/{MARKER}")

    def discard(self) -> None:
        """Remove what was written and is not under its final name."""
        self.tree.remove(self.base)
        with suppress(OSError):  # files of another owner are in it
            self.tree.rmdir(parent(self.base))


class Incoming:
    """Brings the items of a plan into the hidden folders of their places, several at once.

    Args:
        where: the place of each item, by its path.
    """

    def __init__(self, plan: Plan, where: dict[str, Place], report: PushReport, style: Style) -> None:
        self.plan, self.where, self.report, self.style = plan, where, report, style
        self._throttle = Throttle(style.bandwidth_limit)
        # A hard link shares owner and permissions with the source: none of its own can be given to it.
        self._linking = style.link and style.mode is None and style.group is None
        self._linking &= not (plan.in_place and plan.in_place.untouched)
        self._linked: list[Item] = []
        self._made = array("q")  # for each of them, the ctime and the number of links that it had then
        self._lock = threading.Lock()
        self._kinds = {place.above: "" for place in where.values()}
        for place in set(where.values()):
            self._kinds[place.above] = self._kinds[place.above] or fs.kind(place.tree.root / place.above)
        self._local = fs.LOCAL.issuperset(self._kinds.values())
        self._failed = threading.Event()
        self._aside: dict[Item, OSError] = {}  # files at which the file system failed
        self._in_a_row = 0
        self._whole = 0  # files that came

    def kept(self, item: Item) -> str:
        """Return the path of the item's whole file."""
        return f"{self.where[item.path].files}/{item.path}"

    def bring(self, items: list[Item]) -> list[Item]:
        """Write these items, unless they are here already; return those that are here now, flushed.

        The others were rejected, and reported.

        Raises:
            Busy: there is no room for them. Interrupted: what was written is not what should have been.
            Cancelled, OSError: as they come; whole files stay for the next attempt.
        """
        resumed = self._resumed(items)
        for item in items:
            if item.path in resumed:
                self.where[item.path].make_for(self.kept(item), self.style)
                self.where[item.path].claim(item, self.kept(item))
                self._whole += 1
        copying = [item for item in items if item.path not in resumed]
        self._need_room(copying)
        self.in_threads(copying, self._copy)
        for number, item in enumerate(self._linked):
            self._check_link(item, (self._made[2 * number], self._made[2 * number + 1]))
        self._linked, self._made = [], array("q")  # of a million files, they are 24 MB
        here = [item for item in items if item.path not in self.report.outcomes and item not in self._aside]
        self._flush(here)
        return here

    def set_aside(self, item: Item, exc: OSError) -> None:
        """Set a file aside at which alone the file system may fail.

        Raises:
            OSError: the given one, if it is about more than this file.
        """
        self._in_a_row += 1
        if exc.errno not in DOUBTFUL_ERRORS or self._in_a_row > ASIDE_IN_A_ROW:
            raise exc
        self.report.put_off[item.path] = words_of(exc)
        self._aside[item] = exc

    def settle_aside(self) -> None:
        """Reject files that were set aside although others could be written; called when those have their final names.

        Raises:
            OSError: a file's error, if it may pass.
        """
        aside, self._aside = self._aside, {}
        for item, exc in aside.items():
            if self._whole and kind_of(exc) is Denied:
                self.report(item, Outcome(Kind.REJECTED, words_of(exc)))
        for item, exc in aside.items():
            if item.path not in self.report.outcomes:
                raise exc

    def _tree(self, item: Item) -> Tree:
        return self.where[item.path].tree

    def check(self) -> None:
        """Raise if the work is to stop, or has failed in another thread."""
        self.report.check()
        if self._failed.is_set():
            raise Stopped

    def in_threads(self, items: list[Item], work: Callable[[list[Item]], None]) -> None:
        """Do the work in batches, several at once; the first error stops the others; the gravest is raised."""
        if not items:
            return
        threads = min(self.style.threads, len(items))
        if self._local and sum(item.size for item in items) < SMALL_BYTES * len(items):
            threads = 1
        if threads == 1:
            work(items)
            return
        size = min(BATCH_FILES, -(-len(items) // threads))

        def run(batch: list[Item]) -> None:
            try:
                work(batch)
            except Stopped:
                pass
            except BaseException:
                self._failed.set()
                raise

        each((items[start : start + size] for start in range(0, len(items), size)), run, threads, "files")

    def same_checksum(self, item: Item, file: str) -> bool:
        """Compare the SHA-256 of an item with that of a file of its tree that is read back.

        Raises:
            Rejected: the item can no longer be read.
        """
        with self.plan.open(item) as fd:
            ours = fs.checksum(fd, self.check)
        with self._tree(item).opened(file) as fd:
            return fs.checksum(fd, self.check, from_disk=True) == ours

    def prove(self, items: list[Item]) -> None:
        """Compare the checksums of the files here with those of the source.

        Raises:
            Interrupted: one differs; it is removed.
        """

        def work(batch: list[Item]) -> None:
            for item in batch:
                if not self.same_checksum(item, self.kept(item)):
                    self._tree(item).unlink(self.kept(item))
                    raise Interrupted("a file that was read back is not the one that was written", item=item.shown)

        self.in_threads(items, work)

    def _resumed(self, items: list[Item]) -> frozenset[str]:
        """Return the paths of the items that an earlier attempt has written; remove what else it left."""
        places = [place for place in set(self.where.values()) if place.tree.is_folder(place.files)]
        wanted = {self.kept(item): item for item in items} if places else {}
        found: set[str] = set()
        for place in places:
            tree = place.tree
            tree.remove(place.parts)
            for kept in list(tree.files(place.files)):
                if kept in wanted and self._is_whole(wanted[kept], kept):
                    found.add(wanted[kept].path)
                else:
                    tree.unlink(kept)
        return frozenset(found)

    def _is_whole(self, item: Item, kept: str) -> bool:
        """Return True if what an earlier attempt kept is this item, and not what its file was then."""
        try:
            with self._tree(item).opened(kept) as there, self.plan.open(item) as fd:
                info = os.fstat(there)
                is_file = stat.S_ISREG(info.st_mode) and info.st_size == item.size
                return is_file and same_content(fd, there, self.check)
        except Rejected:
            return False
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.EACCES, errno.ENXIO):  # no file of ours
                return False
            raise

    def _need_room(self, items: list[Item]) -> None:
        needs: dict[str, list[Item]] = {}
        for item in items:
            place = self.where[item.path]
            needs.setdefault(place.above, []).append(item)
        for folder, group in needs.items():
            with self._tree(group[0]).opened(folder, FOLDER) as fd:
                if self._linking and self._device(group[0]) == os.fstat(fd).st_dev:
                    continue
                fs.check_writable(fd)  # its room says nothing
                free, inodes, block = fs.room(fd)
            need = sum(-(-item.size // block) * block for item in group)
            if 0 <= free < need:
                raise Busy(f"no room: {fs.size(need)} are needed, {fs.size(free)} are free")
            if 0 <= inodes < len(group):
                raise Busy(f"no room: {len(group)} files are to come, {inodes} more are possible")

    def _device(self, item: Item) -> int:
        folder = self.plan.in_place.root if item.in_place and self.plan.in_place else self.plan.root
        return folder.stat().st_dev

    def _copy(self, batch: list[Item]) -> None:
        """Write files, each whole, under the names that they keep."""
        for item in batch:
            self.check()
            try:
                self._copy_item(item)
            except Rejected as exc:
                self.report(item, Outcome(Kind.REJECTED, exc.message))
            except OSError as exc:
                self.set_aside(item, exc)
            else:
                self._in_a_row = 0
                self._whole += 1

    def _copy_item(self, item: Item) -> None:
        place, kept = self.where[item.path], self.kept(item)
        with _blamed_on(item):
            place.make_for(kept, self.style)
            place.claim(item, kept)
            with self.plan.open(item) as reader:
                if self._linking and self._link(item, reader, kept):
                    return
                part = place.part()
                writer = place.tree.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                try:
                    self._fill(item, reader, writer)
                    place.tree.rename(part, kept)
                except BaseException:
                    with suppress(OSError):
                        place.tree.unlink(part)
                    raise
                finally:
                    os.close(writer)

    def _link(self, item: Item, reader: int, kept: str) -> bool:
        """Make a hard link to the source; say whether that could be done."""
        tree = self._tree(item)
        try:
            # What is read in its place may have another name by now: what was opened is linked.
            source = f"/proc/self/fd/{reader}" if item.in_place else self.plan.file(item)
            tree.link(source, kept, follow=item.in_place)
        except OSError as exc:
            gone = item.in_place and exc.errno == errno.ENOENT
            if exc.errno not in NO_LINK and not gone:
                raise
            if exc.errno != errno.EMLINK and not gone:  # which are about this one file
                self._linking = False
            return False
        made = tree.stat(kept)
        if not os.path.samestat(made, os.fstat(reader)):
            tree.unlink(kept)
            raise Rejected(CHANGED, item=item.shown)
        with self._lock:
            self._linked.append(item)
            self._made.extend((made.st_ctime_ns, made.st_nlink))
        self.report.moved(item.size)  # no byte goes anywhere: nothing to throttle
        return True

    def _check_link(self, item: Item, made: tuple[int, int]) -> None:
        """Look once more, just before it is seen, whether what a link shares with the source is still the same."""
        tree, kept = self._tree(item), self.kept(item)
        if not self.plan.is_same(item, tree.stat(kept), made):
            tree.unlink(kept)
            self.report(item, Outcome(Kind.REJECTED, CHANGED))

    def _fill(self, item: Item, reader: int, writer: int) -> None:
        """Copy the content, and set everything that belongs to the file except its name."""
        try:
            copy_bytes(reader, writer, self._moved, min(PIECE_BYTES, self._throttle.piece))
        except OSError as exc:
            if exc.errno == errno.EIO and not fs.readable(reader):
                raise Rejected(f"can't be read: {exc.strerror}", item=item.shown) from exc
            raise
        self.plan.check(item, reader)
        written = os.fstat(writer).st_size
        if written != item.size:
            raise Interrupted(f"a file has {written} bytes after {item.size} were written", item=item.shown)
        if self.style.group is not None:
            os.fchown(writer, -1, self.style.group)
        if self.style.mode is not None:
            os.fchmod(writer, self.style.mode)
        os.utime(writer, ns=(item.mtime_ns, item.mtime_ns))
        fs.flush_soon(writer)

    def _moved(self, count: int) -> None:
        self._throttle.spend(count)
        self.report.moved(count)
        self.check()

    def _flush(self, items: list[Item]) -> None:
        """Wait until the files here are on disk, including those of earlier attempts and the sources of links.

        Flushing a whole file system costs one commit of its journal, where each file costs its own.
        """
        by_folder: dict[str, list[Item]] = {}
        for item in items:
            by_folder.setdefault(self.where[item.path].above, []).append(item)
        for folder, group in by_folder.items():
            as_a_whole = len(group) >= FEW_FILES and self._kinds[folder] in fs.FLUSHED_AS_A_WHOLE
            if as_a_whole:
                with self._tree(group[0]).opened(folder, FOLDER) as fd:
                    as_a_whole = fs.flush_all(fd, self.check)
            if not as_a_whole:
                self.in_threads(group, self._flush_each)

    def _flush_each(self, batch: list[Item]) -> None:
        for item in batch:
            self.check()
            with self._tree(item).opened(self.kept(item)) as fd:
                os.fsync(fd)


@contextmanager
def _harmless(*numbers: int) -> Iterator[None]:
    """Pass over errors of these numbers."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in numbers:
            raise


@contextmanager
def _blamed_on(item: Item) -> Iterator[None]:
    """Reject the item for an error of the file system that is about it alone."""
    try:
        yield
    except OSError as exc:
        if exc.errno in ITEM_ERRORS:
            raise Rejected(ITEM_ERRORS[exc.errno], item=item.shown) from exc
        raise
