"""Notices which files are written to, whatever their times say afterwards (inotify(7), Linux only).

A file's ctime shows that something happened to it. A watch shows whether the content was written, or only a link was
made or removed, as every other dispatch of the same files does.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import weakref
from contextlib import suppress
from typing import Any

IN_MODIFY = 0x2
IN_ATTRIB = 0x4  # permissions, times, number of links
IN_Q_OVERFLOW = 0x4000
READ_BYTES = 65_536
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows

try:
    _libc: Any = ctypes.CDLL(None, use_errno=True)
    _init, _add = _libc.inotify_init1, _libc.inotify_add_watch
except (AttributeError, OSError):  # not Linux
    _init = _add = None


class Watch:
    """Watches files until it is garbage collected. Where the system has no watches left, nothing is known about a file.

    Local writes are noticed, also through another name of the file; those through a memory map are not, nor those of
    another host to a shared file system.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._events: dict[int, int] = {}  # all that has happened, by watch
        self._lost = False
        self._lock = threading.Lock()
        self._fd = _init(os.O_NONBLOCK | os.O_CLOEXEC) if _init else -1
        if self._fd >= 0:
            weakref.finalize(self, os.close, self._fd)  # also while the interpreter ends, where __del__ fails

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy in another process would know nothing

    def add(self, name: str, path: str) -> None:
        """Watch the file at `path`, under a name of its own."""
        if self._fd >= 0:
            number = _add(self._fd, os.fsencode(path), IN_MODIFY | IN_ATTRIB)
            if number >= 0:
                self._numbers[name] = number

    def is_written(self, name: str) -> bool | None:
        """Return whether a file was written to; None if that is not known.

        False if only something else happened to it on this machine. True if nothing was noticed: the caller has seen a
        change.
        """
        number = self._numbers.get(name)
        if number is None:
            return None
        with self._lock:
            self._read()
            if self._lost:
                return None
            return self._events.get(number, 0) & (IN_MODIFY | IN_ATTRIB) != IN_ATTRIB

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while data := os.read(self._fd, READ_BYTES):
                at = 0
                while at < len(data):
                    number, mask, _, length = _EVENT.unpack_from(data, at)
                    at += _EVENT.size + length
                    self._lost = self._lost or bool(mask & IN_Q_OVERFLOW)
                    self._events[number] = self._events.get(number, 0) | mask
