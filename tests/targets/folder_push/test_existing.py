"""Folder targets: layout, folders that are there already, permissions, links, verification, what is told."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydicom.data import get_testdata_files

from blocks.folder import FolderTarget
from protocols.files import filesystem as fs
from protocols.files import incoming
from protocols.files.tree import Tree
from talaria.testing import studies
from talaria.testing.harness import Sent, attempt, sending
from talaria.testing.process import as_loaded
from tasks.folder import check
from transfer.errors import Denied, Interrupted, Misconfigured, NotFound, Unreachable
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, State


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tmp_path / "study"


def target(folder: Path, **fields: Any) -> FolderTarget:
    made = FolderTarget(folder=str(folder), **fields)
    made.named("archive")
    return made


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def delivered(sent: Sent) -> Sent:
    assert sent.require().state is State.DELIVERED, sent.rejected
    return sent


# ---- layout


def test_the_default_layout(archive: Path, study: Path) -> None:
    studies.ct(study / "a", 1)
    plan = delivered(attempt(target(archive), study)).plan
    assert tree(archive) == {f"{plan.dispatch_id}/a/CT0001.dcm", f"{plan.dispatch_id}/.complete"}
    assert (archive / plan.dispatch_id / ".complete").read_bytes() == b""
    assert os.listdir(archive) == [plan.dispatch_id]


def test_a_layout_over_several_studies(archive: Path, study: Path) -> None:
    for name, patient in (("x", "P1"), ("y", "P2")):
        studies.dicom(study / name / "1.dcm", PatientID=patient, StudyDate="20240102")
        studies.note(study / name / "note.json")
    delivered(attempt(target(archive, layout="{PatientID}/{StudyDate}"), study))
    assert tree(archive) == {
        f"{patient}/20240102/{name}"
        for patient, folder in (("P1", "x"), ("P2", "y"))
        for name in (".complete", f"{folder}/1.dcm", f"{folder}/note.json")
    }


def test_values_of_a_header_stay_inside_the_folder(archive: Path, study: Path) -> None:
    studies.dicom(study / "1.dcm", PatientID="../../../etc", AccessionNumber="/abs")
    delivered(attempt(target(archive, layout="{PatientID}/{AccessionNumber}"), study))
    (patient,) = archive.iterdir()
    (accession,) = patient.iterdir()
    assert re.fullmatch(r"_\.\._\.\._etc~[0-9a-f]{8}", patient.name)
    assert re.fullmatch(r"_abs~[0-9a-f]{8}", accession.name)
    assert tree(accession) == {"1.dcm", ".complete"}
    assert os.listdir(archive.parent) == ["archive", "study"] or set(os.listdir(archive.parent)) == {"archive", "study"}


def test_two_patients_never_share_a_folder(archive: Path, study: Path) -> None:
    """Neither in one dispatch nor in two."""
    patients = ["12/3", "12_3", "12\\3", ".12_3", "ab", "AB", "Mu\u0308ller", "Müller", "", "unknown"]
    for number, patient in enumerate(patients):
        studies.dicom(study / str(number) / f"{number}.dcm", PatientID=patient, SpecificCharacterSet="ISO_IR 192")
    delivered(attempt(target(archive, layout="{PatientID}"), study))
    assert sorted(len(tree(folder)) for folder in archive.iterdir()) == [2] * len(patients)
    assert len({folder.name.casefold() for folder in archive.iterdir()}) == len(patients)
    shutil.rmtree(archive)
    archive.mkdir()
    for number in range(len(patients)):
        delivered(attempt(target(archive, layout="{PatientID}"), study / str(number)))
    assert sorted(len(tree(folder)) for folder in archive.iterdir()) == [2] * len(patients)


def test_a_share_that_takes_small_letters_for_capitals(
    archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another patient's folder is not used: a link that no listing shows stands for such a share."""
    (archive / "AB").mkdir()
    (archive / "ab").symlink_to("AB")
    really = os.listdir
    monkeypatch.setattr("protocols.files.tree.os.listdir", lambda path: [n for n in really(path) if n != "ab"])
    studies.dicom(study / "1.dcm", PatientID="ab")
    studies.dicom(study / "2.dcm", PatientID="AB")
    delivered(attempt(target(archive, layout="{PatientID}"), study / "2.dcm"))
    delivered(attempt(target(archive, layout="{PatientID}"), study / "1.dcm"))
    folders = {path.name for path in archive.iterdir() if not path.is_symlink()}
    assert len(folders) == 2
    assert tree(archive / "AB") == {"2.dcm", ".complete"}


# ---- into a folder that is there already

SAME = {"layout": "{PatientID}"}


def test_two_dispatches_share_a_folder(archive: Path, study: Path) -> None:
    studies.dicom(study / "one" / "1.dcm")
    studies.dicom(study / "two" / "2.dcm")
    delivered(attempt(target(archive, **SAME), study / "one"))
    marker = archive / studies.PATIENT_ID / ".complete"
    os.utime(marker, (0, 0))
    delivered(attempt(target(archive, **SAME), study / "two"))
    assert tree(archive) == {f"{studies.PATIENT_ID}/{name}" for name in ("1.dcm", "2.dcm", ".complete")}
    assert marker.stat().st_mtime > 0, "whoever watches the marker learns of the second"
    assert os.listdir(archive) == [studies.PATIENT_ID]


def test_a_folder_is_not_marked_while_another_dispatch_comes_into_it(archive: Path, study: Path) -> None:
    for number in range(1, 4):
        studies.dicom(study / ("one" if number == 1 else "two") / f"{number}.dcm")
    delivered(attempt(target(archive, **SAME), study / "one"))
    marker = archive / studies.PATIENT_ID / ".complete"
    assert marker.exists()
    obstacle = marker.with_name("3.dcm")
    obstacle.mkdir()
    seen = []
    sent = attempt(target(archive, **SAME), study / "two", told=lambda *_: seen.append(marker.exists()))
    assert set(sent.rejected) == {"3.dcm"}
    assert seen == [False, False]
    assert not marker.exists(), "marked as complete, but a file is missing"
    obstacle.rmdir()
    delivered(attempt(target(archive, **SAME), sent.plan, done=sent.arrived))
    assert marker.exists()


def test_many_dispatches_into_one_folder_at_once(archive: Path, study: Path) -> None:
    wanted = {}
    for number in range(6):
        for path in studies.ct(study / str(number) / f"series{number}", 12):
            wanted[str(path.relative_to(study / str(number)))] = path.read_bytes()
        studies.write(study / str(number) / "shared" / f"{number}.txt", str(number).encode())
        wanted[f"shared/{number}.txt"] = str(number).encode()
    sent: list[Sent] = []
    gate = threading.Barrier(6)

    def work(number: int) -> None:
        gate.wait()
        sent.append(attempt(target(archive, layout="all"), study / str(number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == 6
    for one in sent:
        delivered(one)
    got = {str(p.relative_to(archive / "all")): p.read_bytes() for p in (archive / "all").rglob("*") if p.is_file()}
    assert got.pop(".complete") == b""
    assert got == wanted
    assert os.listdir(archive) == ["all"]


def test_another_instance_of_the_same_name_is_not_lost(archive: Path, study: Path) -> None:
    (first,) = studies.ct(study / "one", 1)
    studies.ct(study / "two", 2)
    delivered(attempt(target(archive, layout="all"), study / "one"))
    sent = attempt(target(archive, layout="all"), study / "two")
    assert sent.require().state is State.PARTIAL
    assert set(sent.rejected) == {"CT0001.dcm"}
    assert "another instance" in sent.rejected["CT0001.dcm"]
    assert "layout" in sent.rejected["CT0001.dcm"]
    assert (archive / "all" / "CT0001.dcm").read_bytes() == first.read_bytes()
    assert tree(archive) == {"all/CT0001.dcm", "all/CT0002.dcm"}, "not complete: one of the second dispatch is missing"


def test_another_instance_of_the_same_length_and_time_is_not_taken_for_it(archive: Path, study: Path) -> None:
    """What unpacks archives may give every file the same time."""
    for name in ("one", "two"):
        (file,) = studies.ct(study / name, 1)
        os.utime(file, (1e9, 1e9))
    assert len({file.stat().st_size for file in study.rglob("*.dcm")}) == 1
    delivered(attempt(target(archive, layout="all"), study / "one"))
    sent = attempt(target(archive, layout="all"), study / "two")
    assert "another instance" in sent.rejected["CT0001.dcm"]


@pytest.mark.parametrize("level", Level)
def test_a_file_that_has_been_damaged_is_sent_again(archive: Path, study: Path, level: Level) -> None:
    (file,) = studies.ct(study, 1)
    first = delivered(attempt(target(archive), study))
    there = archive / first.plan.dispatch_id / "CT0001.dcm"
    data, times = bytearray(there.read_bytes()), there.stat()
    data[-1] ^= 1
    there.write_bytes(data)
    os.utime(there, ns=(times.st_atime_ns, times.st_mtime_ns))
    if level is Level.PROVEN:
        assert set(attempt(target(archive, verify=level), first.plan, done=first.arrived).rejected) == {"CT0001.dcm"}
        assert not there.with_name(".complete").exists(), "not complete: one is not what was sent"
    again = delivered(attempt(target(archive, verify=level), first.plan))
    assert again.outcomes["CT0001.dcm"].kind is Kind.WARNING
    assert there.read_bytes() == file.read_bytes()
    assert there.with_name(".complete").exists()


def test_a_newer_version_replaces_an_older_one_with_a_warning(archive: Path, study: Path) -> None:
    note = studies.note(study / "result.json")
    delivered(attempt(target(archive, layout="all"), study))
    new = studies.note(note).read_bytes()
    sent = delivered(attempt(target(archive, layout="all"), study))
    assert sent.outcomes["result.json"].kind is Kind.WARNING
    assert (archive / "all" / "result.json").read_bytes() == new


def test_the_same_content_with_another_time_is_already_there(archive: Path, study: Path) -> None:
    """As on file systems that keep coarser times."""
    studies.ct(study, 1)
    first = delivered(attempt(target(archive), study))
    there = archive / first.plan.dispatch_id / "CT0001.dcm"
    os.utime(there, (0, 0))
    inode = there.stat().st_ino
    again = delivered(attempt(target(archive), first.plan))
    assert again.outcomes["CT0001.dcm"].kind is Kind.ALREADY
    assert again.moved == 0
    assert there.stat().st_ino == inode


def test_what_is_in_the_way_rejects_one_file(archive: Path, study: Path) -> None:
    studies.ct(study, 2)
    studies.ct(study / "sub", 1)
    (archive / "all" / "CT0001.dcm").mkdir(parents=True)
    (archive / "all" / "sub").write_text("a file")
    (archive / "all" / "CT0003.dcm").symlink_to(study / "CT0002.dcm")
    studies.ct(study, 3)
    sent = attempt(target(archive, layout="all"), study)
    assert set(sent.rejected) == {"CT0001.dcm", "CT0003.dcm", "sub/CT0001.dcm"}
    assert "a folder" in sent.rejected["CT0001.dcm"] and "a link" in sent.rejected["CT0003.dcm"]
    assert sent.rejected["sub/CT0001.dcm"] == "there is a file where its folder should be: sub"
    assert sent.arrived == {"CT0002.dcm"}
    assert (archive / "all" / "sub").read_text() == "a file"
    assert not (archive / "all" / ".complete").exists()
    assert os.listdir(archive) == ["all"]


def test_a_file_in_the_place_of_the_folder(archive: Path, study: Path) -> None:
    studies.ct(study, 2)
    (archive / "all").write_text("a file")
    sent = attempt(target(archive, layout="all"), study)
    assert len(sent.rejected) == 2
    assert (archive / "all").read_text() == "a file"
    assert os.listdir(archive) == ["all"]


def test_a_file_in_the_place_of_a_folder_above_costs_one_patient(archive: Path, study: Path) -> None:
    for patient in ("P1", "P2"):
        studies.dicom(study / patient / "1.dcm", PatientID=patient, StudyDate="20240101")
    (archive / "P1").write_text("a file")
    sent = attempt(target(archive, layout="{PatientID}/{StudyDate}"), study)
    assert sent.rejected == {"P1/1.dcm": "there is a file where its folder should be"}
    assert sent.arrived == {"P2/1.dcm"}
    assert sent.require().state is State.PARTIAL
    assert (archive / "P1").read_text() == "a file"
    assert tree(archive) == {"P1", "P2/20240101/P2/1.dcm", "P2/20240101/.complete"}


@pytest.mark.parametrize("where", ["the folder", "above it", "in the layout"])
def test_a_file_in_the_place_of_the_targets_folder(archive: Path, study: Path, where: str) -> None:
    studies.ct(study, 1)
    file = archive / "file"
    file.write_text("a file")
    folder = {"the folder": file, "above it": file / "below", "in the layout": archive}[where]
    made = target(folder, layout="file/{PatientID}")
    assert isinstance(check(made).error, Misconfigured), "the check does what a push does"
    sent = attempt(made, study)
    if where == "in the layout":
        assert sent.rejected == {"CT0001.dcm": "there is a file where its folder should be"}
    else:
        assert isinstance(sent.error, Misconfigured)
        assert "there is a file where a folder is expected" in str(sent.error)
    assert file.read_text() == "a file"


def test_the_check_writes_where_the_layout_leads(
    open_folder: Path, as_nobody: Callable[[], AbstractContextManager[None]]
) -> None:
    (open_folder / "closed").mkdir(mode=0o555)
    with as_nobody():
        assert check(target(open_folder, layout="open/{PatientID}")).ok
        health = check(target(open_folder, layout="closed/{PatientID}"))
    assert isinstance(health.error, Denied)
    assert not health.ok
    assert sorted(path.name for path in open_folder.iterdir()) == ["closed"]


def test_names_that_a_share_takes_for_one(archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that differ only in capitals: the second is rejected, and never written over the first."""
    monkeypatch.setattr("protocols.files.tree.Tree.is_caseless", lambda tree, folder: True)
    studies.ct(study, 1)
    studies.write(study / "ct0001.DCM", studies.ct_bytes())
    sent = attempt(target(archive), study)
    assert set(sent.rejected) == {"ct0001.DCM"}
    assert "CT0001.dcm has its name there" in sent.rejected["ct0001.DCM"]
    assert sent.arrived == {"CT0001.dcm"}
    assert not list(archive.rglob(".complete"))


def test_holes_and_times_are_kept(archive: Path, study: Path) -> None:
    study.mkdir()
    with open(study / "sparse.bin", "wb") as file:
        file.write(b"begin")
        file.truncate(64 << 20)
        file.seek(40 << 20)
        file.write(b"middle")
    os.utime(study / "sparse.bin", ns=(1, 1_234_567_890_123_456_789))
    sent = delivered(attempt(target(archive, verify="proven"), study))
    there = archive / sent.plan.dispatch_id / "sparse.bin"
    assert there.stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert there.stat().st_size == 64 << 20
    assert there.stat().st_blocks * 512 < 1 << 20
    assert sent.moved == 64 << 20


def test_pydicoms_own_files_arrive_as_they_are(archive: Path, tmp_path: Path) -> None:
    """Whatever they are: a folder takes all, and the receipt equals what is there."""
    files = [Path(name) for name in get_testdata_files() if Path(name).is_file()]
    source = tmp_path / "pydicom"
    for file in files:
        relative = Path(*file.parts[file.parts.index("data") + 1 :])
        studies.write(source / relative, file.read_bytes())
    plan = scan([source])
    assert len(plan.items) > 150
    sent = delivered(attempt(target(archive, verify="proven"), plan))
    receipt = sent.require()
    there = archive / plan.dispatch_id
    assert {item.path for item in receipt.items if item.outcome is Kind.DELIVERED} == tree(there) - {".complete"}
    assert all((there / item.path).read_bytes() == plan.file(item).read_bytes() for item in plan.items)
    assert receipt.bytes == sum(path.stat().st_size for path in there.rglob("*") if path.is_file())


def test_one_rejected_link_cut_retry(archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No marker, and the first true reason, also where everything is verified (T1)."""
    studies.ct(study, 3)
    (archive / "all").mkdir()
    (archive / "all" / "CT0002.dcm").mkdir()
    for level in Level:
        shutil.rmtree(archive / "all")
        (archive / "all" / "CT0002.dcm").mkdir(parents=True)
        with sending(target(archive, layout="all", verify=level), study) as sender:
            with monkeypatch.context() as patch:
                patch.setattr("tasks.folder._Push._verify", _interrupted)
                assert isinstance(sender.attempt().error, Interrupted)
            receipt = sender.attempt().require()
        assert receipt.state is State.PARTIAL
        assert {item.path: (item.outcome, item.detail) for item in receipt.items if item.outcome is Kind.REJECTED} == {
            "CT0002.dcm": (Kind.REJECTED, "there is a folder with its name")
        }
        assert not (archive / "all" / ".complete").exists()


def test_what_an_attempt_brought_before_it_broke_off_is_delivered_and_not_already_there(
    archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies.ct(study, 3)
    flush = Tree.flush

    def gone(tree: Tree, folder: str) -> None:
        if (archive / "all" / "CT0001.dcm").exists():
            raise OSError(errno.ESTALE, "Stale file handle")
        flush(tree, folder)

    with sending(target(archive, layout="all"), study) as sender:
        with monkeypatch.context() as patch:
            patch.setattr(Tree, "flush", gone)
            assert isinstance(sender.attempt().error, Interrupted)
        assert tree(archive / "all") == {"CT0001.dcm", "CT0002.dcm", "CT0003.dcm"}
        receipt = sender.attempt().require()
    assert receipt.counts[Kind.DELIVERED] == 3
    assert receipt.bytes == sum(path.stat().st_size for path in study.iterdir())


def _interrupted(*_: Any) -> None:
    raise Interrupted("the share went away")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("threads", [1, 4])
def test_files_at_which_the_file_system_fails_cost_themselves_alone(
    archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch, code: int, threads: int
) -> None:
    """As a bad sector does, or a folder of another owner; where nothing can be written, it ends soon."""
    studies.ct(study, 20)
    plan, bad = scan([study]), {"CT0001.dcm", "CT0003.dcm", "CT0020.dcm"}
    numbers = {plan.file(item).stat().st_ino for item in plan.items if item.path in bad}
    copy, tried = incoming.copy_bytes, []

    def failing(reader: int, *more: Any) -> None:
        if os.fstat(reader).st_ino in numbers:
            tried.append(reader)
            raise OSError(code, os.strerror(code))
        copy(reader, *more)

    monkeypatch.setattr(incoming, "copy_bytes", failing)
    where = target(archive, concurrency=threads)
    with sending(where, plan) as sender:
        first = sender.attempt()
        assert first.arrived == {item.path for item in plan.items} - bad
        assert len(tried) == 3
        if code in (errno.EACCES, errno.EPERM):
            assert set(first.rejected) == bad
            assert first.require().state is State.PARTIAL
        else:
            assert isinstance(first.error, Interrupted)
            left = [row for row in sender.receipt().items if row.outcome is Kind.UNSENT]
            assert len(left) == 3 and all(os.strerror(code) in row.detail for row in left)
        assert not (archive / plan.dispatch_id / ".complete").exists()
        numbers.clear()
        if first.error:
            assert sender.attempt().require().state is State.DELIVERED
            assert (archive / plan.dispatch_id / ".complete").exists()
    numbers |= {plan.file(item).stat().st_ino for item in plan.items}
    tried.clear()
    sent = attempt(target(archive, layout="other", concurrency=threads), plan)
    assert isinstance(sent.error, Denied if code in (errno.EACCES, errno.EPERM) else Interrupted)
    assert not sent.outcomes
    assert len(tried) <= incoming.ASIDE_IN_A_ROW + threads


def test_a_name_too_long_for_the_file_system_rejects_one_file(archive: Path, study: Path) -> None:
    """The source may take longer names than the target; a path that is too long stands for that."""
    studies.ct(study, 1)
    deep = study.joinpath(*["d" * 200] * 19)
    here = os.getcwd()
    study.mkdir(exist_ok=True)
    try:
        for part in deep.relative_to(study).parts:
            os.chdir(study if here == os.getcwd() else ".")
            os.mkdir(part)
            os.chdir(part)
        Path("1.dcm").write_bytes(studies.ct_bytes())
    finally:
        os.chdir(here)
    plan = scan([study])
    sent = attempt(target(archive, layout="/".join(letter * 200 for letter in "abc")), plan)
    assert sent.arrived == {"CT0001.dcm"}
    assert all("too long" in why or "can't be read" in why for why in sent.rejected.values())
    assert len(sent.rejected) + len([item for item in plan.items if item.problem]) == 1


# ---- what is handed over again


def test_a_dispatch_that_was_moved_away_is_not_missed(archive: Path, study: Path) -> None:
    """Whoever works on what arrives may take it away; the ledger knows that it had come."""
    studies.ct(study, 2)
    first = delivered(attempt(target(archive), study))
    shutil.rmtree(archive / first.plan.dispatch_id)
    again = attempt(target(archive), first.plan, done=first.arrived)
    assert again.require().state is State.DELIVERED
    assert not list(archive.iterdir())


def test_a_marker_that_is_missing_is_completed(archive: Path, study: Path) -> None:
    """As after a kill between the last file and the marker."""
    studies.ct(study, 2)
    first = delivered(attempt(target(archive), study))
    marker = archive / first.plan.dispatch_id / ".complete"
    marker.unlink()
    delivered(attempt(target(archive), first.plan, done=first.arrived))
    assert marker.exists()
    marker.unlink()
    (archive / first.plan.dispatch_id / "CT0001.dcm").unlink()
    sent = attempt(target(archive), first.plan, done=first.arrived)
    assert any("1 files" in note for note in sent.require().notes)
    assert not marker.exists(), "marked as complete, but a file is missing"


def test_verification_finds_what_is_gone_or_damaged(archive: Path, study: Path) -> None:
    studies.ct(study, 4)
    first = delivered(attempt(target(archive), study))
    there = archive / first.plan.dispatch_id
    (there / "CT0001.dcm").unlink()
    os.truncate(there / "CT0002.dcm", 10)
    data = bytearray((there / "CT0003.dcm").read_bytes())
    data[-1] ^= 1
    (there / "CT0003.dcm").write_bytes(data)
    accepted = attempt(target(archive), first.plan, done=first.arrived)
    assert accepted.require().state is State.DELIVERED
    assert accepted.require().verified is Level.ACCEPTED
    listed = attempt(target(archive, verify="listed"), first.plan, done=first.arrived)
    assert set(listed.rejected) == {"CT0001.dcm", "CT0002.dcm"}
    proven = attempt(target(archive, verify="proven"), first.plan, done=first.arrived)
    assert set(proven.rejected) == {"CT0001.dcm", "CT0002.dcm", "CT0003.dcm"}
    assert proven.require().state is State.PARTIAL
    again = attempt(target(archive, verify="proven"), first.plan, done={"CT0004.dcm"})
    assert delivered(again).require().verified is Level.PROVEN


def test_what_cannot_be_read_again_is_not_called_proven(archive: Path, study: Path) -> None:
    files = studies.ct(study, 2)
    first = delivered(attempt(target(archive), study))
    files[0].unlink()
    sent = attempt(target(archive, verify="proven"), first.plan, done=first.arrived)
    assert sent.require().verified is Level.LISTED
    assert sent.require().notes


# ---- permissions, links


def test_permissions_and_group(archive: Path, study: Path) -> None:
    studies.ct(study / "sub", 2)
    group = os.getgid()
    plan = delivered(attempt(target(archive, mode="0640", dir_mode="0750", group=str(group)), study)).plan
    for path in (archive / plan.dispatch_id, *(archive / plan.dispatch_id).rglob("*")):
        wanted = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
        assert path.stat().st_gid == group
    assert stat.S_IMODE((study / "sub" / "CT0001.dcm").stat().st_mode) != 0o640


def test_without_permissions_the_umask_decides(archive: Path, study: Path) -> None:
    studies.ct(study / "sub", 1)
    before = os.umask(0o027)
    try:
        plan = delivered(attempt(target(archive), study)).plan
    finally:
        os.umask(before)
    for path in (archive / plan.dispatch_id).rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640)


def test_a_folder_that_hands_its_group_down_keeps_doing_so(archive: Path, study: Path) -> None:
    studies.ct(study / "sub", 1)
    archive.chmod(0o2775)
    plan = delivered(attempt(target(archive, dir_mode="0770"), study)).plan
    assert stat.S_IMODE((archive / plan.dispatch_id / "sub").stat().st_mode) == 0o2770


def test_a_group_that_does_not_exist(archive: Path, study: Path) -> None:
    studies.ct(study, 1)
    sent = attempt(target(archive, group="no-such-group"), study)
    assert isinstance(sent.error, Misconfigured)
    assert "no-such-group" in str(sent.error)
    assert not check(target(archive, group="no-such-group")).ok


def test_links_only_where_it_is_told_so(archive: Path, study: Path) -> None:
    (file,) = studies.ct(study, 1)
    plan = scan([study])
    there = archive / plan.dispatch_id / "CT0001.dcm"
    for fields, linked in (({}, False), ({"link": "auto"}, True), ({"link": "auto", "mode": "0600"}, False)):
        shutil.rmtree(archive / plan.dispatch_id, ignore_errors=True)
        mode = file.stat().st_mode
        delivered(attempt(target(archive, **fields), plan))
        assert (there.stat().st_ino == file.stat().st_ino) is linked
        assert there.read_bytes() == file.read_bytes()
        assert file.stat().st_mode == mode, "the source's own permissions"


def test_times_are_kept(archive: Path, study: Path) -> None:
    (file,) = studies.ct(study, 1)
    os.utime(file, ns=(1, 1_234_567_890_123_456_789))
    plan = delivered(attempt(target(archive), study)).plan
    assert (archive / plan.dispatch_id / "CT0001.dcm").stat().st_mtime_ns == 1_234_567_890_123_456_789


# ---- a folder that isn't as it should be


def test_a_missing_folder_is_never_made(archive: Path, study: Path) -> None:
    studies.ct(study, 1)
    sent = attempt(target(archive / "share" / "x"), study)
    assert isinstance(sent.error, NotFound)
    assert "mount" in str(sent.error)
    assert not list(archive.iterdir())


def test_a_file_in_the_place_of_the_target(archive: Path, study: Path) -> None:
    studies.ct(study, 1)
    file = studies.write(archive / "file", b"x")
    for folder in (file, file / "below"):
        assert isinstance(attempt(target(folder), study).error, Misconfigured)
        assert isinstance(check(target(folder)).error, Misconfigured)


def test_no_permission(open_folder: Path, as_nobody: Callable[[], AbstractContextManager[None]]) -> None:
    studies.ct(open_folder / "study", 1)
    closed = open_folder / "closed"
    closed.mkdir(mode=0o555)
    (open_folder / "secret").mkdir(mode=0o700)
    plan = scan([open_folder / "study"])
    with as_nobody():
        if os.geteuid() != os.getuid():
            for folder in (closed, open_folder / "secret" / "below"):
                sent = attempt(target(folder), plan)
                assert isinstance(sent.error, Denied)
                assert "nobody" in str(sent.error)
                assert not sent.outcomes
                health = check(target(folder))
                assert isinstance(health.error, Denied)
        else:
            closed.chmod(0o555)
            assert isinstance(attempt(target(closed), plan).error, Denied)
            assert isinstance(check(target(closed)).error, Denied)
    assert not list(closed.iterdir())


def test_a_share_that_hangs_is_unreachable(archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.ct(study, 1)
    over = threading.Event()
    real = Path.stat

    def hanging(path: Path, **options: Any) -> os.stat_result:
        if path == archive:
            over.wait(20)
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", hanging)
    begun = time.monotonic()
    sent = attempt(target(archive, connect_timeout_s=0.3), study)
    over.set()
    assert isinstance(sent.error, Unreachable)
    assert "0.3 s" in str(sent.error)
    assert time.monotonic() - begun < as_loaded(5)


def test_a_check_that_fails_leaves_nothing(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tree, "rename", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    health = check(target(archive))
    assert not health.ok
    assert [(probe.name, probe.result) for probe in health.probes][:2] == [("folder", "ok"), ("authorize", "failed")]
    assert "Input/output error" in health.probes[1].detail
    assert not list(archive.iterdir())


def test_check_tells_what_it_found(archive: Path) -> None:
    health = check(target(archive))
    assert {probe.name: probe.result for probe in health.probes} == {"folder": "ok", "authorize": "ok", "space": "ok"}
    assert str(archive) in health.probes[0].detail
    assert "free" in health.probes[2].detail


# ---- what is told


def test_messages_hold_nothing_of_the_patient(archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout may make folders of a patient's data; what goes wrong in them must not tell."""
    studies.dicom(study / "1.dcm")
    studies.dicom(study / "2.dcm")
    layout = {"layout": "{PatientID}/{AccessionNumber}"}
    first = delivered(attempt(target(archive, **layout), study))
    texts = [repr(first.receipt)]
    there = archive / studies.PATIENT_ID / studies.ACCESSION
    (there / "1.dcm").unlink()
    (there / "1.dcm").mkdir()
    rejected = attempt(target(archive, **layout), first.plan)
    texts += [*rejected.rejected.values(), repr(rejected.receipt)]
    shutil.rmtree(archive / studies.PATIENT_ID)

    def fail(number: int) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            raise OSError(number, os.strerror(number), str(there), None, str(there))

        return call

    for number in (2, 5, 13, 28, 116):
        for name in ("rename", "open", "make_folders"):
            with monkeypatch.context() as patch:
                real = getattr(Tree, name)
                patch.setattr(
                    Tree,
                    name,
                    lambda *a, real=real, number=number, **o: (
                        fail(number)() if ".incoming" in str(a[1]) else real(*a, **o)
                    ),
                )
                sent = attempt(target(archive, **layout), first.plan)
            if sent.error:
                texts += ["".join(traceback.format_exception(sent.error)), repr(sent.error)]
            texts += list(sent.rejected.values())
            shutil.rmtree(archive / studies.PATIENT_ID, ignore_errors=True)
    assert len(texts) > 10
    for text in texts:
        assert studies.PATIENT_ID not in text
        assert studies.ACCESSION not in text


# ---- the block


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"folder": "relative/path"}, "absolute"),
        ({"folder": ""}, "absolute"),
        ({"folder": "/a\nb"}, "control"),
        ({"layout": "{PatientName}"}, "fields are"),
        ({"layout": "../{PatientID}"}, "relative path"),
        ({"mode": 640}, "quotes"),
        ({"mode": "rw-r--r--"}, "octal"),
        ({"mode": "0999"}, "octal"),
        ({"mode": "0040"}, "owner"),
        ({"dir_mode": "0640"}, "owner"),
        ({"group": " "}, "group"),
        ({"link": "always"}, "never"),
        ({"direction": "query"}, "only store"),
        ({"unknown": 1}, "Extra"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        FolderTarget(**{"folder": "/data", **fields})


def test_modes_are_octal() -> None:
    assert FolderTarget(folder="/data", mode="640", dir_mode="0o2750").mode == "0640"
    assert FolderTarget(folder="/data", dir_mode="0o2750").dir_mode == "2750"


def test_the_endpoint_is_the_place() -> None:
    one = FolderTarget(folder="/data")
    assert one.endpoint_for() == FolderTarget(folder="/data", concurrency=1).endpoint_for()
    assert one.endpoint_for() != FolderTarget(folder="/data2").endpoint_for()
    assert one.endpoint_for() != FolderTarget(folder="/data", layout="{PatientID}").endpoint_for()


# ---- file systems


def test_kinds_of_file_systems(tmp_path: Path) -> None:
    said = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", tmp_path], capture_output=True, text=True, check=True)
    assert fs.kind(tmp_path) == said.stdout.strip()
    assert fs.kind(Path("/dev/shm")) == "tmpfs"
    assert fs.kind(Path("/proc/self")) == "proc"


def test_a_flush_of_everything(tmp_path: Path) -> None:
    calls = 0

    def looked() -> None:
        nonlocal calls
        calls += 1

    assert fs.flush_all(tmp_path, looked)
    assert calls
