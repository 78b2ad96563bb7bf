"""What is read of a folder, and what is read again."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pydicom
import pytest

from imaging.query import Query
from protocols.dicomfolder import folder as dicomfolder
from protocols.dicomfolder import scan as dicomscan
from protocols.dicomfolder.folder import DicomFolder
from talaria.testing import studies
from tests.clock import tick
from tests.protocols.dicomfolder.looking import look, names, opened_files, series


def test_first_look_reads_everything_and_the_next_nothing(tmp_path: Path) -> None:
    series(tmp_path / "a", 5)
    series(tmp_path / "b" / "c", 3)
    studies.note(tmp_path / "note.json")
    report = look(tmp_path)
    assert (report.read, report.unchanged, report.not_dicom, report.damaged) == (9, 0, 1, 0)
    assert report.saved
    with opened_files() as opened:
        again = look(tmp_path)
        assert len(names(tmp_path)) == 2
    assert not opened, "a file was opened although nothing has changed"
    assert (again.read, again.removed, again.unchanged, again.not_dicom) == (0, 0, 9, 1)


@pytest.mark.parametrize("at_ns", [-11_644_473_600 * 10**9, 2**63 + 10**18])
def test_times_that_no_index_can_keep(at_ns: int) -> None:
    """1601, as of a share by SMB whose server keeps none, or a wrong clock's: the search failed."""
    with TemporaryDirectory(dir="/dev/shm") as share:
        for file in series(Path(share, "a"), 3):
            os.utime(file, ns=(0, at_ns))
            assert file.stat().st_mtime_ns == at_ns, "the file system keeps it"
        assert look(Path(share)).read == 3 and len(names(Path(share))) == 1
        assert look(Path(share)).read == 0


def test_reads_only_what_is_new_or_changed_and_forgets_what_is_gone(tmp_path: Path) -> None:
    old = [series(tmp_path / str(number), 4, PatientName=f"Old^{number}") for number in range(10)]
    assert look(tmp_path).read == 40
    changed = [old[0][0], old[1][0], old[2][0]]
    for path in changed:
        studies.dicom(path, PatientName="Changed")
    added = [studies.dicom(tmp_path / "new" / f"{number}.dcm", PatientName="New") for number in range(3)]
    for path in (old[3][0], *old[4]):
        path.unlink()
    shutil.rmtree(tmp_path / "5")
    with opened_files() as opened:
        report = look(tmp_path)
    assert {Path(name) for name in opened} == {*changed, *added}
    assert (report.read, report.removed, report.unchanged) == (6, 9, 28)
    assert names(tmp_path).count("Changed") == 3
    assert names(tmp_path).count("New") == 3
    assert "Old^4" not in names(tmp_path)
    assert "Old^5" not in names(tmp_path)
    with DicomFolder(tmp_path) as folder:
        counts = {m.attributes["PatientName"]: m.instances for m in folder.find(Query(PatientName="Old*"))}
    assert (counts["Old^3"], counts["Old^0"], counts["Old^6"]) == (3, 3, 4)


def test_change_of_the_same_length_and_time_is_noticed(tmp_path: Path) -> None:
    path = studies.dicom(tmp_path / "a.dcm", PatientName="Before^X")
    assert names(tmp_path) == ["Before^X"]
    info = path.stat()
    path.write_bytes(path.read_bytes().replace(b"Before^X", b"Behind^Y"))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert path.stat().st_mtime_ns == info.st_mtime_ns
    assert names(tmp_path) == ["Behind^Y"]


def test_file_that_takes_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    one = studies.dicom(tmp_path / "a.dcm", PatientName="Before^X")
    other = studies.write(tmp_path / "outside" / "b.dcm", one.read_bytes().replace(b"Before^X", b"Behind^Y"))
    for path in (one, other):
        os.utime(path, ns=(10**18, 10**18))
    assert names(tmp_path) == ["Before^X"]
    other.replace(one)
    assert names(tmp_path) == ["Behind^Y"]


def test_changes_as_quick_as_they_can_be_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    data = studies.encoded(studies.dataset(PatientName="N^0000"))
    with DicomFolder(tmp_path) as folder:
        for number in range(30):
            path.write_bytes(data.replace(b"N^0000", b"N^%04d" % number))
            assert [m.attributes["PatientName"] for m in folder.find(Query())] == [f"N^{number:04}"]


def test_renamed_folder(tmp_path: Path) -> None:
    series(tmp_path / "old", 3)
    look(tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    report = look(tmp_path)
    assert (report.read, report.removed) == (3, 3)
    with DicomFolder(tmp_path) as folder:
        assert {held.path.parent.name for held in folder.instances(Query())} == {"new"}


def test_folder_becomes_a_file_and_a_file_a_folder(tmp_path: Path) -> None:
    series(tmp_path / "a", 2)
    studies.dicom(tmp_path / "b", PatientName="B")
    look(tmp_path)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b").unlink()
    studies.dicom(tmp_path / "a", PatientName="A")
    studies.dicom(tmp_path / "b" / "1", PatientName="B1")
    assert names(tmp_path) == ["A", "B1"]


def test_file_that_is_written_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    path = studies.dicom(tmp_path / "a.dcm", PatientName="First^X")
    really, written = dicomscan.read_elements, threading.Event()

    def read(fd: int, size: int, tags: Any) -> Any:
        found = really(fd, size, tags)
        if not written.is_set():
            written.set()
            path.write_bytes(path.read_bytes().replace(b"First^X", b"Other^Y"))
        return found

    with mock.patch.object(dicomscan, "read_elements", read):
        look(tmp_path)
    assert look(tmp_path).read == 1
    assert names(tmp_path) == ["Other^Y"]


def test_what_is_not_dicom_and_what_is_damaged_is_passed_over_and_counted(tmp_path: Path) -> None:
    studies.sample(tmp_path)
    broken = studies.damaged(tmp_path / "broken")
    no_series = studies.dataset()
    del no_series.SeriesInstanceUID
    studies.write(tmp_path / "no-series.dcm", studies.encoded(no_series))
    report = look(tmp_path)
    assert report.damaged == len(broken) + 1
    assert report.not_dicom >= 2
    assert look(tmp_path).damaged == report.damaged
    with DicomFolder(tmp_path) as folder:
        assert len(list(folder.instances(Query()))) == len(studies.SAMPLE)


def test_directory_of_a_medium_is_no_instance(tmp_path: Path) -> None:
    shutil.copy(Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests" / "DICOMDIR", tmp_path)
    report = look(tmp_path)
    assert (report.not_dicom, report.damaged) == (1, 0)


def test_own_files_and_half_files_are_no_data(tmp_path: Path) -> None:
    series(tmp_path / "a", 2)
    for name in (".incoming-0123/x/files/a.dcm", ".talaria-part", "a/.talaria-0815", "a/.complete"):
        studies.dicom(tmp_path / name)
    report = look(tmp_path)
    assert (report.read, report.not_dicom) == (2, 0)
    assert look(tmp_path).unchanged == 2


def test_links_are_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    series(outside, 2, PatientName="Outside")
    paths = series(inside / "a", 2, PatientName="Inside")
    (inside / "file.dcm").symlink_to(outside / "0.dcm")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "same.dcm").symlink_to(paths[0])
    (inside / "nowhere").symlink_to(tmp_path / "missing")
    os.mkfifo(inside / "pipe")
    assert look(inside).read == 2
    assert names(inside) == ["Inside"]
    (tmp_path / "link").symlink_to(inside)
    assert names(tmp_path / "link") == ["Inside"]  # the folder itself is what its user named


def test_names_of_any_bytes(tmp_path: Path) -> None:
    paths = studies.odd_names(tmp_path / "Prüfung №1\n")
    with DicomFolder(tmp_path) as folder:
        assert {held.path for held in folder.instances(Query())} == set(paths)
    assert look(tmp_path).unchanged == len(paths)


def test_copies_of_an_instance_count_once_and_the_last_written_is_given(tmp_path: Path) -> None:
    path = studies.dicom(tmp_path / "a.dcm")
    tick(tmp_path)
    copy = studies.write(tmp_path / "z" / "copy.dcm", path.read_bytes())
    os.utime(copy, ns=(0, 0))  # what its times say doesn't count: programs set them
    with DicomFolder(tmp_path) as folder:
        (match,) = folder.find(Query())
        assert match.instances == 1
        (held,) = folder.instances(Query())
        assert held.path == copy
        copy.unlink()
        (held,) = folder.instances(Query())
        assert held.path == path


def test_every_transfer_syntax(tmp_path: Path) -> None:
    paths = studies.every_syntax(tmp_path)
    with DicomFolder(tmp_path) as folder:
        held = list(folder.instances(Query(PatientName=studies.PATIENT_NAME)))
    assert len(held) == len(paths)
    assert len({one.TransferSyntaxUID for one in held}) == len(paths)


def answers(folder: DicomFolder) -> Any:
    """Everything that a folder can tell."""
    return (
        [match.attributes for match in folder.find(Query())],
        [match.attributes for match in folder.find(Query(level="series"))],
        [(held.path, held.SOPInstanceUID, held.size) for held in folder.instances(Query())],
    )


@pytest.mark.parametrize("seed", range(4))
def test_index_that_kept_up_says_the_same_as_a_new_one(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    root = tmp_path / "data"
    root.mkdir()
    uids = {kind: [studies.uid() for _ in range(count)] for kind, count in (("study", 3), ("series", 6), ("sop", 20))}
    folders = [root, root / "a", root / "a" / "b", root / "c"]

    def write() -> None:
        path = choose.choice(folders) / f"{choose.randint(0, 12)}.dcm"
        if choose.random() < 0.2:
            studies.write(path, choose.choice([b"", b"no DICOM" * 100, studies.ct_bytes()[:-1]]))
            return
        number = choose.randrange(6)
        studies.dicom(
            path,
            study=uids["study"][number // 2],
            series=uids["series"][number],
            SOPInstanceUID=choose.choice(uids["sop"]),
            PatientID=choose.choice(["1", "1", "1", "2"]),
            PatientName=choose.choice(["A", "B"]),
            Modality=choose.choice(["CT", "MR"]),
        )

    def files() -> list[Path]:
        return [path for path in sorted(root.rglob("*.dcm")) if path.is_file()]

    def remove() -> None:
        if found := files():
            choose.choice(found).unlink()

    def move() -> None:
        if len(found := files()) > 1:
            one, other = choose.sample(found, 2)
            one.replace(other)

    def remove_folder() -> None:
        shutil.rmtree(choose.choice(folders[1:]), ignore_errors=True)

    kept = DicomFolder(root)
    for step in range(25):
        for _ in range(choose.randint(1, 4)):
            choose.choice([write, write, write, remove, move, remove_folder if step % 7 == 6 else write])()
        if choose.random() < 0.3:
            kept.close()
            kept = DicomFolder(root)  # from its file
        with (
            mock.patch.object(dicomfolder, "_place", lambda *_: (None, 0)),
            mock.patch.object(dicomfolder, "NAME", "-"),
        ):
            new = DicomFolder(root)
        with new:
            assert answers(kept) == answers(new), f"step {step}"
            assert (kept.report.damaged, kept.report.not_dicom) == (new.report.damaged, new.report.not_dicom)
    kept.close()
