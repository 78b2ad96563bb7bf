"""Pages of QIDO-RS: every result once, and none missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from imaging.query import Query
from protocols.dicomweb import pages, qido
from talaria.testing import studies
from tests.servers.dicomweb import Reply, Scripted, as_json
from tests.targets.dicomweb_query.finding import found, hold, study_uids
from transfer.errors import Misconfigured


@pytest.fixture
def many(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """A server with 50 studies; pages of 20 are asked for."""
    monkeypatch.setattr(pages, "PAGE", 20)
    hold(server, *(studies.ct_bytes() for _ in range(50)))
    return server


def test_pages(many: Scripted) -> None:
    matches = found(many)
    assert len(matches) == len(study_uids(matches)) == 50
    offsets = [dict(request.query)["offset"] for request in many.of("GET")]
    assert offsets[:3] == ["0", "19", "38"]
    assert len(offsets) < 12  # that it counts no further than 50 is looked for


def test_what_stands_behind_a_search_shows_by_one_query_that_it_was_whole(many: Scripted) -> None:
    hold(many, *(studies.dataset(AccessionNumber="OTHER") for _ in range(8)))
    assert len(study_uids(found(many, Query(AccessionNumber=("OTHER",))))) == 8
    assert [dict(request.query)["offset"] for request in many.of("GET")] == ["0", "8", "8"]


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


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("most", [20, 25])
@pytest.mark.parametrize("ignores", ["", "offset"])
def test_server_refuses_larger_pages(
    many: Scripted, monkeypatch: pytest.MonkeyPatch, status: int, most: int, ignores: str
) -> None:
    """Each result comes, with all that was asked for of it; without an offset, by shares."""
    monkeypatch.setattr(pages, "SMALL", 12)
    monkeypatch.setattr(pages, "PAGE", 30 if most == 25 else 20)
    many.ignores, many.cap = {ignores}, most
    usual = many._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        return Reply(status) if int(dict(query).get("limit", "999")) > most else usual(segments, query)

    many._search = search  # type: ignore[method-assign]
    matches = found(many)
    assert len(study_uids(matches)) == len(matches) == 50
    assert all(match.instances for match in matches)  # `includefield` was not left out


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


@pytest.mark.parametrize("counts", [7, 13, 20, 37])
def test_server_counts_no_further_than_a_limit(server: Scripted, monkeypatch: pytest.MonkeyPatch, counts: int) -> None:
    """As an Orthanc with `LimitFindResults` does, without a word; it has pages up to there."""
    monkeypatch.setattr(pages, "PAGE", 20)
    hold(server, *(studies.dataset(StudyDate=f"2024{n % 12 + 1:02}{n % 28 + 1:02}") for n in range(60)))
    strict(server)
    server.counts = counts
    assert len(study_uids(found(server, Query(StudyDate="2024-2024")))) == 60
    assert len(study_uids(found(server, Query(StudyDate="20240301-")))) == 50
    with pytest.raises(Misconfigured, match="range of study dates"):  # there may be studies without a date
        found(server, Query(PatientName="*"))
    hold(server, *(studies.dataset(StudyDate="20240101", AccessionNumber="A") for _ in range(60)))
    with pytest.raises(Misconfigured, match=f"gives {counts} results at once, and may have more"):
        found(server, Query(AccessionNumber=("A",)))


@pytest.mark.parametrize("day", ["20000101", ""])
@pytest.mark.parametrize("begin", ["ANON-00", ""])
@pytest.mark.parametrize("key", ["PatientID", "AccessionNumber", "PatientName"])
def test_studies_of_one_day_behind_a_limit(server: Scripted, key: str, begin: str, day: str) -> None:
    """Anonymised studies often share a date, or have none: a search for everything ends at the same limit."""
    same = {"PatientID": "1", "AccessionNumber": "", "PatientName": "ANON", "StudyDate": day}
    hold(server, *(studies.dataset(**same | {key: f"{begin}{n:02}"}) for n in range(13)))
    strict(server)
    server.counts = 5
    for query in (Query(), Query(StudyDate=day), Query(Modality="CT")):
        with pytest.raises(Misconfigured, match="gives 5 results at once, and may have more"):
            found(server, query)
    server.counts = None
    assert len(study_uids(found(server))) == 13


def test_few_studies_of_one_day_are_all_that_there_are(server: Scripted) -> None:
    hold(server, *(studies.dataset(StudyDate="20000101", PatientID=f"P{n}") for n in range(7)))
    strict(server)
    assert len(study_uids(found(server))) == 7
    assert len(server.of("GET")) < 25


def test_series_behind_a_limit_are_read_in_the_metadata(server: Scripted) -> None:
    study, other = studies.uid(), studies.uid()
    hold(server, *(studies.dataset(study=study, SeriesNumber=n, Modality="MR" if n else "CT") for n in range(11)))
    hold(server, *(studies.dataset(study=other, SeriesNumber=n) for n in range(7)))
    strict(server)
    server.counts = 7
    by_series = found(server, Query(StudyInstanceUID=study, level="series"))
    assert len({one.SeriesInstanceUID for one in by_series}) == len(by_series) == 11
    assert len(found(server, Query(StudyInstanceUID=study, level="series", Modality="CT"))) == 1
    assert len(found(server, Query(StudyInstanceUID=other, level="series"))) == 7


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
