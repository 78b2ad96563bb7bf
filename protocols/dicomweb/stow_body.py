"""Batches of instances, and their bodies as multipart/related that stream from disk (RFC 2387, PS3.18 8.7.1)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from imaging.part10 import beginning
from transfer.errors import Rejected
from transfer.plan import Item, Plan

SHARE_BYTES = 1 << 20  # batches are not made smaller than this only to keep all connections busy
SHARE_ITEMS = 10
PART_HEAD = b"Content-Type: application/dicom\r\n\r\n"
BOUNDARY_CHARS = 40
PART_BYTES = len(PART_HEAD) + BOUNDARY_CHARS + 8  # around each instance: two dashes, three line breaks


@dataclass(frozen=True)
class Batch:
    """Instances that are sent in one request.

    Attributes:
        last: whether its only instance was sent before, so that there is no further try in this push.
        soon: whether it is sent next nevertheless, to find out what is wrong.
    """

    items: tuple[Item, ...]
    last: bool = False
    soon: bool = False

    def alone(self) -> list[Batch]:
        """Return each instance in a batch of its own, to be sent for the last time."""
        return [Batch((item,), last=True) for item in self.items]

    def halves(self) -> list[Batch]:
        """Return the same instances in two batches."""
        middle = (len(self.items) + 1) // 2
        return [Batch(half) for half in (self.items[:middle], self.items[middle:]) if half]


def batches(items: Iterable[Item], batch_bytes: int, batch_items: int, concurrency: int) -> Iterator[Batch]:
    """Split instances, in order, so that no request is larger than allowed and every connection gets some.

    An instance larger than `batch_bytes` is sent alone; two with the same UID are never sent together, because no
    answer could show which of them it means.
    """
    items = list(items)
    whole = sum(item.size + PART_BYTES for item in items)
    most_bytes = min(batch_bytes, max(SHARE_BYTES, -(-whole // concurrency)))
    most_items = min(batch_items, max(SHARE_ITEMS, -(-len(items) // concurrency)))
    batch: dict[str, Item] = {}
    size = PART_BYTES  # of the closing boundary
    for item in items:
        uid = uid_of(item)
        if batch and (len(batch) >= most_items or size + item.size + PART_BYTES > most_bytes or uid in batch):
            yield Batch(tuple(batch.values()))
            batch, size = {}, PART_BYTES
        batch[uid] = item
        size += item.size + PART_BYTES
    if batch:
        yield Batch(tuple(batch.values()))


def uid_of(item: Item) -> str:
    """Return the instance's UID; only plans of DICOM files get here."""
    return item.header.SOPInstanceUID if item.header else item.path


class StowBody:
    """A batch as multipart/related: read from disk while it is sent, with a length that is known before.

    Attributes:
        current: the instance that is being read. out: bytes that were sent.
    """

    def __init__(
        self,
        items: tuple[Item, ...],
        plan: Plan,
        buffer: bytearray,
        piece: int,
        pace: Callable[[int], None],
        moved: Callable[[int], None],
    ) -> None:
        self.items, self.current = items, items[0]
        self.boundary = secrets.token_hex(BOUNDARY_CHARS // 2)
        self.out = 0
        self._plan, self._view, self._fill = plan, memoryview(buffer), 0
        self._piece, self._pace, self._moved = piece, pace, moved
        self._head = f"--{self.boundary}\r\n".encode() + PART_HEAD
        self._closing = f"--{self.boundary}--\r\n".encode()
        # What files lack that begin with their data set goes out before that.
        self._starts = [beginning(item.header) if item.header else (b"", 0) for item in items]
        self._ends = []  # bytes of the body up to the end of each instance
        end = 0
        for item, (start, offset) in zip(items, self._starts, strict=True):
            end += len(self._head) + len(start) + item.size - offset + 2
            self._ends.append(end)

    @property
    def length(self) -> int:
        return self._ends[-1] + len(self._closing)

    @property
    def whole(self) -> int:
        """How many instances have been sent whole."""
        return sum(end <= self.out for end in self._ends)

    def sent(self, count: int) -> None:
        self.out += count
        self._moved(count)

    def __iter__(self) -> Iterator[memoryview]:
        """Read the files; the last piece of each is sent only after the file was found unchanged.

        Raises:
            Rejected: `current` is not the file that was planned.
        """
        self.out = self._fill = 0
        frame = self._head
        for item, (start, at) in zip(self.items, self._starts, strict=True):
            self.current = item
            yield from self._put(frame + start)
            with self._plan.open(item) as fd:
                while at < item.size:
                    if self._fill == len(self._view):
                        yield from self._flush()
                    room = self._view[self._fill : self._fill + item.size - at]
                    try:
                        count = os.preadv(fd, [room], at)
                    except OSError as exc:  # a broken disk, a share that is gone
                        raise Rejected(f"can't be read: {exc.strerror}", item=item.shown) from exc
                    if count == 0:
                        break  # shorter than planned: the check says so
                    at += count
                    self._fill += count
                self._plan.check(item, fd)
            frame = b"\r\n" + self._head
        yield from self._put(b"\r\n" + self._closing)
        yield from self._flush()

    def _put(self, frame: bytes) -> Iterator[memoryview]:
        if self._fill + len(frame) > len(self._view):
            yield from self._flush()
        self._view[self._fill : self._fill + len(frame)] = frame
        self._fill += len(frame)

    def _flush(self) -> Iterator[memoryview]:
        full = self._view[: self._fill]
        while full:
            piece, full = full[: self._piece], full[self._piece :]
            self._pace(len(piece))
            yield piece
        self._fill = 0
