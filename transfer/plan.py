"""The plan: the frozen list of what one dispatch sends, read once.

A plan is made from the source (`scan`), moved onto the staged copy (`staging.stage`), narrowed for each target
(`Plan.narrowed`) and handed to the driver, which opens files only through `Plan.open`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from imaging.header import Damaged, Header, NotDicom, read_header
from transfer import roots
from transfer.beneath import FOLDER, resolved
from transfer.errors import Misconfigured, NotFound, Rejected
from transfer.globs import excluded
from transfer.outcome import ALREADY, Outcome
from transfer.readers import Readers
from transfer.source import LeadsOut, Sources
from transfer.watch import Watch

BATCH_FILES = 64  # headers that are read between two looks at whether to stop
HEAD_BYTES = 65_536  # of a file that isn't DICOM, its first bytes stand for its content in the dispatch id
MAX_LINKED_FOLDERS = 10_000  # links to folders that hold links to folders multiply
LEADS_OUT = "a symbolic link that leads out of the source"
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


@dataclass(frozen=True, slots=True)
class Item:
    """One file of a plan.

    Attributes:
        path: relative POSIX path, unique in the plan; bytes that are not UTF-8 are kept as surrogates.
        size: bytes.
        mtime_ns: modification time, nanoseconds since the epoch.
        header: what the DICOM header says, None if the file isn't DICOM or can't be sent as such.
        problem: why no target may have this file (a link out of the source, unreadable); "" if nothing is wrong.
        not_sent: why targets that carry only DICOM reject (damaged) or skip (not DICOM) it, "" if they take it.
        damaged: whether `not_sent` is a rejection.
        ctime_ns, links: time of the last change to the file or to what is known of it, and number of its hard links,
            when it was planned or staged; 0 if that is not known.
    """

    path: str
    size: int
    mtime_ns: int
    header: Header | None = None
    problem: str = ""
    not_sent: str = ""
    damaged: bool = False
    ctime_ns: int = field(default=0, compare=False)
    links: int = field(default=0, compare=False)

    @property
    def shown(self) -> str:
        """The path for logs, JSON and the ledger: valid UTF-8, one line, different for different paths.

        What can't be shown is escaped as in Python; a backslash of the name itself is doubled.
        """
        if self.path.isprintable() and "\\" not in self.path:
            return self.path
        safe = self.path.replace("\\", "\\\\").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in safe)


def header_of(item: Item) -> Header:
    """Return the header of an item, which has one: targets that carry only DICOM get no others."""
    if item.header is None:
        raise RuntimeError(f"{item.shown} is not DICOM and should not have come here")
    return item.header


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

    @property
    def pending(self) -> tuple[Item, ...]:
        """The items that have no outcome yet, in order."""
        return tuple(item for item in self.items if item.path not in self.done and item.path not in self.rejected)

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return sum(item.size for item in self.items)

    def file(self, item: Item) -> Path:
        """Return where the item's bytes are."""
        return self.root / item.path

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
            fd = os.open(f"{self.root}/{item.path}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise Rejected(f"can't be read: {exc.strerror}", item=item.shown) from exc
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
        try:
            now = os.stat(f"{self.root}/{item.path}", follow_symlinks=False) if fd is None else os.fstat(fd)
        except OSError as exc:
            raise Rejected(f"can't be read: {exc.strerror}", item=item.shown) from exc
        if not self.is_same(item, now):
            raise Rejected(CHANGED, item=item.shown)

    def is_same(self, item: Item, now: os.stat_result, since: os.stat_result | None = None) -> bool:
        """Return True if a file's facts are those that it had when it was planned, or at `since`.

        A program that writes to a file may restore its times, but not the time of their change (ctime). Making or
        removing a hard link changes ctime too, and doesn't count.
        """
        if (now.st_size, now.st_mtime_ns) != (item.size, item.mtime_ns):
            return False
        ctime, links = (since.st_ctime_ns, since.st_nlink) if since else (item.ctime_ns, item.links)
        if not ctime or now.st_ctime_ns == ctime:
            return True
        written = self.watch.is_written(item.path) if self.watch else None
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
    with Sources(map(str, asked)) as sources:
        found, left_out = _found(root, sources, exclude, check)
        watch = Watch()
        items = tuple(_items(found, sources, watch, check))
        dispatch_id = _dispatch_id(root, items, sources)
    aside = tuple(Item(name, 0, 0, not_sent=why) for name, why in sorted(left_out.items()))
    return Plan(dispatch_id, root, items, origin=origin, left_out=aside, watch=watch, sources=sources.paths)


def _found(
    root: Path, sources: Sources, exclude: tuple[str, ...], check: Callable[[], None]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the files to send, by relative path, and why others are left out."""
    found: dict[str, str] = {}
    left_out: dict[str, str] = {}
    above = len(str(root).rstrip("/")) + 1
    for source in sources.paths:
        for path in _files(source, sources, check):
            relative = path[above:]
            if excluded(relative, exclude):
                left_out[relative] = f"excluded by {','.join(exclude)}"
            elif excluded(relative, OWN_NAMES):
                left_out[relative] = "a name that Talaria keeps for itself"
            elif sources.is_state(path):
                left_out[relative] = "Talaria's state directory, which holds secrets"
            else:
                found.setdefault(relative, path)
    if not found:
        raise Misconfigured(f"nothing to send in {', '.join(sources.paths)}")
    return found, left_out


def look(paths: Iterable[Path | str], exclude: tuple[str, ...] = ()) -> None:
    """Make sure that there is something to send, without reading any file; ends at the first that is.

    Raises:
        NotFound, Denied, Misconfigured: as `scan` does.
    """
    asked = _sources(paths)
    root = asked[0] if len(asked) == 1 and asked[0].is_dir() else _common_folder(asked)
    above = len(str(root).rstrip("/")) + 1
    with Sources(map(str, asked)) as sources:
        for source in sources.paths:
            for path in _files(source, sources, lambda: None):
                names = (*exclude, *OWN_NAMES)
                if not excluded(path[above:], names) and not sources.is_state(path):
                    return
        raise Misconfigured(f"nothing to send in {', '.join(sources.paths)}")


def _sources(paths: Iterable[Path | str]) -> list[Path]:
    """Resolve the paths; drop those that lie within another one."""
    resolved: list[Path] = []
    for path in paths:
        if not str(path):
            raise Misconfigured("an empty path was given to send")
        roots.sources().check(path)  # before anything says what is there, or where a link leads
        try:
            resolved.append(Path(path).resolve(strict=True))
        except (FileNotFoundError, NotADirectoryError, ValueError) as exc:
            raise NotFound(f"{path!s}: no such file or folder") from exc
        except (OSError, RuntimeError) as exc:  # RuntimeError: symbolic links in a circle
            raise NotFound(f"{path!s}: {getattr(exc, 'strerror', None) or 'symbolic links in a circle'}") from exc
    if not resolved:
        raise Misconfigured("no path to send was given")
    unique = sorted(set(resolved))
    return [p for p in unique if not any(other != p and other in p.parents for other in unique)]


def _common_folder(sources: list[Path]) -> Path:
    return Path(os.path.commonpath([s.parent for s in sources]))


def _files(source: str, sources: Sources, check: Callable[[], None]) -> Iterator[str]:
    """Yield every file below a source, in any order.

    A link to a folder inside the source is followed, unless it leads back to a folder that it is in. A link to one
    outside, and a folder that can't be listed, are yielded as paths of their own, so that they are refused by name.
    """
    if not os.path.isdir(source):
        yield source
        return
    links, top = 0, source
    # A folder, where it really is, and the real folders on the way to it.
    stack: list[tuple[str, str, frozenset[str]]] = [(source, top, frozenset((top,)))]
    while stack:
        folder, place, above = stack.pop()
        check()
        try:
            entries = _listed(folder, sources)
        except (OSError, LeadsOut):
            yield folder
            continue
        for name, is_folder, is_link in entries:
            path = f"{folder.rstrip('/')}/{name}"
            if not is_folder:
                yield path
                continue
            real = f"{place.rstrip('/')}/{name}"
            if is_link:
                real = _end_of(path)
                if not sources.hold(real):
                    yield path  # refused by name
                    continue
                if any(one == real or one.startswith(f"{real}/") for one in above):
                    continue
                links += 1
                if links > MAX_LINKED_FOLDERS:
                    raise Misconfigured(f"{source}: more than {MAX_LINKED_FOLDERS} links to folders, of one another")
            if sources.is_state(real):
                yield path
                continue
            stack.append((path, real, above | {real}))


def _end_of(path: str) -> str:
    """Return where a link leads; its own place if it is gone by now."""
    try:
        return resolved(path)
    except OSError:
        return path


def _listed(folder: str, sources: Sources) -> list[tuple[str, bool, bool]]:
    """Return a folder's entries: name, whether it is or leads to a folder, and whether it is a link."""
    found = []
    fd = sources.open(folder, FOLDER)
    try:
        with os.scandir(fd) as listing:
            for entry in listing:
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link in a circle, or to what may not be looked at
                    is_folder = False
                found.append((entry.name, is_folder, is_folder and entry.is_symlink()))
    finally:
        os.close(fd)
    return found


def _items(found: dict[str, str], sources: Sources, watch: Watch, check: Callable[[], None]) -> Iterator[Item]:
    """Read the facts of all files; return items in the order of their relative paths."""

    def read(name: str) -> Item:
        return _item(name, found[name], sources, watch)

    names = iter(sorted(found))
    with Readers(BATCH_FILES) as readers:
        while batch := list(islice(names, readers.batch)):
            check()
            yield from readers.map(read, batch)


def _item(relative: str, path: str, sources: Sources, watch: Watch) -> Item:
    """Read one file's facts and return its item; the item says what is wrong with the file."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            if not sources.hold(resolved(path)):
                return Item(relative, 0, 0, problem=LEADS_OUT)
            mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            return Item(relative, 0, 0, problem="can't be listed" if stat.S_ISDIR(mode) else "not a regular file")
        fd = sources.open(path)
    except LeadsOut:
        return Item(relative, 0, 0, problem=LEADS_OUT)
    except OSError as exc:
        return Item(relative, 0, 0, problem=f"can't be read: {exc.strerror}")
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):  # since it was looked at
            return Item(relative, 0, 0, problem="not a regular file")
        watch.add(relative, path)
        header, why, damaged = None, "", False
        try:
            header = read_header(fd, info.st_size)
        except NotDicom as exc:
            why = str(exc)
        except Damaged as exc:
            # An empty file says nothing of itself but its name.
            why, damaged = str(exc), info.st_size > 0 or relative.lower().endswith((".dcm", ".dicom"))
        return Item(relative, info.st_size, info.st_mtime_ns, header, "", why, damaged, info.st_ctime_ns, info.st_nlink)
    except OSError as exc:
        return Item(relative, 0, 0, problem=f"can't be read: {exc.strerror}")
    finally:
        os.close(fd)


def _dispatch_id(root: Path, items: tuple[Item, ...], sources: Sources) -> str:
    """Return the id, made of names, sizes, times and content marks: the same for the same files, wherever they lie."""
    digest = hashlib.sha256()
    for item in items:
        # What is refused is not read: a link may lead anywhere.
        mark = item.problem.encode() or (
            item.header.SOPInstanceUID.encode() if item.header else _head(f"{root}/{item.path}", sources)
        )
        name = item.path.encode("utf-8", "surrogateescape")
        digest.update(b"%s\0%d\0%d\0%s\n" % (name, item.size, item.mtime_ns, mark))
    return digest.hexdigest()[:DISPATCH_ID_CHARS]


def _head(path: str, sources: Sources) -> bytes:
    try:
        fd = sources.open(path)
    except (OSError, LeadsOut):
        return b""
    try:
        return hashlib.sha256(os.pread(fd, HEAD_BYTES, 0)).digest()
    except OSError:
        return b""
    finally:
        os.close(fd)
