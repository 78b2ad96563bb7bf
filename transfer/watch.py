"""Notices which files are written to, whatever their times say afterwards (inotify(7), Linux only).

A file's ctime shows that something happened to it. A watch shows whether the content was written, or only a link was
made or removed, as every other dispatch of the same files does.
"""

from __future__ import annotations

import threading
from typing import Any

from transfer.inotify import IN_Q_OVERFLOW, events, opened
from transfer.inotify import add as _add

IN_MODIFY = 0x2
IN_ATTRIB = 0x4  # permissions, times, number of links


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
        self._fd = opened(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy in another process would know nothing

    def add(self, name: str, path: str) -> None:
        """Watch the file at `path`, under a name of its own."""
        if self._fd >= 0:
            number = _add(self._fd, path, IN_MODIFY | IN_ATTRIB)
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
        for number, mask, _ in events(self._fd):
            self._lost = self._lost or bool(mask & IN_Q_OVERFLOW)
            self._events[number] = self._events.get(number, 0) | mask
