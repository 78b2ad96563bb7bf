"""What of a folder could not be read or is damaged, and which studies may have more there.

A file says nothing of its study that can't be opened, or is damaged where its header is; where it lies does. It counts
as part of the study whose files lie beside it, or of all of them if there are as many such files as studies. Where
there are more studies, as in a folder of all that came, most of them must be whole, and nothing shows which: each is
given with a doubt. What lies further up or down, as a closed folder of one series does, counts where nothing of other
studies is: one closed folder in an archive says nothing of the studies in the others.
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
        doubts: sentences on files that may be of it, or of any of many others; the same for all of these.
    """

    unread: int = 0
    damaged: int = 0
    own: int = 0
    doubts: frozenset[str] = frozenset()

    @property
    def count(self) -> int:
        return self.unread + self.damaged + self.own

    def __add__(self, other: Lack) -> Lack:
        return Lack(
            self.unread + other.unread,
            self.damaged + other.damaged,
            self.own + other.own,
            self.doubts | other.doubts,
        )

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
        return "; ".join([*found, *sorted(self.doubts)])


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
        self._crowds: dict[bytes, int] = {}  # studies, by folder

    def lack(self, study: str, series: Collection[str] | None = None) -> Lack:
        """Return what may be part of a study.

        Args:
            series: those that are asked for; None for all, and for those of which there is nothing else.
        """
        damaged = [one for one in self._damaged if one.study == study]
        if series is not None and damaged:
            known = self._series(study) - set(series)
            damaged = [one for one in damaged if one.series not in known]
        unread, nameless = self._spread
        folders = self._folders_of(study) if unread or nameless else set()
        crowded = {path for path in folders if 0 < unread.files[path] + nameless.files[path] < self._studies_in(path)}
        return Lack(
            unread.count(self._db, study, folders, crowded),
            nameless.count(self._db, study, folders, crowded),
            len({one.key for one in damaged}),
            frozenset(map(self._doubt, crowded)),
        )

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

    def _folders_of(self, study: str) -> set[bytes]:
        """Return the folders in which files of a study are."""
        rows = self._db.execute(
            "SELECT DISTINCT d.path FROM studies st JOIN series se ON se.study=st.id JOIN headers h ON h.series=se.id"
            " JOIN files f ON f.header=h.id JOIN folders d ON d.id=f.folder WHERE st.uid=?",
            (study,),
        )
        return {path for (path,) in rows}

    def _studies_in(self, folder: bytes) -> int:
        """Return of how many studies there are files in a folder."""
        if folder not in self._crowds:
            (self._crowds[folder],) = self._db.execute(
                "SELECT COUNT(DISTINCT st.uid) FROM folders d JOIN files f ON f.folder=d.id JOIN headers h"
                " ON h.id=f.header JOIN series se ON se.id=h.series JOIN studies st ON st.id=se.study WHERE d.path=?",
                (folder,),
            ).fetchone()
        return self._crowds[folder]

    def _doubt(self, folder: bytes) -> str:
        unread, nameless = (where.files[folder] for where in self._spread)
        why = [f"{nameless} are damaged"] if nameless else []
        why += [f"{unread} can't be read by user {user()}"] if unread else []
        return (
            f"of the files beside it {' and '.join(why)}, and may be of any of the {self._studies_in(folder)} studies "
            "in that folder"
        )

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
        self.files, self._folders = Counter[bytes](), Counter[bytes]()
        for one in entries:
            (self._folders if one.is_folder else self.files)[one.path.rpartition(b"/")[0]] += 1

    def __bool__(self) -> bool:
        return bool(self.files or self._folders)

    def count(self, db: sqlite3.Connection, study: str, own: set[bytes], crowded: set[bytes]) -> int:
        """Return how many of them count as part of a study.

        Args:
            own: folders in which its files are.
            crowded: those of them in which nothing shows whose the others are.
        """
        found = sum(self.files[path] for path in own - crowded)
        for parent in self.files.keys() | self._folders.keys():
            count = self._folders[parent] + (0 if parent in own else self.files[parent])
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
