"""QIDO, WADO and verification: against a scripted server that misbehaves, and against Orthanc."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from blocks.dicomweb import DicomWebTarget
from imaging.query import Match, Query
from protocols.dicomweb import pages, qido, readback
from protocols.files import partial
from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.dicomweb import driver, find, retrieve
from tests.servers.dicomweb import Reply, Request, Scripted, as_json, scripted, uid_of
from tests.servers.orthanc import Orthanc, shared_orthanc
from tests.targets.dicomweb import dicomweb_target
from transfer.errors import Busy, Cancelled, Denied, DispatchError, Interrupted, Misconfigured, NotFound
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, PushReport, Receipt, State

EVERYTHING = Query()
PAGE = b"<html><head><title>Sign in</title></head><body><form>password</form></body></html>"


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted() as running:
        yield running


@pytest.fixture
def orthanc() -> Orthanc:
    return shared_orthanc()


def orthanc_target(orthanc: Orthanc, **settings: Any) -> DicomWebTarget:
    credentials = {"http_user": orthanc.user, "http_password": orthanc.password}
    return dicomweb_target(orthanc.dicomweb_url, **(credentials | settings))


def hold(server: Scripted, *datasets: Any) -> list[str]:
    """Put instances into the server; returns their UIDs."""
    uids = []
    for ds in datasets:
        data = ds if isinstance(ds, bytes) else studies.encoded(ds)
        uids.append(uid_of(data))
        server.stored[uids[-1]] = data
    return uids


def series_of(count: int, **uids: str) -> list[bytes]:
    """One series of CT images."""
    study, series = uids.get("study", studies.uid(56)), uids.get("series", studies.uid(56))
    return [studies.ct_bytes(study=study, series=series) for _ in range(count)]


def found(server: Scripted, query: Query = EVERYTHING, **settings: Any) -> list[Match]:
    return list(find(dicomweb_target(server.url, **settings), query))


def study_uids(matches: list[Match]) -> set[str]:
    return {match.StudyInstanceUID for match in matches}


# ---- paging


@pytest.fixture
def many(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """A server with 50 studies; pages of 20 are asked for."""
    monkeypatch.setattr(pages, "PAGE", 20)
    hold(server, *(studies.ct_bytes() for _ in range(50)))
    return server


def test_pages(many: Scripted) -> None:
    matches = found(many)
    assert len(matches) == len(study_uids(matches)) == 50
    assert [dict(request.query)["offset"] for request in many.of("GET")] == ["0", "19", "38"]


@pytest.mark.parametrize("cap", [1, 7, 20, 49, 50, 51])
def test_server_caps_pages(many: Scripted, cap: int) -> None:
    many.cap = cap
    assert len(study_uids(found(many))) == 50


@pytest.mark.parametrize("cap", [None, 7])
def test_server_begins_again_after_the_last_page(many: Scripted, cap: int | None) -> None:
    many.repeats, many.cap = True, cap
    matches = found(many)
    assert len(matches) == len(study_uids(matches)) == 50


def test_server_ignores_offset(many: Scripted) -> None:
    many.ignores = {"offset"}
    hold(many, studies.ct_bytes())  # 51, which no server has for a limit
    matches = found(many)
    assert len(matches) == len(study_uids(matches)) == 51


def test_server_ignores_offset_and_limit(many: Scripted) -> None:
    many.ignores = {"offset", "limit"}
    matches = found(many)
    assert len(matches) == len(study_uids(matches)) == 50


def test_server_gives_much_at_once(many: Scripted) -> None:
    many.ignores = {"offset", "limit"}
    usual = many._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        return replace(usual(segments, query), body=usual(segments, query).body + b" " * (20 << 20))

    many._search = search  # type: ignore[method-assign]
    assert len(study_uids(found(many))) == 50


@pytest.mark.parametrize("ignores", [{"offset"}, {"offset", "limit"}])
@pytest.mark.parametrize("cap", [12, 20, 49])
def test_server_ignores_offset_and_caps(many: Scripted, cap: int, ignores: set[str]) -> None:
    """This one takes wild cards in UIDs, so that the studies can be asked for in shares."""
    many.ignores, many.cap = ignores, cap
    assert len(study_uids(found(many))) == 50


def strict(server: Scripted) -> None:
    """Let a server take wild cards in UIDs for letters, as DICOM has it."""
    usual = server._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        stars = [key for key, value in query if key.endswith("UID") and "*" in value]
        return Reply(204) if stars else usual(segments, query)

    server._search = search  # type: ignore[method-assign]


@pytest.mark.parametrize("ignores", [{"offset"}, {"offset", "limit"}, {"offset", "filters"}])
@pytest.mark.parametrize("cap", [12, 49])
def test_no_way_to_all_of_it_is_an_error(many: Scripted, cap: int, ignores: set[str]) -> None:
    many.ignores, many.cap = ignores, cap
    strict(many)
    with pytest.raises(Misconfigured, match="narrow the query"):
        found(many)


@pytest.mark.parametrize("cap", [12, None])
def test_shares_by_study_date(server: Scripted, cap: int | None) -> None:
    hold(server, *(studies.dataset(StudyDate=f"2024{n % 12 + 1:02}{n % 28 + 1:02}") for n in range(60)))
    strict(server)
    server.cap, server.ignores = cap, {"offset"}
    assert len(study_uids(found(server, Query(StudyDate="2024-2024")))) == 60
    assert len(study_uids(found(server, Query(StudyDate="20240301-")))) == 50
    if cap is None:  # nothing is held back: each day has fewer than come at once
        assert len(study_uids(found(server))) == 60
    else:  # there may be studies without a date
        with pytest.raises(Misconfigured, match="range of study dates"):
            found(server)


def test_server_counts_the_offset_within_the_limit(many: Scripted) -> None:
    """As Orthanc 1.10 does for searches by modality."""
    usual = many._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        given = dict(query)
        limit, offset = int(given.get("limit", "0")), int(given.get("offset", "0"))
        shorter = [(key, str(max(0, limit - offset)) if key == "limit" else value) for key, value in query]
        return usual(segments, shorter) if limit > offset else Reply(204)

    many._search = search  # type: ignore[method-assign]
    assert len(study_uids(found(many))) == 50


def test_offset_is_refused_though_there_is_more(many: Scripted) -> None:
    many.cap = 20
    usual = many._search
    many._search = lambda segments, query: (  # type: ignore[method-assign]
        Reply(400) if dict(query).get("offset", "0") != "0" else usual(segments, query)
    )
    assert len(study_uids(found(many))) == 50


def test_server_says_that_there_is_more(many: Scripted) -> None:
    many.ignores, many.cap = {"offset"}, 7
    usual = many._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        reply = usual(segments, query)
        reply.headers["Warning"] = "299 pacs: There are 43 additional results that can be requested"
        return reply

    many._search = search  # type: ignore[method-assign]
    with pytest.raises(Misconfigured, match="narrow the query"):
        found(many)


def test_overlapping_pages(many: Scripted) -> None:
    usual = many._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        shifted = [(key, str(max(0, int(value) - 3)) if key == "offset" else value) for key, value in query]
        return usual(segments, shifted)

    many._search = search  # type: ignore[method-assign]
    matches = found(many)
    assert len(matches) == len(study_uids(matches)) == 50


@pytest.mark.parametrize("studies_there", [5, 50])
@pytest.mark.parametrize("status", [400, 404, 416])
def test_server_refuses_what_is_beyond_the_last_page(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, status: int, studies_there: int
) -> None:
    monkeypatch.setattr(pages, "PAGE", 20)
    hold(server, *(studies.ct_bytes() for _ in range(studies_there)))
    usual = server._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        reply = usual(segments, query)
        return Reply(status) if reply.status == 204 else reply

    server._search = search  # type: ignore[method-assign]
    assert len(study_uids(found(server))) == studies_there


@pytest.mark.parametrize(
    ("times", "repeats"), [(1, False), (19, False), (40, False), (70, False), (450, False), (1, True), (19, True)]
)
def test_server_has_a_row_for_each_instance(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, times: int, repeats: bool
) -> None:
    """As pynetdicom's own server answers searches for studies."""
    monkeypatch.setattr(pages, "PAGE", 20)
    rows = [{qido.STUDY_UID: {"vr": "UI", "Value": [f"2.25.{n}"]}} for n in range(5) for _ in range(times)]

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        offset, limit = int(dict(query)["offset"]), int(dict(query)["limit"])
        page = rows[offset : offset + limit] or (rows[:limit] if repeats else [])
        return Reply(200, as_json(page)) if page else Reply(204)

    server._search = search  # type: ignore[method-assign]
    assert len(study_uids(found(server))) == 5
    assert len(server.of("GET")) < 20 + 5 * times / 10


def test_unknown_parameters_are_left_out(many: Scripted) -> None:
    for rejected in ({"includefield"}, {"limit"}, {"includefield", "limit", "offset"}):
        many.rejects = rejected
        assert len(study_uids(found(many))) == 50


def test_nothing_matches(server: Scripted) -> None:
    assert found(server) == []
    server.script = [Reply(200, b"[]"), Reply(200, b""), Reply(204)]
    for _ in range(3):
        assert found(server) == []
    assert not server.script


# ---- filters, by servers that know them and by servers that don't


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


# ---- retrieval


def fetched(server: Scripted, folder: Path, query: Query = EVERYTHING, **settings: Any) -> Receipt:
    return retrieve(dicomweb_target(server.url, **settings), query, folder, PushReport())


def files(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("gives", ["multipart", "chunked", "single", "closing"])
def test_retrieve(server: Scripted, tmp_path: Path, gives: str) -> None:
    server.gives = gives
    study = studies.uid(56)
    hold(server, *series_of(12, study=study), *series_of(1, study=study), *series_of(3))
    hold(server, studies.dataset("JPEG2000.dcm", study=study), studies.dataset("test-SR.dcm", study=study))
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.DELIVERED
    assert receipt.counts[Kind.DELIVERED] == 18
    assert receipt.verified is Level.LISTED
    assert files(tmp_path / "out") == server.stored
    assert receipt.bytes == sum(map(len, server.stored.values()))
    # Again: all is there.
    before = len(server.requests)
    again = fetched(server, tmp_path / "out")
    assert again.counts[Kind.ALREADY] == 18
    assert not [r for r in server.requests[before:] if 'type="application/dicom"' in r.headers["accept"]]


def test_retrieve_one_series(server: Scripted, tmp_path: Path) -> None:
    study, wanted = studies.uid(56), studies.uid(56)
    uids = hold(server, *series_of(4, study=study, series=wanted))
    hold(server, *series_of(4, study=study))
    fetched(server, tmp_path / "out", Query(SeriesInstanceUID=wanted))
    assert set(files(tmp_path / "out")) == set(uids)


def test_retrieve_nothing(server: Scripted, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        fetched(server, tmp_path, Query(AccessionNumber=("none",)))


def test_retrieve_less_than_announced(server: Scripted, tmp_path: Path) -> None:
    uids = hold(server, *series_of(6))
    server.withheld = set(uids[:2])
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.PARTIAL
    assert {item.sop_instance_uid for item in receipt.items if item.outcome is Kind.REJECTED} == set(uids[:2])
    assert all(item.detail for item in receipt.items if item.outcome is Kind.REJECTED)
    assert set(files(tmp_path / "out")) == set(uids[2:])
    # Only what is missing is asked for, and then it is whole.
    server.withheld = set()
    before = len(server.requests)
    assert fetched(server, tmp_path / "out").state is State.DELIVERED
    asked = [r.path for r in server.requests[before:] if 'type="application/dicom"' in r.headers["accept"]]
    assert {path.rpartition("/")[2] for path in asked} == set(uids[:2])


def test_retrieve_fewer_listed_than_counted(server: Scripted, tmp_path: Path) -> None:
    uids = hold(server, *series_of(6))
    usual = server._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        reply = usual(segments, query)
        if segments[-1] == "series" and reply.body:
            reply.body = reply.body.replace(b'"Value": [6]', b'"Value": [8]')
        return reply

    server._search = search  # type: ignore[method-assign]
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.PARTIAL
    assert receipt.unsent == 2
    assert any("8 instances are announced" in note for note in receipt.notes)
    assert set(files(tmp_path / "out")) == set(uids)


def test_retrieve_fewer_series_than_the_study_has(server: Scripted, tmp_path: Path) -> None:
    study, hidden = studies.uid(56), studies.uid(56)
    hold(server, *series_of(3, study=study), *series_of(2, study=study, series=hidden))
    usual = server._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        reply = usual(segments, query)
        if segments[-1] == "series" and reply.body:
            reply.body = as_json([row for row in json.loads(reply.body) if row[qido.SERIES_UID]["Value"] != [hidden]])
        return reply

    server._search = search  # type: ignore[method-assign]
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.PARTIAL
    assert len(files(tmp_path / "out")) == 3
    assert receipt.unsent == 2
    assert any("5 instances are announced" in note for note in receipt.notes)
    (series,) = {item.header.SeriesInstanceUID for item in scan([tmp_path / "out"]).items if item.header}
    one = fetched(server, tmp_path / "one", Query(SeriesInstanceUID=series))  # all that was asked for
    assert one.state is State.DELIVERED


def test_retrieve_from_a_server_that_lists_no_instances(server: Scripted, tmp_path: Path) -> None:
    uids = hold(server, *series_of(6))
    usual = server._search
    server._search = lambda segments, query: (  # type: ignore[method-assign]
        Reply(404) if segments[-1] == "instances" else usual(segments, query)
    )
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.DELIVERED
    assert set(files(tmp_path / "out")) == set(uids)


@pytest.mark.parametrize("into", ["/proc/none", "file/below", "file"])
def test_retrieve_into_what_is_no_folder(server: Scripted, tmp_path: Path, into: str) -> None:
    hold(server, *series_of(2))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Misconfigured, match="can't write to"):
        fetched(server, tmp_path / into)


@pytest.mark.parametrize("fails", ["create", "write", "rename"])
def test_retrieve_into_a_folder_that_takes_no_files(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """It ends with the first instance: no server is asked for each one that can't be written either."""

    def refuse(*args: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    hold(server, *series_of(20))
    if fails == "create":
        monkeypatch.setattr(partial, "create", refuse)
    elif fails == "write":  # as the kernel does to a disk that has errors: nothing can be removed any more, either
        monkeypatch.setattr(os, "write", refuse)
        monkeypatch.setattr(Path, "unlink", refuse)
    else:
        monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(Misconfigured, match=r"can't write to .*Read-only"):
        fetched(server, tmp_path / "out")
    assert len([request for request in server.of("GET") if 'application/dicom"' in request.headers["accept"]]) == 1


def test_retrieve_cut_midway_then_the_rest(server: Scripted, tmp_path: Path) -> None:
    """What a broken link leaves is fetched one by one; the next try goes on where even that fails."""
    uids = hold(server, *series_of(10))
    usual = server._retrieve

    def cut(segments: list[str]) -> Reply:
        return replace(usual(segments), cut=30_000 if len(segments) == 4 else 3_000)  # of some 70,000, and 7,000

    server._retrieve = cut  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        fetched(server, tmp_path / "out")
    came = files(tmp_path / "out")
    assert 2 <= len(came) < 10
    assert came.items() <= server.stored.items()
    server._retrieve = usual  # type: ignore[method-assign]
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.DELIVERED
    assert receipt.counts[Kind.ALREADY] == len(came)
    assert set(files(tmp_path / "out")) == set(uids)


def test_retrieve_over_a_link_that_is_cut_again_and_again(server: Scripted, tmp_path: Path) -> None:
    """Each try adds something, until all is there."""
    study = studies.uid(56)
    uids = [uid for _ in range(3) for uid in hold(server, *series_of(20, study=study))]
    dice = random.Random(4711)
    answered = server._retrieve
    server._retrieve = lambda segments: replace(answered(segments), cut=dice.randrange(60_000))  # type: ignore[method-assign]
    count = 0
    for _ in range(len(uids)):
        try:
            receipt = fetched(server, tmp_path / "out", concurrency=2)
        except Interrupted:
            came = len(files(tmp_path / "out"))
            assert came > count
            count = came
        else:
            break
    assert receipt.state is State.DELIVERED
    assert set(files(tmp_path / "out")) == set(uids)


@pytest.mark.parametrize(
    "fault",
    [Reply(500), Reply(502), Reply(504), Reply(501), Reply(204), Reply(200), Reply(hangs=True), Reply(resets=True)],
    ids=["500", "502", "504", "501", "204", "empty", "nothing", "reset"],
)
def test_retrieve_where_series_are_too_much(server: Scripted, tmp_path: Path, fault: Reply) -> None:
    study = studies.uid(56)
    uids = [uid for _ in range(2) for uid in hold(server, *series_of(3, study=study))]
    usual = server._retrieve
    server._retrieve = lambda segments: fault if len(segments) == 4 else usual(segments)  # type: ignore[method-assign]
    assert fetched(server, tmp_path / "out", idle_timeout_s=0.5, concurrency=1).state is State.DELIVERED
    assert set(files(tmp_path / "out")) == set(uids)


@pytest.mark.parametrize("status", [406, 500])
@pytest.mark.parametrize("form", ["application/dicom; transfer-syntax=*", "application/dicom", "*/*"])
def test_retrieve_in_the_only_form_that_a_server_gives(
    server: Scripted, tmp_path: Path, form: str, status: int
) -> None:
    uids = hold(server, *series_of(5))
    server.gives = "single"
    usual = server._usual

    def answer(request: Request) -> Reply:
        if "instances/" in request.path or (request.path.count("/") == 5 and 'dicom"' in request.headers["accept"]):
            segments = request.path.split("/")[2:]
            return server._retrieve(segments) if request.headers["accept"] == form else Reply(status)
        return usual(request)

    server._usual = answer  # type: ignore[method-assign]
    assert fetched(server, tmp_path / "out", concurrency=1).state is State.DELIVERED
    assert set(files(tmp_path / "out")) == set(uids)
    assert len([request for request in server.of("GET") if "instances/" in request.path]) < 5 + 5  # it is remembered


def test_retrieve_instance_that_fails_costs_itself(server: Scripted, tmp_path: Path) -> None:
    uids = hold(server, *series_of(6))
    usual = server._retrieve
    server._retrieve = lambda segments: (  # type: ignore[method-assign]
        Reply(500, PAGE, "text/html") if len(segments) == 4 or segments[-1] == uids[2] else usual(segments)
    )
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.PARTIAL
    (bad,) = [item for item in receipt.items if item.outcome is Kind.REJECTED]
    assert bad.sop_instance_uid == uids[2]
    assert "500" in bad.detail
    assert set(files(tmp_path / "out")) == set(uids) - {uids[2]}


@pytest.mark.parametrize("status", [401, 403, 404, 405, 429, 500, 503, 504])
@pytest.mark.parametrize("whole", [False, True], ids=["instance", "series"])
def test_retrieve_what_is_refused_costs_itself(server: Scripted, tmp_path: Path, status: int, *, whole: bool) -> None:
    """One series of three, or one instance of one of them, whatever the server says of it."""
    study = studies.uid(56)
    names = [studies.uid(56) for _ in range(3)]
    groups = [hold(server, *series_of(5, study=study, series=name)) for name in names]
    usual = server._retrieve
    bad = set(groups[1]) if whole else {groups[1][2]}

    def answer(segments: list[str]) -> Reply:
        if segments[-1] == names[1] and not whole:
            return Reply(504)
        return Reply(status, PAGE, "text/html") if segments[-1] in {*bad, names[1]} else usual(segments)

    server._retrieve = answer  # type: ignore[method-assign]
    good = {uid for group in groups for uid in group} - bad
    try:
        receipt = fetched(server, tmp_path / "out", concurrency=1)
    except DispatchError as exc:
        assert exc.retryable and str(status) in exc.message
        assert status in (429, 503), "what may pass is tried again later"
    else:
        rejected = {item.sop_instance_uid: item.detail for item in receipt.items if item.outcome is Kind.REJECTED}
        assert set(rejected) == bad
        assert all(str(status) in reason for reason in rejected.values())
    assert {name.removesuffix(".dcm") for name in files(tmp_path / "out")} == good
    assert sum(request.path.rsplit("/", 1)[-1] in bad for request in server.of("GET")) <= 5 * len(bad) * 3


def test_retrieve_series_that_can_not_be_listed_costs_itself(server: Scripted, tmp_path: Path) -> None:
    study = studies.uid(56)
    series, *others = (studies.uid(56) for _ in range(3))
    groups = [hold(server, *series_of(3, study=study, series=name)) for name in (series, *others)]
    retrieve, search = server._retrieve, server._search
    server._retrieve = lambda segments: Reply(504) if segments[-1] == series else retrieve(segments)  # type: ignore[method-assign]
    server._search = lambda segments, query: (  # type: ignore[method-assign]
        Reply(503) if series in segments else search(segments, query)
    )
    with pytest.raises(Busy, match="503"):
        fetched(server, tmp_path / "out", concurrency=1)
    assert {name.removesuffix(".dcm") for name in files(tmp_path / "out")} == {*groups[1], *groups[2]}


def test_retrieve_what_is_denied_as_a_whole(server: Scripted, tmp_path: Path) -> None:
    hold(server, *series_of(40))
    server._retrieve = lambda segments: Reply(403)  # type: ignore[method-assign]
    with pytest.raises(Denied):
        fetched(server, tmp_path / "out", concurrency=1)
    assert len([r for r in server.of("GET") if "dicom+json" not in r.headers["accept"]]) < 10


def test_retrieve_from_a_server_that_is_broken(server: Scripted, tmp_path: Path) -> None:
    hold(server, *series_of(40))
    server._retrieve = lambda segments: Reply(500)  # type: ignore[method-assign]
    with pytest.raises(Busy, match="500"):
        fetched(server, tmp_path / "out")
    assert len([r for r in server.of("GET") if "dicom+json" not in r.headers["accept"]]) < 60


def test_retrieve_lists_by_metadata(server: Scripted, tmp_path: Path) -> None:
    """A server that breaks down at series, and can't be searched for instances."""
    uids = hold(server, *series_of(4))
    usual = server._search
    held = server._retrieve

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        if segments[-1] == "metadata":
            return Reply(200, as_json([{qido.SOP_UID: {"vr": "UI", "Value": [uid]}} for uid in uids]))
        return Reply(404) if segments[-1] == "instances" else usual(segments, query)

    server._search = search  # type: ignore[method-assign]
    server._retrieve = lambda segments: Reply(504) if len(segments) == 4 else held(segments)  # type: ignore[method-assign]
    assert fetched(server, tmp_path / "out").state is State.DELIVERED
    assert set(files(tmp_path / "out")) == set(uids)


def test_retrieve_damaged_instance(server: Scripted, tmp_path: Path) -> None:
    uids = hold(server, *series_of(4))
    whole = server.stored[uids[1]]
    usual = server._retrieve

    def damage(segments: list[str]) -> Reply:
        reply = usual(segments)
        reply.body = reply.body.replace(whole, whole[:-100])
        return reply

    server._retrieve = damage  # type: ignore[method-assign]
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.PARTIAL
    (bad,) = [item for item in receipt.items if item.outcome is Kind.REJECTED]
    assert bad.sop_instance_uid == uids[1]
    assert "truncated" in bad.detail
    assert set(files(tmp_path / "out")) == set(uids) - {uids[1]}


def test_retrieve_html_instead_of_instances(server: Scripted, tmp_path: Path) -> None:
    hold(server, *series_of(2))
    server._retrieve = lambda segments: Reply(200, PAGE, "text/html")  # type: ignore[method-assign]
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.FAILED
    assert all("Sign in" in item.detail for item in receipt.items)


def test_retrieve_another_instance_than_asked_for(server: Scripted, tmp_path: Path) -> None:
    hold(server, studies.ct_bytes())
    foreign = studies.ct_bytes()
    server._retrieve = lambda segments: Reply(200, foreign, "application/dicom")  # type: ignore[method-assign]
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.FAILED
    assert not files(tmp_path / "out")


def test_retrieve_star_refused(server: Scripted, tmp_path: Path) -> None:
    """Servers that don't know `transfer-syntax=*` answer 406 to it."""
    hold(server, *series_of(2))
    usual = server._usual

    def answer(request: Request) -> Reply:
        return Reply(406) if "transfer-syntax=*" in request.headers["accept"] else usual(request)

    server._usual = answer  # type: ignore[method-assign]
    assert fetched(server, tmp_path / "out").state is State.DELIVERED


def test_retrieve_busy(server: Scripted, tmp_path: Path) -> None:
    hold(server, *series_of(2))
    server._retrieve = lambda segments: Reply(503, headers={"Retry-After": "4"})  # type: ignore[method-assign]
    with pytest.raises(Busy) as caught:
        fetched(server, tmp_path / "out")
    assert caught.value.retry_after == 4


def test_retrieve_cancelled(server: Scripted, tmp_path: Path) -> None:
    hold(server, *series_of(40))
    cancelled = threading.Event()
    moved: list[int] = []

    def move(count: int) -> None:
        moved.append(count)
        if sum(moved) > 50_000:
            cancelled.set()

    target = dicomweb_target(server.url, bandwidth_limit=100_000)
    with pytest.raises(Cancelled):
        retrieve(target, Query(), tmp_path / "out", PushReport(cancelled=cancelled, moved=move))
    assert all(not path.name.startswith(".") for path in (tmp_path / "out").iterdir())


def test_uid_that_is_a_path(server: Scripted, tmp_path: Path) -> None:
    server.withheld = set(hold(server, *series_of(1)))  # so that the list is asked for
    usual = server._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        reply = usual(segments, query)
        if segments[-1] == "instances" and reply.body:
            reply.body = as_json([{"00080018": {"vr": "UI", "Value": ["../../evil"]}}])
        return reply

    server._search = search  # type: ignore[method-assign]
    with pytest.raises(Misconfigured):
        fetched(server, tmp_path / "out")
    assert not (tmp_path.parent / "evil.dcm").exists()


# ---- verification


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback, "LISTED_WAIT_S", 0.3)


def verified(server: Scripted, tmp_path: Path, level: Level, **settings: Any) -> Any:
    studies.sample(tmp_path / "study", others=False)
    plan = scan([tmp_path / "study"])
    return attempt(dicomweb_target(server.url, verify=level, **settings), plan)


@pytest.mark.parametrize("level", [Level.LISTED, Level.PROVEN])
def test_verified(server: Scripted, tmp_path: Path, level: Level) -> None:
    receipt = verified(server, tmp_path, level).require()
    assert receipt.verified is level
    assert receipt.state is State.DELIVERED


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("level", [Level.LISTED, Level.PROVEN])
def test_accepted_but_not_there(server: Scripted, tmp_path: Path, level: Level) -> None:
    lost: list[str] = []
    usual = server._store

    def store(request: Request) -> Reply:
        reply = usual(request)
        if not lost:
            lost.append(request.uids[0])
            del server.stored[lost[0]]
        return reply

    server._store = store  # type: ignore[method-assign]
    sent = verified(server, tmp_path, level)
    receipt = sent.require()
    assert receipt.state is State.PARTIAL
    (missing,) = [item for item in receipt.items if item.outcome is Kind.REJECTED]
    assert missing.sop_instance_uid == lost[0]
    assert "not listed" in missing.detail
    assert receipt.verified is level


def test_listed_a_little_later(server: Scripted, tmp_path: Path) -> None:
    usual = server._search
    looks: list[int] = []

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        looks.append(1)
        return Reply(204) if len(looks) < 20 else usual(segments, query)

    server._search = search  # type: ignore[method-assign]
    receipt = verified(server, tmp_path, Level.LISTED).require()
    assert receipt.state is State.DELIVERED
    assert receipt.verified is Level.LISTED


@pytest.mark.parametrize("status", [404, 501, 403, 400])
def test_no_search_to_verify_by(server: Scripted, tmp_path: Path, status: int) -> None:
    server._search = lambda segments, query: Reply(status)  # type: ignore[method-assign]
    receipt = verified(server, tmp_path, Level.LISTED).require()
    assert receipt.verified is Level.ACCEPTED
    assert receipt.state is State.DELIVERED
    assert any("can't be verified by listing" in note for note in receipt.notes)


def test_proven_without_search(server: Scripted, tmp_path: Path) -> None:
    server._search = lambda segments, query: Reply(404)  # type: ignore[method-assign]
    assert verified(server, tmp_path, Level.PROVEN).require().verified is Level.PROVEN


def changed(server: Scripted, change: Any) -> None:
    """Let the server change what it stored, once, after it was stored."""
    usual = server._store

    def store(request: Request) -> Reply:
        reply = usual(request)
        for uid, data in list(server.stored.items()):
            server.stored[uid] = change(data)
        return reply

    server._store = store  # type: ignore[method-assign]


def test_proven_though_the_header_was_changed(server: Scripted, tmp_path: Path) -> None:
    def coerce(data: bytes) -> bytes:
        return data.replace(studies.PATIENT_ID.encode() + b" ", b"PHI-4712-XQ ")

    changed(server, coerce)
    sent = verified(server, tmp_path, Level.PROVEN)
    receipt = sent.require()
    assert receipt.state is State.DELIVERED
    # A report has no pixel data to compare, so this one proves nothing.
    assert receipt.verified is Level.LISTED
    assert any("1 instance(s) can't be proven" in note and "SR/report" in note for note in receipt.notes)


def test_other_pixels_are_taken_back(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 5)
    plan = scan([tmp_path / "study"])
    victim = plan.items[2]
    original = plan.file(victim).read_bytes()

    def flip(data: bytes) -> bytes:
        return data[:-10] + b"0123456789" if data == original else data

    changed(server, flip)
    sent = attempt(dicomweb_target(server.url, verify=Level.PROVEN), plan)
    receipt = sent.require()
    assert receipt.state is State.PARTIAL
    assert "other pixel data" in sent.outcomes[victim.path].detail
    assert sent.outcomes[victim.path].kind is Kind.REJECTED


# ---- Orthanc


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


def test_driver_can_query() -> None:
    assert driver.find is find
    assert driver.retrieve is retrieve
