"""Updates the index of a folder: reads every directory entry, but only the headers of new and changed files.

Symbolic links are not followed: what they lead to inside the folder is found in its own place, and what is outside is
not part of it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

from imaging.header import PREAMBLE_BYTES, Damaged, NotDicom, read_elements
from imaging.remains import Remains, remains
from protocols.dicomfolder.index import DAMAGED, INSTANCE, NOT_DICOM, TAGS, Index, IndexedInstance, Stamp
from protocols.dicomfolder.unread import LOST_AND_FOUND, UnreadEntry
from protocols.files.tree import Tree
from transfer.beneath import FOLDER
from transfer.readers import Readers

CHUNK = 256  # files that are read between two looks at whether to stop
# Two writes closer together than this may leave the same times (the kernel's clock of files ticks every 10 ms or
# faster): a header counts only if it is read later than that after the last write.
TICK_NS = 20_000_000
# Times without a fraction of a second come from a file system that has none, or has even seconds only (FAT).
COARSE_NS = 2_000_000_000
OWN = (b".talaria-", b".incoming-")  # names of our own, here and in folders that other targets write
MARKER = b".complete"
# How files of instances are named: as people name them, or as devices do, by numbers and UIDs (IM000001, 1.2.840.1).
# What has no content but such a name was to be one; a hidden file (macOS makes one beside each) wasn't.
CALLED_DICOM = re.compile(rb"[^.].*\.(dcm|dicom|dic|ima)", re.IGNORECASE | re.DOTALL)
NUMBERED = re.compile(rb"[^.]*[0-9][^.]*(\.[0-9]+)*|[^.]+(\.[0-9]+){2,}", re.DOTALL)
# A share whose server is gone: no answer can be given. Any other error is about one file or folder.
GONE = frozenset(
    (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNRESET, errno.EHOSTDOWN,
     errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
)  # fmt: skip


@dataclass
class Change:
    """The differences between one folder and the index.

    Attributes:
        path: relative to the root, `b""` for the root itself.
        mark: a digest of all its entries as they were seen.
        read: names of the files whose headers must be read.
        gone: names that are no longer there.
    """

    path: bytes
    mark: bytes
    read: list[bytes]
    gone: list[bytes]


@dataclass
class Changes:
    """The differences between a whole tree and the index.

    Attributes:
        vanished: folders that are no longer there.
        unchanged: how many files are unchanged.
        unread: folders that can't be listed.
        links: how many symbolic links there are, which are not followed.
        newest: the latest time of any file that must be read, nanoseconds since the epoch.
    """

    folders: list[Change] = field(default_factory=list)
    vanished: list[bytes] = field(default_factory=list)
    unchanged: int = 0
    unread: list[UnreadEntry] = field(default_factory=list)
    links: int = 0
    newest: int = 0

    def __bool__(self) -> bool:
        return bool(self.folders or self.vanished)


def look(index: Index, tree: Tree, check: Callable[[], None]) -> Changes:
    """Find out what has changed. No file is opened.

    Args:
        check: called for each folder; may raise to stop.

    Raises:
        OSError: the root can't be listed, or the share is gone.
    """
    known = index.folders()
    found = Changes()
    stack = [b""]
    while stack:
        path = stack.pop()
        check()
        try:
            files, below, links = _list(tree, path)
        except OSError as exc:
            if not path or exc.errno in GONE:
                raise
            vanished = exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            if not vanished and path.rpartition(b"/")[2] != LOST_AND_FOUND:
                found.unread.append(UnreadEntry(path, is_folder=True))
            continue
        found.links += links
        stack.extend(os.path.join(path, name) for name in below)
        folder, mark = known.pop(path, (None, None))
        now = _mark(files)
        if now == mark:
            found.unchanged += len(files)
            continue
        stamps = {} if folder is None else index.stamps(folder)
        read = [name for name, stamp in files.items() if stamps.get(name) != stamp]
        found.unchanged += len(files) - len(read)
        found.newest = max([found.newest, *(max(files[name].mtime_ns, files[name].ctime_ns) for name in read)])
        found.folders.append(Change(path, now, read, [name for name in stamps if name not in files]))
    found.vanished = list(known)
    return found


def _list(tree: Tree, path: bytes) -> tuple[dict[bytes, Stamp], list[bytes], int]:
    """Return a directory's files by name with their stamps, the names of directories, and how many links there are."""
    files, below, links = {}, [], 0
    with tree.opened(os.fsdecode(path), FOLDER) as fd, os.scandir(fd) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if name.startswith(OWN) or name == MARKER:
                continue
            try:
                info = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # removed since the directory was opened
                continue
            if stat.S_ISREG(info.st_mode):
                files[name] = Stamp.of(info)
            elif stat.S_ISDIR(info.st_mode):
                below.append(name)
            elif stat.S_ISLNK(info.st_mode):
                links += 1
    return files, below, links


def _mark(files: dict[bytes, Stamp]) -> bytes:
    lines = [b"%b\0%d %d %d %d" % (name, *stamp) for name, stamp in files.items()]
    lines.sort()
    return hashlib.blake2b(b"\n".join(lines), digest_size=16).digest()


# ---- reading what has changed


class Read(NamedTuple):
    """The result of reading one file.

    Attributes:
        stamp: None if the file can't be read, or is gone.
        left: what a damaged file says that may be part of a study.
        settled: whether any later change of the file must change its stamp.
    """

    name: bytes
    stamp: Stamp | None
    kind: int = NOT_DICOM
    instance: IndexedInstance | None = None
    left: Remains | None = None
    settled: bool = True


@dataclass
class Work:
    """How many files were read and found gone, and which could not be read."""

    read: int = 0
    removed: int = 0
    unread: list[UnreadEntry] = field(default_factory=list)


def apply(index: Index, tree: Tree, changes: Changes, between: Callable[[], None]) -> Work:
    """Read the headers of new and changed files into the index, and take out what is gone.

    Args:
        between: called after every few files; may save the index, and may raise to stop: what was read until then
            stays in the index.

    Raises:
        OSError: the share is gone.
    """
    work = Work()
    known = index.folders()
    if changes.newest:
        _let_it_tick(changes.newest)
    try:
        with index.changing():
            for path in changes.vanished:
                work.removed += index.remove_folder(known[path][0])
        with Readers(CHUNK) as readers:
            for change in changes.folders:
                folder = known[change.path][0] if change.path in known else index.add_folder(change.path)
                _bring_up(index, tree, folder, change, readers, work, between)
    finally:
        index.settle()
    return work


def _bring_up(
    index: Index, tree: Tree, folder: int, change: Change, readers: Readers, work: Work, between: Callable[[], None]
) -> None:
    """Update one folder."""
    with index.changing():
        index.remove_files(folder, change.gone)
    work.removed += len(change.gone)
    names, whole = iter(change.read), True
    while chunk := list(islice(names, readers.batch)):
        with index.changing():
            for read in readers.map(partial(_read, tree, change.path), chunk):
                whole &= _put(index, folder, read, work)
                if read.stamp is None and read.kind == DAMAGED:
                    work.unread.append(UnreadEntry(os.path.join(change.path, read.name), is_folder=False))
        between()
    if whole:
        index.mark_folder(folder, change.mark)


def _let_it_tick(newest: int) -> None:
    """Wait until any later write must get a later time than the newest one."""
    age = time.time_ns() - newest
    if age < TICK_NS:
        time.sleep(min(TICK_NS, TICK_NS - age) / 1e9)


def _put(index: Index, folder: int, read: Read, work: Work) -> bool:
    """Add a file to the index; return False if it must be read again although its stamp is the same."""
    if read.stamp is None:
        index.remove_files(folder, [read.name])
        return False
    work.read += 1
    stamp = read.stamp if read.settled else read.stamp._replace(size=-1)  # equals no file's
    index.put_file(folder, read.name, stamp, read.kind, read.instance, read.left)
    return read.settled


def _read(tree: Tree, folder: bytes, name: bytes) -> Read:
    """Read one file's header."""
    try:
        fd = tree.open(os.fsdecode(os.path.join(folder, name)))
    except OSError as exc:
        return _failed(name, exc)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return Read(name, None)
        kind, instance, left = _kind(fd, info.st_size, name)
        stamp = Stamp.of(info)
        return Read(name, stamp, kind, instance, left, stamp == Stamp.of(os.fstat(fd)) and not _coarse(stamp))
    except OSError as exc:
        return _failed(name, exc)
    finally:
        os.close(fd)


def _failed(name: bytes, exc: OSError) -> Read:
    if exc.errno in GONE:
        raise exc
    vanished = exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return Read(name, None, NOT_DICOM if vanished else DAMAGED)


def _kind(fd: int, size: int, name: bytes) -> tuple[int, IndexedInstance | None, Remains | None]:
    """Return what a file is: an instance, a damaged one with what it still says, or something else."""
    try:
        header, elements = read_elements(fd, size, TAGS)
    except NotDicom as exc:
        # What a full disk or a crash leaves behind may be blank, or other bytes than were written.
        meant = not exc.is_directory and (CALLED_DICOM.fullmatch(name) or (NUMBERED.fullmatch(name) and _blank(fd)))
        return (DAMAGED, None, Remains()) if meant else (NOT_DICOM, None, None)
    except Damaged:
        named = CALLED_DICOM.fullmatch(name) or NUMBERED.fullmatch(name)
        return DAMAGED, None, remains(fd, size) if named or not _blank(fd) else None
    if header.StudyInstanceUID and header.SeriesInstanceUID:
        return INSTANCE, IndexedInstance(header, elements), None
    # Servers refuse such instances; a color palette or a hanging protocol is none of a study's.
    left = Remains(header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID, header.AccessionNumber)
    return DAMAGED, None, left if any((left.study, left.series, header.PatientID, header.Modality)) else None


def _blank(fd: int) -> bool:
    """Return True if a file begins with nothing but zeros, or is empty."""
    return not any(os.pread(fd, PREAMBLE_BYTES, 0))


def _coarse(stamp: Stamp) -> bool:
    """Return True if the file may be written again and keep its times."""
    latest = max(stamp.mtime_ns, stamp.ctime_ns)
    whole = stamp.mtime_ns % 1_000_000_000 == 0 and stamp.ctime_ns % 1_000_000_000 == 0
    return whole and abs(time.time_ns() - latest) < COARSE_NS
