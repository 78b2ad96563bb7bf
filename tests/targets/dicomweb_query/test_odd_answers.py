"""Servers that write DICOM JSON as nobody should, or answer as no standard says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imaging.query import Query
from protocols.dicomweb import client
from talaria.testing import studies
from tests.servers.dicomweb import JSON, Reply, Scripted, as_json
from tests.targets.dicomweb_query.fetching import fetched, series_of
from tests.targets.dicomweb_query.finding import files, found, hold
from transfer.errors import Misconfigured, NotFound
from transfer.receipt import State


def writing(server: Scripted, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Have a server change each element of its answers to searches."""
    usual = server._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        reply = usual(segments, query)
        if reply.status == 200:
            rows = json.loads(reply.body)
            reply.body = as_json([{tag: change(element) for tag, element in row.items()} for row in rows])
        return reply

    server._search = search  # type: ignore[method-assign]


def padded(element: dict[str, Any]) -> dict[str, Any]:
    pad = "\0" if element["vr"] == "UI" else " "
    values = [value + pad if isinstance(value, str) and len(value) % 2 else value for value in element.get("Value", ())]
    return element | ({"Value": values} if values else {})


def bare(element: dict[str, Any]) -> dict[str, Any]:
    return element | ({"Value": element["Value"][0]} if len(element.get("Value", ())) == 1 else {})


@pytest.mark.parametrize("change", [padded, bare])
@pytest.mark.parametrize("ignores", ["filters", ""])
def test_values_that_are_padded_or_in_no_list(
    server: Scripted, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], ignores: str
) -> None:
    study, other = studies.uid(55), studies.uid(56)
    uids = hold(server, *(studies.dataset(study=study, series=f"{study}.{number}") for number in (1, 2, 10)))
    named = {"AccessionNumber": "A-1", "StudyDescription": "Thorax!"}
    uids += hold(server, studies.dataset(study=other, series=f"{other}.1", **named))
    server.ignores = {ignores}
    writing(server, change)
    assert {match.StudyInstanceUID for match in found(server)} == {study, other}
    (match,) = found(server, Query(AccessionNumber=("A-1",), StudyDescription=("Thorax!",), level="series"))
    assert match.StudyInstanceUID == other and match.attributes["AccessionNumber"] == "A-1"
    assert fetched(server, tmp_path / "out").state is State.DELIVERED
    assert set(files(tmp_path / "out")) == set(uids)


@pytest.mark.parametrize("body", [b"null", b"[]", b""])
def test_forms_of_no_result(server: Scripted, body: bytes) -> None:
    server._search = lambda segments, query: Reply(200, body, headers={"Content-Type": JSON})  # type: ignore[method-assign]
    assert found(server) == []


def test_modalities_that_are_written_as_in_a_file(server: Scripted) -> None:
    study = studies.uid(56)
    hold(server, *series_of(1, study=study), studies.dataset("MR_small.dcm", study=study))
    writing(
        server,
        lambda element: (
            element | ({"Value": ["\\".join(element["Value"])]} if len(element.get("Value", ())) > 1 else {})
        ),
    )
    server.ignores = {"filters"}
    assert len(found(server, Query(Modality="MR"))) == len(found(server, Query(Modality="CT"))) == 1
    assert not found(server, Query(Modality="US"))


def test_results_that_all_lack_their_uid_are_not_taken_for_none(server: Scripted) -> None:
    hold(server, *series_of(2))
    usual = server._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        reply = usual(segments, query)
        if reply.status == 200:
            reply.body = as_json([{t: e for t, e in row.items() if t != "0020000D"} for row in json.loads(reply.body)])
        return reply

    server._search = search  # type: ignore[method-assign]
    with pytest.raises(Misconfigured, match="StudyInstanceUID"):
        found(server)


@pytest.mark.parametrize("reply", [Reply(429, headers={"Retry-After": "0"}), Reply(503), Reply(resets=True)])
def test_a_list_at_a_server_that_asks_to_come_back_now_and_then(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, reply: Reply
) -> None:
    """It goes on with where it was; who began again would come no further than the server allows at once."""
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.0)
    numbers = tuple(f"A{number}" for number in range(30))
    hold(server, *(studies.dataset(AccessionNumber=number) for number in numbers))
    usual = server._usual
    server._usual = lambda request: reply if len(server.requests) % 7 in (0, 1) else usual(request)  # type: ignore[method-assign]
    assert {match.attributes["AccessionNumber"] for match in found(server, Query(AccessionNumber=numbers))} == set(
        numbers
    )


@pytest.mark.parametrize("status", [204, 400, 404, 405, 501])
def test_server_that_lists_no_series(server: Scripted, tmp_path: Path, status: int) -> None:
    """The metadata of a study that it has name them."""
    study = studies.uid(56)
    uids = hold(server, *series_of(3, study=study), *series_of(2, study=study))
    hold(server, studies.dataset("MR_small.dcm", study=study, SeriesDescription="Head"))
    usual = server._search
    server._search = lambda segments, query: (  # type: ignore[method-assign]
        Reply(status) if segments[-1] == "series" else usual(segments, query)
    )
    assert len(found(server, Query(SeriesDescription=("Head",)))) == 1
    assert not found(server, Query(SeriesDescription=("Foot",)))
    assert fetched(server, tmp_path / "out", Query(Modality="CT")).state is State.DELIVERED
    assert set(files(tmp_path / "out")) == set(uids)


@pytest.mark.parametrize(
    ("parameter", "status"),
    [("includefield", 501), ("ModalitiesInStudy", 501), ("limit", 501), ("offset", 501), ("offset", 500)],
)
def test_server_that_does_not_implement_a_parameter(
    server: Scripted, tmp_path: Path, parameter: str, status: int
) -> None:
    """Or stumbles over an offset that is behind its last result."""
    uids = hold(server, *(studies.dataset(study="1.2.3", series="1.2.3.4", AccessionNumber="A-1") for _ in range(3)))
    usual = server._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        given = dict(query).get(parameter, "")
        return Reply(status) if given and (parameter, given) != ("offset", "0") else usual(segments, query)

    server._search = search  # type: ignore[method-assign]
    query = Query(AccessionNumber=("A-1",), Modality="CT")
    assert len(found(server, query)) == 1
    assert fetched(server, tmp_path / "out", query).state is State.DELIVERED
    assert set(files(tmp_path / "out")) == set(uids)


def test_server_that_says_404_where_nothing_matches(server: Scripted) -> None:
    hold(server, studies.dataset(AccessionNumber="A-1"))
    usual = server._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        reply = usual(segments, query)
        return Reply(404, b"no such study", "text/plain") if reply.status == 204 else reply

    server._search = search  # type: ignore[method-assign]
    assert len(found(server, Query(AccessionNumber=("A-0", "A-1", "A-2")))) == 1
    assert found(server, Query(AccessionNumber=("A-0",))) == found(server, Query(PatientName="Nobody*")) == []
    server.stored.clear()  # now it may as well have no such service
    with pytest.raises(NotFound):
        found(server, Query(AccessionNumber=("A-0",)))


@pytest.mark.parametrize("kind", ["application/octet-stream", "binary/octet-stream", ""])
@pytest.mark.parametrize("uri", ["", "/wado"])
@pytest.mark.parametrize("chunked", [0, 50])
def test_instances_under_the_type_that_files_have_in_web_servers(
    server: Scripted, tmp_path: Path, kind: str, uri: str, chunked: int
) -> None:
    uids = hold(server, *series_of(3))
    server.uri, server.gives = uri, "single"
    retrieve, by_uri = server._retrieve, server._by_uri

    def plain(reply: Reply) -> Reply:
        return replace(reply, type=kind, chunked=chunked) if reply.type == "application/dicom" else reply

    server._retrieve = lambda segments: plain(retrieve(segments)) if len(segments) == 6 else Reply(404)  # type: ignore[method-assign]
    server._by_uri = lambda given: plain(by_uri(given))  # type: ignore[method-assign]
    assert fetched(server, tmp_path / "out").state is State.DELIVERED
    assert set(files(tmp_path / "out")) == set(uids)
    server._retrieve = lambda segments: Reply(200, b"x" * 300, kind)  # type: ignore[method-assign]
    server._by_uri = lambda given: Reply(200, b"x" * 300, kind)  # type: ignore[method-assign]
    assert fetched(server, tmp_path / "none").state is State.FAILED
