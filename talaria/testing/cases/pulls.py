"""What was pushed is found and brought back, from each server that can be queried (`SOURCES` of the harnesses)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blocks import EXTENSIONS
from blocks.base import Target
from imaging.query import Query
from talaria.testing import studies
from talaria.testing.cases.compare import assert_same_instance, send
from talaria.testing.harness import Harness, sources_of_extension
from tasks import DRIVERS
from tasks.driver import Driver
from transfer.errors import Cancelled, NotFound
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, PushReport, Receipt, State


def test_retrieve_every_type_that_can_be_queried_has_a_source() -> None:
    for name, driver in DRIVERS.items():
        able = driver.find is not None
        assert able == (driver.retrieve is not None) == driver.target.can_query
        assert not able or name not in EXTENSIONS or sources_of_extension(name)


def test_retrieve_what_was_pushed_found_by_each_key(source: Harness | None, study: Path, tmp_path: Path) -> None:
    if source is None:  # no type here can be queried
        return
    one, other = studies.uid(), studies.uid()
    series = [studies.uid() for _ in range(2)]
    for number in range(6):
        studies.dicom(
            study / f"{number}.dcm",
            study=one,
            series=series[number % 2],
            AccessionNumber="A 1",
            StudyDescription="Thorax, nativ",
            SeriesDescription=f"S{number % 2}",
            Modality=("CT", "MR")[number % 2],
        )
    studies.dicom(study / "other.dcm", study=other, AccessionNumber="A2", StudyDescription="Knee")
    send(source, study)
    driver, target = source.driver, source.target
    assert driver.find is not None

    def found(**keys: object) -> list[str]:
        return sorted(match.StudyInstanceUID for match in driver.find(target, Query(**keys)))  # type: ignore[misc,arg-type]

    assert found(AccessionNumber=("A 1",)) == [one]
    assert found(AccessionNumber=("A 1", "A2", "A3")) == sorted([one, other])
    assert found(StudyDescription=("Thorax, nativ",)) == [one]
    assert found(StudyDescription=("thorax, nativ",)) == []
    assert found(Modality="MR") == [one]
    assert found(StudyDate="20240101-20240229", PatientName="Quell*") == sorted([one, other])
    assert found(StudyDate="20240301-") == []
    of_series = list(driver.find(target, Query(AccessionNumber=("A 1",), SeriesDescription=("S1",), level="series")))
    assert [(match.SeriesInstanceUID, match.instances) for match in of_series] == [(series[1], 3)]
    receipt = retrieve(source, Query(AccessionNumber=("A 1",), SeriesDescription=("S1",)), tmp_path / "some")
    assert receipt.counts[Kind.DELIVERED] == 3
    with pytest.raises(NotFound):
        retrieve(source, Query(AccessionNumber=("NONE",)), tmp_path / "none")


def test_retrieve_every_kind_of_instance_as_it_was_pushed(source: Harness | None, study: Path, tmp_path: Path) -> None:
    if source is None:
        return
    studies.sample(study, others=False)
    sent = send(source, study)
    wanted = {item.header.SOPInstanceUID: sent.plan.file(item).read_bytes() for item in sent.plan.items if item.header}
    [uid] = {item.header.StudyInstanceUID for item in sent.plan.items if item.header}
    into = tmp_path / "into"
    receipt = retrieve(source, Query(StudyInstanceUID=uid), into)
    assert receipt.state is State.DELIVERED and receipt.verified is Level.LISTED
    assert receipt.counts[Kind.DELIVERED] == len(wanted) and receipt.unsent == 0
    here = {path.stem: path.read_bytes() for path in into.iterdir()}
    assert here.keys() == wanted.keys() == {item.sop_instance_uid for item in receipt.items}
    assert receipt.bytes == sum(map(len, here.values()))
    for name, data in wanted.items():
        assert_same_instance(data, here[name])
    brought = {item.header.SOPInstanceUID: item.header for item in scan([into]).items if item.header}
    for item in sent.plan.items:
        assert item.header and brought[item.header.SOPInstanceUID].TransferSyntaxUID == item.header.TransferSyntaxUID
    # Again: only what is missing.
    lost = min(into.iterdir())
    lost.unlink()
    again = retrieve(source, Query(StudyInstanceUID=uid), into)
    assert (again.counts[Kind.ALREADY], again.counts[Kind.DELIVERED]) == (len(wanted) - 1, 1) and lost.exists()


def test_retrieve_cancelled_or_from_a_dead_peer(source: Harness | None, study: Path, tmp_path: Path) -> None:
    if source is None:
        return
    studies.ct(study, 3)
    sent = send(source, study)
    header = sent.plan.items[0].header
    assert header is not None
    query = Query(StudyInstanceUID=header.StudyInstanceUID)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        _retrieve(source.driver)(source.target, query, tmp_path / "into", PushReport(cancelled=cancelled))
    with pytest.raises(source.dead_error):
        _retrieve(source.driver)(source.dead, query, tmp_path / "dead", PushReport())
    assert retrieve(source, query, tmp_path / "into").state is State.DELIVERED


def retrieve(source: Harness, query: Query, into: Path) -> Receipt:
    return _retrieve(source.driver)(source.target, query, into, PushReport())


def _retrieve(driver: Driver[Target]) -> Callable[[Target, Query, Path, PushReport], Receipt]:
    assert driver.retrieve is not None
    return driver.retrieve
