"""Large objects, sent in parts ("Multipart upload overview", Amazon S3 user guide).

The store keeps the parts of an upload until it is completed or aborted, even if nobody remembers it. `stale` finds such
uploads when the same object is sent again, and `resume` continues one whose parts are the file's.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from protocols.s3.checksums import ALGORITHMS, MD5, Mismatch, Support, encoded
from protocols.s3.error import StoreError
from protocols.s3.store import Payload, Store

MIB = 1 << 20
MAX_PARTS = 10_000  # S3's limit
# What boto3 calls the fields that an object's head may have.
PARAMETERS = {
    "content-type": "ContentType",
    "x-amz-server-side-encryption": "ServerSideEncryption",
    "x-amz-server-side-encryption-aws-kms-key-id": "SSEKMSKeyId",
    "x-amz-storage-class": "StorageClass",
}
META = "x-amz-meta-"


class Gone(Exception):
    """The store doesn't know the upload: it was completed, or somebody aborted it."""


class Form(StrEnum):
    """The kind of checksum that an upload in parts has."""

    FULL = "FULL_OBJECT"
    COMPOSITE = "COMPOSITE"  # of the parts' checksums
    PLAIN = "PLAIN"  # none that S3 names; the parts may have theirs


def part_size(size: int, wanted: int) -> int:
    """Return the size of a part in bytes: as wanted, or whole MiB so that a large object has at most 10,000 parts."""
    least = -(-size // MAX_PARTS)
    return wanted if least <= wanted else -(-least // MIB) * MIB


@dataclass(frozen=True)
class UploadPart:
    """A part that the store has."""

    etag: str
    digest: bytes | None


class Upload:
    """The upload of one object in parts; `put` may be called from several threads.

    Args:
        headers: header fields of the object.
        support: which checksum is sent along.
    """

    def __init__(self, store: Store, key: str, headers: Mapping[str, str], support: Support, form: Form) -> None:
        self.store, self.key, self.headers, self.support, self.form = store, key, headers, support, form
        self.id = ""
        self.made = False  # whether the store has made the object
        self.version: str | None = None  # of it, if the bucket keeps versions
        self.parts: dict[int, UploadPart] = {}
        self._lock = threading.Lock()

    def create(self) -> None:
        """Begin the upload; raises as `Store.call`."""
        parameters: dict[str, Any] = {PARAMETERS[name]: v for name, v in self.headers.items() if name in PARAMETERS}
        parameters["Metadata"] = {n.removeprefix(META): v for n, v in self.headers.items() if n.startswith(META)}
        if self.form is not Form.PLAIN and self.support.algorithm:
            parameters |= {"ChecksumAlgorithm": self.support.algorithm.name.upper(), "ChecksumType": self.form.value}
        self.id = str(self.store.call("create_multipart_upload", Key=self.key, **parameters)["UploadId"])

    def put(self, number: int, payload: Payload) -> None:
        """Send a part, counted from 1.

        Raises:
            Mismatch: the store got something else. Gone: it doesn't know the upload. Or as `Store.call`.
        """
        algorithm = self.support.algorithm
        digest = algorithm.of(payload.data) if algorithm else None
        headers = self.support.header(digest) if algorithm is MD5 or self.form is not Form.PLAIN else {}
        # A part that has no checksum is signed, over TLS too: most stores compare that.
        signed = None if headers else hashlib.sha256(payload.data).hexdigest()
        try:
            query = {"partNumber": str(number), "uploadId": self.id}
            reported = self.store.put(self.key, payload, headers, signed, query, tries=2)
        except StoreError as exc:
            if exc.code == "NoSuchUpload":
                raise Gone from exc
            raise
        self.support.compare(digest, reported)
        with self._lock:
            self.parts[number] = UploadPart(reported.get("ETag", ""), digest)

    def complete(self, size: int, whole: bytes | None) -> str | None:
        """Make the object from its parts; return its checksum as the store will report it, if that is known.

        Args:
            whole: the checksum of all bytes, for `Form.FULL`.

        Raises:
            Mismatch, Gone, or as `Store.call`.
        """
        algorithm = self.support.algorithm
        numbers = sorted(self.parts)
        member = f"Checksum{algorithm.name.upper()}" if algorithm and self.form is not Form.PLAIN else ""
        rows = []
        for number in numbers:
            part = self.parts[number]
            row: dict[str, Any] = {"PartNumber": number, "ETag": part.etag}
            if member and part.digest:
                row[member] = encoded(part.digest)
            rows.append(row)
        parameters: dict[str, Any] = {}
        expected = None
        if algorithm and self.form is Form.FULL and whole is not None:
            expected = encoded(whole)
            parameters = {member: expected, "ChecksumType": self.form.value, "MpuObjectSize": size}
        elif algorithm and (self.form is Form.COMPOSITE or (algorithm is MD5 and self.support.reports)):
            expected = algorithm.composite(part.digest or b"" for part in map(self.parts.__getitem__, numbers))
        try:
            answer = self.store.call(
                "complete_multipart_upload",
                Key=self.key, UploadId=self.id, MultipartUpload={"Parts": rows}, **parameters,
            )  # fmt: skip
        except StoreError as exc:
            if exc.code == "NoSuchUpload":
                raise Gone from exc
            raise
        self.made, self.version = True, answer.get("VersionId")
        reported = answer.get(member) if member else None
        if expected and reported and reported != expected:
            raise Mismatch(f"{algorithm.name if algorithm else ''} of the whole is {reported}, not {expected}")
        return expected

    def abort(self) -> None:
        """Abort the upload, so that the store deletes its parts; an unknown upload is not an error."""
        if not self.id or self.made:
            return
        try:
            self.store.call("abort_multipart_upload", Key=self.key, UploadId=self.id)
        except StoreError as exc:
            if exc.status != 404:
                raise

    def resume(self, found: str, sizes: list[int], read: Callable[[int], memoryview]) -> bool:
        """Continue an upload that the store has; return False if its parts are not the file's.

        Args:
            found: its id.
            sizes: bytes of each part.
            read: returns the bytes of a part, counted from 1.
        """
        listed: list[dict[str, Any]] = []
        for page in self.store.pages(
            "list_parts", {"PartNumberMarker": "NextPartNumberMarker"}, Key=self.key, UploadId=found
        ):
            mine = self.support.algorithm.name.upper() if self.support.algorithm else ""
            theirs = (page.get("ChecksumAlgorithm") or mine, page.get("ChecksumType") or self.form.value)
            if self.form is not Form.PLAIN and theirs != (mine, self.form.value):
                return False
            listed += page.get("Parts", ())
        for row in listed:
            number = int(row["PartNumber"])
            if not 1 <= number <= len(sizes) or int(row.get("Size", -1)) != sizes[number - 1]:
                return False
            data = read(number)
            same = _same(row, data)
            if same is False:
                return False
            if same:
                algorithm = self.support.algorithm
                self.parts[number] = UploadPart(str(row["ETag"]), algorithm.of(data) if algorithm else None)
        self.id = found if self.parts else ""
        return bool(self.parts)


def _same(row: Mapping[str, Any], data: memoryview) -> bool | None:
    """Compare a part at the store with our bytes; None if the store gives nothing to compare with."""
    for name, algorithm in ALGORITHMS.items():
        if algorithm is MD5:
            reported = MD5.reported({"etag": str(row.get("ETag", "")).lower()})
        else:
            reported = row.get(f"Checksum{name.upper()}")
        if reported:
            same = bool(reported == encoded(algorithm.of(data)))
            return same or (None if algorithm is MD5 else False)  # KMS makes ETags that are no MD5
    return None


def stale(store: Store, prefix: str) -> dict[str, list[str]]:
    """Return the ids of unfinished uploads by key, newest last, for all keys with this prefix.

    Empty for a store that can't list them.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        for page in store.pages(
            "list_multipart_uploads", {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
            Prefix=prefix,
        ):  # fmt: skip
            for row in page.get("Uploads", ()):
                found.setdefault(row["Key"], []).append((str(row.get("Initiated", "")), row["UploadId"]))
    except StoreError as exc:
        if exc.busy or exc.status not in (403, 404, 405, 501):
            raise
    return {key: [upload for _, upload in sorted(rows)] for key, rows in found.items()}
