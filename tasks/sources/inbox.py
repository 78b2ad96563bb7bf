"""The units of an inbox: each folder directly below it, or the loose files of each study or series.

Nothing is opened but headers of loose files, each once. Links are not followed: what they lead to is sent if it lies
within the unit, as of any dispatch, but nothing of it is ever moved or deleted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from blocks.inbox import InboxSource, InboxUnit
from blocks.source import Source
from imaging.header import Damaged, NotDicom, read_header
from tasks.sources.units import Unit
from transfer import roots
from transfer.beneath import FOLDER, resolved
from transfer.errors import Denied, Misconfigured, NotFound
from transfer.fingerprint import Fingerprint
from transfer.globs import is_excluded
from transfer.ledger import Ledger
from transfer.plan import OWN_NAMES, Item
from transfer.sourcebook import LooseFile
from transfer.unitlist import FileFacts

MARKER = ".complete"
TAKEN = ".talaria-taken-"  # before the name of a file that is just being moved or deleted


def units(source: InboxSource, ledger: Ledger, check: Callable[[], None]) -> Iterator[Unit]:
    """Yield the units of an inbox; as `tasks.sources.units.units`."""
    folder = real_folder(source.folder)
    if source.unit is InboxUnit.FOLDER:
        yield from of_folders(folder, source, check)
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


def of_folders(folder: str, source: Source, check: Callable[[], None]) -> Iterator[Unit]:
    """Yield a unit for each folder directly below one."""
    with os.scandir(folder) as listing:
        names = sorted(entry.name for entry in listing if entry.is_dir(follow_symlinks=False))
    for name in names:
        check()
        if is_excluded(name, (*source.globs, *OWN_NAMES)):
            continue
        path = f"{folder}/{name}"
        mark, complete = look(path, source.globs)
        if mark.files:
            newest = mark.newest_ns / 1e9
            key = Item(name, 0, 0).shown
            yield Unit(key, (path,), str(mark), newest, mark.files, source.origin, source.reaches, complete)


def look(path: str, exclude: tuple[str, ...], facts: list[FileFacts] | None = None) -> tuple[Fingerprint, bool]:
    """Return the fingerprint of the files below a folder, by their paths there, and whether its marker is the newest.

    Args:
        facts: gets those of each file.
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
        except OSError:  # it may hold anything: the dispatch says what is wrong
            mark.add(f"{below}/", 0, 0)
            continue
        for entry in entries:
            relative = f"{below}/{entry.name}" if below else entry.name
            with suppress(FileNotFoundError):
                info = entry.stat(follow_symlinks=False)
                if entry.name == MARKER and not below:
                    marked_ns = max(info.st_mtime_ns, info.st_ctime_ns)
                if is_excluded(entry.name, names):
                    continue
                if stat.S_ISDIR(info.st_mode):
                    mark.newest_ns = max(mark.newest_ns, info.st_mtime_ns)
                    stack.append(relative)
                    continue
                mark.add(relative, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
                if facts is not None and stat.S_ISREG(info.st_mode):
                    facts.append(_facts(f"{path}/{relative}", info))
    return mark, bool(marked_ns) and marked_ns >= mark.newest_ns


def root(source: InboxSource) -> str:
    """Return the folder that all files of a source lie in, without links; raises as `real_folder`."""
    return real_folder(source.folder)


def facts_of(unit: Unit, source: Source) -> tuple[list[FileFacts], str]:
    """Return what each file of a unit is now, and the fingerprint of all of them."""
    facts: list[FileFacts] = []
    if len(unit.paths) == 1 and Path(unit.paths[0]).is_dir():
        mark, _ = look(unit.paths[0], source.globs, facts)
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


def _of_uids(folder: str, source: InboxSource, ledger: Ledger, check: Callable[[], None]) -> Iterator[Unit]:
    """Read the headers of what is new, then yield a unit for each UID."""
    name = source.name
    gone = ledger.sources.folders(name)
    for below, entries in _folders(folder, source.globs):
        check()
        gone.discard(below)
        known = ledger.sources.files(name, below)
        new = []
        for entry in entries:
            with suppress(OSError):
                info = entry.stat(follow_symlinks=False)
                old = known.pop(entry.name, None)
                facts = info.st_size, info.st_mtime_ns, info.st_ctime_ns
                if old is None or (old.size, old.mtime_ns, old.ctime_ns) != facts:
                    check()
                    new.append(LooseFile(entry.name, *facts, _uid(entry.path, source)))
        if new or known:
            ledger.sources.note(name, below, new, known)
    for below in gone:
        ledger.sources.note(name, below, (), ledger.sources.files(name, below))
    for uid, files in groupby(ledger.sources.by_uid(name), key=lambda one: one.uid):
        check()
        mark, paths = Fingerprint(), []
        for one in files:
            paths.append("/".join(part for part in (folder, one.folder, one.name) if part))
            mark.add(paths[-1], one.size, one.mtime_ns, one.ctime_ns)
        yield Unit(uid, tuple(paths), str(mark), mark.newest_ns / 1e9, mark.files, source.origin, source.reaches)


def _folders(folder: str, exclude: tuple[str, ...]) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yield each folder, relative to the inbox, with its plain files."""
    stack, names = [""], (*exclude, *OWN_NAMES)
    while stack:
        below = stack.pop()
        try:
            with os.scandir(f"{folder}/{below}" if below else folder) as listing:
                entries = [one for one in listing if not is_excluded(one.name, names) and one.name.isprintable()]
        except OSError:
            continue
        prefix = f"{below}/" if below else ""
        stack += (f"{prefix}{one.name}" for one in entries if one.is_dir(follow_symlinks=False))
        yield below, [one for one in entries if one.is_file(follow_symlinks=False)]


def _uid(path: str, source: InboxSource) -> str:
    """Return the UID of the study or series that a file belongs to; "" if it is not DICOM (yet)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        header = read_header(fd, os.fstat(fd).st_size)
    except (NotDicom, Damaged, OSError):
        return ""
    finally:
        os.close(fd)
    return header.StudyInstanceUID if source.unit is InboxUnit.STUDY else header.SeriesInstanceUID
