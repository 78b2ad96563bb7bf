"""What of a folder could not be read, and which studies may have more there.

A file says nothing of its study that can't be opened; where it lies does. It counts as part of the studies whose files
lie beside it. What lies further up or down, as a closed folder of one series does, counts where nothing of other
studies is: one closed folder in an archive says nothing of the studies in the others.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from transfer.oserrors import user

# What a check of an ext2 to 4 file system has found without a name; root's alone.
LOST_AND_FOUND = b"lost+found"


class UnreadEntry(NamedTuple):
    """A file or folder that could not be read; `path` is relative to the root."""

    path: bytes
    is_folder: bool


def may_have_more(count: int) -> str:
    """Return in words that a study may have more than was found of it."""
    return f"{count} files or folders beside it can't be read by user {user()}, and may hold more of it"


class Beside:
    """Counts, study by study, what could not be read and may be part of it.

    Args:
        db: of the index.
    """

    def __init__(self, db: sqlite3.Connection, unread: Iterable[UnreadEntry]) -> None:
        self._db = db
        self._files, self._folders = Counter[bytes](), Counter[bytes]()  # by the folder that they are in
        for one in unread:
            (self._folders if one.is_folder else self._files)[one.path.rpartition(b"/")[0]] += 1

    def count(self, study: str) -> int:
        """Return how many files and folders may hold instances of a study."""
        if not self._files and not self._folders:
            return 0
        rows = self._db.execute(
            "SELECT DISTINCT d.path FROM studies st JOIN series se ON se.study=st.id JOIN headers h ON h.series=se.id"
            " JOIN files f ON f.header=h.id JOIN folders d ON d.id=f.folder WHERE st.uid=?",
            (study,),
        )
        own = {path for (path,) in rows}
        found = sum(self._files[path] for path in own)
        for parent in self._files.keys() | self._folders.keys():
            count = self._folders[parent] + (0 if parent in own else self._files[parent])
            top = _top(parent, own)
            if count and top is not None and not self._has_others(top, study):
                found += count
        return found

    def _has_others(self, top: bytes, study: str) -> bool:
        """Return True if a folder, or one below it, holds instances of another study."""
        below = top + b"/"
        where, values = "TRUE", list[bytes]()
        if top:
            where, values = "(d.path=? OR (d.path>=? AND d.path<?))", [top, below, top + b"0"]  # which follows "/"
        return bool(
            self._db.execute(
                "SELECT 1 FROM folders d JOIN files f ON f.folder=d.id JOIN headers h ON h.id=f.header"  # noqa: S608
                " JOIN series se ON se.id=h.series JOIN studies st ON st.id=se.study"
                f" WHERE {where} AND st.uid<>? LIMIT 1",
                (*values, study),
            ).fetchone()
        )


def _top(parent: bytes, own: set[bytes]) -> bytes | None:
    """Return the folder that holds both an entry of `parent` and files of a study; None if neither is in the other."""
    if any(_is_within(path, parent) for path in own):
        return parent
    return max((path for path in own if _is_within(parent, path)), key=len, default=None)


def _is_within(path: bytes, folder: bytes) -> bool:
    return path == folder or not folder or path.startswith(folder + b"/")
