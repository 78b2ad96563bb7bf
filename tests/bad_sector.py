"""A file of which a part can't be read, as of a disk with a bad sector, or of a share that is gone."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest


def bad_from(monkeypatch: pytest.MonkeyPatch, path: Path, offset: int) -> None:
    """Let every read of this process fail that touches what lies at or behind an offset of a file."""
    bad, pread, preadv = path.stat().st_ino, os.pread, os.preadv

    def look(fd: int, end: int) -> None:
        if end > offset and os.fstat(fd).st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def whole(fd: int, count: int, at: int) -> bytes:
        look(fd, at + count)
        return pread(fd, count, at)

    def scattered(fd: int, buffers: Any, at: int, *flags: int) -> int:
        look(fd, at + sum(len(one) for one in buffers))
        return preadv(fd, buffers, at, *flags)

    monkeypatch.setattr(os, "pread", whole)
    monkeypatch.setattr(os, "preadv", scattered)
