"""Notices what happens in folders, theirs and those below them (inotify(7)); only what is done on this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from transfer.inotify import IN_Q_OVERFLOW, add, events, opened

# A file was closed after it was written to; a name has come; a name has gone.
_EVENTS = 0x8 | 0x80 | 0x100
IN_ISDIR, IN_IGNORED = 0x40000000, 0x8000
IN_ONLYDIR, IN_DONT_FOLLOW = 0x1000000, 0x2000000
MOST = 50_000  # folders; the system allows a user some number of its own


class FolderWatch:
    """Watches a folder and those below it, until it is garbage collected.

    Args:
        name: only this file in the folder, and no folder below it.

    Attributes:
        blind: whether something may happen that is not noticed: there are too many folders, or events were lost.
    """

    def __init__(self, folder: str, name: str = "") -> None:
        self._folders: dict[int, str] = {}
        self._name, self._folder = name, folder
        self._identity = _identity(folder)
        self._fd = opened(self)
        self.blind = self._fd < 0
        if self._fd >= 0:
            self._add(os.path.realpath(folder))  # it may be a link itself; those below it are not followed

    def _add(self, folder: str) -> None:
        stack = [folder]
        while stack:
            path = stack.pop()
            if len(self._folders) >= MOST:
                self.blind = True
                return
            number = add(self._fd, path, _EVENTS | IN_ONLYDIR | IN_DONT_FOLLOW)
            if number < 0:
                self.blind = self.blind or os.path.lexists(path)
                continue
            self._folders[number] = path
            if self._name:
                return
            with suppress(OSError), os.scandir(path) as listing:
                stack += (one.path for one in listing if one.is_dir(follow_symlinks=False))

    @property
    def is_stale(self) -> bool:
        """Whether another folder has come into the place of the one that is watched, or a file system over it.

        No event says so: a folder that is renamed or removed takes its watches along.
        """
        return _identity(self._folder) != self._identity

    def names(self) -> list[str]:
        """Return the names of what has come, was written, or has gone, since the last call."""
        found: list[str] = []
        if self._fd < 0:
            return found
        for number, mask, name in events(self._fd):
            if mask & IN_Q_OVERFLOW:
                self.blind = True
            elif mask & IN_IGNORED:
                self._folders.pop(number, None)
                continue
            elif mask & IN_ISDIR and number in self._folders and not self._name:
                self._add(f"{self._folders[number]}/{name}")
            if self._name in ("", name):
                found.append(name)
        return found


def _identity(folder: str) -> tuple[int, int] | None:
    """Return what no other folder has; None if it can't be looked at."""
    try:
        there = Path(folder).stat()
    except OSError:
        return None
    return there.st_dev, there.st_ino
