"""Notices which files are written to, whatever their times say afterwards (inotify(7), Linux only).

A file's ctime shows that something happened to it. A watch shows whether the content was written, or only a link was
made or removed, as every other dispatch of the same files does.

All plans of a process share one instance of inotify, of which a user may have 128 (fs.inotify.max_user_instances): a
plan without one would take a link that came and went for a change.
"""

from __future__ import annotations

import threading
import time
import weakref
from array import array
from collections import Counter, deque
from typing import Any

from transfer.inotify import IN_Q_OVERFLOW, closing, events, remove
from transfer.inotify import add as _add

IN_MODIFY = 0x2
IN_ATTRIB = 0x4  # permissions, times, number of links
EACH = 1024  # files after which is read what has happened: of events that wait, the system keeps 16,384
LATE_S = 0.1  # a file's new ctime shows before the event that says why; a busy system may stop its maker in between
LATEST_S = 1.0  # of a plan's files together, where something happens that nobody reports, as on a share
BLOCK_BITS = 10  # numbers of watches that are kept together
_WATCHED, _TOUCHED = 1, 2
_NONE = bytes(1 << BLOCK_BITS)


class Watch:
    """Watches a plan's files until it is closed, or garbage collected.

    Where the system has no watches left, nothing is known about a file. Local writes are noticed, also through another
    name of the file; those through a memory map are not, nor those of another host to a shared file system.
    """

    def __init__(self) -> None:
        self._numbers = array("i")
        self._since: dict[int, int] = {}  # files that had been written to while others watched them: up to when
        self._late_s = LATEST_S
        self._instance = _Instance.joined()
        self._lost = self._instance.lost
        self._end = weakref.finalize(self, self._instance.left.append, self._numbers)
        self._end.atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy in another process would know nothing

    def close(self) -> None:
        """Watch nothing any more: nothing is known about any file from now on."""
        self._end()
        self._instance.clear_up()

    def add(self, file: str | int) -> int:
        """Watch the file at a path, or an opened one; return the number of its watch, 0 if it can't be watched."""
        path = f"/proc/self/fd/{file}" if isinstance(file, int) else file
        return self._instance.add(path, self._numbers, self._since) if self._end.alive else 0

    def keep_up(self) -> None:
        """Take in now and then what has happened, called once for each file: of what waits, the system keeps so much"""
        self._instance.keep_up()

    def is_written(self, number: int) -> bool | None:
        """Return whether the file of a number was written to; None if that is not known.

        False if only something else happened to it on this machine. True if nothing was noticed: the caller has seen a
        change.
        """
        until = 0.0
        while number and self._end.alive:
            happened = self._instance.happened(number, self._since.get(number, 0))
            if self._instance.lost != self._lost:
                break
            if happened is not None:
                return happened
            now = time.monotonic()
            until = until or now + min(LATE_S, self._late_s)
            if now >= until:
                return True
            time.sleep(0.002)
            self._late_s -= time.monotonic() - now
        return None


class _Instance:
    """The watches of all plans of this process. Its methods are safe to call from several threads.

    Attributes:
        lost: how often events were lost.
        left: the numbers of plans that are no more; put there also where garbage is collected, and no lock may be
            waited for.
    """

    _current: _Instance | None = None
    _lock = threading.RLock()

    @classmethod
    def joined(cls) -> _Instance:
        """Return the one for a new plan."""
        with cls._lock:
            if cls._current is not None:
                cls._current.clear_up()
            if cls._current is None or cls._current._fd < 0:
                cls._current = cls()
            cls._current._plans += 1
            return cls._current

    def __init__(self) -> None:
        self.lost = 0
        self.left: deque[array[int]] = deque()
        self._plans = 0
        self._marks: dict[int, bytearray] = {}  # a byte for each watch, in blocks
        self._more: Counter[int] = Counter()  # watches of several plans: how many besides the first
        self._written: dict[int, int] = {}  # watches of what was written to: when, as a number of the event
        self._number = self._files = 0
        self._fd, self._close = closing(self)

    def add(self, path: str, numbers: array[int], since: dict[int, int]) -> int:
        with self._lock:
            number = _add(self._fd, path, IN_MODIFY | IN_ATTRIB) if self._fd >= 0 else -1
            if number < 0:
                return 0
            block, at = number >> BLOCK_BITS, number & ((1 << BLOCK_BITS) - 1)
            marks = self._marks.get(block)
            if marks is None:
                marks = self._marks[block] = bytearray(1 << BLOCK_BITS)
            if marks[at]:  # a file that another plan has, or this one under another name
                self._more[number] += 1
                self._read()
                if number in self._written:
                    since[number] = self._written[number]
            marks[at] |= _WATCHED
            numbers.append(number)
        self.keep_up()
        return number

    def keep_up(self) -> None:
        self._files += 1
        if self._files % EACH == 0:
            with self._lock:
                self._read()

    def happened(self, number: int, since: int) -> bool | None:
        """Return True if a file was written to after the event `since`, False if it was touched, else None."""
        with self._lock:
            self._read()
            if self._written.get(number, 0) > since:
                return True
            marks = self._marks.get(number >> BLOCK_BITS)
            return False if marks and marks[number & ((1 << BLOCK_BITS) - 1)] & _TOUCHED else None

    def clear_up(self) -> None:
        """Forget the watches of plans that are no more; where there is no other plan, the whole instance."""
        with self._lock:
            while self.left and self._fd >= 0:
                numbers = self.left.popleft()
                self._plans -= 1
                if not self._plans:
                    self._fd = -1
                    self._close()
                    return
                for count, number in enumerate(numbers):
                    self._forget(number)
                    if count % EACH == 0:
                        self._read()  # each removal is an event as well

    def _forget(self, number: int) -> None:
        if self._more[number] > 0:
            self._more[number] -= 1
            return
        del self._more[number]
        remove(self._fd, number)
        block = number >> BLOCK_BITS
        marks = self._marks[block]
        marks[number & ((1 << BLOCK_BITS) - 1)] = 0
        self._written.pop(number, None)
        if marks == _NONE:
            del self._marks[block]

    def _read(self) -> None:
        for number, mask, _ in events(self._fd) if self._fd >= 0 else ():
            self._number += 1
            if mask & IN_Q_OVERFLOW:
                self.lost += 1
            elif mask & IN_MODIFY:
                self._written[number] = self._number
            elif mask & IN_ATTRIB and (marks := self._marks.get(number >> BLOCK_BITS)):
                marks[number & ((1 << BLOCK_BITS) - 1)] |= _TOUCHED
