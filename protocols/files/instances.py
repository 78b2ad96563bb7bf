"""Whole instances in a folder that a retrieval fills, as `<SOP instance UID>.dcm`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

from imaging.header import Damaged, NotDicom, read_header
from transfer.plan import Item


def here(folder: Path, series: Collection[str], check: Callable[[], None]) -> Iterator[tuple[str, str, Item]]:
    """Yield the instances of these series that are in a folder: UIDs of instance and series, and the file as an item.

    Args:
        check: called before each file; may raise to stop.
    """
    for path in folder.glob("*.dcm"):
        check()
        item = held(path, path.stem)
        if item and item.header and item.header.SeriesInstanceUID in series:
            yield path.stem, item.header.SeriesInstanceUID, item


def held(path: Path, uid: str) -> Item | None:
    """Return the item of a file if it is whole and holds this instance; None if not."""
    with suppress(OSError, NotDicom, Damaged), path.open("rb") as file:
        info = os.fstat(file.fileno())
        header = read_header(file.fileno(), info.st_size)
        if header.SOPInstanceUID == uid:
            return Item(path.name, info.st_size, info.st_mtime_ns, header)
    return None
