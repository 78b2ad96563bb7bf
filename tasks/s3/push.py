"""One push to a bucket.

    <prefix>/<name>/<path>                                the files, several at once, large ones in parts
    <prefix>/<name>/.talaria-manifest-<dispatch id>.json  names, sizes and checksums, after all files
    <prefix>/<name>/.complete                             empty, last

An object is visible whole or not at all, so nothing needs a temporary name. An object that is there already, with the
same size and SHA-256, is not sent again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

from blocks.s3 import S3Target
from imaging.header import BEGINNING_BYTES, other_instance
from protocols.s3.checksums import Mismatch
from protocols.s3.error import StoreError
from protocols.s3.keys import MAX_KEY_BYTES, content_type, keys, under
from protocols.s3.store import LONGEST_PAUSE_S, SHA256_FIELD, TRIES, Payload, SentObject, Store, StoredObject
from protocols.s3.upload import Upload, stale
from tasks.s3.errors import errors, of, only_denied
from tasks.s3.lanes import FOR_NOW, Lanes
from tasks.s3.large import Large
from tasks.s3.pace import useful
from tasks.s3.support import Supports
from tasks.s3.verify import Sums, Verifier
from transfer.content import read_here
from transfer.errors import (
    Busy,
    DispatchError,
    Interrupted,
    Rejected,
    Retryable,
)
from transfer.fanout import each
from transfer.layout import OTHER_INSTANCE
from transfer.outcome import ALREADY, DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import Level, PushReport, Receipt
from transfer.throttle import Throttle

MARKER = ".complete"
MANIFEST = ".talaria-manifest-{}.json"
LARGE_AT_ONCE = 2  # while the parts of one large file are sent, the next one is hashed
ABORT_S = 3.0  # for giving up what is unfinished, though the dispatch was cancelled
_ENCODED = json.JSONEncoder(ensure_ascii=False).encode
REPLACED = Outcome(Kind.WARNING, "replaced another object of this key")


class S3Push:
    """One push; its steps are called in the order in which they stand here.

    Args:
        folders: by path, the folder that the layout gives.
    """

    def __init__(self, target: S3Target, plan: Plan, report: PushReport, store: Store, folders: dict[str, str]) -> None:
        self.target, self.plan, self.report, self.store = target, plan, report, store
        self.folders = folders
        self.keys = keys(target.prefix, folders, (item.path for item in plan.items))
        self.supports = Supports(target, store)
        self.sums: dict[str, Sums] = {}
        self.uploads: set[Upload] = set()  # that are under way
        self.unfinished: dict[str, list[str]] = {}  # uploads of earlier attempts, by key
        self._verifier = Verifier(target.verify, store, self.supports, self.keys, self.sums, self._sums_of, report)
        self._throttle = Throttle(target.bandwidth_limit)
        self._there: dict[str, int] | None = {}  # size by key; None if the bucket may not be listed
        self._written: set[str] = set()  # folders that something was put into
        self._notes: list[str] = []
        self._lanes = Lanes(report, target.concurrency)
        self._lock = threading.Lock()
        self._local = threading.local()

    def run(self) -> Receipt:
        with errors(self.store.where):
            self.store.locate()
            self._look()
        self._send(self.plan.pending)
        if self.target.verify is not Level.ACCEPTED:
            self._each(filter(self._arrived, self.plan.items), self._verifier.verify)
        self._finish()
        notes = (*self.supports.notes, *self._notes, *self._verifier.notes)
        return self.report.receipt(self.target.name, self.plan, self._verifier.level, notes)

    def give_up(self, why: BaseException) -> None:
        """Abort the uploads under way, unless the next attempt can go on with them."""
        if isinstance(why, Retryable):
            return
        with suppress(DispatchError, StoreError), self.store.grace(ABORT_S):
            for upload in tuple(self.uploads):
                upload.abort()

    # ---- what is there

    def _look(self) -> None:
        """List what is there, and the unfinished uploads of earlier attempts."""
        for folder in sorted(set(self.folders.values())):
            try:
                for page in self.store.pages(
                    "list_objects_v2", {"ContinuationToken": "NextContinuationToken"}, Prefix=self._key(folder, "")
                ):
                    for row in page.get("Contents", ()):
                        if self._there is not None:
                            self._there[row["Key"]] = int(row["Size"])
            except StoreError as exc:
                if not only_denied(exc):
                    raise
                self._there = None  # a key that may only write is a sensible one: each object is asked for by name
        large = {self.folders[item.path] for item in self.plan.pending if self._is_large(item)}
        for folder in large:
            self.unfinished |= stale(self.store, self._key(folder, ""))

    def _key(self, folder: str, name: str) -> str:
        return under(self.target.prefix, folder) + f"/{name}"

    def _is_large(self, item: Item) -> bool:
        return item.size > self.target.multipart_bytes

    def _stored(self, key: str, size: int | None = None) -> StoredObject | None:
        """Return what the store says about an object; None if it isn't there with this size."""
        if self._there is not None and (key not in self._there or size not in (None, self._there[key])):
            return None
        try:
            return self.store.head(key)
        except StoreError as exc:
            if only_denied(exc):  # what isn't there is denied, too, if the bucket may not be listed
                return None
            raise of(exc, self.store.where) from exc

    def _is_there(self, item: Item, sha256: str) -> bool:
        """Report ALREADY if the item is there with the same size and SHA-256; return whether it was."""
        stored = self._stored(self.keys[item.path], item.size)
        if stored is None or stored.size != item.size or stored.sha256 != sha256:
            return False
        self.report(item, ALREADY)
        return True

    def _spare(self, item: Item, ours: bytes) -> None:
        """Raise Rejected if another instance has an item's key, because that would be lost."""
        key = self.keys[item.path]
        if self._there is None or not self._there.get(key):
            return
        theirs = b""
        try:
            with self.store.get(key, {"range": f"bytes=0-{BEGINNING_BYTES - 1}"}) as answer:
                for piece in answer.chunks():
                    theirs += piece
                    if len(theirs) >= BEGINNING_BYTES:
                        break
        except StoreError as exc:
            if not (exc.status == 404 or only_denied(exc)):  # gone, or ours to write but not to read
                raise of(exc, self.store.where) from exc
        if other_instance(ours, theirs):
            raise Rejected(OTHER_INSTANCE, item=item.shown)

    def _unmark(self, item: Item) -> None:
        """Remove a folder's marker before something is put into it: it is no longer complete."""
        folder = self.folders[item.path]
        with self._lock:
            if folder in self._written:
                return
            marker = self._key(folder, MARKER)
            if self._stored(marker) is not None:
                self._remove_marker(marker)
            self._written.add(folder)

    def _remove_marker(self, marker: str) -> None:
        try:
            self.store.delete(marker)
        except StoreError as exc:
            if not only_denied(exc):
                raise of(exc, self.store.where) from exc
            self._notes.append(f"the {MARKER} of an earlier dispatch stayed there all the time: it can't be removed")
        else:
            if self._there is not None:
                self._there.pop(marker, None)

    # ---- several at once

    def check(self) -> None:
        """Raise if this push is to stop, or has failed in another thread."""
        self._lanes.check()

    def _each(self, items: Iterable[Item], work: Callable[[Item], None]) -> None:
        """Call a function with each item, in several threads."""

        def one(item: Item) -> None:
            self.check()
            try:
                work(item)
            except Rejected as exc:
                self.report(item, Outcome(Kind.REJECTED, exc.message))

        each(items, one, self.target.concurrency, "s3-ask")

    def _send_aside(self) -> None:
        """Send again, one by one, what failed for now; raise the first error of those that fail again."""
        failed: list[DispatchError] = []
        for item, error in self._lanes.set_aside():
            wait_s = error.retry_after if isinstance(error, Busy) else 0.0
            if self._is_large(item) or (wait_s or 0) > LONGEST_PAUSE_S:  # the next attempt goes on with its parts
                failed.append(error)
                continue
            self.store.pause(wait_s)
            try:
                if (sending := self._begin_small(item)) is not None:
                    sending.end()
            except Rejected as exc:
                self.report(item, Outcome(Kind.REJECTED, exc.message))
            except FOR_NOW as exc:
                exc.item = exc.item or item.shown
                self.report.put_off[item.path] = exc.message
                failed.append(exc)
        if failed:
            raise failed[0]

    # ---- sending

    def _send(self, items: tuple[Item, ...]) -> None:
        if not items:
            return
        items = tuple(sorted(items, key=lambda item: item.path in self.report.put_off))  # these come last
        small = [item for item in items if not self._is_large(item)]
        large = [item for item in items if self._is_large(item)]
        _ = self.supports.support, large and self.supports.form  # found out before there are threads
        waiting = deque(small)
        with (
            ThreadPoolExecutor(self.target.concurrency, "s3-put") as self.pool,
            ThreadPoolExecutor(LARGE_AT_ONCE, "s3-large") as captains,
            self._lanes.stopping(),
        ):
            futures = [captains.submit(self._lanes.run, self._send_large, deque([item])) for item in large]
            begin, most = self._begin_small, self.target.concurrency
            count = useful(small, most, lambda: self._lanes.run(begin, deque([waiting.popleft()])))
            for _ in range(min(count, len(waiting))):
                futures.append(self.pool.submit(self._lanes.run, begin, waiting, ahead=2 * count <= most))
            wait(futures)
        self._send_aside()
        for item in items:  # uploads that were not resumed
            for left in self.unfinished.pop(self.keys[item.path], ()):
                self.forget(self.keys[item.path], left)

    def _begin_small(self, item: Item) -> _UnansweredFile | None:
        """Send a file that fits into memory; None if it is there already."""
        key = self._checked_key(item)
        local = self._local.__dict__  # the last file's content stays until it has been answered
        local["buffer"], local["spare"] = local.get("spare", bytearray()), local.get("buffer", bytearray())
        with self.plan.open(item) as fd:
            data = self.read(item, fd, 0, item.size)
            self.plan.check(item, fd)
        sha256 = hashlib.sha256(data).hexdigest()
        support = self.supports.support
        digest = support.algorithm.of(data) if support.algorithm else None
        self.sums[item.path] = Sums.of(sha256, digest)
        if self._is_there(item, sha256):
            return None
        self._spare(item, bytes(data[:BEGINNING_BYTES]))
        self._unmark(item)
        headers = self.headers(item, sha256) | support.header(digest)
        with errors(self.store.where, item.shown):
            sent = self.store.begin(key, self.payload(data), headers, sha256)
        return _UnansweredFile(self, item, key, data, headers, sha256, digest, sent)

    def end_small(self, sending: _UnansweredFile) -> None:
        """Read the answer about a file that was sent, and report it."""
        self.put(sending.key, sending.data, sending.headers, sending.sha256, sending.digest, sending.item, sending.sent)
        self._report_arrival(sending.item)

    def _send_large(self, item: Item) -> None:
        key = self._checked_key(item)
        with self.plan.open(item) as fd:
            file = Large(self, item, key, fd)
            self.sums[item.path] = file.hash()
            if self._is_there(item, file.sha256):
                return
            self._spare(item, read_here(fd, BEGINNING_BYTES, 0))
            self._unmark(item)
            self.sums[item.path] = file.send()
        self._report_arrival(item)

    def _checked_key(self, item: Item) -> str:
        key = self.keys[item.path]
        size = len(key.encode())
        if size > MAX_KEY_BYTES:
            raise Rejected(f"its key would have {size} bytes, S3 takes {MAX_KEY_BYTES}", item=item.shown)
        return key

    def headers(self, item: Item, sha256: str) -> dict[str, str]:
        """Return the header fields that an item's object gets."""
        kind = content_type(item.path, item.header is not None)
        return {"content-type": kind, SHA256_FIELD: sha256, **self.supports.headers}

    def put(
        self,
        key: str,
        data: memoryview,
        headers: dict[str, str],
        sha256: str,
        digest: bytes | None,
        item: Item | None,
        sent: SentObject | None = None,
    ) -> None:
        """Put an object from memory; put it a second time if the store got something else.

        Args:
            sent: if it was sent a first time already.

        Raises:
            Rejected: it did so again, or keeps something else, which is then removed.
        """
        support, shown = self.supports.support, item.shown if item else None
        headers |= support.header(digest)
        for last in (False, True):
            try:
                with errors(self.store.where, shown):
                    if sent is not None:
                        reported = sent.fields()
                        break
                    payload = self.payload(data) if item else Payload(data)
                    # An item that the store wants later is put aside, and sent once more.
                    reported = self.store.put(key, payload, headers, sha256, tries=1 if item else TRIES)
                break
            except Mismatch as exc:
                sent = None
                if last:
                    raise Rejected(f"the store got other bytes than were sent: {exc}", item=shown) from exc
        try:
            support.compare(digest, reported)
        except Mismatch as exc:
            with errors(self.store.where):
                self.store.delete(key, reported.get("x-amz-version-id"))
            raise Rejected(f"the store keeps other bytes than were sent: {exc}", item=shown) from exc

    def payload(self, data: memoryview) -> Payload:
        """Return a body that keeps to the bandwidth limit and reports the bytes that were sent."""
        return Payload(data, self._throttle.piece, self._throttle.spend, self.report.moved)

    def read(self, item: Item, fd: int, start: int, size: int) -> memoryview:
        """Read a piece of a file into this thread's buffer; it is valid until the next call."""
        buffer: bytearray = getattr(self._local, "buffer", bytearray())
        if len(buffer) < size:
            buffer = self._local.buffer = bytearray(size)
        view, done = memoryview(buffer)[:size], 0
        while done < size:
            try:
                count = os.preadv(fd, [view[done:]], start + done)
            except OSError as exc:
                raise Rejected(f"can't be read: {exc.strerror}", item=item.shown) from exc
            if count == 0:
                raise Rejected("changed since the dispatch was planned: it has become shorter", item=item.shown)
            done += count
        return view

    def forget(self, key: str, upload_id: str) -> None:
        """Abort an upload that nobody will continue."""
        upload = Upload(self.store, key, {}, self.supports.support, self.supports.form)
        upload.id = upload_id
        with errors(self.store.where):
            upload.abort()

    def _report_arrival(self, item: Item) -> None:
        self._lanes.took()
        replaced = self._there is not None and self.keys[item.path] in self._there
        self.report(item, REPLACED if replaced else DELIVERED)

    # ---- what comes last

    def _arrived(self, item: Item) -> bool:
        return self.report.arrived(self.plan, item)

    def _finish(self) -> None:
        """Put manifests and markers, if every file of the plan is there; a marker goes where one was taken back."""
        self.report.check()
        folders: dict[str, list[Item]] = {}
        for item in self.plan.items:
            folders.setdefault(self.folders[item.path], []).append(item)
        for folder in {self.folders[path] for path in self.report.revoked}:
            if self._stored(marker := self._key(folder, MARKER)) is not None:
                self._remove_marker(marker)
        manifests = [f for f in folders if self._lacks(f, MANIFEST.format(self.plan.dispatch_id))]
        markers = [f for f in folders if self._lacks(f, MARKER)]
        for folder in manifests:
            self._each([item for item in folders[folder] if item.path not in self.sums], self._know)
        if self.plan.lacks or not all(map(self._arrived, self.plan.items)):
            return
        for folder in manifests:
            self._put_manifest(folder, folders[folder])
        for folder in markers:
            self._put(self._key(folder, MARKER), b"", "application/octet-stream")

    def _lacks(self, folder: str, name: str) -> bool:
        return folder in self._written or self._stored(self._key(folder, name)) is None

    def _know(self, item: Item) -> None:
        """Find the SHA-256 of an item that an earlier attempt has sent."""
        if not self._arrived(item):
            return
        stored = self._verifier.stored.get(item.path)
        if stored is None:
            with errors(self.store.where):
                stored = self.store.head(self.keys[item.path])
            if stored is None or stored.size != item.size:
                self.report.revoke(item, "it had been delivered, but the store no longer has it")
                return
        try:
            self.sums[item.path] = Sums(stored.sha256) if stored.sha256 else self._sums_of(item)
        except Rejected as exc:
            self.report.revoke(item, exc.message)

    def _sums_of(self, item: Item) -> Sums:
        with self.plan.open(item) as fd:
            return Large(self, item, self.keys[item.path], fd).hash()

    def _put_manifest(self, folder: str, items: list[Item]) -> None:
        start = len(self._key(folder, ""))
        # A line for each file: json writes what is indented several times as slowly.
        rows = ",\n".join(
            _ENCODED({
                "name": self.keys[item.path][start:],
                "size": item.size,
                "sha256": self.sums[item.path].sha256,
                "content_type": content_type(item.path, item.header is not None),
                **({"sop_instance_uid": item.header.SOPInstanceUID} if item.header else {}),
            })
            for item in items
        )  # fmt: skip
        text = f'{{"dispatch_id": {_ENCODED(self.plan.dispatch_id)}, "files": [\n{rows}\n]}}\n'
        self._put(self._key(folder, MANIFEST.format(self.plan.dispatch_id)), text.encode(), "application/json")

    def _put(self, key: str, content: bytes, kind: str) -> None:
        data = memoryview(content)
        sha256 = hashlib.sha256(data).hexdigest()
        algorithm = self.supports.support.algorithm
        headers = {"content-type": kind, SHA256_FIELD: sha256, **self.supports.headers}
        try:
            self.put(key, data, headers, sha256, algorithm.of(data) if algorithm else None, None)
        except Rejected as exc:
            raise Interrupted(f"{self.store.where}: {exc.message}") from exc


@dataclass(frozen=True, slots=True)
class _UnansweredFile:
    """A file that was sent, and whose answer is still to be read."""

    push: S3Push
    item: Item
    key: str
    data: memoryview
    headers: dict[str, str]
    sha256: str
    digest: bytes | None
    sent: SentObject

    def end(self) -> None:
        self.push.end_small(self)

    def leave(self) -> None:
        self.sent.leave()
