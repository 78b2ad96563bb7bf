"""Filters of QIDO-RS, by servers that know them and by servers that don't."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from imaging.query import Query
from talaria.testing import studies
from tasks.dicomweb import find, retrieve
from tests.servers.dicomweb import Reply, Request, Scripted
from tests.targets.dicomweb import dicomweb_target
from tests.targets.dicomweb_query.finding import PAGE, found, hold, study_uids
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotFound
from transfer.receipt import PushReport, State


@pytest.fixture(params=["filters", ""])
def archive(server: Scripted, request: pytest.FixtureRequest) -> Scripted:
    server.ignores = {request.param}

    def one(accession: str, name: str, date: str, modality: str, description: str, **more: Any) -> Any:
        source = "CT_small.dcm" if modality == "CT" else "MR_small.dcm"
        values = {"PatientID": f"ID-{accession}", "StudyDescription": description, "SeriesDescription": f"S {modality}"}
        return studies.dataset(source, AccessionNumber=accession, PatientName=name, StudyDate=date, **(values | more))

    hold(
        server,
        one("A1", "Muster^Anna", "20240101", "CT", "Thorax"),
        one("A2", "Muster^Max", "20240115", "MR", "Kopf, nativ"),
        one("A3", "Beispiel^Eva", "20240201", "CT", "Abdomen"),
        one("A10", "Beispiel^Udo", "20240301", "MR", "Thorax"),
        one("", "Ohne^Nummer", "20240301", "CT", ""),
    )
    return server


@pytest.mark.parametrize(
    ("query", "accessions"),
    [
        (Query(AccessionNumber=("A1",)), {"A1"}),
        (Query(AccessionNumber=("A1", "A3", "A1", "none")), {"A1", "A3"}),
        (Query(AccessionNumber=("A*",)), set()),
        (Query(PatientID="ID-A2"), {"A2"}),
        (Query(PatientID="ID-A1*"), {"A1", "A10"}),
        (Query(PatientName="Muster*"), {"A1", "A2"}),
        (Query(PatientName="beispiel^e?a"), {"A3"}),
        (Query(StudyDate="20240115"), {"A2"}),
        (Query(StudyDate="20240110-20240210"), {"A2", "A3"}),
        (Query(StudyDate="-20240115"), {"A1", "A2"}),
        (Query(StudyDate="20240201-"), {"A3", "A10", ""}),
        (Query(StudyDate="202401-202401"), {"A1", "A2"}),
        (Query(Modality="MR"), {"A2", "A10"}),
        (Query(StudyDescription=("Thorax",)), {"A1", "A10"}),
        (Query(StudyDescription=("Thorax", "Kopf, nativ")), {"A1", "A2", "A10"}),
        (Query(SeriesDescription=("S MR",)), {"A2", "A10"}),
        (Query(AccessionNumber=("A1", "A2"), Modality="CT"), {"A1"}),
        (Query(AccessionNumber=("A1", "A2"), StudyDescription=("Abdomen",)), set()),
        (Query(), {"A1", "A2", "A3", "A10", ""}),
    ],
)
@pytest.mark.parametrize("level", ["study", "series"])
def test_filters(archive: Scripted, query: Query, accessions: set[str], level: str) -> None:
    matches = found(archive, Query(**{**vars(query), "level": level}))
    assert {match.attributes["AccessionNumber"] for match in matches} == accessions
    assert len(matches) == len(accessions)
    assert all(match.instances == 1 for match in matches)
    if level == "series":
        assert all(match.attributes["Modality"] in ("CT", "MR") for match in matches)


@pytest.mark.parametrize("key", ["AccessionNumber", "StudyDescription", "SeriesDescription"])
def test_list_of_blanks_asks_for_nothing(archive: Scripted, key: str) -> None:
    keys: dict[str, Any] = {key: ("", " ")}
    assert found(archive, Query(**keys)) == []
    assert not archive.requests


def test_filters_that_a_server_refuses(archive: Scripted) -> None:
    archive.rejects = {"StudyDescription", "includefield"}
    matches = found(archive, Query(StudyDescription=("Thorax",)))
    assert {match.attributes["AccessionNumber"] for match in matches} == {"A1", "A10"}


def test_by_uid(archive: Scripted) -> None:
    (match,) = found(archive, Query(AccessionNumber=("A2",), level="series"))
    assert study_uids(found(archive, Query(StudyInstanceUID=match.StudyInstanceUID))) == {match.StudyInstanceUID}
    (series,) = found(archive, Query(SeriesInstanceUID=match.SeriesInstanceUID, level="series"))
    assert series.SeriesInstanceUID == match.SeriesInstanceUID
    assert found(archive, Query(StudyInstanceUID=match.StudyInstanceUID, SeriesInstanceUID="1.2.3")) == []
    archive.requests.clear()
    assert found(archive, Query(SeriesInstanceUID="1.2.3")) == []
    assert {request.path.rpartition("/")[2] for request in archive.requests} == {"series"}  # no studies were listed
    archive.script = [Reply(204)] * 2  # it finds no series without their study
    assert len(found(archive, Query(SeriesInstanceUID=match.SeriesInstanceUID))) == 1


def test_a_modality_is_asked_for_in_capitals(archive: Scripted) -> None:
    """Servers may tell upper from lower case."""
    assert len(found(archive, Query(Modality="mr"))) == 2
    asked = {value for request in archive.requests for key, value in request.query if key == "ModalitiesInStudy"}
    assert asked == {"MR"}


def test_what_identifies_a_patient_shows_in_no_error(server: Scripted) -> None:
    def echo(request: Request) -> Reply:
        return Reply(500, f"<p>no index for {dict(request.query)}</p>".encode(), "text/html")

    server.script = [echo]
    with pytest.raises(Busy) as caught:
        found(server, Query(PatientName="Quellwasser^Zyprian", PatientID="PHI-4711-XQ"))
    for text in ("Quellwasser", "Zyprian", "4711"):
        assert text not in str(caught.value)


@pytest.mark.parametrize(
    "query",
    [
        Query(PatientName="Müller^Jörg"), Query(PatientName="Müll?r*^J*"), Query(PatientID="Müller 4711"),
        Query(AccessionNumber=("Müller-4711",)), Query(PatientName="Müller^*=Jörg"),
    ],
    ids=str,
)  # fmt: skip
def test_what_identifies_a_patient_shows_in_no_address(server: Scripted, query: Query) -> None:
    def echo(request: Request) -> Reply:
        return Reply(500, f"Cannot GET {request.path}?{urlencode(request.query)}".encode(), "text/plain")

    server.script = [echo]
    with pytest.raises(Busy) as caught:
        found(server, query)
    for text in ("ller", "J%C3", "4711"):
        assert text not in str(caught.value).partition("Cannot GET")[2]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(200, PAGE, "text/html"), Misconfigured),
        (Reply(200, b"[{", "application/dicom+json"), Interrupted),
        (Reply(200, b"[{}", cut=1), Interrupted),
        (Reply(200, b'{"results": []}'), Interrupted),
        (Reply(200, b'[{"error": "index is rebuilt"}]', "application/json"), Interrupted),
        (Reply(401, PAGE, "text/html"), Denied),
        (Reply(403, PAGE, "text/html"), Denied),
        (Reply(404, PAGE, "text/html"), NotFound),
        (Reply(503, headers={"Retry-After": "5"}), Busy),
        (Reply(resets=True), Interrupted),
    ],
)
def test_errors_of_a_search(server: Scripted, reply: Reply, error: type[DispatchError]) -> None:
    server.script = [reply]
    with pytest.raises(error) as caught:
        found(server)
    assert caught.value.target == "dicomweb-test"
    if isinstance(caught.value, Busy):
        assert caught.value.retry_after == 5


def test_redirected_search(server: Scripted) -> None:
    hold(server, studies.ct_bytes())
    server.script = [Reply(302, headers={"Location": "/rs/studies?limit=20"})]
    assert len(found(server)) == 1


def test_prefixes(server: Scripted, tmp_path: Path) -> None:
    hold(server, studies.ct_bytes())
    base = server.url.removesuffix("/rs")
    target = dicomweb_target(base, qido_url_prefix="rs", wado_url_prefix="/rs/", stow_url_prefix="rs")
    (match,) = find(target, Query())
    receipt = retrieve(target, Query(StudyInstanceUID=match.StudyInstanceUID), tmp_path, PushReport())
    assert receipt.state is State.DELIVERED
    with pytest.raises(NotFound):
        list(find(dicomweb_target(base), Query()))


def test_what_a_server_shows_in_place_of_a_letter_is_no_letter_of_its_own(server: Scripted) -> None:
    server.shown_in = "ISO_IR 100"
    names = ("Łukasz^A", "Żukasz^A", "Łukasz^AB", "Łukaszek^A")
    hold(
        server,
        *(
            studies.dataset(SpecificCharacterSet="ISO_IR 192", PatientName=name, AccessionNumber=f"A{number}")
            for number, name in enumerate(names)
        ),
    )
    for name, wanted in {"Łukas?^A": {"A0"}, "Łuk??z*": {"A0", "A2", "A3"}, "Łukasz^?": {"A0"}}.items():
        matches = found(server, Query(PatientName=name))
        assert {match.attributes["AccessionNumber"] for match in matches} == wanted, name
