"""What of a folder could not be read or is damaged, and which studies may have more there.

A file says nothing of its study that can't be opened, or is damaged where its header is; where it lies does. It counts
as part of the studies whose files lie beside it. What lies further up or down, as a closed folder of one series does,
counts where nothing of other studies is: one closed folder in an archive says nothing of the studies in the others.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transfer.oserrors import user

# What a check of an ext2 to 4 file system has found without a name; root's alone.
LOST_AND_FOUND = b"lost+found"


class UnreadEntry(NamedTuple):
    """A file or folder that could not be read; `path` is relative to the root."""

    path: bytes
    is_folder: bool


@dataclass(frozen=True)
class Lack:
    """How much is, or may be, part of a study and can't be given.

    Attributes:
        unread: files and folders that can't be read.
        damaged: files whose damage hides which study they are of.
        own: files that say that they are of this study, and are damaged.
    """

    unread: int = 0
    damaged: int = 0
    own: int = 0

    @property
    def count(self) -> int:
        return self.unread + self.damaged + self.own

    def __add__(self, other: Lack) -> Lack:
        return Lack(self.unread + other.unread, self.damaged + other.damaged, self.own + other.own)

    def __str__(self) -> str:
        """Return it in words; "" if nothing lacks."""
        found = []
        if self.own:
            found.append(f"{self.own} files of it are damaged")
        if self.damaged:
            found.append(f"{self.damaged} files beside it are damaged, and may be of it")
        if self.unread:
            found.append(
                f"{self.unread} files or folders beside it can't be read by user {user()}, and may hold more of it"
            )
        return "; ".join(found)


class DamagedFile(NamedTuple):
    """A damaged file, and what it says of itself; "" for what it doesn't."""

    path: bytes
    study: str
    series: str
    instance: str
    accession: str

    @property
    def key(self) -> str | bytes:
        """Of copies of one instance, one is missing."""
        return self.instance or self.path


class Beside:
    """Counts, study by study, what can't be given and is, or may be, part of it.

    Args:
        db: of the index.
    """

    def __init__(self, db: sqlite3.Connection, unread: Iterable[UnreadEntry]) -> None:
        self._db = db
        self._unread = tuple(unread)

    def lack(self, study: str, series: Collection[str] | None = None) -> Lack:
        """Return what may be part of a study.

        Args:
            series: those that are asked for; None for all, and for those of which there is nothing else.
        """
        damaged = [one for one in self._damaged if one.study == study]
        if series is not None and damaged:
            known = self._series(study) - set(series)
            damaged = [one for one in damaged if one.series not in known]
        unread, nameless = (where.count(self._db, study) for where in self._spread)
        return Lack(unread, nameless, len({one.key for one in damaged}))

    def named(self, asked: Collection[str]) -> frozenset[str]:
        """Return those accession numbers and study UIDs, in lower case, of which there is nothing but damaged files."""
        return frozenset(
            name
            for one in (self._damaged if asked else ())
            for name in {one.accession.strip().casefold(), one.study}.intersection(asked)
            if not self._has_whole(one)
        )

    def _has_whole(self, damaged: DamagedFile) -> bool:
        """Return True if there are whole files of the study of a damaged one."""
        where, value = ("h.AccessionNumber", damaged.accession) if not damaged.study else ("st.uid", damaged.study)
        return bool(
            self._db.execute(
                "SELECT 1 FROM headers h JOIN series se ON se.id=h.series JOIN studies st ON st.id=se.study"  # noqa: S608
                f" WHERE {where}=? COLLATE NOCASE LIMIT 1",
                (value,),
            ).fetchone()
        )

    @cached_property
    def _damaged(self) -> list[DamagedFile]:
        """All damaged files that may be of a study, but for those of which there is a whole copy."""
        rows = self._db.execute(
            "SELECT d.path, f.name, f.study, f.of_series, f.uid, f.accession FROM files f"
            " JOIN folders d ON d.id=f.folder WHERE f.study IS NOT NULL"
        )
        found = [DamagedFile(folder + b"/" + name if folder else name, *said) for folder, name, *said in rows]
        if not found:
            return found
        whole = {
            uid
            for (uid,) in self._db.execute(
                "SELECT uid FROM files WHERE header IS NOT NULL"
                " AND uid IN (SELECT uid FROM files WHERE study IS NOT NULL AND uid<>'')"
            )
        }
        return [one for one in found if one.instance not in whole]

    @cached_property
    def _spread(self) -> tuple[_Spread, _Spread]:
        nameless = [UnreadEntry(one.path, is_folder=False) for one in self._damaged if not one.study]
        return _Spread(self._unread), _Spread(nameless)

    def _series(self, study: str) -> set[str]:
        return {
            uid
            for (uid,) in self._db.execute(
                "SELECT se.uid FROM series se JOIN studies st ON st.id=se.study WHERE st.uid=?", (study,)
            )
        }


class _Spread:
    """Files and folders that say nothing of their study, by the folder that they are in."""

    def __init__(self, entries: Iterable[UnreadEntry]) -> None:
        self._files, self._folders = Counter[bytes](), Counter[bytes]()
        for one in entries:
            (self._folders if one.is_folder else self._files)[one.path.rpartition(b"/")[0]] += 1

    def count(self, db: sqlite3.Connection, study: str) -> int:
        """Return how many of them may be of a study."""
        if not self._files and not self._folders:
            return 0
        rows = db.execute(
            "SELECT DISTINCT d.path FROM studies st JOIN series se ON se.study=st.id JOIN headers h ON h.series=se.id"
            " JOIN files f ON f.header=h.id JOIN folders d ON d.id=f.folder WHERE st.uid=?",
            (study,),
        )
        own = {path for (path,) in rows}
        found = sum(self._files[path] for path in own)
        for parent in self._files.keys() | self._folders.keys():
            count = self._folders[parent] + (0 if parent in own else self._files[parent])
            top = _top(parent, own)
            if count and top is not None and not _has_others(db, top, study):
                found += count
        return found


def _has_others(db: sqlite3.Connection, top: bytes, study: str) -> bool:
    """Return True if a folder, or one below it, holds instances of another study."""
    below = top + b"/"
    where, values = "TRUE", list[bytes]()
    if top:
        where, values = "(d.path=? OR (d.path>=? AND d.path<?))", [top, below, top + b"0"]  # which follows "/"
    return bool(
        db.execute(
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
