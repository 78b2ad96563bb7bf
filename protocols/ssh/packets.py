"""The packets of SFTP, version 3, and the bookkeeping of many requests under way.

Source: draft-ietf-secsh-filexfer-02.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

INIT, VERSION_ANSWER, OPEN, CLOSE, READ, WRITE, FSTAT = 1, 2, 3, 4, 5, 6, 8
FSETSTAT = 10
OPENDIR, READDIR, REMOVE, MKDIR, RMDIR, STAT, RENAME = 11, 12, 13, 14, 15, 17, 18
STATUS, HANDLE, DATA, NAME, ATTRS, EXTENDED, EXTENDED_REPLY = 101, 102, 103, 104, 105, 200, 201
FLAG_READ, FLAG_WRITE, FLAG_CREATE, FLAG_TRUNCATE = 0x01, 0x02, 0x08, 0x10
HAS_SIZE, HAS_OWNER, HAS_MODE, HAS_TIMES, HAS_EXTENDED = 0x1, 0x2, 0x4, 0x8, 0x80000000
FIXED = ((HAS_SIZE, 8), (HAS_OWNER, 8), (HAS_MODE, 4), (HAS_TIMES, 8))  # attributes and their bytes (draft section 5)
HEAD_BYTES = 9  # length, type, request id

Answered = Callable[[int, bytes], None]
LOST = 0  # as the type of an answer: there will be none


class Code(IntEnum):
    """Status codes (draft section 7)."""

    OK = 0
    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3
    FAILURE = 4
    BAD_MESSAGE = 5
    NO_CONNECTION = 6
    CONNECTION_LOST = 7
    OP_UNSUPPORTED = 8


class Status(Exception):
    """The server's answer was not OK. `words` is its message, `path` what it was about."""

    def __init__(self, code: int, words: str, path: bytes = b"") -> None:
        super().__init__(code, words, path)
        self.code, self.words, self.path = code, words, path

    def __str__(self) -> str:
        name = Code(self.code).name if self.code in Code.__members__.values() else f"status {self.code}"
        return self.words or name.lower().replace("_", " ")


@dataclass(frozen=True)
class Attributes:
    """What a server says about a file; None for what it doesn't say."""

    size: int | None = None
    mode: int | None = None

    @property
    def is_folder(self) -> bool:
        return self.mode is not None and self.mode & 0o170000 == 0o040000


@dataclass(frozen=True)
class Space:
    """The free space of a file system for the user that asks, without root's reserve."""

    free_bytes: int
    free_files: int
    read_only: bool


class SendWindow:
    """A limit on the bytes under way; first come, first served."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._is_open = False

    async def take(self, count: int) -> None:
        """Wait until `count` bytes may be sent."""
        if not self._waiters and (count <= self._free or self._is_open):
            self._free -= count
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((count, future))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(count)
            raise

    def give(self, count: int) -> None:
        """Release `count` bytes that are no longer under way."""
        self._free += count
        while self._waiters and (self._waiters[0][0] <= self._free or self._is_open):
            count, future = self._waiters.popleft()
            if not future.done():
                self._free -= count
                future.set_result(None)

    def open(self) -> None:
        """Let every waiter through: the connection is lost, and they are to find that out."""
        self._is_open = True
        self.give(0)


class FileWrites:
    """The writes of one file that are under way."""

    def __init__(self, loop: asyncio.AbstractEventLoop, window: SendWindow, moved: Callable[[int], None]) -> None:
        self._loop, self._window, self._moved = loop, window, moved
        self._count = 0
        self._lost = False
        self._done: asyncio.Future[None] | None = None
        self.failed: Exception | None = None

    def sent(self, count: int) -> Answered:
        """Note a write of `count` bytes; return the function to call with its answer, which never raises."""
        self._count += 1

        def answered(kind: int, body: bytes) -> None:
            self._count -= 1
            self._window.give(count)
            if kind == STATUS:
                status = status_of(body)
                if status.code == Code.OK:
                    try:
                        self._moved(count)
                    except Exception as exc:  # raised where the file is written: here nobody would hear of it
                        self.failed = self.failed or exc
                else:
                    self.failed = self.failed or status
            else:
                self.failed = self.failed or Status(Code.CONNECTION_LOST, "connection lost")
            if not self._count and self._done is not None and not self._done.done():
                self._done.set_result(None)

        return answered

    async def settled(self) -> None:
        """Wait until every write has been answered; raise the first failure, of a write or of `moved`."""
        if self._count:
            self._done = self._loop.create_future()
            await self._done
        if self.failed:
            raise self.failed


def string(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def take(body: bytes, at: int = 0) -> bytes:
    """Return the string at a place of an answer."""
    length = int.from_bytes(body[at : at + 4], "big")
    return body[at + 4 : at + 4 + length]


def status_of(body: bytes, path: bytes = b"") -> Status:
    code = int.from_bytes(body[:4], "big")
    return Status(code, take(body, 4).decode("utf-8", "replace") if len(body) > 8 else "", path)


def attributes_of(body: bytes) -> Attributes:
    flags, at = int.from_bytes(body[:4], "big"), 4
    size = mode = None
    if flags & HAS_SIZE:
        size = int.from_bytes(body[at : at + 8], "big")
        at += 8
    if flags & HAS_OWNER:
        at += 8
    if flags & HAS_MODE:
        mode = int.from_bytes(body[at : at + 4], "big")
    return Attributes(size, mode)


def names_of(body: bytes) -> list[bytes]:
    """Return the names in an answer to READDIR (draft section 7)."""
    names, at = [], 4
    for _ in range(int.from_bytes(body[:4], "big")):
        if at >= len(body):
            break
        name = take(body, at)
        names.append(name)
        at += 4 + len(name)
        at += 4 + int.from_bytes(body[at : at + 4], "big")  # the line for people
        flags = int.from_bytes(body[at : at + 4], "big")
        at += 4 + sum(size for flag, size in FIXED if flags & flag)
        if flags & HAS_EXTENDED:
            count, at = int.from_bytes(body[at : at + 4], "big"), at + 4
            for _ in range(min(2 * count, len(body))):
                at += 4 + int.from_bytes(body[at : at + 4], "big")
    return names


def space_of(body: bytes) -> Space | None:
    """Read an answer to `statvfs@openssh.com` (OpenSSH's PROTOCOL, section 4.4): eleven numbers of 64 bits."""
    if len(body) < 88:
        return None
    numbers = struct.unpack_from(">11Q", body)
    # Of a whole that is 0 nothing is known: file systems without a number of files (Btrfs), or with no figures at all.
    free_bytes = numbers[1] * numbers[4] if numbers[2] else sys.maxsize
    free_files = numbers[7] if numbers[5] else sys.maxsize
    return Space(free_bytes=free_bytes, free_files=free_files, read_only=bool(numbers[9] & 1))
