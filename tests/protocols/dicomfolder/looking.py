"""Looks at a folder, as other processes take them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from imaging.query import Query
from protocols.dicomfolder.folder import DicomFolder, IndexReport
from talaria.testing import studies
from transfer.beneath import open_beneath


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Record every regular file that is opened below the folder: that is how headers are read."""
    seen: list[str] = []

    def recording(folder: int, path: str, *args: Any) -> int:
        fd = open_beneath(folder, path, *args)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            seen.append(os.readlink(f"/proc/self/fd/{fd}"))
        return fd

    with mock.patch("protocols.files.tree.open_beneath", recording):
        yield seen


def look(root: Path, state: Path | None = None) -> IndexReport:
    """Open a folder as another process would, and look at it once."""
    with DicomFolder(root, state) as folder:
        return folder.refresh()


def names(root: Path, **keys: Any) -> list[str]:
    with DicomFolder(root) as folder:
        return sorted(str(match.attributes["PatientName"]) for match in folder.find(Query(**keys)))


def series(root: Path, count: int, **changes: Any) -> list[Path]:
    """Write instances of one series."""
    study, uid = studies.uid(), studies.uid()
    return [studies.dicom(root / f"{number}.dcm", study=study, series=uid, **changes) for number in range(count)]
