"""A folder of DICOM files that answers queries as a DICOMweb server does, and lists instances to fetch.

A query first reads every directory entry (names, sizes, times: no file is opened), then the headers of new and changed
files, and forgets those that are gone; see `scan.py` and `index.py`. Answers are those of Orthanc for the same files.
The folder's files are never changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imaging.json import keyworded
from imaging.match import Test
from imaging.query import Match, Query
from protocols.dicomfolder.index import ATTRIBUTES, DAMAGED, NAME, NOT_DICOM, Index, Stamp
from protocols.dicomfolder.indexes import INDEXES, SUFFIX
from protocols.dicomfolder.scan import Changes, Work, apply, look
from protocols.dicomfolder.unread import Beside, Lack, UnreadEntry
from protocols.files.tree import Tree
from transfer.beneath import FOLDER
from transfer.errors import Rejected
from transfer.query import series_tests, study_tests

SAVE_EVERY_S = 20.0  # of a long first look, so much is lost at most when the process is killed
# How long to wait for another process that is reading the same headers. The lock only spares both the same work;
# where a file system has no locks, or one is held for ever, everything works without.
LOCK_S = 60.0
LOCK_WAIT_S = 0.1

_BY_KEYWORD = {attribute.keyword: attribute for attribute in ATTRIBUTES}
# What a match has: what Orthanc answers at its level, and what we ask of servers besides (see `qido`).
_COMMON = (
    "StudyDate", "StudyTime", "AccessionNumber", "InstanceAvailability", "ReferringPhysicianName",
    "TimezoneOffsetFromUTC", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID",
    "StudyID",
)  # fmt: skip
STUDY_FIELDS = (*_COMMON, "StudyDescription")
# A series is answered with its study's attributes, and then its own.
SERIES_FIELDS = (
    *_COMMON, "Modality", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber",
    "PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime", "BodyPartExamined",
)  # fmt: skip
_SERIES_UID = SERIES_FIELDS.index("SeriesInstanceUID")


@dataclass(frozen=True)
class IndexReport:
    """What a look at the folder found.

    Attributes:
        read: files whose headers were read just now.
        removed: files that are no longer there.
        unchanged: files that are as they were, and were not opened.
        not_dicom: files in the folder that are not DICOM.
        damaged: files that are DICOM, or meant to be, but are broken or don't name their series.
        unread: files and folders that this process may not read.
        links: symbolic links, which are not followed.
        saved: whether the index is in its file; False where it is in memory only.
    """

    read: int = 0
    removed: int = 0
    unchanged: int = 0
    not_dicom: int = 0
    damaged: int = 0
    unread: tuple[UnreadEntry, ...] = field(default=(), repr=False)
    links: int = 0
    saved: bool = False


@dataclass(frozen=True, slots=True)
class HeldInstance:
    """One instance in the folder.

    Attributes:
        path: its file, absolute; bytes that are not UTF-8 are kept as surrogates.
        stamp: shows whether the file is still the one that was indexed.
    """

    path: Path
    stamp: Stamp = field(repr=False)
    SOPInstanceUID: str
    SOPClassUID: str
    TransferSyntaxUID: str
    StudyInstanceUID: str
    SeriesInstanceUID: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stamp.size


class DicomFolder:
    """A folder with its index; for one thread at a time.

    The index is kept in the folder if that is writable, else in the state directory, else in memory.

    Args:
        root: the folder; a link to one is followed.
        state_dir: where the indexes of read-only folders are kept; None for nowhere.
        check: called now and then; may raise to stop.

    Attributes:
        report: what the last look at the folder found.
        older: files of the last `instances` that it passed over, as another one of that UID was written later.

    Raises:
        OSError: there is no such folder. Denied: it lies where Talaria may not read (`transfer.roots`).
    """

    def __init__(self, root: Path, state_dir: Path | None = None, check: Callable[[], None] = lambda: None) -> None:
        self.root = root.resolve(strict=True)
        self._tree = Tree(self.root)
        self._check = check
        self._path, self._mode = _place(self.root, state_dir)
        if self._path and self._path.parent != self.root:
            _note_use(self._path)
        self._stamp = _stamp(self._path)
        # An index that others keep in a folder that we can't write to is a start.
        self._index = Index(self._path, self.root / NAME)
        self._saved_at = time.monotonic()
        self.report = IndexReport()
        self.older: list[HeldInstance] = []
        self._beside = Beside(self._index.db, ())

    def close(self) -> None:
        self._index.close()
        self._tree.close()

    def open(self, instance: HeldInstance) -> int:
        """Open the file of an instance; the caller closes the descriptor.

        Raises:
            Rejected: it is gone, or there is a link on the way to it by now.
        """
        try:
            return self._tree.open(str(instance.path.relative_to(self.root)))
        except OSError as exc:
            raise Rejected(f"can't be read: {exc.strerror}") from exc

    def __enter__(self) -> DicomFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- keeping the index up to date

    def refresh(self) -> IndexReport:
        """Update the index; read only the headers of new and changed files.

        Raises:
            OSError: the folder can't be listed, or its share is gone.
        """
        changes = look(self._index, self._tree, self._check)
        work = Work()
        if changes:
            with self._alone():
                if (stamp := _stamp(self._path)) != self._stamp:
                    # Another process has read what we were about to read.
                    self._index.close()
                    self._index, self._stamp = Index(self._path, self.root / NAME), stamp
                    changes = look(self._index, self._tree, self._check)
                work = self._apply(changes)
        self.report = self._reported(changes, work)
        self._beside = Beside(self._index.db, self.report.unread)
        return self.report

    def _apply(self, changes: Changes) -> Work:
        def between() -> None:
            if time.monotonic() - self._saved_at > SAVE_EVERY_S:
                self._save()
            self._check()

        try:
            return apply(self._index, self._tree, changes, between)
        finally:
            self._save()

    def _save(self) -> None:
        self._index.save(self._mode)
        self._stamp = _stamp(self._path)
        self._saved_at = time.monotonic()

    def _reported(self, changes: Changes, work: Work) -> IndexReport:
        counts = self._index.counts()
        return IndexReport(
            work.read,
            work.removed,
            changes.unchanged,
            counts.get(NOT_DICOM, 0),
            counts.get(DAMAGED, 0),
            (*changes.unread, *work.unread),
            changes.links,
            self._index.is_saved,
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other process is reading headers of this folder, as far as its file system shows."""
        fd = self._tree.open("", FOLDER)
        try:
            end = time.monotonic() + LOCK_S
            while time.monotonic() < end:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._check()
                    time.sleep(LOCK_WAIT_S)
                    continue
                except OSError:
                    pass
                break
            yield
        finally:
            os.close(fd)

    # ---- answering

    def lack(self, study: str, series: Collection[str] | None = None) -> Lack:
        """Return what the last look could not read, or found damaged, and is or may be part of a study.

        Args:
            series: those that are asked for; None for all.
        """
        return self._beside.lack(study, series)

    def damaged(self, asked: Collection[str]) -> frozenset[str]:
        """Return those accession numbers and study UIDs, in lower case, of which there is nothing but damaged files."""
        return self._beside.named(asked)

    def find(self, query: Query) -> Iterator[Match]:
        """Yield the studies or series that match, as the folder is now, in the order of their files' paths.

        A study matches if its own attributes do and, where the query has keys of series, one of its series matches them
        all.

        Raises:
            Misconfigured: a key is malformed.
            OSError: the folder can't be listed.
        """
        tests = study_tests(query), series_tests(query)
        self.refresh()
        matched = self._matched(*tests)
        if query.level == "series":
            for study, series in matched:
                yield self._series(study, series)
        else:
            for study in dict.fromkeys(study for study, _ in matched):
                yield self._study(study)

    def instances(self, query: Query) -> Iterator[HeldInstance]:
        """Yield the instances of all series that match, as the folder is now; each once, in the order of paths.

        Where several files hold one instance, it is the one that was written last. There are as many as `find` with
        level `series` announces.
        """
        tests = study_tests(query), series_tests(query)
        self.refresh()
        self.older.clear()
        for study, series in self._matched(*tests):
            yield from self._held(study, series)

    def _matched(self, of_studies: list[tuple[str, Test]], of_series: list[tuple[str, Test]]) -> list[tuple[int, int]]:
        """Return the ids, of study and series, of the series that pass all tests."""
        where = ["TRUE"]
        for number, (table, keyword, test) in enumerate(
            [("sh", *one) for one in of_studies] + [("h", *one) for one in of_series]
        ):
            self._index.db.create_function(f"test{number}", 1, _nullable(test), deterministic=True)
            where.append(f"test{number}({table}.{keyword})")
        return self._index.db.execute(
            "SELECT se.study, se.id FROM series se JOIN headers h ON h.id=se.header JOIN studies st ON st.id=se.study"  # noqa: S608
            f" JOIN headers sh ON sh.id=st.header WHERE {' AND '.join(where)} ORDER BY se.first"
        ).fetchall()

    def _study(self, study: int) -> Match:
        answer, instances = self._study_answer(study)
        return self._match(answer, instances)

    def _study_answer(self, study: int) -> tuple[dict[str, Any], int]:
        """Return QIDO's answer for a study, and how many instances it has."""
        db = self._index.db
        row = db.execute(
            f"SELECT {_columns(STUDY_FIELDS)} FROM studies st JOIN headers h ON h.id=st.header WHERE st.id=?",  # noqa: S608
            (study,),
        ).fetchone()
        series = db.execute(
            "SELECT h.Modality, se.instances FROM series se JOIN headers h ON h.id=se.header WHERE se.study=?", (study,)
        ).fetchall()
        instances = sum(count for _, count in series)
        answer = _answer(STUDY_FIELDS, row)
        answer["00080061"] = _element("CS", "\\".join(sorted({modality for modality, _ in series if modality})))
        answer["00201206"] = {"vr": "IS", "Value": [len(series)]}
        answer["00201208"] = {"vr": "IS", "Value": [instances]}
        return answer, instances

    def _series(self, study: int, series: int) -> Match:
        *row, instances = self._index.db.execute(
            f"SELECT {_columns(SERIES_FIELDS)}, se.instances FROM series se JOIN headers h ON h.id=se.header"  # noqa: S608
            " WHERE se.id=?",
            (series,),
        ).fetchone()
        answer = _answer(SERIES_FIELDS, row)
        answer["00201209"] = {"vr": "IS", "Value": [instances]}
        return self._match({**self._study_answer(study)[0], **answer}, instances, {str(row[_SERIES_UID])})

    def _match(self, answer: dict[str, Any], instances: int, series: Collection[str] | None = None) -> Match:
        match = Match(keyworded(answer), instances)
        return replace(match, note=str(self.lack(match.StudyInstanceUID, series)))

    def _held(self, study: int, series: int) -> Iterator[HeldInstance]:
        db = self._index.db
        study_uid = db.execute("SELECT uid FROM studies WHERE id=?", (study,)).fetchone()[0]
        series_uid = db.execute("SELECT uid FROM series WHERE id=?", (series,)).fetchone()[0]
        last: dict[str, HeldInstance] = {}
        for folder, name, size, mtime_ns, ctime_ns, inode, uid, class_uid, syntax in db.execute(
            "SELECT d.path, f.name, f.size, f.mtime_ns, f.ctime_ns, f.inode, f.uid, f.class_uid, f.syntax"
            " FROM headers h JOIN files f ON f.header=h.id JOIN folders d ON d.id=f.folder WHERE h.series=?"
            " ORDER BY d.path, f.name",
            (series,),
        ):
            if b"/" in name or b".." in folder.split(b"/") or folder.startswith(b"/"):
                continue  # no look at a directory finds such names: somebody put them into the index
            path = self.root / os.fsdecode(os.path.join(folder, name))
            held = HeldInstance(
                path, Stamp(size, mtime_ns, ctime_ns, inode), uid, class_uid, syntax, study_uid, series_uid
            )
            known = last.get(uid)
            if known is None or ctime_ns > known.stamp.ctime_ns:  # a push keeps the time of modification
                last[uid], held = held, known or held
            if known is not None:
                self.older.append(held)
        yield from last.values()


def _place(root: Path, state_dir: Path | None) -> tuple[Path | None, int]:
    """Return where the index of a folder is kept, and with which permissions: it holds patients' data."""
    index = root / NAME
    # One that another user keeps there for himself is left to him.
    if os.access(root, os.W_OK | os.X_OK) and (not os.path.lexists(index) or os.access(index, os.R_OK)):
        # Whoever may list the folder as a member of its group may read the index.
        return index, 0o600 | (root.stat().st_mode & 0o040)
    if state_dir is None:
        return None, 0
    folder = state_dir / INDEXES
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None, 0
    return folder / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}{SUFFIX}", 0o600


def _note_use(index: Path) -> None:
    """Set the time of the last access, which not every file system does by itself; keep the other times."""
    with suppress(OSError):
        os.utime(index, ns=(time.time_ns(), index.stat().st_mtime_ns))


def _stamp(path: Path | None) -> Stamp | None:
    """Return what differs between versions of an index file; None if there is none."""
    if path is None:
        return None
    try:
        return Stamp.of(path.stat())
    except OSError:
        return None


def _columns(fields: Iterable[str]) -> str:
    return ", ".join(f"h.{field}" for field in fields)


def _nullable(test: Test) -> Callable[[str | None], bool]:
    """Return a test that takes a missing value for an empty one."""
    return lambda value: test(value or "")


# ---- the answer: what Orthanc makes of the same values


def _answer(fields: Iterable[str], row: Iterable[str | None]) -> dict[str, Any]:
    """Return a match in DICOM JSON; an attribute that the file doesn't have is left out."""
    answer: dict[str, Any] = {}
    texts = dict(zip(fields, row, strict=True))
    for keyword, text in texts.items():
        if text is not None:
            attribute = _BY_KEYWORD[keyword]
            answer[f"{attribute.tag:08X}"] = _element(attribute.vr, text)
    # Orthanc writes its answers in Latin-1, its default, and loses what that can't hold. We don't.
    latin = all(text is None or _is_latin(text) for text in texts.values())
    answer["00080005"] = {"vr": "CS", "Value": ["ISO_IR 100" if latin else "ISO_IR 192"]}
    return answer


def _is_latin(text: str) -> bool:
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True


def _element(vr: str, text: str) -> dict[str, Any]:
    """Return one element in DICOM JSON (PS3.18 Annex F)."""
    if not text:
        return {"vr": vr}
    values: list[Any] = []
    for part in text.split("\\"):
        if vr == "IS":
            try:
                values.append(int(part))
            except ValueError:
                continue  # no number at all: left out
        elif vr == "PN":
            values.append(dict(zip(("Alphabetic", "Ideographic", "Phonetic"), part.split("="), strict=False)))
        else:
            values.append(part or None)
    return {"vr": vr, "Value": values}
