"""What can be queried and pulled from, of every type: found as it was sent, and brought back instance by instance."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from blocks.base import Target
from imaging.query import Query
from talaria.testing import studies
from talaria.testing.harness import Harness, attempt
from tasks import DRIVERS
from tests.servers.qr import Instance
from transfer.errors import NotFound
from transfer.outcome import Kind
from transfer.receipt import Level, PushReport, State

SERVERS = {
    "dicom-orthanc": "dicom",
    "dicom-tls-orthanc": "dicom_tls",
    "dicomweb-orthanc": "dicomweb",
    "dicomweb-orthanc-tls": "dicomweb",
    "dicomweb-file": "dicomweb",
}


@pytest.fixture(params=list(SERVERS))
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    (tmp_path / "server").mkdir()
    with import_module(f"tests.targets.{SERVERS[request.param]}").HARNESSES[request.param](tmp_path / "server") as one:
        yield one


def test_every_type_that_can_be_queried_is_here() -> None:
    able = {name.replace("-", "_") for name, driver in DRIVERS.items() if driver.find or driver.retrieve}
    assert able == set(SERVERS.values())


def test_what_was_sent_is_found_and_brought_back(harness: Harness, tmp_path: Path) -> None:
    study, other = studies.uid(), studies.uid()
    series = [studies.uid() for _ in range(2)]
    sent = {}
    for number in range(6):
        path = studies.dicom(
            tmp_path / "sent" / f"{number}.dcm",
            study=study,
            series=series[number % 2],
            AccessionNumber="A 1",
            StudyDescription="Thorax, nativ",
            SeriesDescription=f"S{number % 2}",
            Modality=("CT", "MR")[number % 2],
        )
        one = Instance.of(path.read_bytes())
        sent[one.uid] = one
    studies.dicom(tmp_path / "sent" / "other.dcm", study=other, AccessionNumber="A2", StudyDescription="Knee")
    assert attempt(harness.target, tmp_path / "sent").require().state is State.DELIVERED
    target: Target = harness.target
    driver = harness.driver
    assert driver.find is not None and driver.retrieve is not None

    def found(**keys: object) -> list[str]:
        return sorted(match.StudyInstanceUID for match in driver.find(target, Query(**keys)))  # type: ignore[misc,arg-type]

    assert found(AccessionNumber=("A 1",)) == [study]
    assert found(AccessionNumber=("A 1", "A2", "A3")) == sorted([study, other])
    assert found(StudyDescription=("Thorax, nativ",)) == [study]
    assert found(Modality="MR") == [study]
    assert found(StudyDate="20240101-20240229", PatientName="Quell*") == sorted([study, other])
    assert found(StudyDate="20240301-") == []
    of_series = list(driver.find(target, Query(AccessionNumber=("A 1",), SeriesDescription=("S1",), level="series")))
    assert [(one.SeriesInstanceUID, one.instances) for one in of_series] == [(series[1], 3)]

    into = tmp_path / "into"
    receipt = driver.retrieve(target, Query(AccessionNumber=("A 1",)), into, PushReport())
    assert receipt.state is State.DELIVERED and receipt.verified is Level.LISTED
    assert receipt.counts[Kind.DELIVERED] == 6
    here = {one.uid: one for one in (Instance.of(path.read_bytes()) for path in into.iterdir())}
    assert here.keys() == sent.keys() == {item.sop_instance_uid for item in receipt.items}
    for uid, one in here.items():
        assert one.syntax == sent[uid].syntax and one.ds.SeriesInstanceUID == sent[uid].ds.SeriesInstanceUID
    lost = sorted(into.iterdir())[0]
    lost.unlink()
    again = driver.retrieve(target, Query(AccessionNumber=("A 1",)), into, PushReport())
    assert (again.counts[Kind.ALREADY], again.counts[Kind.DELIVERED]) == (5, 1) and lost.exists()
    with pytest.raises(NotFound):
        driver.retrieve(target, Query(AccessionNumber=("NONE",)), tmp_path / "none", PushReport())
