"""The plan: the frozen list of what one dispatch sends, read once.

A plan is made from the source (`scan`), moved onto the staged copy (`staging.stage`), narrowed for each target
(`Plan.narrowed`) and handed to the driver, which opens files only through `Plan.open`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from imaging.header import Damaged, Header, NotDicom, read_header
from transfer import roots
from transfer.beneath import PATH_ONLY, is_link_error, resolved
from transfer.errors import Misconfigured, NotFound, Rejected
from transfer.fingerprint import LAST_NS, modified_ns
from transfer.globs import excluded, is_excluded
from transfer.item import Item as Item
from transfer.outcome import ALREADY, Outcome
from transfer.readers import Readers
from transfer.source import InPlace, LeadsOut, Sources
from transfer.walk import files
from transfer.watch import Watch

BATCH_FILES = 64  # headers that are read between two looks at whether to stop
HEAD_BYTES = 65_536  # of a file that isn't DICOM, its first bytes stand for its content in the dispatch id
LEADS_OUT = "a symbolic link that leads out of the source"
TOO_LATE = "its time of modification lies after the year 2262"
CHANGED = "changed since the dispatch was planned"
DISPATCH_ID_CHARS = 20  # hexadecimal, 80 bits
# Our own traces in a folder that a target wrote or that is being written: never data.
OWN_NAMES = (".complete", ".incoming-*", ".talaria-*")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a received study came from, for targets that pass it on or send it back."""

    sender_aet: str = ""
    receiver_aet: str = ""
    sender_host: str = ""


def header_of(item: Item) -> Header:
    """Return the header of an item, which has one: targets that carry only DICOM get no others."""
    header = item.header
    if header is None:
        raise RuntimeError(f"{item.shown} is not DICOM and should not have come here")
    return header


@dataclass(frozen=True)
class Plan:
    """What one dispatch sends to one target.

    Attributes:
        dispatch_id: derived from the content, so that the same study sent again is the same dispatch.
        root: the folder that the items' paths are relative to.
        items: every file that the target shall have in the end, sorted by path.
        done: outcomes, by path, of the items that the ledger says the target already has.
        rejected: outcomes, by path, of the items that an earlier attempt of this run saw rejected: not sent again, and
            not at the target.
        origin: where the study came from.
        left_out: files of the source that no target gets, `not_sent` says why; not part of the dispatch's identity.
        lacks: how many files the target should have that can't be sent, and are not among `items`: as long as there
            are any, nothing says that it is complete.
        watch: knows which of the files were written to.
        sources: absolute paths, without links, of what was asked for; empty for all that is in `root`.
        in_place: opens the items that are not below `root`, but read where they lie.
        copied: the ctime, in nanoseconds, of the files of a source that were copied, by path.
    """

    dispatch_id: str
    root: Path
    items: tuple[Item, ...] = field(repr=False)
    done: Mapping[str, Outcome] = field(default_factory=dict, repr=False)
    rejected: Mapping[str, Outcome] = field(default_factory=dict, repr=False)
    origin: Origin = Origin()
    left_out: tuple[Item, ...] = field(default=(), repr=False)
    lacks: int = 0
    watch: Watch | None = field(default=None, repr=False, compare=False)
    sources: tuple[str, ...] = field(default=(), repr=False, compare=False)
    in_place: InPlace | None = field(default=None, repr=False, compare=False)
    copied: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)

    @property
    def pending(self) -> tuple[Item, ...]:
        """The items that have no outcome yet, in order."""
        return tuple(item for item in self.items if item.path not in self.done and item.path not in self.rejected)

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return sum(item.size for item in self.items)

    def file(self, item: Item) -> Path:
        """Return where the item's bytes are; to read them, open them with `open`."""
        return (self.in_place.root if item.in_place and self.in_place else self.root) / item.path

    def descriptor(self, item: Item, flags: int = os.O_RDONLY | os.O_NONBLOCK) -> int:
        """Open the item's file, whatever has become of it; OSError with ELOOP if a link leads out of the source."""
        if item.in_place and self.in_place:
            return self.in_place.open(item.path, flags)
        return os.open(f"{self.root}/{item.path}", flags | os.O_CLOEXEC | os.O_NOFOLLOW)

    def narrowed(
        self,
        items: Iterable[Item],
        done: Mapping[str, Outcome] | Iterable[str] = (),
        lacks: int | None = None,
        rejected: Mapping[str, Outcome] | None = None,
    ) -> Plan:
        """Return the same plan with these items only; `lacks` is kept unless given."""
        lacks = self.lacks if lacks is None else lacks
        done = dict(done) if isinstance(done, Mapping) else dict.fromkeys(done, ALREADY)
        return replace(self, items=tuple(items), done=done, lacks=lacks, rejected=dict(rejected or {}))

    @contextmanager
    def open(self, item: Item) -> Iterator[int]:
        """Open the item's file for reading; yields a file descriptor.

        Call `check` after the last byte was read and before the peer gets it in a form that it would keep.

        Raises:
            Rejected: the file is gone or is not the one that was planned.
        """
        try:
            fd = self.descriptor(item)
        except OSError as exc:
            raise self._unreadable(item, exc) from exc
        try:
            self.check(item, fd)
            yield fd
        finally:
            os.close(fd)

    def check(self, item: Item, fd: int | None = None) -> None:
        """Raise Rejected if the file has changed since the plan was made or is gone.

        Args:
            fd: the open file; None to look by its name, which costs a fifth of opening it.
        """
        if self.watch:
            self.watch.keep_up()
        try:
            now = self._seen(item) if fd is None else os.fstat(fd)
        except OSError as exc:
            raise self._unreadable(item, exc) from exc
        if not self.is_same(item, now):
            raise Rejected(CHANGED, item=item.shown)

    def _seen(self, item: Item) -> os.stat_result:
        if not item.in_place:
            return os.stat(f"{self.root}/{item.path}", follow_symlinks=False)
        fd = self.descriptor(item, PATH_ONLY)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _unreadable(self, item: Item, exc: OSError) -> Rejected:
        moved = item.in_place and is_link_error(exc)  # something else is in its place
        return Rejected(CHANGED if moved else f"can't be read: {exc.strerror}", item=item.shown)

    def is_same(self, item: Item, now: os.stat_result, since: tuple[int, int] | None = None) -> bool:
        """Return True if a file's facts are those that it had when it was planned; if `since`, then later.

        A program that writes to a file may restore its times, but not the time of their change (ctime). Making or
        removing a hard link changes ctime too, and doesn't count.

        Args:
            since: its ctime and number of links then.
        """
        if (now.st_size, modified_ns(now)) != (item.size, item.mtime_ns):
            return False
        ctime, links = since or (item.ctime_ns, item.links)
        if not ctime or now.st_ctime_ns == ctime:
            return True
        if item.in_place and now.st_ino != item.inode:
            return False
        written = self.watch.is_written(item.watch) if self.watch else None
        return now.st_nlink != links if written is None else not written


def scan(
    paths: Iterable[Path | str],
    exclude: tuple[str, ...] = (),
    origin: Origin = Origin(),
    check: Callable[[], None] = lambda: None,
) -> Plan:
    """Plan the files below the given files and folders.

    Paths in the plan are relative to the folder, if it is one, or else to the nearest folder that holds them
    all. Symbolic links are followed as long as they stay inside the source.

    Args:
        check: called between folders and every few files; may raise to stop.

    Raises:
        NotFound: a path doesn't exist.
        Denied: it lies where nothing may be sent from (`transfer.roots`).
        Misconfigured: there is nothing to send.
    """
    asked = _sources(paths)
    root = asked[0] if len(asked) == 1 and asked[0].is_dir() else _common_folder(asked)
    with Sources(map(str, asked)) as sources, _Scan(str(root), sources, exclude, check) as found:
        found.read_all()
        items = tuple(sorted(found.items, key=_path))
        dispatch_id = _dispatch_id(items, found.heads)
    aside = tuple(Item(name, 0, 0, not_sent=why) for name, why in sorted(found.left_out.items()))
    return Plan(dispatch_id, root, items, origin=origin, left_out=aside, watch=found.watch, sources=sources.paths)


# The files of a series often have one length: kept in memory once.
_common = lru_cache(maxsize=256)(int)


def _path(item: Item) -> str:
    return item.path


class _Scan:
    """Finds the files of the sources and reads their headers, several at once where that pays. A context manager.

    Attributes:
        items: the files to send, in any order.
        left_out: why others are left out, by relative path.
        heads: marks of the content of files that are not DICOM, by relative path.
        watch: knows which of the files are written to.
    """

    def __init__(self, root: str, sources: Sources, exclude: tuple[str, ...], check: Callable[[], None]) -> None:
        self.items: list[Item] = []
        self.left_out: dict[str, str] = {}
        self.heads: dict[str, bytes] = {}
        self.watch = Watch()
        self._above, self._sources = len(root.rstrip("/")) + 1, sources
        self._exclude, self._check = exclude, check
        self._folder: str | None = None  # that of the last file
        self._outer = ""  # why all files of that folder are left out
        self._fd = -1  # it, opened, where files of it wait to be read
        self._opened: list[int] = []  # all folders of which files wait
        self._waiting: list[tuple[int, str, str]] = []  # opened folder, or -1, path, relative path
        self._readers = Readers(BATCH_FILES)

    def __enter__(self) -> _Scan:
        self._readers.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._readers.__exit__(*exc)
        self._close()

    def read_all(self) -> None:
        """Read everything."""
        for source in self._sources.paths:
            for folder, fd, name in files(source, self._sources, self._check):
                self._take(folder, fd, name)
        self._read()
        if not self.items:
            raise Misconfigured(f"nothing to send in {', '.join(self._sources.paths)}")

    def _take(self, folder: str, fd: int, name: str) -> None:
        if folder != self._folder:
            self._folder, self._fd = folder, -1
            self._outer = self._why_not([part for part in folder[self._above :].split("/") if part])
        path = f"{folder}/{name}"
        relative = path[self._above :]
        why = self._outer or self._why_not((name,))
        if not why and self._sources.is_state(path):
            why = "Talaria's state directory, which holds secrets"
        if why:
            self.left_out[relative] = why
            return
        if fd >= 0 and self._fd < 0:
            self._fd = os.dup(fd)
            self._opened.append(self._fd)
        self._waiting.append((self._fd if fd >= 0 else -1, path, relative))
        if len(self._waiting) >= self._readers.batch:
            self._read()

    def _why_not(self, names: Sequence[str]) -> str:
        for name in names:
            if self._exclude and is_excluded(name, self._exclude):
                return f"excluded by {','.join(self._exclude)}"
        return "a name that Talaria keeps for itself" if any(is_excluded(name, OWN_NAMES) for name in names) else ""

    def _read(self) -> None:
        """Read the files that wait; return when their folders are closed."""
        self._check()
        waiting, self._waiting = self._waiting, []
        try:
            self.items += self._readers.map(self._item, waiting)
        finally:
            self._close()

    def _close(self) -> None:
        while self._opened:
            os.close(self._opened.pop())
        self._fd = -1

    def _item(self, file: tuple[int, str, str]) -> Item:
        """Read one file's facts and return its item; the item says what is wrong with the file."""
        folder, path, relative = file
        try:
            fd = self._open(folder, path)
        except LeadsOut:
            return Item(relative, 0, 0, problem=LEADS_OUT)
        except _Irregular as exc:
            return Item(relative, 0, 0, problem=str(exc))
        except OSError as exc:
            return Item(relative, 0, 0, problem=f"can't be read: {exc.strerror}")
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):  # since it was looked at
                return Item(relative, 0, 0, problem="not a regular file")
            if info.st_mtime_ns > LAST_NS:
                return Item(relative, info.st_size, LAST_NS, problem=TOO_LATE)
            watch = self.watch.add(path)
            header, why, damaged = None, "", False
            try:
                header = read_header(fd, info.st_size)
            except NotDicom as exc:
                why = str(exc)
            except Damaged as exc:
                # An empty file says nothing of itself but its name.
                why, damaged = str(exc), info.st_size > 0 or relative.lower().endswith((".dcm", ".dicom"))
            if header is None:
                self.heads[relative] = hashlib.sha256(os.pread(fd, HEAD_BYTES, 0)).digest()
            facts = (info.st_ctime_ns, info.st_nlink, info.st_ino, False, watch)
            return Item(relative, _common(info.st_size), modified_ns(info), header, "", why, damaged, *facts)
        except OSError as exc:
            return Item(relative, 0, 0, problem=f"can't be read: {exc.strerror}")
        finally:
            os.close(fd)

    def _open(self, folder: int, path: str) -> int:
        if folder >= 0:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                return os.open(path.rpartition("/")[2], flags, dir_fd=folder)
            except OSError as exc:
                if not is_link_error(exc):  # which it has become
                    raise
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            if not self._sources.hold(resolved(path)):
                raise LeadsOut(path)
            mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise _Irregular("can't be listed" if stat.S_ISDIR(mode) else "not a regular file")
        return self._sources.open(path)


class _Irregular(Exception):
    """It is no file; the text says what is wrong with it."""


def look(paths: Iterable[Path | str], exclude: tuple[str, ...] = ()) -> None:
    """Make sure that there is something to send, without reading any file; ends at the first that is.

    Raises:
        NotFound, Denied, Misconfigured: as `scan` does.
    """
    asked = _sources(paths)
    if not any(has_files(source, asked, exclude) for source in asked):
        left_out = bool(exclude) and any(has_files(source, asked) for source in asked)
        why = f": {','.join(exclude)} leaves out all that is there" if left_out else ""
        raise Misconfigured(f"nothing to send in {', '.join(map(str, asked))}{why}")


def has_files(source: Path, asked: Sequence[Path], exclude: tuple[str, ...] = ()) -> bool:
    """Return True if one of the paths that are asked for has something to send, by names alone.

    Args:
        asked: all of them, as `outermost` returns them.

    Raises:
        Denied: it may not be read.
    """
    root = source if len(asked) == 1 and source.is_dir() else _common_folder(asked)
    above, names = len(str(root).rstrip("/")) + 1, (*exclude, *OWN_NAMES)
    with Sources([str(source)]) as sources:
        for folder, _, name in files(str(source), sources, lambda: None):
            path = f"{folder}/{name}"
            if not excluded(path[above:], names) and not sources.is_state(path):
                return True
    return False


def _sources(paths: Iterable[Path | str]) -> list[Path]:
    """Resolve the paths; drop those that lie within another one."""
    found = outermost([source_of(path) for path in paths])
    if not found:
        raise Misconfigured("no path to send was given")
    return found


def source_of(path: Path | str) -> Path:
    """Resolve a path that is asked for.

    Raises:
        NotFound, Denied, Misconfigured: it is not there, or may not be read.
    """
    if not str(path):
        raise Misconfigured("an empty path was given to send")
    roots.sources().check(path)  # before anything says what is there, or where a link leads
    try:
        return Path(path).resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError, ValueError) as exc:
        raise NotFound(f"{path!s}: no such file or folder") from exc
    except (OSError, RuntimeError) as exc:  # RuntimeError: symbolic links in a circle
        raise NotFound(f"{path!s}: {getattr(exc, 'strerror', None) or 'symbolic links in a circle'}") from exc


def outermost(resolved: Iterable[Path]) -> list[Path]:
    """Return paths without those that lie within another one, in their order."""
    unique = sorted(set(resolved))
    return [p for p in unique if not any(other != p and other in p.parents for other in unique)]


def _common_folder(sources: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([s.parent for s in sources]))


def _dispatch_id(items: tuple[Item, ...], heads: Mapping[str, bytes]) -> str:
    """Return the id, made of names, sizes, times and content marks: the same for the same files, wherever they lie."""
    digest = hashlib.sha256()
    for item in items:
        # What is refused is not read: a link may lead anywhere.
        mark = item.problem.encode() or item.sop_instance_uid.encode() or heads.get(item.path, b"")
        name = item.path.encode("utf-8", "surrogateescape")
        digest.update(b"%s\0%d\0%d\0%s\n" % (name, item.size, item.mtime_ns, mark))
    return digest.hexdigest()[:DISPATCH_ID_CHARS]
