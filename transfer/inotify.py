"""The system's watches of files and folders (inotify(7), Linux only)."""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

IN_Q_OVERFLOW = 0x4000  # events were lost
READ_BYTES = 65_536
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows

try:
    _libc: Any = ctypes.CDLL(None, use_errno=True)
    _init, _add, _remove = _libc.inotify_init1, _libc.inotify_add_watch, _libc.inotify_rm_watch
except (AttributeError, OSError):  # not Linux
    _init = _add = _remove = None


def opened(owner: object) -> int:
    """Return a descriptor of watches, which is closed with its owner; -1 where the system has none (left)."""
    return closing(owner)[0]


def closing(owner: object) -> tuple[int, Callable[[], object]]:
    """Return the same, and what closes it before its owner goes."""
    fd: int = _init(os.O_NONBLOCK | os.O_CLOEXEC) if _init else -1
    if fd < 0:
        return fd, lambda: None
    return fd, weakref.finalize(owner, os.close, fd)  # also while the interpreter ends, where __del__ fails


def add(fd: int, path: str, mask: int) -> int:
    """Watch a file or folder for the events of a mask; return the watch's number, -1 if it can't be watched."""
    return int(_add(fd, os.fsencode(path), mask))


def remove(fd: int, number: int) -> None:
    """Watch no longer what has a number; one that ended with its file is no error."""
    _remove(fd, number)


def events(fd: int) -> Iterator[tuple[int, int, str]]:
    """Yield what has happened since the last call: the watch's number, the mask, and in a folder the name."""
    with suppress(BlockingIOError):
        while data := os.read(fd, READ_BYTES):
            at = 0
            while at < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size
                yield number, mask, os.fsdecode(data[at : at + length].rstrip(b"\0")) if length else ""
                at += length
