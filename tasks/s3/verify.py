"""Asks a bucket what it has, and proves that it is what was sent."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from protocols.s3.checksums import encoded
from protocols.s3.error import StoreError
from protocols.s3.probe import MODE
from protocols.s3.store import Store, StoredObject
from tasks.s3.errors import CREDENTIALS, errors, of
from tasks.s3.support import Supports
from transfer.errors import DispatchError, Rejected
from transfer.plan import Item
from transfer.receipt import Level, PushReport


@dataclass(frozen=True)
class Sums:
    """The checksums of one file.

    Attributes:
        sha256: hexadecimal.
        reported: what the store says about an object with that content, encoded; None if that is not known.
    """

    sha256: str
    reported: str | None = None

    @classmethod
    def of(cls, sha256: str, digest: bytes | None) -> Sums:
        return cls(sha256, encoded(digest) if digest is not None else None)


class Verifier:
    """Verifies items, several at once, and knows the level that was reached for all of them.

    Args:
        keys: by path.
        sums: of the items that were read, by path.
        local: reads the checksums of an item that was not.
    """

    def __init__(
        self,
        wanted: Level,
        store: Store,
        supports: Supports,
        keys: dict[str, str],
        sums: dict[str, Sums],
        local: Callable[[Item], Sums],
        report: PushReport,
    ) -> None:
        self.level = wanted
        self.stored: dict[str, StoredObject] = {}
        self.notes: list[str] = []
        self._proving = wanted is Level.PROVEN
        self._store, self._supports, self._keys, self._sums = store, supports, keys, sums
        self._local, self._report = local, report
        self._lock = threading.Lock()

    def verify(self, item: Item) -> None:
        """Verify one item that has arrived; revoke it if the store doesn't have it, or has something else."""
        key = self._keys[item.path]
        try:
            stored = self._store.head(key, MODE if self._proving else None)
        except StoreError as exc:
            if exc.status != 403 or exc.code in CREDENTIALS:
                raise of(exc, self._store.where) from exc
            self._lower(Level.ACCEPTED, "the key may not look at what is in the bucket")
            return
        if stored is None:
            self._report.revoke(item, "the store does not have it")
            return
        sums = self._sums.get(item.path)
        if stored.size != item.size:
            self._refuse(item, f"the store has {stored.size} bytes instead of {item.size}")
        elif sums and stored.sha256 not in (None, sums.sha256):
            self._refuse(item, "the store has another object of this key")
        else:
            self.stored[item.path] = stored
            if self._proving:
                self._prove(item, stored)

    def _prove(self, item: Item, stored: StoredObject) -> None:
        try:
            sums = self._sums.get(item.path) or self._local(item)
        except Rejected:
            self._lower(Level.LISTED, "a file that was sent before can't be read again")
            return
        support = self._supports.support
        reported = support.algorithm.reported(stored.headers) if support.algorithm and support.reports else None
        if reported and sums.reported and reported.partition("-")[1:] == sums.reported.partition("-")[1:]:
            if reported != sums.reported:
                self._refuse(item, "the store's checksum is not that of what was sent")
            return
        self._read_back(item, sums)

    def _read_back(self, item: Item, sums: Sums) -> None:
        digest = hashlib.sha256()
        try:
            with errors(self._store.where), self._store.get(self._keys[item.path]) as answer:
                for piece in answer.chunks():
                    digest.update(piece)
        except DispatchError as exc:
            cause = exc.__cause__
            if not isinstance(cause, StoreError) or cause.status != 403 or cause.code in CREDENTIALS:
                raise
            self._lower(Level.LISTED, "the store gives no checksum of its own, and the key may not read")
            return
        self._note("the store gives no checksum of its own for some objects: they were read back and compared")
        if digest.hexdigest() != sums.sha256:
            self._refuse(item, "what the store gives back is not what was sent")

    def _refuse(self, item: Item, why: str) -> None:
        """Revoke an item and remove what the store has in its place, which no reader and no later push must find."""
        self._report.revoke(item, why)
        with suppress(StoreError):
            self._store.delete(self._keys[item.path])

    def _lower(self, level: Level, why: str) -> None:
        with self._lock:
            if list(Level).index(level) < list(Level).index(self.level):
                self.level = level
        self._note(f"verified only as {level}: {why}")

    def _note(self, text: str) -> None:
        with self._lock:
            if text not in self.notes:
                self.notes.append(text)
