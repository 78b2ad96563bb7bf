"""The units of an inbox: each folder directly below it, or the loose files of each study or series.

Nothing is opened but headers of loose files, each once. Links are not followed: what they lead to is sent if it lies
within the unit, as of any dispatch, but nothing of it is ever moved or deleted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from blocks.inbox import InboxSource, InboxUnit
from blocks.source import Source
from imaging.header import PREAMBLE_BYTES, Damaged, NotDicom, has_preamble, read_header
from tasks.sources.units import Unit, in_time
from transfer import roots
from transfer.beneath import FOLDER, resolved
from transfer.errors import Denied, Misconfigured, NotFound
from transfer.fingerprint import LAST_NS, Fingerprint, modified_ns
from transfer.globs import is_excluded
from transfer.ledger import Ledger
from transfer.oserrors import passes, words_of
from transfer.plan import OWN_NAMES, Item
from transfer.sourcebook import LooseFile, UnitState
from transfer.unitlist import FileFacts

MARKER = ".complete"
TAKEN = ".talaria-taken-"  # before the name of a file that is just being moved or deleted
# The keys of loose files that are in no study or series, and are told of; no UID looks like these.
LOST_AND_FOUND = "lost+found"  # in an inbox that is a whole file system: what a check of it has found, root's alone
DAMAGED, UNREAD = "damaged files", "files that can't be read"
BESIDE = "beside the folders"  # the key of studies that whoever put them there waits for in vain
NOT_LOOKED_AT = (
    "DICOM files and links beside the folders are not looked at: put each study into a folder of its own, or, of files,"
    " set unit: study"
)
MOST_BESIDE = 100  # files that are looked at for that, by each sweep
NAMED = 3  # files that are named of those that are told of


def units(source: InboxSource, ledger: Ledger, check: Callable[[], None]) -> Iterator[Unit]:
    """Yield the units of an inbox; as `tasks.sources.units.units`."""
    folder = real_folder(source.folder)
    if source.unit is InboxUnit.FOLDER:
        yield from _of_folders(folder, source, ledger, check)
    else:
        yield from _of_uids(folder, source, ledger, check)


def real_folder(path: str) -> str:
    """Return the folder of a source without links.

    Raises:
        NotFound, Denied, Misconfigured: it can't be looked through.
    """
    fd = -1
    try:
        fd = roots.sources().open(path, FOLDER)
        with os.scandir(fd):
            pass
        return resolved(path, strict=True)
    except NotADirectoryError as exc:
        raise Misconfigured(f"{path}: is not a folder") from exc
    except FileNotFoundError as exc:
        raise NotFound(f"{path}: no such file or folder") from exc
    except PermissionError as exc:
        raise Denied(f"{path}: can't be read by this user") from exc
    except OSError as exc:
        raise NotFound(f"{path}: {exc.strerror}") from exc
    finally:
        if fd >= 0:
            os.close(fd)


def _of_folders(folder: str, source: InboxSource, ledger: Ledger, check: Callable[[], None]) -> Iterator[Unit]:
    """Yield a unit for each folder directly below one, and one for what is to be told."""
    with os.scandir(folder) as listing:
        entries = list(listing)
    names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    unread, told = _Unread(), set[str]()
    for name in names:
        check()
        if name == LOST_AND_FOUND or is_excluded(name, (*source.globs, *OWN_NAMES)):
            continue
        path = f"{folder}/{name}"
        try:
            mark, complete = look(path, source.globs, patient=True)
        except OSError as exc:  # of a share, maybe: what is known of it stays, and it is looked at by the next sweep
            unread.folders.add(f"{_remembered(name)}/")
            unread.why = words_of(exc)
            continue
        if mark.files:
            newest = mark.newest_ns / 1e9
            key = Item(name, 0, 0).shown
            unit = Unit(key, (path,), str(mark), newest, mark.files, source.origin, source.reaches, complete)
            yield in_time(unit, source)
    if beside := _beside(entries, source):
        told.add(beside.key)
        yield beside
    yield from _told_of(unread, told, source, ledger)


def _beside(entries: Iterable[os.DirEntry[str]], source: InboxSource) -> Unit | None:
    """Return what is told of studies that lie beside the folders; once, as long as there are any."""
    names = (*source.globs, *OWN_NAMES)
    there = [one for one in entries if not one.is_dir(follow_symlinks=False) and not is_excluded(one.name, names)]
    found = sorted((one for one in there[:MOST_BESIDE] if _is_study(one)), key=lambda one: one.name)
    if not found:
        return None
    newest = 0.0
    for one in found:
        with suppress(OSError):
            newest = max(newest, one.stat(follow_symlinks=False).st_ctime)
    unit = _told(BESIDE, [one.name for one in found], Fingerprint(1), NOT_LOOKED_AT, source)
    return in_time(replace(unit, newest=newest), source)


def _is_study(entry: os.DirEntry[str]) -> bool:
    """Return True for a link to a folder, and for a DICOM file."""
    try:
        if entry.is_symlink():
            return entry.is_dir()
        fd = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode) and has_preamble(os.pread(fd, PREAMBLE_BYTES, 0))
        finally:
            os.close(fd)
    except OSError:
        return False


def look(
    path: str, exclude: tuple[str, ...], facts: list[FileFacts] | None = None, *, patient: bool = False
) -> tuple[Fingerprint, bool]:
    """Return the fingerprint of the files below a folder, by their paths there, and whether its marker is the newest.

    Args:
        facts: gets those of each file.
        patient: whether what may pass by itself is no part of the fingerprint.

    Raises:
        OSError: there is such, and somebody is patient.
    """
    mark, marked_ns = Fingerprint(), 0
    stack, names = [""], (*exclude, *OWN_NAMES)
    while stack:
        below = stack.pop()
        try:
            with os.scandir(f"{path}/{below}" if below else path) as listing:
                entries = list(listing)
        except FileNotFoundError:
            continue
        except OSError as exc:  # it may hold anything: the dispatch says what is wrong
            if patient and passes(exc):
                raise
            mark.add(f"{below}/", 0, 0)
            continue
        for entry in entries:
            relative = f"{below}/{entry.name}" if below else entry.name
            try:
                info = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as exc:  # a folder that lists its names only: as above
                if patient and passes(exc):
                    raise
                if not is_excluded(entry.name, names):
                    mark.add(relative, 0, 0)
                continue
            if entry.name == MARKER and not below:
                marked_ns = _put_there_ns(entry)
            if is_excluded(entry.name, names):
                continue
            if stat.S_ISDIR(info.st_mode):
                mark.newest_ns = max(mark.newest_ns, info.st_ctime_ns)  # `cp -a` sets the other one
                stack.append(relative)
                continue
            mark.add(relative, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            if facts is not None and stat.S_ISREG(info.st_mode):
                facts.append(_facts(f"{path}/{relative}", info))
    return mark, bool(marked_ns) and marked_ns >= mark.newest_ns


def _put_there_ns(marker: os.DirEntry[str]) -> int:
    """Return when a marker was put into its folder, in nanoseconds since the epoch; 0 if it has gone.

    As of files, the time that it brings along says nothing: one of the future would make complete all that ever comes.
    """
    try:
        info = marker.stat(follow_symlinks=False)
    except OSError:
        return 0
    return info.st_ctime_ns or info.st_mtime_ns


def root(source: InboxSource) -> str:
    """Return the folder that all files of a source lie in, without links; raises as `real_folder`."""
    return real_folder(source.folder)


def facts_of(unit: Unit, source: Source) -> tuple[list[FileFacts], str]:
    """Return what each file of a unit is now, and the fingerprint of all of them; "" while it can't be looked at."""
    facts: list[FileFacts] = []
    if len(unit.paths) == 1 and Path(unit.paths[0]).is_dir():
        try:
            mark, _ = look(unit.paths[0], source.globs, facts, patient=isinstance(source, InboxSource))
        except OSError:
            return [], ""
        return facts, str(mark)
    mark = Fingerprint()
    for path in unit.paths:
        with suppress(OSError):
            info = os.lstat(path)
            mark.add(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            facts.append(_facts(path, info))
    return facts, str(mark)


def _facts(path: str, info: os.stat_result) -> FileFacts:
    return FileFacts(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)


# ---- loose files


@dataclass
class _Unread:
    """What could not be read, by paths as they are remembered; a folder's ends with a slash, the inbox's is empty."""

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    why: str = ""

    def has(self, path: str) -> bool:
        """Return True if nobody knows now what is at a path."""
        return path in self.files or path.startswith(tuple(self.folders))

    def unit(self, source: InboxSource) -> Unit:
        """Return what people are told; it is no unit that could be dispatched."""
        paths, mark = sorted(self.files | self.folders), Fingerprint()
        for path in paths:
            mark.add(path, 0, 0)
        why = f"{len(paths)} files or folders can't be read: {self.why}"
        return _told(UNREAD, paths, mark, why, source)


def _of_uids(folder: str, source: InboxSource, ledger: Ledger, check: Callable[[], None]) -> Iterator[Unit]:
    """Read the headers of what is new, then yield a unit for each UID, and one for what is to be told."""
    name, unread, told, marked = source.name, _Unread(), set[str](), dict[str, int]()
    gone = ledger.sources.folders(name)
    for below, entries, marked_ns in _folders(folder, source.globs, unread):
        check()
        kept = _remembered(below)
        gone.discard(kept)
        if marked_ns:
            marked[kept] = marked_ns
        known = ledger.sources.files(name, kept)
        new = []
        for entry in entries:
            called = _remembered(entry.name)
            old = known.get(called)
            try:
                info = entry.stat(follow_symlinks=False)
                facts = info.st_size, min(modified_ns(info), LAST_NS), info.st_ctime_ns
                if old is None or (old.size, old.mtime_ns, old.ctime_ns) != facts:
                    check()
                    new.append(LooseFile(called, *facts, _uid(entry.path, source)))
            except FileNotFoundError:
                continue
            except OSError as exc:  # of a share, maybe: read again by the next sweep
                unread.files.add(_joined(kept, called))
                unread.why = words_of(exc)
            known.pop(called, None)
        if new or known:
            ledger.sources.note(name, kept, new, known)
    for kept in gone:
        if not unread.has(f"{kept}/"):
            ledger.sources.note(name, kept, (), ledger.sources.files(name, kept))
    for uid, files in groupby(ledger.sources.by_uid(name), key=lambda one: one.uid):
        check()
        mark, paths, is_known, within = Fingerprint(), [], True, set[str]()
        for one in files:
            within.add(one.folder)
            inside = _joined(one.folder, one.name)
            is_known = is_known and not unread.has(inside)
            paths.append(_joined(folder.rstrip("/"), _path(one.folder), _path(one.name)))
            mark.add(paths[-1], one.size, one.mtime_ns, one.ctime_ns)
        if uid == DAMAGED:
            told.add(uid)
            inside_of = len(folder.rstrip("/")) + 1
            why = f"{len(paths)} files are damaged, not whole, or without the UID of a {source.unit}"
            yield _told(uid, [one[inside_of:] for one in paths], mark, why, source)
        elif is_known:  # what can't be read now may belong to it, too, but nobody knows that
            whole, newest = _are_whole(within, marked, mark.newest_ns), mark.newest_ns / 1e9
            unit = Unit(uid, tuple(paths), str(mark), newest, mark.files, source.origin, source.reaches, whole)
            yield in_time(unit, source)
    yield from _told_of(unread, told, source, ledger)


def _told_of(unread: _Unread, told: set[str], source: InboxSource, ledger: Ledger) -> Iterator[Unit]:
    """Yield a unit for what could not be read, and forget that something was to be told which is well by now.

    Args:
        told: the keys of other such units.

    Raises:
        NotFound, Denied, Misconfigured: all of the source is away.
    """
    if unread.why:
        real_folder(source.folder)
        told.add(UNREAD)
        yield unread.unit(source)
    if well := {DAMAGED, UNREAD, BESIDE} & ledger.sources.units(source.name, UnitState.HELD).keys() - told:
        ledger.sources.forget(source.name, well)


def _are_whole(folders: Iterable[str], marked: Mapping[str, int], newest_ns: int) -> bool:
    """Return True if each of some folders, or one that it lies in, has a marker that is not older than a time.

    Args:
        marked: when the markers of folders were put there, by paths relative to the inbox.
    """
    young = {folder for folder, marked_ns in marked.items() if marked_ns >= newest_ns}
    return bool(young) and all(not young.isdisjoint(_and_above(one)) for one in folders)


def _and_above(folder: str) -> Iterator[str]:
    """Yield a folder, relative to the inbox, those that it lies in, and the inbox itself."""
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]
    yield ""


def _told(key: str, paths: list[str], mark: Fingerprint, why: str, source: InboxSource) -> Unit:
    """Return a unit that is held, and names some of its files, relative to the inbox."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    shown = f"{key}: {', '.join(Item(one, 0, 0).shown or '.' for one in paths[:NAMED])}{more}"
    newest = mark.newest_ns / 1e9
    unit = Unit(key, (), str(mark), newest, len(paths), source.origin, source.reaches, problem=why, shown=shown)
    return in_time(unit, source)


def _remembered(name: str) -> str:
    """Return a name, or path, as the ledger's text: whole, one line, and another one for each name."""
    if name.isprintable() and "\\" not in name:
        return name
    return name.encode("unicode_escape", "surrogatepass").decode("ascii")


def _path(remembered: str) -> str:
    """Return the name, or path, that `_remembered` was given."""
    return remembered.encode("ascii").decode("unicode_escape") if "\\" in remembered else remembered


def _joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _folders(
    folder: str, exclude: tuple[str, ...], unread: _Unread
) -> Iterator[tuple[str, list[os.DirEntry[str]], int]]:
    """Yield each folder, relative to the inbox, its plain files, and when its marker was put there (0 for none).

    Those that can't be read are added to `unread`.
    """
    stack, names = [""], (*exclude, *OWN_NAMES)
    while stack:
        below = stack.pop()
        prefix = f"{below}/" if below else ""
        try:
            with os.scandir(f"{folder}/{below}" if below else folder) as listing:
                every = list(listing)
            entries = [one for one in every if not is_excluded(one.name, names)]
            folders = [f"{prefix}{one.name}" for one in entries if one.is_dir(follow_symlinks=False)]
            stack += [one for one in folders if one != LOST_AND_FOUND]
            found = [one for one in entries if one.is_file(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            unread.folders.add(_remembered(prefix))
            unread.why = words_of(exc)
            continue
        yield below, found, max((_put_there_ns(one) for one in every if one.name == MARKER), default=0)


def _uid(path: str, source: InboxSource) -> str:
    """Return the UID of the study or series that a file belongs to; "" if it is not DICOM (yet).

    Raises:
        OSError: it can't be read now.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        header = read_header(fd, os.fstat(fd).st_size)
    except NotDicom:
        return ""
    except Damaged:
        return DAMAGED
    finally:
        os.close(fd)
    uid = header.StudyInstanceUID if source.unit is InboxUnit.STUDY else header.SeriesInstanceUID
    return uid or DAMAGED
