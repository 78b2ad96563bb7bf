"""Checksums of objects and of their parts, as S3 stores take and give them.

Source: "Checking object integrity for data uploads", Amazon S3 user guide.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from awscrt import checksums as crt  # type: ignore[import-untyped]

_ETAG = re.compile(r'"?([0-9a-f]{32})(-\d+)?"?')


class Mismatch(Exception):
    """The store's checksum of what it received differs from that of what was sent."""


class HeadFields(Protocol):
    """The head of an answer; names of any case."""

    def get(self, name: str, /) -> str | None: ...


class Hash(Protocol):
    """What hashlib's objects do."""

    def update(self, data: memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


class _Crc:
    """A CRC that grows."""

    def __init__(self, step: Callable[[memoryview, int], int], size: int) -> None:
        self._step, self._size, self._value = step, size, 0

    def update(self, data: memoryview, /) -> None:
        self._value = self._step(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._size, "big")


@dataclass(frozen=True)
class Algorithm:
    """A checksum that a store may know.

    Attributes:
        name: as in the target's settings; `md5` is the fallback for stores that know none of the newer ones.
        field: of a request's header that holds it, in lower case.
        whole: whether the checksum of all parts together can be compared, or only that of their checksums.
    """

    name: str
    field: str
    whole: bool
    new: Callable[[], Hash]

    def of(self, data: memoryview) -> bytes:
        """Return the checksum of some bytes."""
        made = self.new()
        made.update(data)
        return made.digest()

    def header(self, digest: bytes) -> dict[str, str]:
        """Return the header field that carries the checksum to a store."""
        return {self.field: encoded(digest)}

    def reported(self, headers: HeadFields) -> str | None:
        """Return an answer's checksum, encoded, with `-<count>` if it is that of the parts' checksums; or None."""
        if self is not MD5:
            return headers.get(self.field)
        form = _ETAG.fullmatch((headers.get("etag") or "").lower())
        return encoded(bytes.fromhex(form[1])) + (form[2] or "") if form else None

    def composite(self, digests: Iterable[bytes]) -> str:
        """Return the checksum of the parts' checksums, encoded as stores report it."""
        parts = list(digests)
        return f"{encoded(self.of(memoryview(b''.join(parts))))}-{len(parts)}"


def encoded(digest: bytes) -> str:
    """Return a checksum as S3 writes it."""
    return base64.b64encode(digest).decode()


CRC64NVME = Algorithm("crc64nvme", "x-amz-checksum-crc64nvme", True, lambda: _Crc(crt.crc64nvme, 8))
CRC32 = Algorithm("crc32", "x-amz-checksum-crc32", True, lambda: _Crc(zlib.crc32, 4))
SHA256 = Algorithm("sha256", "x-amz-checksum-sha256", False, hashlib.sha256)
# Stores report an object's MD5 in its ETag, unless it is encrypted with KMS.
MD5 = Algorithm("md5", "content-md5", False, lambda: hashlib.md5(usedforsecurity=False))
ALGORITHMS = {one.name: one for one in (CRC64NVME, CRC32, SHA256, MD5)}


@dataclass(frozen=True)
class Support:
    """What a store does with checksums.

    Attributes:
        algorithm: the one that is sent with every object, None for none.
        verifies: whether the store was seen to refuse an object whose checksum is wrong.
        reports: whether it gives the checksum of what it holds, computed by itself.
        read_back: whether what was written could be read.
        removed: whether what was written could be removed.
    """

    algorithm: Algorithm | None = None
    verifies: bool = False
    reports: bool = False
    read_back: bool = True
    removed: bool = True

    def header(self, digest: bytes | None) -> dict[str, str]:
        """Return the field to send with an object; none for an MD5 that is not compared, only repeated."""
        if self.algorithm is None or digest is None or (self.algorithm is MD5 and not self.verifies):
            return {}
        return self.algorithm.header(digest)

    def compare(self, digest: bytes | None, headers: HeadFields) -> None:
        """Compare a checksum with the store's, if it gives one.

        Raises:
            Mismatch: the store holds something else.
        """
        if self.algorithm is None or digest is None or (self.algorithm is MD5 and not self.reports):
            return
        reported = self.algorithm.reported(headers)
        if reported and "-" not in reported and reported != encoded(digest):
            raise Mismatch(f"the store's {self.algorithm.name} is {reported}, that of what was sent {encoded(digest)}")

    def __str__(self) -> str:
        if self.algorithm is None:
            return "the store neither compares nor gives checksums"
        does = [word for word, so in (("compares", self.verifies), ("gives", self.reports)) if so]
        return f"the store {' and '.join(does) or 'ignores'} {self.algorithm.name}"
