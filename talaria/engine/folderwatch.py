"""Notices what happens in folders, theirs and those below them (inotify(7)); only what is done on this machine."""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from contextlib import suppress
from typing import Any

# A file was closed after it was written to; a name has come; a name has gone.
_EVENTS = 0x8 | 0x80 | 0x100
IN_ISDIR, IN_Q_OVERFLOW, IN_IGNORED = 0x40000000, 0x4000, 0x8000
IN_ONLYDIR, IN_DONT_FOLLOW = 0x1000000, 0x2000000
READ_BYTES = 1 << 16
MOST = 50_000  # folders; the system allows a user some number of its own
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows

try:
    _libc: Any = ctypes.CDLL(None, use_errno=True)
    _init, _add = _libc.inotify_init1, _libc.inotify_add_watch
except (AttributeError, OSError):  # not Linux
    _init = _add = None


class FolderWatch:
    """Watches a folder and those below it, until it is garbage collected.

    Args:
        name: only this file in the folder, and no folder below it.

    Attributes:
        blind: whether something may happen that is not noticed: there are too many folders, or events were lost.
    """

    def __init__(self, folder: str, name: str = "") -> None:
        self._folders: dict[int, str] = {}
        self._name = name
        self._fd = _init(os.O_NONBLOCK | os.O_CLOEXEC) if _init else -1
        self.blind = self._fd < 0
        if self._fd >= 0:
            weakref.finalize(self, os.close, self._fd)
            self._add(folder)

    def _add(self, folder: str) -> None:
        stack = [folder]
        while stack:
            path = stack.pop()
            if len(self._folders) >= MOST:
                self.blind = True
                return
            number = _add(self._fd, os.fsencode(path), _EVENTS | IN_ONLYDIR | IN_DONT_FOLLOW)
            if number < 0:
                self.blind = self.blind or os.path.lexists(path)
                continue
            self._folders[number] = path
            if self._name:
                return
            with suppress(OSError), os.scandir(path) as listing:
                stack += (one.path for one in listing if one.is_dir(follow_symlinks=False))

    def names(self) -> list[str]:
        """Return the names of what has come, was written, or has gone, since the last call."""
        found: list[str] = []
        if self._fd < 0:
            return found
        with suppress(BlockingIOError):
            while data := os.read(self._fd, READ_BYTES):
                at = 0
                while at < len(data):
                    number, mask, _, length = _EVENT.unpack_from(data, at)
                    name = os.fsdecode(data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0"))
                    at += _EVENT.size + length
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
