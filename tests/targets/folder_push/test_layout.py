"""Which folder a dispatch gets, and what it shares it with."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from tests.targets.folder_push.pushing import delivered, target, tree


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
