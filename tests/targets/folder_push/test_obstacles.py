"""What is in the place of a file or folder, and files at which the file system fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from protocols.files import incoming
from talaria.testing import studies
from talaria.testing.harness import attempt, sending
from tasks.folder import check
from tests.targets.folder_push.pushing import target, tree
from transfer.errors import Denied, Interrupted, Misconfigured
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import State


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
