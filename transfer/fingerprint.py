"""Fingerprints of sets of files, to which files can be added, and from which they can be taken, one at a time."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

# What the ledger keeps of a time: from a whole second of the year 1677 to 2262.
FIRST_NS, LAST_NS = -(2**63 // 10**9) * 10**9, 2**63 - 1
_BITS = 128


def modified_ns(info: os.stat_result) -> int:
    """Return when a file was modified, in nanoseconds since the epoch; FIRST_NS for all that was before.

    Shares by SMB whose server keeps no times give their files the year 1601.
    """
    return max(info.st_mtime_ns, FIRST_NS)


@dataclass(slots=True)
class Fingerprint:
    """Stands for a set of files by their paths, sizes and times; their order doesn't matter.

    Attributes:
        files: how many there are.
        newest_ns: when something of them changed last, nanoseconds since the epoch; taking a file leaves it.
        oldest_ns: when the first of those that were added changed last; 0 for none.
    """

    files: int = 0
    total: int = 0
    newest_ns: int = 0
    oldest_ns: int = 0

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """Return what `str` has written."""
        files, _, total = text.partition(":")
        return cls(int(files or 0), int(total or "0", 16))

    def __str__(self) -> str:
        return f"{self.files}:{self.total:x}"

    def add(self, path: str, size: int, mtime_ns: int, ctime_ns: int = 0) -> None:
        """Add a file."""
        self.files += 1
        self.total = (self.total + _mark(path, size, mtime_ns)) % (1 << _BITS)
        changed_ns = ctime_ns or mtime_ns
        self.newest_ns = max(self.newest_ns, changed_ns)
        self.oldest_ns = min(self.oldest_ns or changed_ns, changed_ns)

    def take(self, path: str, size: int, mtime_ns: int) -> None:
        """Take a file away that is one of them."""
        self.files -= 1
        self.total = (self.total - _mark(path, size, mtime_ns)) % (1 << _BITS)


def _mark(path: str, size: int, mtime_ns: int) -> int:
    data = b"%b\0%d\0%d" % (os.fsencode(path), size, max(FIRST_NS, min(mtime_ns, LAST_NS)))
    return int.from_bytes(hashlib.blake2b(data, digest_size=_BITS // 8).digest(), "big")
