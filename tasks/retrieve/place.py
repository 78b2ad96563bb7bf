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

PLACES = "places"  # file beside the instances that are moved: where they go


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
    places: dict[Path, Path] = {}
    changed: dict[Path, None] = {}
    try:
        for path in sorted(folder.glob("*.dcm")):
            with path.open("rb") as file:
                header = read_header(file.fileno(), path.stat().st_size)
            places[path] = into / sanitised(name) / sanitised(header.SeriesInstanceUID) / path.name
        with (folder / PLACES).open("a", encoding="utf-8") as notes:
            notes.writelines(f"{final}\n" for final in places.values())
        for path, final in places.items():
            if final.parent not in changed:
                final.parent.mkdir(parents=True, exist_ok=True)
                changed |= dict.fromkeys((final.parent, final.parent.parent, into))
            _move(path, final)
        for one in changed:
            flush_folder(one)
    except OSError as exc:
        kind = Busy if exc.errno in FULL else Misconfigured
        raise kind(f"can't write to {into}: {exc.strerror}") from exc
    return len(places)


def is_placed(folder: Path) -> bool:
    """Return True if all that was ever to be moved from a folder is in its final place."""
    try:
        finals = (folder / PLACES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return bool(finals) and all(map(os.path.exists, finals))


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
