"""One large file on its way to a bucket: hashed, sent in parts, put together."""

from __future__ import annotations

import hashlib
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from typing import Protocol

from blocks.s3 import S3Target
from protocols.s3.checksums import Mismatch
from protocols.s3.store import Payload, Store
from protocols.s3.upload import Gone, Upload, part_size
from tasks.s3.errors import errors
from tasks.s3.support import Supports
from tasks.s3.verify import Sums
from transfer.errors import DispatchError, Permanent, Rejected
from transfer.plan import Item, Plan

HASHED_BYTES = 4 << 20  # read at once to be hashed, between two looks at the cancel flag


class PartsPush(Protocol):
    """What a large file needs of the push that it is part of."""

    target: S3Target
    plan: Plan
    store: Store
    supports: Supports
    pool: ThreadPoolExecutor
    uploads: set[Upload]
    unfinished: dict[str, list[str]]

    def check(self) -> None: ...

    def read(self, item: Item, fd: int, start: int, size: int) -> memoryview: ...

    def headers(self, item: Item, sha256: str) -> dict[str, str]: ...

    def payload(self, data: memoryview) -> Payload: ...

    def forget(self, key: str, upload_id: str) -> None: ...


class Large:
    """One file that is larger than a part.

    Args:
        fd: open, for as long as it takes.
    """

    def __init__(self, push: PartsPush, item: Item, key: str, fd: int) -> None:
        self.push, self.item, self.key, self.fd = push, item, key, fd
        self.size = part_size(item.size, push.target.multipart_bytes)
        self.sizes = [min(self.size, item.size - start) for start in range(0, item.size, self.size)]
        self.sha256 = ""
        self.whole: bytes | None = None

    def hash(self) -> Sums:
        """Read the file once for what must be known before its first byte is sent: SHA-256 and CRC of the whole."""
        sha256 = hashlib.sha256()
        algorithm = self.push.supports.support.algorithm
        whole = algorithm.new() if algorithm and algorithm.whole else None
        for start in range(0, self.item.size, HASHED_BYTES):
            self.push.check()
            data = self.push.read(self.item, self.fd, start, min(HASHED_BYTES, self.item.size - start))
            sha256.update(data)
            if whole:
                whole.update(data)
        self.sha256 = sha256.hexdigest()
        self.whole = whole.digest() if whole else None
        return Sums.of(self.sha256, self.whole)

    def send(self) -> Sums:
        """Send the file, continuing what an earlier attempt has left.

        Raises:
            Rejected: the file has changed, or the store gets other bytes each time.
        """
        for last in (False, True):
            upload = self._begun()
            self.push.uploads.add(upload)
            try:
                reported = self._sent(upload)
            except (Permanent, Mismatch) as exc:
                # Whoever may not complete an upload may not be allowed to abort it either.
                with nullcontext() if isinstance(exc, Rejected | Mismatch) else suppress(DispatchError):
                    self._undo(upload)
                if isinstance(exc, Permanent):
                    raise
                if last:
                    raise Rejected(f"the store got other bytes than were sent: {exc}", item=self.item.shown) from exc
            else:
                self.push.uploads.discard(upload)
                return Sums(self.sha256, reported)
        raise AssertionError("the last try returns or raises")

    def _begun(self) -> Upload:
        push = self.push
        headers = push.headers(self.item, self.sha256)
        for found in reversed(push.unfinished.pop(self.key, [])):
            upload = Upload(push.store, self.key, headers, push.supports.support, push.supports.form)
            with errors(push.store.where):
                if upload.resume(found, self.sizes, self._part):
                    return upload
                push.forget(self.key, found)
        upload = Upload(push.store, self.key, headers, push.supports.support, push.supports.form)
        with errors(push.store.where, self.item.shown):
            upload.create()
        return upload

    def _part(self, number: int) -> memoryview:
        self.push.check()
        data = self.push.read(self.item, self.fd, (number - 1) * self.size, self.sizes[number - 1])
        self.push.plan.check(self.item, self.fd)
        return data

    def _sent(self, upload: Upload) -> str | None:
        """Send the parts that are missing, and put all of them together."""
        push = self.push
        resumed = bool(upload.parts)
        missing = [number for number in range(1, len(self.sizes) + 1) if number not in upload.parts]
        futures: list[Future[None]] = [push.pool.submit(self._send_part, upload, number) for number in missing]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        wait(futures)  # they read from our file
        for future in done:
            future.result()
        push.check()
        push.plan.check(self.item, self.fd)
        with errors(push.store.where, self.item.shown):
            try:
                reported = upload.complete(self.item.size, self.whole)
            except Gone:
                # It had been completed, and the answer was lost; or somebody took it away.
                stored = push.store.head(self.key)
                if stored is None or (stored.size, stored.sha256) != (self.item.size, self.sha256):
                    raise
                return None
            # The head of a resumed upload was fixed by the earlier attempt; and not every store counts.
            stored = push.store.head(self.key) if resumed or reported is None else None
        if stored and stored.size != self.item.size:
            raise Mismatch(f"it made {stored.size} bytes of {self.item.size}")
        if stored and resumed and stored.sha256 != self.sha256:
            raise Mismatch("the parts of an earlier attempt are of another file")
        return reported

    def _send_part(self, upload: Upload, number: int) -> None:
        data = self._part(number)
        for last in (False, True):
            try:
                with errors(self.push.store.where, self.item.shown):
                    upload.put(number, self.push.payload(data))
            except Mismatch:
                if last:
                    raise
            else:
                return

    def _undo(self, upload: Upload) -> None:
        """Remove everything of a failed upload: its parts, and an object that is not the file."""
        with errors(self.push.store.where):
            if upload.made:
                self.push.store.delete(self.key, upload.version)
            upload.abort()
        self.push.uploads.discard(upload)
