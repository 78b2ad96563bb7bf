"""Finds out what a store does with checksums, with small objects that are written, read back and removed.

Only a wrong checksum shows whether a store compares it, and whether the store computes the one that it gives or repeats
what it was sent. What was written is read back each time, so a store that gives back other bytes is found before
anybody's data goes there.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from protocols.http.head import Fields
from protocols.s3.checksums import CRC32, CRC64NVME, MD5, Algorithm, Mismatch, Support, encoded
from protocols.s3.error import StoreError
from protocols.s3.keys import under
from protocols.s3.store import Payload, Store
from protocols.s3.upload import Form, Gone, Upload
from transfer.errors import DispatchError

NAME = ".talaria-probe-"
# Bytes that no conversion of text or compression leaves alone; the same in every run.
SAMPLE = random.Random(5).randbytes(4096) + b"\r\n\x1a\n\0" * 3  # noqa: S311
MODE = {"x-amz-checksum-mode": "ENABLED"}
AUTOMATIC = (CRC64NVME, CRC32, MD5)  # in order of preference: fast first; MD5 is all that older stores know
NOT_SUPPORTED = frozenset((400, 404, 405, 411, 412, 415, 501))  # what stores answer to what they don't know
READ_BYTES = 1 << 20  # of a probe that comes back
AGAIN_S = 0.5  # before what was not there is read a second time
REMOVE_S = 3.0  # for taking probes away, though the dispatch was cancelled
TRAILING = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"


class Corrupts(Exception):
    """The store gives back other bytes than were written."""


class Prober:
    """Writes, reads and removes probes below a prefix.

    Args:
        headers: header fields of every object, such as its encryption.
    """

    def __init__(self, store: Store, prefix: str, headers: Mapping[str, str]) -> None:
        self.store, self.headers = store, headers
        self.key = under(prefix, NAME + uuid.uuid4().hex[:12])
        self.read_back = self.removed = True
        self._versions: dict[str | None, None] = {}

    def checksums(self, candidates: Iterable[Algorithm] = AUTOMATIC) -> Support:
        """Return the first algorithm that the store compares, else the first that it computes, else none.

        Raises:
            Corrupts: what comes back is not what was written.
            StoreError: writing is refused altogether. DispatchError: no answer.
        """
        best = Support()
        try:
            for algorithm in candidates:
                found = self._try(algorithm)
                if found.verifies or (found.reports and not best.reports):
                    best = found
                if found.verifies:
                    break
            if not self._versions:  # nothing was taken: with checksums, or at all?
                self.write({})
                self.compare()
        finally:
            self.remove()
        return Support(best.algorithm, best.verifies, best.reports, self.read_back, self.removed)

    def locked(self, candidates: Iterable[Algorithm] = AUTOMATIC) -> Support:
        """Write one probe, with a checksum, into a bucket that keeps it (Object Lock), so that it can't be removed.

        Such a store demands a checksum with each object and compares it, so no wrong one is tried.

        Raises:
            as `checksums`.
        """
        for algorithm in candidates:
            right = algorithm.of(memoryview(SAMPLE))
            if not self._refused(lambda: self.write(algorithm.header(right))):  # noqa: B023
                reported = self.compare()
                self.remove()
                reports = reported is not None and algorithm.reported(reported) == encoded(right)
                return Support(algorithm, True, reports, self.read_back, self.removed)
        self.write({})  # raises what the store has against it
        self.compare()
        self.remove()
        return Support(None, False, False, self.read_back, self.removed)

    def _try(self, algorithm: Algorithm) -> Support:
        right = algorithm.of(memoryview(SAMPLE))
        wrong = algorithm.of(memoryview(SAMPLE[1:]))
        if self._refused(lambda: self.write(algorithm.header(right))):
            return Support()
        reported = self.compare()
        verifies = self._refused(lambda: self.write(algorithm.header(wrong)))
        if not verifies:  # a right one in the answer is then of the store's own making
            reported = self.compare()
        return Support(algorithm, verifies, reported is not None and algorithm.reported(reported) == encoded(right))

    @staticmethod
    def _refused(write: Callable[[], object]) -> bool:
        try:
            write()
        except StoreError as exc:
            if exc.busy or exc.status not in NOT_SUPPORTED:
                raise
            return True
        return False

    def parts(self, support: Support) -> Form:
        """Return how the store takes the checksum of an object in parts; raises as `checksums`."""
        algorithm = support.algorithm
        forms = [Form.PLAIN]
        if algorithm and algorithm is not MD5:
            forms = [*([Form.FULL] if algorithm.whole else []), Form.COMPOSITE, Form.PLAIN]
        try:
            for form in forms:
                upload = Upload(self.store, self.key, self.headers, support, form)
                try:
                    upload.create()
                    upload.put(1, Payload(memoryview(SAMPLE)))
                    upload.complete(len(SAMPLE), algorithm.of(memoryview(SAMPLE)) if algorithm else None)
                except (StoreError, Mismatch, Gone) as exc:
                    with suppress(StoreError):
                        upload.abort()
                    if form is Form.PLAIN or (isinstance(exc, StoreError) and exc.status not in NOT_SUPPORTED):
                        raise
                else:
                    self._versions[upload.version] = None
                    self.compare()
                    return form
        finally:
            self.remove()
        raise AssertionError("the last form is returned or raises")

    def trailing(self) -> str:
        """Return what the store does with checksums that follow the data, as boto3 and others send them over TLS."""
        digest = encoded(CRC32.of(memoryview(SAMPLE)))
        field = CRC32.field
        body = b"%x\r\n%b\r\n0\r\n%b:%b\r\n\r\n" % (len(SAMPLE), SAMPLE, field.encode(), digest.encode())
        headers = {
            "content-encoding": "aws-chunked",
            "x-amz-decoded-content-length": str(len(SAMPLE)),
            "x-amz-trailer": field,
        }
        try:
            self.write(headers, body, TRAILING)
            self.compare()
        except StoreError as exc:
            if exc.busy or exc.status not in NOT_SUPPORTED:
                raise
            return f"refused: {exc}"
        except Corrupts as exc:
            return f"spoil the object: {exc}"
        finally:
            self.remove()
        return "taken"

    def write(self, headers: Mapping[str, str], body: bytes = SAMPLE, sha256: str | None = None) -> None:
        """Write the probe; raises as `Store.put`."""
        reported = self.store.put(self.key, Payload(memoryview(body)), {**self.headers, **headers}, sha256)
        self._versions[reported.get("x-amz-version-id")] = None

    def compare(self) -> Fields | None:
        """Read the probe back; return the head of the answer, None if reading is not allowed.

        Raises:
            Corrupts: it is not what was written.
        """
        try:
            return self._compare()
        except Corrupts:  # some stores answer before they have written
            time.sleep(AGAIN_S)
            return self._compare()

    def _compare(self) -> Fields | None:
        data = bytearray()
        try:
            with self.store.get(self.key, MODE) as answer:
                for piece in answer.chunks():
                    data += piece
                    if len(data) > READ_BYTES:
                        break
        except StoreError as exc:
            if exc.status == 403:
                self.read_back = False
                return None
            if exc.status == 404:
                raise Corrupts("what was written is not there") from exc
            raise
        if data != SAMPLE:
            raise Corrupts(f"{len(SAMPLE)} bytes were written, and {len(data)} different bytes came back")
        return answer.headers

    def remove(self) -> None:
        """Remove every version of all that was written; `removed` says whether nothing is left.

        What must stay gets a delete marker, so that it doesn't appear in lists of the bucket.
        """
        versions, self._versions = self._versions, {}
        try:
            with self.store.grace(REMOVE_S):
                for version in versions:
                    self.store.delete(self.key, version)
        except (StoreError, DispatchError):
            self.removed = False
            with suppress(StoreError, DispatchError), self.store.grace(REMOVE_S):
                self.store.delete(self.key)
