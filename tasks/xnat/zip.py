"""The zip of a study's files as the body of a request: made while it is sent, from files opened through the plan.

A zip has each file's CRC-32 before its bytes. Small files are read once: compute, check, send. For large ones a thread
computes it a little ahead of the sending, so that the second reading comes from the page cache. Another thread fills
buffers while the caller sends them.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from imaging.part10 import beginning
from protocols.xnat.zipstream import ZipEntry, directory, length
from transfer.errors import Rejected
from transfer.plan import CHANGED, Item, Plan
from transfer.throttle import Throttle

try:  # ten times as fast: 32 GB/s instead of 3
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this processor
    from zlib import crc32

PIECE_BYTES = 1 << 20  # one send; larger ones are not faster
ROOM_BYTES = 1024  # in a buffer beyond a piece: any header, and any record of the directory
BUFFERS = 3  # one being filled, one being sent, one to hand over
AHEAD_BYTES = 256 << 20  # what is summed but not sent stays well within the page cache
WAIT_S = 0.2  # between two looks at whether to stop


class ZipBody:
    """A body for `protocols.http.exchange`, for any number of requests one after the other. Use it in a `with` block.

    A file that differs from the planned one stops the request before its last byte, so that no server ever gets a whole
    zip with it.

    Args:
        names: what each file is called in the zip.
        check: called while waiting and between pieces; may raise to stop.
        moved: called with the number of bytes that went out.
    """

    def __init__(
        self,
        plan: Plan,
        names: Sequence[tuple[Item, str]],
        throttle: Throttle,
        check: Callable[[], None],
        moved: Callable[[int], None],
    ) -> None:
        self._plan, self._throttle, self._check = plan, throttle, check
        self.sent = moved
        self.piece = min(PIECE_BYTES, throttle.piece)
        # Large files first, the largest before all: its sum is known before the connection is made, and every other
        # is ready by the time it is needed, so the server never waits in the middle of a request.
        parts = [_Part.of(item, name) for item, name in names]
        self._parts = sorted(parts, key=lambda one: (-one.size if self._large(one) else 0, one.item.path))
        self.length = length(part.entry for part in self._parts)
        self.begun = False  # whether any byte went out
        self.finished = False  # whether the last one did
        self._sums: _Sums | None = None

    def __enter__(self) -> ZipBody:
        """Begin to read.

        Raises:
            Rejected: the first file changed, or can't be read.
        """
        large = [part for part in self._parts if self._large(part)]
        if large:
            self._sums = _Sums(self._plan, large)
            try:
                self._sums.wait_for(large[0], self._check)
            except BaseException:
                self._sums.stop()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._sums:
            self._sums.stop()

    def __len__(self) -> int:
        return self.length  # for `requests`, which looks for it

    def __iter__(self) -> Iterator[memoryview]:
        self.finished = False
        filler = _Filler(self._fill, self.piece + ROOM_BYTES)
        try:
            while (piece := filler.next(self._check)) is not None:
                self._throttle.spend(len(piece))
                self.begun = True
                yield piece
                filler.give_back(piece)
        finally:
            filler.stop()
        self.finished = True

    def _large(self, part: _Part) -> bool:
        return part.size + ROOM_BYTES > self.piece  # with its header it doesn't fit into one piece

    def _fill(self, out: _Filler) -> None:
        """Write the zip into buffers. Runs in a thread of its own."""
        for part in self._parts:
            if self._sums and self._large(part):
                self._large_file(part, out, self._sums)
            else:
                self._small_file(part, out)
        for record in directory(part.entry for part in self._parts):
            out.make_room(len(record))
            out.put(record)

    def _small_file(self, part: _Part, out: _Filler) -> None:
        """Write a file and its header, if it has not changed since it was planned."""
        out.ask()
        head = part.entry.local_size
        out.make_room(head + part.size)
        with self._plan.open(part.item) as fd:
            data = out.free[head : head + part.size]
            part.read(fd, data, 0)
            self._plan.check(part.item, fd)
        part.entry.crc = crc32(data)
        out.put(part.entry.local())
        out.skip(part.size)

    def _large_file(self, part: _Part, out: _Filler, sums: _Sums) -> None:
        """Write a file piece by piece; its bytes must match the CRC-32 in its header."""
        part.entry.crc = sums.wait_for(part, out.ask)
        out.make_room(part.entry.local_size)
        out.put(part.entry.local())
        with self._plan.open(part.item) as fd:
            done = crc = 0
            while done < part.size:
                data = out.free[: part.size - done]
                part.read(fd, data, done)
                crc = crc32(data, crc)
                done += len(data)
                if done == part.size:
                    self._plan.check(part.item, fd)
                    if crc != part.entry.crc:
                        raise Rejected(CHANGED, item=part.item.shown)
                out.skip(len(data))
                out.flush()
        sums.forget(part)


@dataclass(frozen=True)
class _Part:
    """One file of the zip: what is missing at its beginning (`imaging.part10`), and its bytes from `skip` on."""

    item: Item
    entry: ZipEntry
    head: bytes
    skip: int

    @classmethod
    def of(cls, item: Item, name: str) -> _Part:
        head, skip = beginning(item.header) if item.header else (b"", 0)
        return cls(item, ZipEntry.of(name, len(head) + item.size - skip), head, skip)

    @property
    def size(self) -> int:
        return self.entry.size

    def read(self, fd: int, into: memoryview, offset: int) -> None:
        """Fill a buffer with the entry's bytes from `offset` on.

        Raises:
            Rejected: the file has become shorter, or can't be read.
        """
        head = self.head[offset : offset + len(into)]
        into[: len(head)] = head
        _read(fd, into[len(head) :], max(0, offset - len(self.head)) + self.skip, self.item)


class _Stopped(Exception):
    """The rest is no longer wanted."""


class _Filler:
    """Fills buffers in a thread while others are sent, so that reading and summing don't delay the connection.

    Args:
        fill: writes everything, by way of `put`, or of `free` and `skip`.
        size: of a buffer, bytes.
    """

    def __init__(self, fill: Callable[[_Filler], None], size: int) -> None:
        self._full: SimpleQueue[memoryview | BaseException | None] = SimpleQueue()
        self._empty: SimpleQueue[memoryview | None] = SimpleQueue()
        self._stopped = False
        self._used = 0
        self._fill = fill
        self._view: memoryview | None = None
        for _ in range(BUFFERS):
            self._empty.put(memoryview(bytearray(size)))
        self._thread = threading.Thread(target=self._work, name="zip", daemon=True)
        self._thread.start()

    # ---- for who sends

    def next(self, check: Callable[[], None]) -> memoryview | None:
        """Return the next piece to send, None at the end; raise the thread's error if it failed."""
        while True:
            check()
            with suppress(Empty):
                found = self._full.get(timeout=WAIT_S)
                if isinstance(found, BaseException):
                    raise found
                return found

    def give_back(self, piece: memoryview) -> None:
        """Take back the buffer of a piece that was sent."""
        self._empty.put(memoryview(piece.obj))

    def stop(self) -> None:
        self._stopped = True
        self._empty.put(None)
        self._thread.join()

    # ---- for who fills

    def ask(self) -> None:
        if self._stopped:
            raise _Stopped

    @property
    def free(self) -> memoryview:
        """Return the free rest of the current buffer, which is never empty."""
        if self._view is None:
            self._view, self._used = self._empty.get(), 0
        if self._view is None:
            raise _Stopped
        return self._view[self._used :]

    def make_room(self, count: int) -> None:
        if len(self.free) < count:
            self.flush()

    def put(self, data: bytes) -> None:
        self.free[: len(data)] = data
        self.skip(len(data))

    def skip(self, count: int) -> None:
        self._used += count

    def flush(self) -> None:
        if self._view is not None and self._used:
            self._full.put(self._view[: self._used])
            self._view = None

    def _work(self) -> None:
        try:
            self._fill(self)
            self.flush()
        except _Stopped:
            return
        except BaseException as exc:  # raised where it is sent
            self._full.put(exc)
        else:
            self._full.put(None)


class _Sums:
    """The CRC-32 of files, computed by a thread that stays at most `AHEAD_BYTES` ahead of the reader."""

    def __init__(self, plan: Plan, parts: Sequence[_Part]) -> None:
        self._plan = plan
        self._todo = deque(parts)
        self._known: dict[str, int | BaseException] = {}
        self._ahead = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="crc-32", daemon=True)
        self._thread.start()

    def wait_for(self, part: _Part, check: Callable[[], None]) -> int:
        """Return a file's CRC-32 as soon as it is known; raise the error if it can't be computed."""
        with self._changed:
            while part.item.path not in self._known:
                check()
                self._changed.wait(WAIT_S)
            found = self._known[part.item.path]
        if isinstance(found, BaseException):
            raise found
        return found

    def forget(self, part: _Part) -> None:
        """Drop a file that was sent, so that the thread may go on to another."""
        with self._changed:
            self._ahead -= part.size
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        while self._todo:
            part = self._todo.popleft()
            with self._changed:
                # A file larger than the limit goes alone.
                while not self._stopped and self._ahead and self._ahead + part.size > AHEAD_BYTES:
                    self._changed.wait()
                if self._stopped:
                    return
                self._ahead += part.size
            try:
                found: int | BaseException = self._sum(part, buffer)
            except BaseException as exc:  # raised in the thread that waits for it
                found = exc
            with self._changed:
                self._known[part.item.path] = found
                self._changed.notify_all()

    def _sum(self, part: _Part, buffer: memoryview) -> int:
        crc = done = 0
        with self._plan.open(part.item) as fd:
            while done < part.size and not self._stopped:
                data = buffer[: part.size - done]
                part.read(fd, data, done)
                crc = crc32(data, crc)
                done += len(data)
            self._plan.check(part.item, fd)
        return crc


def _read(fd: int, into: memoryview, offset: int, item: Item) -> None:
    """Fill a buffer from an open file.

    Raises:
        Rejected: the file has become shorter, or can't be read.
    """
    done = 0
    while done < len(into):
        try:
            count = os.preadv(fd, [into[done:]], offset + done)
        except OSError as exc:
            raise Rejected(f"can't be read: {exc.strerror}", item=item.shown) from exc
        if count == 0:
            raise Rejected(CHANGED, item=item.shown)
        done += count
