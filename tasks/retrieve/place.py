"""Moves a fetched study into a folder of the user's, as `<into>/<accession>/<series>/<instance>.dcm`."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path

from imaging.header import read_header
from protocols.files.filesystem import flush_folder
from transfer.errors import Busy, Misconfigured
from transfer.layout import sanitised
from transfer.oserrors import FULL


def check_place(into: Path) -> None:
    """Raise if studies can't be moved to a folder, or if its name is probably mistyped.

    Raises:
        Misconfigured: neither the folder nor the one above it exists.
    """
    if os.path.lexists(into) and not into.is_dir():
        raise Misconfigured(f"{into} is not a folder")
    if not into.parent.is_dir():
        raise Misconfigured(f"{into}: there is no folder {into.parent} to make it in")


def place(folder: Path, into: Path, name: str) -> int:
    """Move the instances of a folder to their final places; return how many. What is there already is replaced.

    Args:
        name: name of the study's folder: its accession number or its UID.

    Raises:
        Busy: there is no room. Misconfigured: the folder can't be written to.
    """
    count = 0
    changed: dict[Path, None] = {}
    try:
        for path in sorted(folder.glob("*.dcm")):
            with path.open("rb") as file:
                header = read_header(file.fileno(), path.stat().st_size)
            parent = into / sanitised(name) / sanitised(header.SeriesInstanceUID)
            if parent not in changed:
                parent.mkdir(parents=True, exist_ok=True)
                changed |= dict.fromkeys((parent, parent.parent, into))
            _move(path, parent / path.name)
            count += 1
        for one in changed:
            flush_folder(one)
    except OSError as exc:
        kind = Busy if exc.errno in FULL else Misconfigured
        raise kind(f"can't write to {into}: {exc.strerror}") from exc
    return count


def _move(path: Path, final: Path) -> None:
    try:
        path.replace(final)
        return
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
    part = final.with_name(f".talaria-{uuid.uuid4().hex[:16]}")
    try:
        shutil.copyfile(path, part)
        fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)
        part.replace(final)
    finally:
        part.unlink(missing_ok=True)
    path.unlink()
