"""Queries and retrievals at Orthanc."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imaging.query import Query
from protocols.dicomweb import pages
from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.dicomweb import driver, find, retrieve
from tests.servers.orthanc import Orthanc
from tests.targets import letters
from tests.targets.dicomweb_query.fetching import orthanc_target
from tests.targets.dicomweb_query.finding import files
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, PushReport, State


def test_orthanc_find(orthanc: Orthanc, tmp_path: Path) -> None:
    for number in range(5):
        studies.dicom(
            tmp_path / f"{number}.dcm",
            "CT_small.dcm" if number % 2 else "MR_small.dcm",
            AccessionNumber=f"ACC{number}",
            PatientID=f"P{number}",
            StudyDate=f"2024020{number + 1}",
            StudyDescription=f"Study {number % 2}",
            SeriesDescription="T1, axial" if number < 3 else "T2",
        )
    target = orthanc_target(orthanc)
    attempt(target, tmp_path).require()

    def accessions(**keys: Any) -> set[str]:
        return {str(match.attributes["AccessionNumber"]) for match in find(target, Query(**keys))}

    assert accessions() == {"ACC0", "ACC1", "ACC2", "ACC3", "ACC4"}
    assert accessions(AccessionNumber=("ACC1", "ACC4", "x")) == {"ACC1", "ACC4"}
    assert accessions(PatientID="P?") == {"ACC0", "ACC1", "ACC2", "ACC3", "ACC4"}
    assert accessions(PatientName="quellwasser^zyp*", PatientID="P3") == {"ACC3"}
    assert accessions(PatientName="quellwasser^zyx*") == set()
    assert accessions(StudyDescription=("Study 1",), PatientID="P1") == {"ACC1"}
    assert accessions(PatientName="quell*") == {"ACC0", "ACC1", "ACC2", "ACC3", "ACC4"}
    assert accessions(StudyDate="20240202-20240203") == {"ACC1", "ACC2"}
    assert accessions(Modality="CT") == {"ACC1", "ACC3"}
    assert accessions(StudyDescription=("Study 1",)) == {"ACC1", "ACC3"}
    assert accessions(SeriesDescription=("T1, axial",)) == {"ACC0", "ACC1", "ACC2"}
    assert accessions(SeriesDescription=("T1, axial", "T2"), AccessionNumber=("ACC3",)) == {"ACC3"}
    (match,) = find(target, Query(AccessionNumber=("ACC2",), level="series"))
    assert match.instances == 1
    assert match.attributes["SeriesDescription"] == "T1, axial"
    assert match.attributes["StudyDescription"] == "Study 0"


def test_names_that_orthanc_shows_without_some_letters_are_found(orthanc: Orthanc, tmp_path: Path) -> None:
    """It leaves out what Latin-1 doesn't have, unless it is told to answer otherwise."""
    letters.fill(orthanc)
    target = orthanc_target(orthanc)
    assert letters.wrong(lambda query: find(target, query)) == {}
    job = letters.searched(target, tmp_path)
    assert sorted(one.accession for one in job.studies.values()) == sorted(["0", letters.NUMBER, "7"])
    assert job.missing == ["x"]
    [match] = find(target, Query(PatientName="Павлов^Иван"))
    assert match.attributes["PatientName"] == "Павлов^Иван"


def test_orthanc_pages(orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGE", 7)
    for number in range(23):
        studies.write(tmp_path / f"{number}.dcm", studies.ct_bytes())
    target = orthanc_target(orthanc)
    attempt(target, tmp_path).require()
    assert len(list(find(target, Query()))) == 23


def test_orthanc_retrieve_equals_what_was_stored(orthanc: Orthanc, tmp_path: Path) -> None:
    studies.every_syntax(tmp_path / "in")
    studies.ct(tmp_path / "in" / "ct", 30)
    target = orthanc_target(orthanc)
    sent = attempt(target, tmp_path / "in")
    sent.require()
    report = PushReport()
    receipt = retrieve(target, Query(), tmp_path / "out", report)
    assert receipt.state is State.DELIVERED
    assert files(tmp_path / "out") == orthanc.files()
    assert len(report.outcomes) == len(sent.plan.items)


def test_orthanc_retrieve_through_dicomweb_client_agrees(orthanc: Orthanc, tmp_path: Path) -> None:
    """A client of other make sees the same studies."""
    from dicomweb_client.api import DICOMwebClient
    from dicomweb_client.session_utils import create_session_from_user_pass

    studies.ct(tmp_path / "in", 5)
    attempt(orthanc_target(orthanc), tmp_path / "in").require()
    client = DICOMwebClient(orthanc.dicomweb_url, session=create_session_from_user_pass(orthanc.user, orthanc.password))
    theirs = client.search_for_studies()
    ours = list(find(orthanc_target(orthanc), Query()))
    assert [one["0020000D"]["Value"][0] for one in theirs] == [match.StudyInstanceUID for match in ours]


@pytest.mark.usefixtures("impatient")
def test_orthanc_that_loses_an_instance(orthanc: Orthanc, tmp_path: Path) -> None:
    studies.ct(tmp_path, 5)
    plan = scan([tmp_path])
    victim = plan.items[3]
    assert victim.header
    orthanc.drop(victim.header.SOPInstanceUID)
    sent = attempt(orthanc_target(orthanc, verify=Level.LISTED), plan)
    receipt = sent.require()
    assert receipt.state is State.PARTIAL
    assert {item.path for item in receipt.items if item.outcome is Kind.REJECTED} == {victim.path}


def test_one_uid_in_two_series_comes_once(orthanc: Orthanc, tmp_path: Path) -> None:
    study = studies.uid()
    for number in range(3):
        one = studies.dataset(study=study, series="1.2.8.1")
        studies.write(tmp_path / f"{number}.dcm", studies.encoded(one))
        one.SeriesInstanceUID = "1.2.8.2"
        orthanc.request("POST", "/instances", studies.encoded(one))
    target = orthanc_target(orthanc, concurrency=1)
    attempt(target, tmp_path).require()
    assert {match.instances for match in find(target, Query(StudyInstanceUID=study, level="series"))} == {3}
    receipt = retrieve(target, Query(StudyInstanceUID=study), tmp_path / "out", PushReport())
    assert receipt.state is State.DELIVERED and len(files(tmp_path / "out")) == 3, receipt.notes
    assert "3 instances are in another series as well, and come once" in "; ".join(receipt.notes)


def test_driver_can_query() -> None:
    assert driver.find is find
    assert driver.retrieve is retrieve
