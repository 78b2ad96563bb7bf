"""Retrieval by WADO-RS."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imaging.query import Query
from protocols.dicomweb import qido
from protocols.dicomweb.wado_request import ACCEPTS, fetch
from protocols.files import partial
from talaria.testing import studies
from tasks.dicomweb import connect, retrieve
from tests.servers.dicomweb import Reply, Request, Scripted, as_json
from tests.targets.dicomweb import dicomweb_target
from tests.targets.dicomweb_query.fetching import fetched, series_of
from tests.targets.dicomweb_query.finding import EVERYTHING, PAGE, files, hold
from transfer.errors import Busy, Cancelled, Denied, DispatchError, Interrupted, Misconfigured, NotFound
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, PushReport, State


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


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("alike", [True, False], ids=["copied", "other"])
def test_one_uid_in_two_series_comes_once_and_what_differs_is_not_taken_for_it(
    server: Scripted, tmp_path: Path, alike: bool, counted: bool
) -> None:
    study, (first, second) = studies.uid(56), sorted(studies.uid(56) for _ in range(2))  # it lists them so
    both = [studies.dataset(study=study, series=first) for _ in range(2)]
    copies = [studies.dataset(study=study, series=second, SOPInstanceUID=one.SOPInstanceUID) for one in both]
    if not alike:
        copies[0].PixelData = bytes(len(copies[0].PixelData))
    uids = hold(server, *both, *series_of(1, study=study, series=second))
    server.stored |= {f"copy {number}": studies.encoded(one) for number, one in enumerate(copies)}
    if not counted:
        uncounted(server)
    for _ in range(2):  # what is here already is as much as what comes
        receipt = fetched(server, tmp_path / "out", concurrency=1)
        assert receipt.state is (State.DELIVERED if alike else State.PARTIAL), receipt.notes
        assert set(files(tmp_path / "out")) == set(uids)
        said = "; ".join(receipt.notes)
        assert receipt.unsent == (0 if alike else 1)
        count = 2 if alike else 1
        assert f"series {second}: {count} instances are in another series as well, and come once" in said
        assert (f"another instance of the same UID is in series {first}" in said) is not alike


@pytest.mark.parametrize("alike", [True, False], ids=["copied", "other"])
def test_one_uid_that_a_series_has_twice_comes_once_and_what_differs_is_said(
    server: Scripted, tmp_path: Path, alike: bool
) -> None:
    one = studies.dataset(study=studies.uid(56), series=studies.uid(56))
    uids = hold(server, one)
    if not alike:
        one.PixelData = bytes(len(one.PixelData))
    server.stored["copy"] = studies.encoded(one)
    receipt = fetched(server, tmp_path / "out")
    assert set(files(tmp_path / "out")) == set(uids)
    words = "1 instances were not taken: another instance of the same UID came before"
    assert any(words in note for note in receipt.notes) is not alike


def test_copies_of_a_whole_series_come_over_several_connections(server: Scripted, tmp_path: Path) -> None:
    study, series = studies.uid(56), [studies.uid(56) for _ in range(4)]
    first = [studies.dataset(study=study, series=series[0]) for _ in range(6)]
    uids = hold(server, *first)
    for number, one in enumerate(first):
        for uid in series[1:]:
            copy = studies.dataset(study=study, series=uid, SOPInstanceUID=one.SOPInstanceUID)
            server.stored[f"{uid} {number}"] = studies.encoded(copy)
    receipt = fetched(server, tmp_path / "out", concurrency=4)
    assert receipt.state is State.DELIVERED, receipt.notes
    assert set(files(tmp_path / "out")) == set(uids) and receipt.counts[Kind.DELIVERED] == 6
    # Each instance comes once, of whichever series is first, and is in three others.
    copies = [re.search(r"(\d+) instances are in another series as well", note) for note in receipt.notes]
    assert sum(int(one[1]) for one in copies if one) == 18


def test_what_a_pause_leaves_is_missing_though_the_server_counts_nothing(server: Scripted, tmp_path: Path) -> None:
    uids = hold(server, *series_of(10))
    uncounted(server)
    usual, pausing = server._retrieve, threading.Event()
    server._retrieve = lambda segments: Reply(504) if len(segments) == 4 else usual(segments)  # type: ignore[method-assign]
    report = PushReport(lambda item, outcome: pausing.set(), pausing=pausing)
    receipt = retrieve(dicomweb_target(server.url, concurrency=1), EVERYTHING, tmp_path / "out", report)
    assert receipt.state is State.PARTIAL and receipt.unsent >= 1
    assert 0 < len(files(tmp_path / "out")) < len(uids)
    assert fetched(server, tmp_path / "out").state is State.DELIVERED
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


def uncounted(server: Scripted, *, cap: int | None = None, metadata: bool = True) -> None:
    """Have a server count no instances, give so many of a list at most and without pages, and perhaps no metadata."""
    search, describe = server._search, server._metadata

    def searched(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        reply = search(segments, query)
        if segments[-1] == "instances":
            reply.body = as_json(json.loads(reply.body)[:cap]) if reply.body else b""
        elif reply.body:
            counts = ("00201206", "00201208", "00201209")
            reply.body = as_json([{k: v for k, v in row.items() if k not in counts} for row in json.loads(reply.body)])
        return reply

    server.ignores = {"offset", "limit", "filters"} if cap else set()
    server._search = searched  # type: ignore[method-assign]
    server._metadata = lambda segments: describe(segments) if metadata else Reply(404)  # type: ignore[method-assign]


def test_retrieve_where_lists_end_at_a_limit(server: Scripted, tmp_path: Path) -> None:
    uids = hold(server, *series_of(12))
    uncounted(server, cap=10)
    usual = server._retrieve
    server._retrieve = lambda segments: Reply(504) if len(segments) == 4 else usual(segments)  # type: ignore[method-assign]
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.DELIVERED  # the metadata name all
    assert set(files(tmp_path / "out")) == set(uids)


def test_retrieve_where_nothing_lists_all_is_partial_unless_the_series_came_as_a_whole(
    server: Scripted, tmp_path: Path
) -> None:
    uids = hold(server, *series_of(12))
    uncounted(server, cap=10, metadata=False)
    for _ in range(2):  # nor is it called partial when it is here already
        receipt = fetched(server, tmp_path / "whole")
        assert receipt.state is State.DELIVERED and receipt.verified is Level.ACCEPTED
        assert set(files(tmp_path / "whole")) == set(uids)
    usual = server._retrieve
    server._retrieve = lambda segments: Reply(504) if len(segments) == 4 else usual(segments)  # type: ignore[method-assign]
    receipt = fetched(server, tmp_path / "parts")
    assert len(files(tmp_path / "parts")) == 10
    assert receipt.state is State.PARTIAL and receipt.unsent
    assert any("lists only" in note for note in receipt.notes)


def test_retrieve_that_is_cut_is_partial_where_the_server_neither_counts_nor_lists(
    server: Scripted, tmp_path: Path
) -> None:
    hold(server, *series_of(6))
    uncounted(server, metadata=False)
    search, usual = server._search, server._retrieve
    server._search = lambda segments, query: (  # type: ignore[method-assign]
        Reply(404) if segments[-1] == "instances" else search(segments, query)
    )
    server._retrieve = lambda segments: replace(usual(segments), cut=25_000)  # type: ignore[method-assign]
    receipt = fetched(server, tmp_path / "out")
    assert 0 < len(files(tmp_path / "out")) < 6
    assert receipt.state is State.PARTIAL


@pytest.mark.parametrize("lists", [True, False])
def test_retrieve_of_which_the_server_says_that_it_is_a_part(server: Scripted, tmp_path: Path, lists: bool) -> None:
    """206: the rest is fetched one by one, where the server lists it; else it is not known that nothing is missing."""
    uids = hold(server, *series_of(6))
    uncounted(server, metadata=False)
    search, usual = server._search, server._retrieve
    server._search = lambda segments, query: (  # type: ignore[method-assign]
        Reply(404) if segments[-1] == "instances" and not lists else search(segments, query)
    )

    def some(segments: list[str]) -> Reply:
        if len(segments) > 4:
            return usual(segments)
        kept, hidden = dict(server.stored), sorted(uids)[4:]
        for uid in hidden:
            del server.stored[uid]
        try:
            return replace(usual(segments), status=206)
        finally:
            server.stored.update(kept)

    server._retrieve = some  # type: ignore[method-assign]
    receipt = fetched(server, tmp_path / "out")
    assert len(files(tmp_path / "out")) == (6 if lists else 4)
    assert receipt.state is (State.DELIVERED if lists else State.PARTIAL)


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


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("rows", [True, False], ids=["listed", "one by one"])
def test_retrieve_where_credentials_are_refused_midway(
    server: Scripted, tmp_path: Path, status: int, *, rows: bool
) -> None:
    """A password that was changed, a token that was withdrawn: that holds for all that is left."""
    study = studies.uid(56)
    uids = [uid for _ in range(4) for uid in hold(server, *series_of(10, study=study))]
    usual, given = server._usual, [0]

    def answer(request: Request) -> Reply:
        if 'dicom"' in request.headers["accept"] and not rows and request.path.count("/") == 5:
            return Reply(504)
        if given[0] >= (1 if rows else 5):
            return Reply(status, PAGE, "text/html")
        given[0] += 'application/dicom"' in request.headers["accept"]
        return usual(request)

    server._usual = answer  # type: ignore[method-assign]
    with pytest.raises(Denied, match=str(status)):
        fetched(server, tmp_path / "out", concurrency=2)
    assert 0 < len(files(tmp_path / "out")) < len(uids)
    asked = [r for r in server.of("GET") if "dicom+json" not in r.headers["accept"]]
    assert len(asked) < len(files(tmp_path / "out")) + 12
    server._usual = usual  # type: ignore[method-assign]
    assert fetched(server, tmp_path / "out").state is State.DELIVERED


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
    refuse_star(server)
    assert fetched(server, tmp_path / "out").state is State.DELIVERED


def refuse_star(server: Scripted) -> None:
    usual = server._usual

    def answer(request: Request) -> Reply:
        return Reply(406) if "transfer-syntax=*" in request.headers["accept"] else usual(request)

    server._usual = answer  # type: ignore[method-assign]


def test_while_a_form_comes_first_no_other_thread_finds_none_to_ask_for(server: Scripted) -> None:
    """It would take a series that it asked nothing of for one that has come."""
    seen: list[int] = []

    class Form(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __ne__(self, other: object) -> bool:
            seen.append(len(forms))
            return not self == other

    forms: list[str] = [Form(one) for one in ACCEPTS]
    study, series = studies.uid(56), studies.uid(56)
    hold(server, *series_of(1, study=study, series=series))
    refuse_star(server)
    with connect(dicomweb_target(server.url)) as service:
        for content in fetch(service, (study, series), int, forms):
            assert b"".join(bytes(piece) for piece in content)
    assert set(seen) == {len(ACCEPTS)} and forms[0] == ACCEPTS[1]


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
