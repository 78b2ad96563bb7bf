"""What becomes of the files of a unit that has been delivered: moved, or deleted, if every target has confirmed them.

A file goes only if nothing at all has happened to it since the sweep that dispatched it (its length, times and inode
are those that the sweep saw), and if the ledger says that every target has confirmed a file of this path, length and
time. It is looked at by its descriptor, gets a name of ours, is looked at again, and goes: what somebody puts in its
place meanwhile is never touched, nor what somebody has open for writing. What a kill leaves under our name goes, or
gets its own name again, with the next sweep.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from blocks.source import After, Source
from protocols.files.tree import NO_LINK, Tree, parent
from tasks.sources import writers
from tasks.sources.inbox import MARKER, TAKEN
from transfer import roots
from transfer.beneath import FOLDER, PATH_ONLY, above
from transfer.content import copy_bytes, same_content, sha256
from transfer.fingerprint import FIRST_NS, Fingerprint
from transfer.home import host_name
from transfer.layout import names
from transfer.oserrors import passes, words_of
from transfer.plan import Item, scan
from transfer.unitlist import FileFacts, ListedUnit

NOT_CONFIRMED = "not confirmed by every target"
TOUCHED = "something has happened to it since it was dispatched"
WRITTEN = "it is still open for writing"
OUTSIDE = "it lies outside the source's folder"
MOST_NAMES = 1000  # tried for a file whose name is taken where it is moved to
NAMED = 3  # files that a sentence names
PERMISSIONS = 0o777
READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # a pipe may have taken the place of a file
_NAME_BYTES = 100  # of a file, that show in our name for it: of encrypted folders some take 143 in all, others 255


@dataclass
class Finished:
    """What has become of a unit's files.

    Attributes:
        fingerprint: of those that are left, of the ones that were dispatched.
        kept: the names of those that were left, by the reason.
        passing: how many of them for a reason that passes by itself, as a full disk does.
        failed: what the file system said, of whichever file.
        put_back: the facts of files that had our name for a moment, which changed their ctime, by path.
    """

    fingerprint: str
    gone: int = 0
    kept: dict[str, list[str]] = field(default_factory=dict)
    passing: int = 0
    failed: str = ""
    put_back: dict[str, FileFacts] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """Why files were left, in a sentence; "" if none was."""
        return "; ".join(f"{_some(names)}: {why}" for why, names in self.kept.items())


def _some(names: list[str]) -> str:
    """Return how many files stay, and the names of the first."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} file{'s stay' if len(names) > 1 else ' stays'} ({', '.join(names[:NAMED])}{more})"


class _Stays(Exception):
    """A file is left where it is; the text says why."""


def finish(
    source: Source,
    folder: str,
    unit: ListedUnit,
    fingerprint: str,
    confirmed: Callable[[FileFacts], bool],
    check: Callable[[], None] = lambda: None,
) -> Finished:
    """Move or delete the files of a unit, as its source says; may be repeated after a kill.

    Args:
        folder: that of the source, without links.
        fingerprint: that of the unit when it was dispatched.
        confirmed: returns True if every target has confirmed a file.
        check: called between files; may raise to stop.
    """
    mark = Fingerprint.parse(fingerprint)
    done = Finished(fingerprint)
    if source.leaving.after is After.LEAVE:
        return done
    moving = source.leaving.after is After.MOVE
    finals = _finals(source, folder, unit) if moving else {}
    with ExitStack() as stack:
        fd = roots.sources().open(folder, FOLDER)
        stack.callback(os.close, fd)
        tree = stack.enter_context(Tree(Path(source.leaving.move_to))) if moving else None
        for one in unit.files:
            check()
            inside = _inside(folder, one.path)
            try:
                _let_go(fd, inside, one, confirmed, tree, finals.get(one.path, inside), done.put_back)
            except _Stays as exc:
                done.kept.setdefault(str(exc), []).append(_name(unit, one.path))
                done.passing += str(exc) == WRITTEN
            except OSError as exc:
                done.failed = words_of(exc)
                done.kept.setdefault(done.failed, []).append(_name(unit, one.path))
                done.passing += passes(exc)
            else:
                done.gone += 1
                mark.take(_name(unit, one.path), one.size, one.mtime_ns)
        if is_folder(unit) and (inside := _inside(folder, unit.paths[0])):
            with suppress(OSError):
                _clear(fd, inside)
    done.fingerprint = str(mark)
    return done


def restore(folder: str, unit: ListedUnit) -> None:
    """Give the files of a unit that a kill has left under our name their own again."""
    fd = roots.sources().open(folder, FOLDER)
    try:
        for inside in (_inside(folder, one.path) for one in unit.files):
            with suppress(OSError), above(fd, inside) as (at, name):
                _put_back(at, _taken(name), name)
    finally:
        os.close(fd)


def has_begun(unit: ListedUnit) -> bool:
    """Return True if something of a unit has gone already, or a kill has left a file of it under our name."""
    return not all(os.path.lexists(one.path) for one in unit.files)


def _inside(folder: str, path: str) -> str:
    """Return a path relative to the folder that it lies in; "" if it lies elsewhere."""
    return path[len(folder.rstrip("/")) + 1 :] if roots.is_in(path, folder) else ""


def _name(unit: ListedUnit, path: str) -> str:
    """Return by which path a file counts in the fingerprint of its unit."""
    return path.removeprefix(f"{unit.paths[0]}/") if is_folder(unit) else path


def _taken(name: str) -> str:
    """Return our own name for a file, the same after a kill."""
    raw = os.fsencode(name)
    return TAKEN + (name if len(raw) <= _NAME_BYTES else hashlib.blake2b(raw, digest_size=16).hexdigest())


def _let_go(
    root: int,
    inside: str,
    one: FileFacts,
    confirmed: Callable[[FileFacts], bool],
    tree: Tree | None,
    final: str,
    back: dict[str, FileFacts],
) -> None:
    """Move or delete one file; if it can't go, though it may, keep what it is then in `back`.

    Raises:
        _Stays: it must not go. OSError: it can't.
    """
    if not inside:
        raise _Stays(OUTSIDE)
    try:
        with above(root, inside) as (folder, name):
            taken, held = _taken(name), False
            try:
                _take(folder, name, taken, one, confirmed)
                held = True
                _check_writers(folder, taken)
                if tree is None:
                    os.unlink(taken, dir_fd=folder)
                else:
                    _move(folder, taken, tree, final)
            except BaseException:
                _put_back(folder, taken, name)  # also what a kill has left
                if held:
                    _note(folder, name, one, back)
                raise
    except FileNotFoundError:
        return  # it is gone: an earlier sweep, or somebody else, was faster


def _take(folder: int, name: str, taken: str, one: FileFacts, confirmed: Callable[[FileFacts], bool]) -> None:
    """Give a file our own name, if it is what was dispatched and may go.

    Raises:
        _Stays: it must not go; it may have our name. OSError: it can't be looked at, or renamed.
    """
    if not confirmed(one):
        raise _Stays(NOT_CONFIRMED)
    try:
        left = os.stat(taken, dir_fd=folder, follow_symlinks=False)  # by a kill, after it was looked at
    except FileNotFoundError:
        same = _renamed(folder, name, taken, one)
    else:
        same = (left.st_size, left.st_mtime_ns, left.st_ino) == (one.size, one.mtime_ns, one.inode)
    if not same:
        raise _Stays(TOUCHED)


def _check_writers(folder: int, taken: str) -> None:
    if writers.name_is_written(taken, folder):
        raise _Stays(WRITTEN)


def _note(folder: int, name: str, one: FileFacts, back: dict[str, FileFacts]) -> None:
    """Keep what a file is that was found unchanged and has its own name again; nothing if it is another one."""
    with suppress(OSError):
        now = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if (now.st_size, now.st_mtime_ns, now.st_ino) == (one.size, one.mtime_ns, one.inode):
            back[one.path] = replace(one, ctime_ns=now.st_ctime_ns)


def _renamed(folder: int, name: str, taken: str, one: FileFacts) -> bool:
    """Give a file our own name; return False if it, or another one, is not what was dispatched."""
    fd = os.open(name, PATH_ONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        if not one.is_still(os.fstat(fd)):
            return False
        os.rename(name, taken, src_dir_fd=folder, dst_dir_fd=folder)
        now, still = os.stat(taken, dir_fd=folder, follow_symlinks=False), os.fstat(fd)
        return os.path.samestat(now, still) and (still.st_size, still.st_mtime_ns) == (one.size, one.mtime_ns)
    finally:
        os.close(fd)


def _put_back(folder: int, taken: str, name: str) -> None:
    """Give a file its own name again, or one beside it if that is taken; it is never put in the place of another."""
    for number in range(MOST_NAMES):
        free = name if not number else f"{name}.{number}"
        try:
            os.link(taken, free, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            continue
        except FileNotFoundError:
            return
        except OSError as exc:
            if exc.errno not in NO_LINK:
                raise
            with suppress(FileNotFoundError):
                os.stat(free, dir_fd=folder, follow_symlinks=False)
                continue
            os.rename(taken, free, src_dir_fd=folder, dst_dir_fd=folder)
            return
        os.unlink(taken, dir_fd=folder)
        return


def _move(folder: int, taken: str, tree: Tree, final: str) -> None:
    """Move a file into a tree; what has its name there stays, unless it has the same content."""
    for made in tree.make_folders(parent(final)):
        with suppress(OSError):  # a share that knows no permissions
            tree.own_folder(made, os.fstat(tree.fd).st_mode & PERMISSIONS, None)
    stem, dot, suffix = final.rpartition(".") if "." in final.rpartition("/")[2] else (final, "", "")
    fd = os.open(taken, READ, dir_fd=folder)
    try:
        for number in range(MOST_NAMES):
            place = final if not number else f"{stem}.{number}{dot}{suffix}"
            if _placed(fd, folder, taken, tree, place):
                tree.flush(parent(place))
                os.unlink(taken, dir_fd=folder)
                return
    finally:
        os.close(fd)
    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), final)


def _placed(fd: int, folder: int, taken: str, tree: Tree, place: str) -> bool:
    """Return True if a file's content has a name in a tree now; False if something else has that name."""
    with suppress(FileNotFoundError), tree.opened(place, os.O_RDONLY | os.O_NONBLOCK) as there:
        return same_content(fd, there)
    with above(tree.fd, place) as (other, name):
        try:
            os.link(taken, name, src_dir_fd=folder, dst_dir_fd=other, follow_symlinks=False)
        except FileExistsError:
            return False
        except OSError as exc:
            if exc.errno not in NO_LINK:
                raise
        else:
            return True
    info = os.fstat(fd)
    part = "/".join(filter(None, (parent(place), f".talaria-{_mark(info)}")))
    _clear_part(tree, part)
    try:
        with tree.opened(part, os.O_RDWR | os.O_CREAT | os.O_EXCL) as writer:
            with suppress(OSError):  # a share that knows no locks
                fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
            copy_bytes(fd, writer)
            with suppress(OSError):
                os.fchmod(writer, info.st_mode & PERMISSIONS)
            with suppress(OSError):  # only root gives files to others, and their users to groups of their own
                os.fchown(writer, -1, info.st_gid)
            os.utime(writer, ns=(info.st_atime_ns, info.st_mtime_ns))
            os.fsync(writer)
            if not same_content(fd, writer):
                raise OSError(errno.EIO, "the copy differs from the file", place)
        return tree.move_file(part, place)
    finally:
        with suppress(FileNotFoundError):
            tree.unlink(part)


def _clear_part(tree: Tree, part: str) -> None:
    """Remove what a kill has left of a copy.

    Raises:
        OSError: a sweep that was stopped is still at it: half of ours would get the name of its copy.
    """
    with suppress(FileNotFoundError):
        with tree.opened(part) as left:
            try:
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), part) from exc
            except OSError:
                pass  # a share that knows no locks
        tree.unlink(part)


def _mark(info: os.stat_result) -> str:
    """Return what names a file while it is copied: the same after a kill, and another one on each host."""
    which = f"{host_name()} {info.st_dev} {info.st_ino}"
    return hashlib.blake2b(which.encode(), digest_size=8).hexdigest()


def _finals(source: Source, folder: str, unit: ListedUnit) -> Mapping[str, str]:
    """Return where files are moved to, by their paths; those that are not in it keep their path in the inbox."""
    there = [one for one in unit.paths if os.path.lexists(one)]  # the rest went before a kill, or by somebody else
    if not source.leaving.move_layout or not any(os.path.lexists(one.path) for one in unit.files):
        return {}
    plan = scan(there, source.globs)
    root = str(plan.root).rstrip("/")
    return {f"{root}/{path}": f"{below}/{path}" for path, below in names(plan, source.leaving.move_layout).items()}


def _clear(root: int, inside: str) -> None:
    """Remove a unit's folder if nothing is in it any more, but folders, and the marker of whoever sent it."""
    with above(root, inside) as (higher, name):
        path = f"/proc/self/fd/{higher}/{name}"
        found = [(below, files) for below, _, files in os.walk(path, topdown=False)]
        if any(set(files) - ({MARKER} if below == path else set()) for below, files in found):
            return
        for below, files in found:
            for one in files:
                Path(below, one).unlink()
            Path(below).rmdir()


def holds(there: tuple[int, int, str] | None, one: FileFacts) -> bool:
    """Return True if a target is known to hold what a file has: by its sum, where another dispatch brought it."""
    if there is None or there[:2] != (one.size, max(one.mtime_ns, FIRST_NS)):
        return False
    if not there[2]:
        return True
    try:
        with open(one.path, "rb", opener=lambda path, _: os.open(path, READ)) as file:
            return sha256(file.fileno()) == there[2]
    except OSError:
        return False


def is_folder(unit: ListedUnit) -> bool:
    """Return True if a unit is one folder, and not some files."""
    return len(unit.paths) == 1 and not any(one.path == unit.paths[0] for one in unit.files)


def shown_in(unit: ListedUnit) -> Callable[[str], str]:
    """Return what returns by which path the ledger knows a file of a unit."""
    above_all = os.path.commonpath([one.rpartition("/")[0] or "/" for one in unit.paths])
    skip = len((unit.paths[0] if is_folder(unit) else above_all).rstrip("/")) + 1
    return lambda path: Item(path[skip:], 0, 0).shown
