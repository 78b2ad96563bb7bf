"""A target's folder, opened: everything in it is reached from its descriptor, and never by way of a link.

Whoever may write to a folder below may put a link in the place of a folder or file at any moment, also of one that we
have just made or looked at. Every call here resolves its path anew in the kernel, which refuses links (ELOOP), and acts
on a name in the folder that was opened so.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transfer import roots
from transfer.beneath import FOLDER, WAY, above, is_link_error, open_beneath

# What link(2) says where the file system, or the owner, allows no hard link.
NO_LINK = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EINVAL)


class Tree:
    """A folder and all below it. A context manager; safe to use from several threads.

    Paths are relative to it, POSIX, "" for itself; none may climb. All methods raise OSError as their system calls do.

    Args:
        root: it may be, or lie behind, a link; must lie where may be written to (`transfer.roots`).

    Raises:
        Denied: it lies elsewhere. NotFound, OSError: it can't be opened.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fd = roots.places().open(root, WAY)

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- looking

    def open(self, path: str, flags: int = os.O_RDONLY | os.O_NONBLOCK, mode: int = 0o666) -> int:
        """Open what a path names; the caller closes the descriptor."""
        return open_beneath(self.fd, path or ".", flags, mode)

    @contextmanager
    def opened(self, path: str, flags: int = os.O_RDONLY | os.O_NONBLOCK) -> Iterator[int]:
        """Yield what a path names, opened."""
        fd = self.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def stat(self, path: str) -> os.stat_result:
        """Return what is known of a name, of a link itself if it is one."""
        if not path:
            return os.fstat(self.fd)
        with above(self.fd, path) as (folder, name):
            return os.stat(name, dir_fd=folder, follow_symlinks=False)

    def exists(self, path: str) -> bool:
        """Return True if there is anything of a name, also a link; False where a link is on the way to it."""
        return self._mode(path) != 0

    def is_folder(self, path: str) -> bool:
        """Return True if there is a folder of a name, and no link."""
        return stat.S_ISDIR(self._mode(path))

    def _mode(self, path: str) -> int:
        """Return the type and permissions of what has a name; 0 if there is nothing, or a link is on the way to it."""
        try:
            return self.stat(path).st_mode
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return 0
            raise

    def is_linked(self, path: str) -> bool:
        """Return True if a link is on the way to a path, or in its place."""
        try:
            with self.opened(path, WAY):
                return False
        except OSError as exc:
            return is_link_error(exc)

    def files(self, path: str) -> Iterator[str]:
        """Yield all that is no folder below a folder, relative to the tree; links as what they are."""
        folders = []
        with self.opened(path, FOLDER) as fd, os.scandir(fd) as entries:
            for entry in entries:
                below = f"{path}/{entry.name}" if path else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(below)
                else:
                    yield below
        for folder in folders:
            with suppress(FileNotFoundError):
                yield from self.files(folder)

    def folders(self, path: str) -> Iterator[str]:
        """Yield a folder's folders, the deepest first, and then itself."""
        with self.opened(path, FOLDER) as fd, os.scandir(fd) as entries:
            below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        for name in below:
            yield from self.folders(f"{path}/{name}" if path else name)
        yield path

    # ---- changing

    def make_folders(self, path: str, below: str = "", mode: int | None = None, group: int | None = None) -> list[str]:
        """Make the folders from `below` (which exists) down to `path`; return those that are new, the highest first."""
        missing, made = [], []
        while path != below and not self.is_folder(path):
            missing.append(path)
            path = parent(path)
        for folder in reversed(missing):
            try:
                with above(self.fd, folder) as (fd, name):
                    os.mkdir(name, dir_fd=fd)
            except FileExistsError:
                if not self.is_folder(folder):  # else somebody else was faster
                    if stat.S_ISLNK(self.stat(folder).st_mode):
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), folder) from None
                    raise
                continue
            self.own_folder(folder, mode, group)
            made.append(folder)
        return made

    def own_folder(self, path: str, mode: int | None, group: int | None) -> None:
        """Give a folder its permissions and group."""
        if mode is not None or group is not None:
            with self.opened(path, FOLDER) as fd:
                own(fd, mode, group)

    def rename(self, old: str, new: str) -> None:
        """Give a file or folder another name, in the place of a file that has it; a link there is replaced itself."""
        with above(self.fd, old) as (source, name), above(self.fd, new) as (place, final):
            os.rename(name, final, src_dir_fd=source, dst_dir_fd=place)

    def link(self, source: str | os.PathLike[str], new: str, *, follow: bool = False) -> None:
        """Make a hard link to a file from outside; see link(2)."""
        with above(self.fd, new) as (place, final):
            os.link(source, final, dst_dir_fd=place, follow_symlinks=follow)

    def unlink(self, path: str) -> None:
        """Remove a file, or a link itself."""
        with above(self.fd, path) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def rmdir(self, path: str) -> None:
        """Remove an empty folder."""
        with above(self.fd, path) as (folder, name):
            os.rmdir(name, dir_fd=folder)

    def remove(self, path: str) -> None:
        """Remove a folder with all that is in it, as far as that can be done; links in it, not what they lead to."""
        with suppress(OSError):
            with self.opened(path, FOLDER) as fd, os.scandir(fd) as entries:
                inside = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for name, is_folder in inside:
                with suppress(OSError):
                    self.remove(f"{path}/{name}") if is_folder else self.unlink(f"{path}/{name}")
            self.rmdir(path)

    def flush(self, path: str) -> None:
        """Wait until the entries of a folder are on disk, where the file system knows of such a thing."""
        with self.opened(path, FOLDER) as fd:
            try:
                os.fsync(fd)
            except OSError as exc:
                if exc.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):  # shares that can't flush folders
                    raise

    def move_folder(self, source: str, final: str) -> bool:
        """Give a whole folder its final name in one step; False if there is something of that name."""
        try:
            self.rename(source, final)
        except OSError as exc:
            if exc.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                return False
            if exc.errno in (errno.EXDEV, errno.EBUSY) and self._is_mount(final):
                return False  # a file system of its own, of which we are inside
            raise
        return True

    def _is_mount(self, path: str) -> bool:
        try:
            with self.opened(path, WAY) as fd:
                return os.fstat(fd).st_dev != self.stat(parent(path)).st_dev
        except OSError:
            return False

    def move_file(self, source: str, final: str) -> bool:
        """Give a file its final name in one step; False, and nothing changed, if there is something of that name.

        rename(2) replaces what is there, also what another process put there since we looked; link(2) doesn't.
        """
        with above(self.fd, source) as (folder, name), above(self.fd, final) as (place, other):
            try:
                os.link(name, other, src_dir_fd=folder, dst_dir_fd=place, follow_symlinks=False)
            except FileExistsError:
                return False
            except OSError as exc:
                if exc.errno not in NO_LINK:
                    raise
                with suppress(FileNotFoundError):
                    os.stat(other, dir_fd=place, follow_symlinks=False)
                    return False
                os.rename(name, other, src_dir_fd=folder, dst_dir_fd=place)
                return True
            os.unlink(name, dir_fd=folder)
        return True

    # ---- shares with a mind of their own

    def is_caseless(self, path: str) -> bool:
        """Return True if the file system takes the name of a folder, in other letters, for the same."""
        with suppress(OSError), above(self.fd, path) as (folder, name):
            return name.swapcase() != name and _is_same(folder, name.swapcase(), name)
        return False

    def is_of_other_name(self, path: str) -> bool:
        """Return True if a path leads to what is called otherwise: on a share that takes `ab` for `AB`."""
        with suppress(OSError), above(self.fd, path) as (folder, name):
            for other in (name.swapcase(), name.rstrip(".") or name):
                with suppress(OSError):
                    if other != name and _is_same(folder, name, other) and name not in self._listed(parent(path)):
                        return True
        return False

    def _listed(self, path: str) -> list[str]:
        with self.opened(path, FOLDER) as fd:
            return os.listdir(fd)


def _is_same(folder: int, one: str, other: str) -> bool:
    return os.path.samestat(os.stat(one, dir_fd=folder), os.stat(other, dir_fd=folder))


def parent(path: str) -> str:
    """Return the folder that a path lies in, "" for the tree itself."""
    return path.rpartition("/")[0]


def joined(*parts: str) -> str:
    """Join paths, of which some may be empty."""
    return "/".join(part for part in parts if part)


def own(fd: int, mode: int | None, group: int | None) -> None:
    """Give an opened file or folder its permissions and group; a set-group-ID bit that a folder inherited stays."""
    if group is not None:
        os.fchown(fd, -1, group)
    if mode is not None:
        info = os.fstat(fd)
        inherited = info.st_mode & stat.S_ISGID if stat.S_ISDIR(info.st_mode) else 0  # chmod(2) drops it
        os.fchmod(fd, mode | inherited)
