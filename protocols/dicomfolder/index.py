"""The index of a folder of DICOM files: the values of each file's header, in one SQLite file.

The database lives in memory: it is read whole from the file, changed there, and saved by writing a new file and
renaming it. So no reader ever sees half of it, a process that is killed leaves the last saved one, and no locks are
needed, which network shares often don't have or get wrong (SQLite's write-ahead log can't be on one at all). Two
processes at once have a copy each; the last one to save wins, and what its copy lacks is read from the files again. A
file of 100,000 instances has some 20 MB, and is read in milliseconds. A digest of the database follows it in the file.

A header's values are kept once for all files that share them: usually one row per series.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imaging.charset import NAME_DELIMITERS, TEXT_DELIMITERS, decoded
from imaging.header import Header
from imaging.remains import Remains
from transfer.fingerprint import LAST_NS, modified_ns

NAME = ".talaria-index.sqlite"  # hidden, and one of the names that no plan and no index takes for data
APPLICATION_ID = 0x54414C49  # "TALI": the mark of our own files (PRAGMA application_id)
VERSION = 2  # of the tables; a file of another version is made anew
DIGEST_BYTES = 32
STALE_S = 3600  # a part of an index that is older was left behind by a process that was killed

NOT_DICOM, DAMAGED, INSTANCE = range(3)  # kinds of file


class Attribute(NamedTuple):
    """An indexed attribute: it can be matched, and is returned where files have it."""

    tag: int
    keyword: str
    vr: str


# What Orthanc answers of a study, and what else people look for (PS3.18 table 10.6.3-3).
STUDY = (
    Attribute(0x00080020, "StudyDate", "DA"),
    Attribute(0x00080030, "StudyTime", "TM"),
    Attribute(0x00080050, "AccessionNumber", "SH"),
    Attribute(0x00080056, "InstanceAvailability", "CS"),
    Attribute(0x00080080, "InstitutionName", "LO"),
    Attribute(0x00080090, "ReferringPhysicianName", "PN"),
    Attribute(0x00080201, "TimezoneOffsetFromUTC", "SH"),
    Attribute(0x00081030, "StudyDescription", "LO"),
    Attribute(0x00100010, "PatientName", "PN"),
    Attribute(0x00100020, "PatientID", "LO"),
    Attribute(0x00100030, "PatientBirthDate", "DA"),
    Attribute(0x00100040, "PatientSex", "CS"),
    Attribute(0x00101010, "PatientAge", "AS"),
    Attribute(0x0020000D, "StudyInstanceUID", "UI"),
    Attribute(0x00200010, "StudyID", "SH"),
)
# The same of a series (PS3.18 table 10.6.3-4).
SERIES = (
    Attribute(0x00080021, "SeriesDate", "DA"),
    Attribute(0x00080031, "SeriesTime", "TM"),
    Attribute(0x00080060, "Modality", "CS"),
    Attribute(0x00080070, "Manufacturer", "LO"),
    Attribute(0x00081010, "StationName", "SH"),
    Attribute(0x0008103E, "SeriesDescription", "LO"),
    Attribute(0x00081090, "ManufacturerModelName", "LO"),
    Attribute(0x00180015, "BodyPartExamined", "CS"),
    Attribute(0x00181030, "ProtocolName", "LO"),
    Attribute(0x0020000E, "SeriesInstanceUID", "UI"),
    Attribute(0x00200011, "SeriesNumber", "IS"),
    Attribute(0x00200060, "Laterality", "CS"),
    Attribute(0x00400244, "PerformedProcedureStepStartDate", "DA"),
    Attribute(0x00400245, "PerformedProcedureStepStartTime", "TM"),
)
ATTRIBUTES = STUDY + SERIES
KEYWORDS = tuple(attribute.keyword for attribute in ATTRIBUTES)
ORDER = tuple(attribute.tag for attribute in ATTRIBUTES)
TAGS = frozenset(ORDER)
CHARSET = 0x00080005  # Specific Character Set

# A study is identified by patient and UID, as Orthanc does: one UID under two patients is two studies.
# `header` of a series and of a study is the row that speaks for it; see `Index.settle`. Of a damaged file, `uid`,
# `study`, `of_series` and `accession` are what it still says, "" for nothing; NULL for a file that belongs to no study.
SCHEMA = f"""
CREATE TABLE folders (id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, mark BLOB NOT NULL);
CREATE TABLE studies (id INTEGER PRIMARY KEY, patient TEXT NOT NULL, uid TEXT NOT NULL, header INTEGER,
  UNIQUE (uid, patient));
CREATE TABLE series (id INTEGER PRIMARY KEY, study INTEGER NOT NULL, uid TEXT NOT NULL, header INTEGER,
  first BLOB, instances INTEGER NOT NULL DEFAULT 0, UNIQUE (study, uid));
CREATE TABLE headers (id INTEGER PRIMARY KEY, series INTEGER NOT NULL, mark BLOB NOT NULL UNIQUE,
  {", ".join(f"{keyword} TEXT" for keyword in KEYWORDS)});
CREATE INDEX headers_series ON headers (series);
CREATE TABLE files (folder INTEGER NOT NULL, name BLOB NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
  ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, kind INTEGER NOT NULL, header INTEGER, uid TEXT,
  class_uid TEXT, syntax TEXT, study TEXT, of_series TEXT, accession TEXT, PRIMARY KEY (folder, name)) WITHOUT ROWID;
CREATE INDEX files_header ON files (header) WHERE header IS NOT NULL;
CREATE INDEX files_damaged ON files (study) WHERE study IS NOT NULL;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
"""


class Stamp(NamedTuple):
    """Shows that a file is the one whose header was read: size in bytes, two times in nanoseconds, inode number."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, info: os.stat_result) -> Stamp:
        # SQLite has 64 bits with a sign; some file systems use all of them for inode numbers.
        times = min(modified_ns(info), LAST_NS), min(info.st_ctime_ns, LAST_NS)
        return cls(info.st_size, *times, info.st_ino & 0x7FFFFFFFFFFFFFFF)


class IndexedInstance(NamedTuple):
    """One instance: its header, and the undecoded values of the indexed elements."""

    header: Header
    elements: Mapping[int, bytes]

    @property
    def mark(self) -> bytes:
        """A digest of all values."""
        found = [self.elements.get(tag) for tag in (CHARSET, *ORDER)]
        return hashlib.blake2b(repr(found).encode(), digest_size=16).digest()

    def texts(self) -> list[str | None]:
        """Return the values in the order of ATTRIBUTES; None where the file doesn't have the attribute."""
        charset = self.elements.get(CHARSET, b"")
        found: list[str | None] = []
        for attribute in ATTRIBUTES:
            raw = self.elements.get(attribute.tag)
            delimiters = NAME_DELIMITERS if attribute.vr == "PN" else TEXT_DELIMITERS
            found.append(None if raw is None else decoded(raw, charset, delimiters).rstrip("\0 "))
        return found


class Index:
    """An index in memory, loaded from the first of the files that can be used.

    Args:
        path: where it is saved, and looked for first; None keeps it in memory only.
        others: further files that may hold an index to start from.
    """

    def __init__(self, path: Path | None, *others: Path) -> None:
        self.path = path
        self.is_saved = False
        self._touched: set[int] = set()  # series whose count, or header that speaks for it, may have changed
        for source in dict.fromkeys([path, *others]):
            self.db = _database()
            if source is not None and self._load(source):
                self.is_saved = source == path
                break
            self.db.close()
        else:
            self.db = _database()
            self.db.executescript(SCHEMA)
        self._changed = not self.is_saved

    def _load(self, source: Path) -> bool:
        """Read a file; return True if it is an index of ours and whole.

        Anybody who may write to a folder can replace the index by any file; one with other tables, or with triggers and
        views, is not ours.
        """
        try:
            data = _read(source)
            database, digest = memoryview(data)[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
            if digest != _digest(database):
                return False  # empty, cut short, or damaged in a way that SQLite would not notice
            self.db.deserialize(database)
            return _schema(self.db) == _own_schema() and self._is_whole()
        except (OSError, MemoryError, sqlite3.Error):
            return False

    def _is_whole(self) -> bool:
        return bool(self.db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))

    def close(self) -> None:
        self.db.close()

    # ---- folders and files

    def folders(self) -> dict[bytes, tuple[int, bytes]]:
        """Return id and mark of every folder, by path."""
        return {path: (key, mark) for key, path, mark in self.db.execute("SELECT id, path, mark FROM folders")}

    def stamps(self, folder: int) -> dict[bytes, Stamp]:
        """Return the stamps of a folder's files, by name."""
        rows = self.db.execute("SELECT name, size, mtime_ns, ctime_ns, inode FROM files WHERE folder=?", (folder,))
        return {name: Stamp(*stamp) for name, *stamp in rows}

    def counts(self) -> dict[int, int]:
        """Return how many files of each kind there are."""
        return dict(self.db.execute("SELECT kind, COUNT(*) FROM files GROUP BY kind"))

    def add_folder(self, path: bytes) -> int:
        """Add a folder; its mark is empty, which equals no other, until all its files are added."""
        self._changed = True
        row = self.db.execute("INSERT INTO folders (path, mark) VALUES (?, x'') RETURNING id", (path,)).fetchone()
        return int(row[0])

    def mark_folder(self, folder: int, mark: bytes) -> None:
        """Note that all files of a folder have been added as they are now."""
        self._changed = True
        self.db.execute("UPDATE folders SET mark=? WHERE id=?", (mark, folder))

    def remove_folder(self, folder: int) -> int:
        """Remove a folder and its files; return how many files there were."""
        names = list(self.stamps(folder))
        self.remove_files(folder, names)
        self.db.execute("DELETE FROM folders WHERE id=?", (folder,))
        return len(names)

    def put_file(
        self,
        folder: int,
        name: bytes,
        stamp: Stamp,
        kind: int,
        instance: IndexedInstance | None = None,
        left: Remains | None = None,
    ) -> None:
        """Add a file, or replace what is known about it.

        Args:
            left: what a damaged file says that may be part of a study.
        """
        self._touch(folder, [name])
        row: tuple[Any, ...] = (None,) * 7
        if instance is not None:
            header = instance.header
            row = (self._header(instance), header.SOPInstanceUID, header.SOPClassUID, header.TransferSyntaxUID)
            row += (None,) * 3
        elif left is not None:
            row = (None, left.instance, None, None, left.study, left.series, left.accession)
        marks = ",".join("?" * 14)
        self.db.execute(f"INSERT OR REPLACE INTO files VALUES ({marks})", (folder, name, *stamp, kind, *row))  # noqa: S608

    def remove_files(self, folder: int, names: list[bytes]) -> None:
        """Remove files that are gone; an unknown one is not an error."""
        self._touch(folder, names)
        self.db.executemany("DELETE FROM files WHERE folder=? AND name=?", [(folder, name) for name in names])

    def _touch(self, folder: int, names: Iterable[bytes]) -> None:
        self._changed = True
        for name in names:
            row = self.db.execute(
                "SELECT h.series FROM files f JOIN headers h ON h.id=f.header WHERE f.folder=? AND f.name=?",
                (folder, name),
            ).fetchone()
            if row:
                self._touched.add(row[0])

    def _header(self, instance: IndexedInstance) -> int:
        """Return the row of the instance's values; add it if there is none."""
        mark = instance.mark
        row = self.db.execute("SELECT id, series FROM headers WHERE mark=?", (mark,)).fetchone()
        if row is None:
            texts = instance.texts()
            patient = texts[KEYWORDS.index("PatientID")] or ""
            study = self._get("studies", ("patient", "uid"), (patient, instance.header.StudyInstanceUID))
            series = self._get("series", ("study", "uid"), (study, instance.header.SeriesInstanceUID))
            marks = ",".join("?" * (len(texts) + 2))
            row = self.db.execute(
                f"INSERT INTO headers (series, mark, {','.join(KEYWORDS)}) VALUES ({marks}) RETURNING id, series",  # noqa: S608
                (series, mark, *texts),
            ).fetchone()
        self._touched.add(row[1])
        return int(row[0])

    def _get(self, table: str, columns: tuple[str, str], values: tuple[Any, Any]) -> int:
        where = f"{columns[0]}=? AND {columns[1]}=?"
        row = self.db.execute(f"SELECT id FROM {table} WHERE {where}", values).fetchone()  # noqa: S608
        if row is None:
            insert = f"INSERT INTO {table} ({','.join(columns)}) VALUES (?,?) RETURNING id"  # noqa: S608
            row = self.db.execute(insert, values).fetchone()
        return int(row[0])

    def settle(self) -> None:
        """Count the instances of changed series, and choose the file whose header stands for each and for its study.

        For a series that is its first file in the order of paths; for a study, the one of the series that begins
        last. Where the files of a study agree, as they should, this changes nothing; where they don't, it is what
        Orthanc answers after it got the files in that order.
        """
        with self.changing():
            self._settle()

    def _settle(self) -> None:
        studies = set()
        for key in self._touched:
            row = self.db.execute("SELECT study FROM series WHERE id=?", (key,)).fetchone()
            if row is None:
                continue
            studies.add(row[0])
            self.db.execute(
                "DELETE FROM headers WHERE series=? AND NOT EXISTS (SELECT 1 FROM files WHERE header=headers.id)",
                (key,),
            )
            found = self.db.execute(
                "SELECT d.path, f.name, f.header FROM headers h JOIN files f ON f.header=h.id"
                " JOIN folders d ON d.id=f.folder WHERE h.series=? ORDER BY d.path, f.name LIMIT 1",
                (key,),
            ).fetchone()
            if found is None:
                self.db.execute("DELETE FROM series WHERE id=?", (key,))
                continue
            self.db.execute(
                "UPDATE series SET first=?, header=?, instances=(SELECT COUNT(DISTINCT f.uid) FROM headers h"
                " JOIN files f ON f.header=h.id WHERE h.series=series.id) WHERE id=?",
                (os.path.join(*found[:2]), found[2], key),
            )
        for key in studies:
            row = self.db.execute(
                "SELECT header FROM series WHERE study=? ORDER BY first DESC LIMIT 1", (key,)
            ).fetchone()
            if row is None:
                self.db.execute("DELETE FROM studies WHERE id=?", (key,))
            else:
                self.db.execute("UPDATE studies SET header=? WHERE id=?", (row[0], key))
        self._touched.clear()

    # ---- keeping it

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Make changes in one transaction, which is faster; changes before an exception stay, as each is complete."""
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.execute("COMMIT")

    def save(self, mode: int) -> None:
        """Write the index to its file if something changed; `is_saved` is True if the file has it all now.

        Args:
            mode: permission bits of the file.
        """
        if self.path is None or not self._changed:
            return
        self.settle()
        part = self.path.with_name(f"{self.path.name}.{secrets.token_hex(6)}.part")
        try:
            _sweep(self.path)
            data = self.db.serialize()
            _write(part, (data, _digest(data)), mode)
            part.replace(self.path)
        except OSError:
            # A full disk, a folder that has become read-only, a share that lets nobody rename over an open file: the
            # answers don't depend on it.
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            self.is_saved = False
        else:
            self._changed, self.is_saved = False, True


def _database() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA trusted_schema=OFF")
    return db


def _schema(db: sqlite3.Connection) -> list[Any]:
    marks = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    return [*marks, *db.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name")]


@functools.cache
def _own_schema() -> list[Any]:
    with contextlib.closing(_database()) as db:
        db.executescript(SCHEMA)
        return _schema(db)


def _read(path: Path) -> bytes:
    """Return a file's bytes; a link, or anything else but a file, is refused."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        return file.read() if stat.S_ISREG(os.fstat(fd).st_mode) else b""


def _digest(data: bytes | memoryview) -> bytes:
    """Return the digest that follows the database in an index file."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _write(path: Path, pieces: Iterable[bytes], mode: int) -> None:
    """Write a new file and flush it to disk, so that it is whole under any name that it gets afterwards."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
    with open(fd, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(fd)


def _sweep(path: Path) -> None:
    """Remove unfinished files of this index."""
    with os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f"{path.name}.") and entry.name.endswith(".part"):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < time.time() - STALE_S:
                        Path(entry.path).unlink()
