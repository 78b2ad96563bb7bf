"""A page of a search and metadata by dicomweb-client: what it carries, and what it must not lose."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from dicomweb_client.web import DICOMwebClient

from imaging.query import Query
from protocols.dicomweb.client import DicomwebClient, RequestRefused
from talaria.testing import studies
from tasks.dicomweb import connect, find
from tests.servers.dicomweb import XML, Reply, Request, Scripted, as_json, as_xml, scripted, uid_of
from tests.servers.orthanc import shared_orthanc
from tests.targets.dicomweb import dicomweb_target
from transfer.errors import Busy, Denied, Interrupted, Misconfigured, NotFound

ROW = {
    "0020000D": {"vr": "UI", "Value": ["1.2.3"]},
    "00100020": {"vr": "LO", "Value": ["P-1"]},
    "00201208": {"vr": "IS", "Value": [7]},
}


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted() as running:
        yield running


@pytest.fixture
def client(server: Scripted) -> Iterator[DicomwebClient]:
    with connect(dicomweb_target(server.url)) as service:
        yield DicomwebClient(service)


def test_the_library_carries_every_page_and_metadata(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the product stops using it."""
    calls: list[str] = []
    for name in ("search_for_studies", "search_for_series", "retrieve_instance_metadata"):
        usual = getattr(DICOMwebClient, name)

        def counted(self: Any, *args: Any, usual: Any = usual, name: str = name, **settings: Any) -> Any:
            calls.append(name)
            return usual(self, *args, **settings)

        monkeypatch.setattr(DICOMwebClient, name, counted)
    data = studies.encoded(studies.dataset(StudyDescription="Thorax"))
    server.stored[uid_of(data)] = data
    server.ignores = {"filters", "includefield"}
    target = dicomweb_target(server.url)
    assert len(list(find(target, Query(StudyDescription=("Thorax",), level="series")))) == 1
    assert not list(find(target, Query(StudyDescription=("Abdomen",))))
    assert set(calls) == {"search_for_studies", "search_for_series", "retrieve_instance_metadata"}
    assert calls.count("search_for_studies") == len([r for r in server.of("GET") if r.path == "/rs/studies"])


def test_wild_cards_reach_orthanc_as_they_are() -> None:
    """Encoded as the library encodes them, it finds nothing."""
    orthanc = shared_orthanc()
    orthanc.request("POST", "/instances", studies.encoded(studies.dataset(PatientName="Muster^Anna")))
    target = dicomweb_target(orthanc.dicomweb_url, http_user=orthanc.user, http_password=orthanc.password)
    for name in ("MUSTER*", "M?ster^Anna", "Muster^Anna", "*anna"):
        assert len(list(find(target, Query(PatientName=name)))) == 1
    assert not list(find(target, Query(PatientName="Mister*")))


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (as_xml(ROW), XML),
        (b"--b\r\nContent-Type: text/xml\r\n\r\n" + as_xml(ROW) + b"\r\n--b--", "multipart/related; boundary=b"),
        (b"\xef\xbb\xbf" + as_json([ROW]), "application/json"),
        (as_json(ROW), "text/plain"),
        (as_json([{tag.lower(): element for tag, element in ROW.items()}, {}]), "application/json"),
    ],
    ids=["XML", "XML parts", "byte-order mark", "one alone", "lower case"],
)
def test_forms_of_answers(server: Scripted, client: DicomwebClient, body: bytes, kind: str) -> None:
    server.script = [Reply(200, body, kind)]
    (row,) = client.search(["studies"]).rows
    assert row["0020000D"]["Value"] == ["1.2.3"]


def test_server_that_has_only_xml(server: Scripted, client: DicomwebClient) -> None:
    def answer(request: Request) -> Reply:
        return Reply(200, as_xml(ROW), XML) if "xml" in request.headers["accept"] else Reply(406)

    server.script = [answer] * 3
    assert len(client.search(["studies"]).rows) == len(client.search(["studies"]).rows) == 1
    assert len(server.requests) == 3  # it is asked for XML at once from then on


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (Reply(200, b"<html><title>Sign in</title></html>", "text/html"), Misconfigured, "Sign in"),
        (Reply(200, b"[{", "application/dicom+json"), Interrupted, "can't be read"),
        (Reply(200, b"[" * 100_000), Interrupted, "can't be read"),
        (Reply(200, b"[1]"), Interrupted, "can't be read"),
        (Reply(401, b"no"), Denied, "credentials"),
        (Reply(404, as_json({"message": "no such study"})), NotFound, "no such study"),
        (Reply(503, headers={"Retry-After": "9"}), Busy, "503"),
        (Reply(resets=True), Interrupted, "127.0.0.1"),
    ],
)
def test_errors_keep_status_type_and_words(
    server: Scripted, client: DicomwebClient, reply: Reply, error: type[Exception], words: str
) -> None:
    server.script = [reply]
    with pytest.raises(error, match=words) as caught:
        client.search(["studies"], (("PatientName", "Quellwasser*"),))
    assert "Quellwasser" not in str(caught.value)
    cause = caught.value.__cause__
    assert cause is None or (reply.resets and isinstance(cause, ConnectionError))  # the system's own word, if any
    assert len(server.requests) == 1  # the library would try again for half a minute


def test_refusal_and_warning(server: Scripted, client: DicomwebClient) -> None:
    server.script = [Reply(400), Reply(200, as_json([ROW]), headers={"Warning": "299 pacs: There are 7 more"})]
    with pytest.raises(RequestRefused):
        client.search(["studies"])
    assert client.search(["studies"]).more
    assert not client.search(["studies"]).more


def test_uids_that_are_not_valid(server: Scripted, client: DicomwebClient) -> None:
    """Servers list such; what leads elsewhere is asked for as a name."""
    client.search(["studies", "no uid", "series"])
    client.search(["studies", "../..", "series"])
    assert [request.path for request in server.requests] == [
        "/rs/studies/no%20uid/series",
        "/rs/studies/..%2F../series",
    ]


def test_no_log_shows_what_was_looked_for(
    server: Scripted, client: DicomwebClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client.search(["studies"], (("PatientName", "Quellwasser*"),))
    assert "Quellwasser" not in caplog.text
