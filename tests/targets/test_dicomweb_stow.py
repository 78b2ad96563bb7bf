"""STOW: every answer that servers give, and what becomes of the instances."""

from __future__ import annotations

import errno
import gzip
import io
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pydicom
import pytest

from protocols.dicomweb import stow, stow_doubts
from protocols.http import session as http
from talaria.testing import studies
from talaria.testing.harness import Sent, attempt, sending
from talaria.testing.process import as_loaded
from tasks.dicomweb import driver
from tests.servers.dicomweb import XML, Reply, Request, Scripted, Step, as_json, as_xml, listing, scripted, uid_of
from tests.targets.dicomweb import dicomweb_target
from transfer.errors import (
    Busy,
    Cancelled,
    Denied,
    Interrupted,
    Misconfigured,
    NotFound,
    Retryable,
    TimedOut,
)
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan, scan
from transfer.receipt import Level, PushReport, State

PAGE = b"<html><head><title>Bad Request</title><style>x{}</style></head><body><h1>It hurts</h1></body></html>"


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted(only="POST") as running:
        yield running


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a process that has met no server yet."""
    monkeypatch.setattr(stow, "_suspected", {})
    monkeypatch.setattr(stow, "_stumbled", {})
    monkeypatch.setattr(http, "_without_continue", set())


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    studies.ct(tmp_path / "study", 8)
    return scan([tmp_path / "study"])


def uids(plan: Plan) -> list[str]:
    return [item.header.SOPInstanceUID for item in plan.items if item.header]


def push(server: Scripted, plan: Plan | Path, **settings: Any) -> Sent:
    return attempt(dicomweb_target(server.url, **({"concurrency": 1} | settings)), plan)


def kinds(sent: Sent) -> list[Kind]:
    return [sent.outcomes[item.path].kind for item in sent.plan.items if item.path in sent.outcomes]


def all_delivered(sent: Sent, server: Scripted) -> None:
    assert sent.require().state is State.DELIVERED
    assert kinds(sent) == [Kind.DELIVERED] * len(sent.plan.items)
    assert set(server.stored) == set(uids(sent.plan))


class Always(list[Step]):
    """A script that has one answer to all requests."""

    def pop(self, index: Any = -1) -> Step:
        return self[0]


# ---- what goes out


def test_request(server: Scripted, plan: Plan) -> None:
    sent = push(server, plan)
    all_delivered(sent, server)
    (request,) = server.of("POST")
    assert request.path == "/rs/studies"
    assert request.headers["content-type"].startswith('multipart/related; type="application/dicom"; boundary=')
    assert "transfer-encoding" not in request.headers
    assert request.parts == [plan.file(item).read_bytes() for item in plan.items]
    assert server.stored == {uid_of(part): part for part in request.parts}


def test_batches_by_items_and_bytes(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path, 30)
    plan = scan([tmp_path])
    all_delivered(push(server, plan, batch_items=7), server)
    assert [len(request.parts) for request in server.of("POST")] == [7, 7, 7, 7, 2]
    server.requests.clear()
    size = plan.items[0].size
    all_delivered(push(server, plan, batch_bytes=4 * size), server)
    assert all(request.length <= 4 * size for request in server.of("POST"))
    assert {len(request.parts) for request in server.of("POST")} == {3}
    server.requests.clear()
    all_delivered(push(server, plan, batch_bytes=1), server)  # nothing fits: each goes alone
    assert [len(request.parts) for request in server.of("POST")] == [1] * 30


def test_several_requests_at_once(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path, 24)
    together = threading.Barrier(4, timeout=60)

    def wait(request: Request) -> None:
        together.wait()

    server.script = [wait] * 4
    all_delivered(push(server, scan([tmp_path]), batch_items=6, concurrency=4), server)


def test_connections_are_used_again(server: Scripted, plan: Plan) -> None:
    all_delivered(push(server, plan, batch_items=1), server)
    assert server.connections == 1


def test_same_instance_twice_in_a_plan(server: Scripted, tmp_path: Path) -> None:
    data = studies.ct_bytes()
    for name in ("a.dcm", "b.dcm"):
        studies.write(tmp_path / name, data)
    sent = push(server, tmp_path)
    assert kinds(sent) == [Kind.DELIVERED, Kind.ALREADY]
    assert [len(request.parts) for request in server.of("POST")] == [1]


def test_other_content_under_the_same_uid_is_rejected(server: Scripted, tmp_path: Path) -> None:
    uid = studies.uid()
    for name in ("a", "b"):
        studies.dicom(tmp_path / f"{name}.dcm", SOPInstanceUID=uid, PatientComments=name)
    sent = push(server, tmp_path)
    assert kinds(sent) == [Kind.DELIVERED, Kind.REJECTED]
    assert "a.dcm" in sent.rejected["b.dcm"]
    assert server.stored[uid] == (tmp_path / "a.dcm").read_bytes()
    assert len(server.of("POST")) == 1


def test_data_set_without_meta_header(server: Scripted, tmp_path: Path) -> None:
    """What is sent is a file as PS3.10 has it, and the same data set."""
    whole = studies.encoded(studies.dataset())
    bare = whole[scan([studies.write(tmp_path / "w" / "w.dcm", whole)]).items[0].header.dataset_offset :]  # type: ignore[union-attr]
    studies.write(tmp_path / "in" / "bare.dcm", bare)
    assert push(server, tmp_path / "in").require().state is State.DELIVERED
    (stored,) = server.stored.values()
    assert stored[128:132] == b"DICM"
    assert stored.endswith(bare)
    assert pydicom.dcmread(io.BytesIO(stored)).file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"


# ---- accepted, in words of the server's own


def at_most_twice(server: Scripted) -> None:
    counts = Counter(uid for request in server.of("POST") for uid in request.uids)
    assert max(counts.values()) <= 2


def renamed(request: Request) -> Reply:
    """A gateway that gives instances UIDs of its own."""
    return Reply(200, as_json(listing({f"1.2.3.{n}": 0 for n, _ in enumerate(request.parts)})))


@pytest.mark.parametrize("batch_items", [1, 3, 100])
@pytest.mark.parametrize("level", [Level.ACCEPTED, Level.LISTED])
def test_stored_under_another_uid(server: Scripted, plan: Plan, batch_items: int, level: Level) -> None:
    server.script = [renamed] * 99
    sent = push(server, plan, batch_items=batch_items, verify=level)
    assert sent.require().state is State.DELIVERED
    assert sent.require().verified is Level.ACCEPTED
    assert kinds(sent) == [Kind.WARNING] * 8
    assert all("another UID" in outcome.detail for outcome in sent.outcomes.values())
    assert sum(len(request.parts) for request in server.of("POST")) == 8


@pytest.mark.parametrize("level", [Level.LISTED, Level.PROVEN])
def test_stored_under_another_uid_is_known_in_later_attempts_and_runs(
    server: Scripted, plan: Plan, level: Level
) -> None:
    """Nobody can look for it there: that is no reason to call it missing, or to send it again."""
    server.script = [renamed] * 3 + [Reply(503)] * 9
    target = dicomweb_target(server.url, batch_items=1, concurrency=1, verify=level)
    with sending(target, plan) as sender:
        first = sender.attempt()
        assert isinstance(first.error, Busy) and len(first.arrived) == 3
        server.script = [renamed] * 99
        receipt = sender.attempt().require()
    assert receipt.state is State.DELIVERED and receipt.counts[Kind.WARNING] == 8
    assert receipt.verified is Level.ACCEPTED
    known = {row.path: Outcome(row.outcome, row.detail) for row in receipt.items}
    posted = len(server.of("POST"))
    again = attempt(target, plan, done=known).require()
    assert again.state is State.DELIVERED and again.counts[Kind.ALREADY] == 8
    assert all("another UID" in row.detail for row in again.items)
    assert len(server.of("POST")) == posted


def test_fewer_under_other_uids_than_were_sent(server: Scripted, plan: Plan) -> None:
    """Which of them it was can't be told, so each is sent alone, once more."""
    server.script = [Reply(200, as_json(listing({"1.2.3": 0}))), *[renamed] * 8]
    sent = push(server, plan)
    assert kinds(sent) == [Kind.WARNING] * 8
    at_most_twice(server)


@pytest.mark.parametrize(
    "answer",
    [
        lambda uids: listing({}) | {"00081199": {"vr": "SQ", "Value": [{"00081150": {"vr": "UI"}} for _ in uids]}},
        lambda uids: {"00081140": listing(dict.fromkeys(uids, 0))["00081199"]},
        lambda uids: {"ReferencedSOPSequence": [{"ReferencedSOPInstanceUID": uid} for uid in uids]},
        lambda uids: {},
        lambda uids: [],
        lambda uids: "stored",
        lambda uids: {"message": "8 instances stored"},
    ],
    ids=["no UID", "other attribute", "keywords", "empty", "empty list", "text", "message"],
)
def test_what_the_answer_leaves_open_is_asked_for(server: Scripted, plan: Plan, answer: Any) -> None:
    usual = server._store

    def store(request: Request) -> Reply:
        usual(request)
        return Reply(200, as_json(answer(request.uids)))

    server._store = store  # type: ignore[method-assign]
    all_delivered(push(server, plan), server)
    assert len(server.of("POST")) == 1


@pytest.mark.parametrize("body", [b"{}", b'"stored"', b"OK"])
def test_success_of_a_server_that_can_not_be_searched(server: Scripted, plan: Plan, body: bytes) -> None:
    server._search = lambda segments, query: Reply(404)  # type: ignore[method-assign]
    server.script = [Reply(200, body)] * 99
    sent = push(server, plan)
    assert kinds(sent) == [Kind.WARNING] * 8
    assert "can't be searched" in sent.outcomes[plan.items[0].path].detail
    at_most_twice(server)


def test_success_without_trace_stays_unknown(server: Scripted, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stow, "SETTLE_S", 0.1)
    server.script = [Reply(200, b"{}")] * 99
    sent = push(server, plan)
    assert isinstance(sent.error, Interrupted)
    assert not sent.outcomes
    at_most_twice(server)


@pytest.mark.parametrize("status", [400, 409, 500, 202])
def test_nothing_goes_out_more_than_twice(server: Scripted, tmp_path: Path, status: int) -> None:
    studies.ct(tmp_path, 40)
    plan = scan([tmp_path])
    bad = set(uids(plan)[3:30:5])
    server.script = [lambda request: Reply(status) if bad & set(request.uids) else None] * 99
    sent = push(server, plan, concurrency=3)
    assert len(sent.arrived) == 40 - (len(bad) if status != 202 else 0)
    at_most_twice(server)


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("batch_items", [1, 3, 100])
def test_no_room_for_some_costs_only_them(server: Scripted, tmp_path: Path, concurrency: int, batch_items: int) -> None:
    """As Orthanc says of instances without a patient's ID, each time."""
    studies.ct(tmp_path, 30)
    plan = scan([tmp_path])
    server.refuses = dict.fromkeys(uids(plan)[:6], 0xA700)
    sent = push(server, plan, batch_items=batch_items, concurrency=concurrency)
    assert isinstance(sent.error, Busy)
    assert "A700" in sent.error.message
    assert len(sent.arrived) == 24
    at_most_twice(server)


def test_words_of_a_failure(server: Scripted, plan: Plan) -> None:
    """Google's FailureDetail, and a reason that is a JSON string."""
    victim = uids(plan)[0]
    lists = listing(dict.fromkeys(uids(plan)[1:], 0), {victim: 0x0110 + 0x12})
    lists["00081198"]["Value"][0]["00090097"] = {"vr": "LO", "Value": ["The study is locked for writing"]}
    server.script = [Reply(202, as_json(lists))]
    (detail,) = push(server, plan).rejected.values()
    assert "locked for writing" in detail
    server.script = [Reply(400, as_json("the archive takes no CT"))] * 9
    assert all("takes no CT" in detail for detail in push(server, plan).rejected.values())


def test_the_first_reason_survives_retries(server: Scripted, plan: Plan) -> None:
    """One is rejected, then the link is cut; the next attempt ends well, and looks at what is there."""
    bad = uids(plan)[0]
    server.refuses = {bad: 0x0122}
    server.script = [lambda _: None, *[Reply(resets=True)] * 5]
    target = dicomweb_target(server.url, verify=Level.LISTED, concurrency=1, batch_items=4)
    first = attempt(target, plan)
    assert isinstance(first.error, Interrupted)
    server.script = []
    rejected = {path: outcome for path, outcome in first.outcomes.items() if not outcome.arrived}
    assert list(rejected) == [plan.items[0].path]
    report = PushReport()
    receipt = driver.push(target, plan.narrowed(plan.items, first.arrived, rejected=rejected), report)
    assert receipt.state is State.PARTIAL
    assert receipt.verified is Level.LISTED
    assert receipt.items[0].detail == rejected[plan.items[0].path].detail
    assert sum(bad in request.uids for request in server.of("POST")) == 1


def test_406_has_advice(server: Scripted, plan: Plan) -> None:
    server.script = Always([Reply(406)])
    error = push(server, plan).error
    assert isinstance(error, Misconfigured)
    assert "406" in error.message
    assert "check url" in error.message


def test_large_instance_in_pieces(server: Scripted, tmp_path: Path) -> None:
    studies.multiframe(tmp_path / "large.dcm", 12)  # 6 MB
    studies.ct(tmp_path, 2)
    all_delivered(push(server, tmp_path), server)


def test_a_batch_that_may_have_been_taken_is_asked_for(
    server: Scripted, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection has been idle, and goes after the whole body (RFC 9110 section 9.2.2)."""
    monkeypatch.setattr(http, "STALE_S", 0.0)

    def taken(request: Request) -> Reply:
        server._store(request)
        return Reply(resets=True)

    server.script = [lambda _: None, taken]
    all_delivered(push(server, plan, batch_items=4, concurrency=1), server)
    assert [len(request.parts) for request in server.of("POST")] == [4, 4]
    server.script = [lambda _: None, Reply(resets=True)]
    server.stored.clear()
    all_delivered(push(server, plan, batch_items=4, concurrency=1), server)
    assert [len(request.parts) for request in server.of("POST")][2:] == [4, 4, 1, 1, 1, 1]


# ---- per instance


@pytest.mark.parametrize("encode", [as_json, as_xml, lambda lists: as_json([lists])])
def test_202_some_failed(server: Scripted, plan: Plan, encode: Callable[[Any], bytes]) -> None:
    good, bad = uids(plan)[:6], uids(plan)[6:]
    lists = listing(dict.fromkeys(good, 0), dict.fromkeys(bad, 0x0122))
    server.script = [Reply(202, encode(lists), XML if encode is as_xml else "application/dicom+json")]
    sent = push(server, plan)
    assert sent.require().state is State.PARTIAL
    assert kinds(sent) == [Kind.DELIVERED] * 6 + [Kind.REJECTED] * 2
    assert all("SOP class not supported (0122)" in detail for detail in sent.rejected.values())
    assert len(server.of("POST")) == 1


@pytest.mark.parametrize("status", [200, 202])
def test_warning_reasons(server: Scripted, plan: Plan, status: int) -> None:
    codes = [0xB000, 0xB006, 0xB007, 1, 0, 0, 0, 0]
    server.script = [Reply(status, as_json(listing(dict(zip(uids(plan), codes, strict=True)))))]
    sent = push(server, plan)
    assert sent.require().state is State.DELIVERED
    assert kinds(sent) == [Kind.WARNING] * 4 + [Kind.DELIVERED] * 4
    details = [outcome.detail for outcome in sent.outcomes.values()]
    assert "coerced (B000)" in details[0]
    assert "discarded (B006)" in details[1]
    assert "(B007)" in details[2]
    assert "(0001)" in details[3]


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (0x0110, Kind.REJECTED, "processing failure (0110)"),
        (0x0111, Kind.ALREADY, "duplicate SOP instance (0111)"),
        (45070, Kind.ALREADY, "there already (B00E)"),
        (0x0117, Kind.REJECTED, "invalid SOP instance (0117)"),
        (0x0122, Kind.REJECTED, "SOP class not supported (0122)"),
        (0x0124, Kind.REJECTED, "not authorised (0124)"),
        (0xA900, Kind.REJECTED, "data set does not match the SOP class (A900)"),
        (43265, Kind.REJECTED, "(A901)"),
        (0xC000, Kind.REJECTED, "cannot understand the instance (C000)"),
        (0xC122, Kind.REJECTED, "transfer syntax not supported (C122)"),
        (0xC409, Kind.REJECTED, "(C409)"),
        (0x1234, Kind.REJECTED, "refused (1234)"),
        (None, Kind.REJECTED, "without a reason"),
    ],
)
@pytest.mark.parametrize("status", [202, 409])
def test_failure_reasons(server: Scripted, plan: Plan, code: int | None, kind: Kind, text: str, status: int) -> None:
    server.refuses = dict.fromkeys(uids(plan) if status == 409 else uids(plan)[:1], code)
    sent = push(server, plan)
    sent.require()
    count = len(server.refuses)
    assert kinds(sent) == [kind] * count + [Kind.DELIVERED] * (8 - count)
    assert text in next(iter(sent.outcomes.values())).detail or text in next(iter(sent.rejected.values()))


@pytest.mark.parametrize("code", [0xA700, 0xA7FF, 0x0213, 45071])
def test_out_of_resources_is_Busy_for_that_instance(server: Scripted, plan: Plan, code: int) -> None:
    victim = uids(plan)[3]
    server.refuses = {victim: code}
    sent = push(server, plan)
    assert isinstance(sent.error, Busy)
    assert len(sent.arrived) == 7
    assert victim not in str(sent.outcomes)
    server.refuses = {}
    again = attempt(dicomweb_target(server.url), plan, done=sent.arrived)
    assert again.require().state is State.DELIVERED
    assert set(server.of("POST")[-1].uids) == {victim}


def test_full_server_gets_no_more(server: Scripted, plan: Plan) -> None:
    server.refuses = dict.fromkeys(uids(plan), 0xA700)
    sent = push(server, plan, batch_items=2)
    assert isinstance(sent.error, Busy)
    assert len(server.of("POST")) <= 7


def test_processing_failure_that_passes(server: Scripted, plan: Plan) -> None:
    lists = listing(dict.fromkeys(uids(plan)[1:], 0), {uids(plan)[0]: 0x0110})
    server.script = [Reply(202, as_json(lists))]
    sent = push(server, plan)
    assert kinds(sent) == [Kind.DELIVERED] * 8
    assert [len(request.parts) for request in server.of("POST")] == [8, 1]


def test_comment_of_a_failure(server: Scripted, plan: Plan) -> None:
    victim = uids(plan)[0]
    comments = {victim: f"(0010,0010) {studies.PATIENT_NAME} is no name"}
    lists = listing(dict.fromkeys(uids(plan)[1:], 0), {victim: 0xC000}, comments=comments)
    server.script = [Reply(202, as_json(lists))]
    (detail,) = push(server, plan).rejected.values()
    assert "is no name" in detail
    assert "Quellwasser" not in detail


def test_409_data_already_there(server: Scripted, plan: Plan) -> None:
    """Only the reason says so; the status doesn't."""
    server.refuses = dict.fromkeys(uids(plan), 0x0111)
    sent = push(server, plan)
    assert sent.require().state is State.DELIVERED
    assert kinds(sent) == [Kind.ALREADY] * 8


@pytest.mark.parametrize("fault", [Reply(504), Reply(resets=True)], ids=["504", "reset"])
def test_what_this_run_brought_without_an_answer_is_delivered_and_not_already_there(
    server: Scripted, plan: Plan, fault: Reply
) -> None:
    """A request is taken, and its answer lost; the server can't be searched, and says 0111 of what it has."""
    brought: set[str] = {uids(plan)[7]}  # which was there before

    def store(request: Request) -> Reply:
        old = {uid: 0x0111 for uid in request.uids if uid in brought}
        new = {uid: 0 for uid in request.uids if uid not in brought}
        brought.update(new)
        if len(server.of("POST")) == 2:
            return fault
        return Reply(409 if old else 200, as_json(listing(new, old)))  # type: ignore[arg-type]

    server.only = ""
    server.script = [lambda request: store(request) if request.method == "POST" else Reply(404)] * 99
    receipt = push(server, plan, batch_items=2).require()
    kinds = [row.outcome for row in receipt.items]
    assert kinds == [Kind.DELIVERED] * 7 + [Kind.ALREADY]
    assert receipt.bytes == plan.size - plan.items[7].size


def test_409_without_a_list_is_a_rejection(server: Scripted, plan: Plan) -> None:
    bad = uids(plan)[2]
    server.script = [lambda request: Reply(409, PAGE, "text/html") if bad in request.uids else None] * 20
    sent = push(server, plan)
    assert sent.require().state is State.PARTIAL
    assert list(sent.rejected) == [plan.items[2].path]
    assert "409" in sent.rejected[plan.items[2].path]
    assert len(sent.arrived) == 7


def test_failed_sequence_present_but_empty(server: Scripted, plan: Plan) -> None:
    lists = listing(dict.fromkeys(uids(plan), 0))
    assert lists["00081198"] == {"vr": "SQ"}
    for empty in ({"vr": "SQ"}, {"vr": "SQ", "Value": []}, {"vr": "SQ", "Value": None}):
        server.script = [Reply(200, as_json({**lists, "00081198": empty}))]
        assert kinds(push(server, plan)) == [Kind.DELIVERED] * 8


@pytest.mark.parametrize("status", [202, 409])
def test_one_failed_listed_of_several(server: Scripted, plan: Plan, status: int) -> None:
    """The others were not mentioned, so nothing is known of them: they are asked about again."""
    bad = set(uids(plan)[:3] if status == 202 else uids(plan))

    def answer(request: Request) -> Reply:
        failed = [uid for uid in request.uids if uid in bad]
        accepted = dict.fromkeys([uid for uid in request.uids if uid not in bad], 0)
        for part in request.parts:
            if uid_of(part) in accepted:
                server.stored[uid_of(part)] = part
        status = 409 if failed and not accepted else 202 if failed else 200
        return Reply(status, as_json(listing(accepted, {failed[0]: 0xC000} if failed else {})))

    server.script = [answer] * 50
    sent = push(server, plan)
    assert sent.require().state in (State.PARTIAL, State.FAILED)
    assert {item.path for item in plan.items if item.header and item.header.SOPInstanceUID in bad} == set(sent.rejected)
    assert len(sent.arrived) == 8 - len(bad)


def test_instance_that_no_list_names_is_sent_again(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(200, as_json(listing(dict.fromkeys(uids(plan)[:7], 0))))]
    sent = push(server, plan)
    assert kinds(sent) == [Kind.DELIVERED] * 8
    assert [request.uids for request in server.of("POST")][1:] == [uids(plan)[7:]]


def test_instance_that_is_never_named_stays_unknown(server: Scripted, plan: Plan) -> None:
    server.silent = {uids(plan)[4]}
    server._search = lambda segments, query: Reply(404)  # type: ignore[method-assign]
    sent = push(server, plan)
    assert isinstance(sent.error, Interrupted)
    assert plan.items[4].path in sent.error.message
    assert len(sent.arrived) == 7
    assert not sent.rejected
    server.silent = set()
    assert attempt(dicomweb_target(server.url), plan, done=sent.arrived).require().state is State.DELIVERED


def test_other_failures_without_uid(server: Scripted, plan: Plan) -> None:
    bad = uids(plan)[5]

    def answer(request: Request) -> Reply:
        accepted = dict.fromkeys([uid for uid in request.uids if uid != bad], 0)
        return Reply(202, as_json(listing(accepted, others=[0xC000])))

    server.script = [answer]
    sent = push(server, plan)
    assert list(sent.rejected) == [plan.items[5].path]
    assert "C000" in sent.rejected[plan.items[5].path]


def test_other_failures_that_can_not_be_told_apart(server: Scripted, plan: Plan) -> None:
    """One failure without UID and two instances without a word: sent again, the bad one is found."""
    bad, quiet = uids(plan)[5], uids(plan)[6]

    def first(request: Request) -> Reply:
        accepted = dict.fromkeys([uid for uid in request.uids if uid not in (bad, quiet)], 0)
        return Reply(202, as_json(listing(accepted, others=[0xC000])))

    def later(request: Request) -> Reply:
        accepted = dict.fromkeys([uid for uid in request.uids if uid != bad], 0)
        failed = [0xC000] if bad in request.uids else []
        return Reply(200 if accepted else 409, as_json(listing(accepted, others=failed)))

    server.script = [first, later, later, later]
    sent = push(server, plan)
    assert list(sent.rejected) == [plan.items[5].path]
    assert len(sent.arrived) == 7


def test_foreign_uids_in_the_answer_are_nobodys(server: Scripted, plan: Plan) -> None:
    lists = listing({"1.2.3": 0, **dict.fromkeys(uids(plan), 0)}, {"1.2.4": 0xC000})
    server.script = [Reply(202, as_json(lists))]
    assert kinds(push(server, plan)) == [Kind.DELIVERED] * 8


# ---- the request as a whole


@pytest.mark.parametrize("status", [200, 201, 204])
def test_empty_body_of_a_success(server: Scripted, plan: Plan, status: int) -> None:
    server.script = [Reply(status)]
    sent = push(server, plan)
    receipt = sent.require()
    assert kinds(sent) == [Kind.DELIVERED] * 8
    assert receipt.verified is Level.ACCEPTED
    assert any("verify=listed" in note for note in receipt.notes)


def test_202_with_an_empty_body(server: Scripted, plan: Plan) -> None:
    """Some may have failed, so each is asked about alone; alone it was taken, with some warning."""
    server.script = [Reply(202)] * 30
    sent = push(server, plan)
    assert kinds(sent) == [Kind.WARNING] * 8
    assert [len(request.parts) for request in server.of("POST")].count(1) == 8


@pytest.mark.parametrize("status", [400, 409, 415, 422, 500])
def test_one_bad_instance_costs_only_itself(server: Scripted, plan: Plan, status: int) -> None:
    bad = uids(plan)[6]
    server.script = [lambda request: Reply(status, PAGE, "text/html") if bad in request.uids else None] * 30
    sent = push(server, plan)
    assert sent.require().state is State.PARTIAL
    assert list(sent.rejected) == [plan.items[6].path]
    detail = sent.rejected[plan.items[6].path]
    assert str(status) in detail
    assert "It hurts" in detail
    assert "<" not in detail
    assert set(server.stored) == set(uids(plan)) - {bad}
    assert len(server.of("POST")) <= 10


def test_400_for_everything(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(400, PAGE, "text/html")] * 100
    sent = push(server, plan)
    assert sent.require().state is State.FAILED
    assert kinds(sent) == [Kind.REJECTED] * 8


def test_500_for_everything_is_the_servers_fault(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(500, PAGE, "text/html")] * 100
    sent = push(server, plan)
    assert isinstance(sent.error, Busy)
    assert not sent.outcomes
    assert "500" in sent.error.message
    assert len(server.of("POST")) < 20


def test_500_once(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(500)]
    all_delivered(push(server, plan), server)


def test_quotes_hold_neither_secrets_nor_patients(server: Scripted, plan: Plan) -> None:
    def echo(request: Request) -> Reply:
        text = f"<p>{request.headers['authorization']} for {studies.PATIENT_NAME}, {studies.PATIENT_NAME.upper()}, "
        text += f"QUELLWASSER ZYPRIAN, {studies.PATIENT_ID} born 1944-02-29 (19440229), {studies.ACCESSION}</p>"
        return Reply(400, text.encode(), "text/html")

    server.script = [echo] * 100
    sent = push(server, plan, http_user="lab", http_password="pa55word-1234")
    for detail in sent.rejected.values():
        for word in ("pa55word", "bGFi", "Quellwasser", "QUELL", "Zyprian", "4711", "1944", studies.ACCESSION):
            assert word.lower() not in detail.lower()
        assert "***" in detail
        assert len(detail) < 300


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504, 507])
def test_busy_statuses(server: Scripted, plan: Plan, status: int) -> None:
    server.script = Always([Reply(status, PAGE, "text/html")])
    sent = push(server, plan)
    assert type(sent.error) is Busy
    assert sent.error.retry_after is None
    assert str(status) in sent.error.message
    assert not sent.outcomes
    assert len(server.of("POST")) == stow_doubts.MOST


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        (lambda: formatdate(time.time() + 90, usegmt=True), 80, 91),
        (lambda: formatdate(time.time() - 90, usegmt=True), 0, 0),
        ("99999999", 86_400, 86_400),
    ],
)
def test_retry_after(server: Scripted, plan: Plan, value: Any, low: float, high: float) -> None:
    text = value if isinstance(value, str) else value()
    server.script = [Reply(429, headers={"Retry-After": text})]
    error = push(server, plan).error
    assert isinstance(error, Busy)
    assert error.retry_after is not None
    assert low <= error.retry_after <= high


@pytest.mark.parametrize("value", ["soon", "-", "nan", "Mon, 99 Foo 2024"])
def test_retry_after_that_is_none(server: Scripted, plan: Plan, value: str) -> None:
    server.script = Always([Reply(503, headers={"Retry-After": value})])
    error = push(server, plan).error
    assert isinstance(error, Busy)
    assert error.retry_after is None


FAULTS: dict[str, Reply] = {
    **{str(status): Reply(status) for status in (401, 403, 404, 405, 406, 408, 410, 425, 429, 500, 501, 502, 503, 504)},
    "505": Reply(505),
    "507": Reply(507),
    "302": Reply(302, headers={"Location": "/login"}),
    "other host": Reply(302, headers={"Location": "http://192.0.2.1/login"}),
    "reset": Reply(resets=True),
    "cut": Reply(200, as_json(listing({"1.2.3": 0})), cut=20),
    "silence": Reply(hangs=True),
    "login page": Reply(200, PAGE, "text/html"),
}
PASSING = ("408", "425", "429", "502", "503", "504", "507", "reset", "cut", "silence", "login page")


@pytest.mark.parametrize(
    ("fault", "bad", "count", "batch_items", "concurrency"),
    [
        (fault, *case)
        for fault in FAULTS
        for case in (((0,), 8, 100, 1), ((3, 4, 5), 8, 4, 1), ((0, 4), 8, 4, 4), ((0, 5, 9, 17, 18, 29), 30, 100, 1))
        if fault != "silence" or len(case[0]) < 3  # each silence takes its time
    ],
)
def test_what_fails_a_whole_request_for_some_instances_costs_only_them(
    server: Scripted, tmp_path: Path, fault: str, bad: tuple[int, ...], count: int, batch_items: int, concurrency: int
) -> None:
    studies.ct(tmp_path, count)
    plan = scan([tmp_path])
    victims = {uids(plan)[number] for number in bad}
    server.script = Always([lambda request: FAULTS[fault] if victims & set(request.uids) else None])
    target = dicomweb_target(
        server.url,
        concurrency=concurrency,
        batch_items=batch_items,
        max_attempts=2,
        idle_timeout_s=1 if fault == "silence" else 10,
    )
    with sending(target, plan) as sender:
        while True:
            sent = sender.attempt()
            assert set(server.stored) == set(uids(plan)) - victims, "the others have to wait"
            if sent.error is None or not sender.delivery.may_go_on:
                break
            assert isinstance(sent.error, Retryable)
        receipt = sender.receipt()
    assert sender.delivery.attempts == (stow_doubts.LONE_TRIES if fault in PASSING else 1)
    seen = Counter(uid for request in server.of("POST") for uid in request.uids)
    assert max(seen.values()) <= 1 + sender.delivery.attempts
    assert receipt.counts[Kind.DELIVERED] == count - len(bad)
    left = [row for row in receipt.items if row.outcome is not Kind.DELIVERED]
    assert all(row.outcome is Kind.REJECTED and row.detail for row in left), left
    if fault.isdecimal() and fault != "302":
        assert all(fault in row.detail for row in left), left


@pytest.mark.parametrize("fault", ["503", "500", "reset", "silence"])
def test_what_is_not_settled_has_its_reason(server: Scripted, plan: Plan, fault: str) -> None:
    """One attempt is all that there is."""
    bad = uids(plan)[2]
    server.script = Always([lambda request: FAULTS[fault] if bad in request.uids else None])
    with sending(dicomweb_target(server.url, concurrency=1, idle_timeout_s=1), plan) as sender:
        sender.attempt()
        (left,) = (row for row in sender.receipt().items if row.outcome is not Kind.DELIVERED)
    assert left.outcome is (Kind.REJECTED if fault == "500" else Kind.UNSENT)
    assert {"503": "503", "500": "500", "reset": "connection", "silence": "silent"}[fault] in left.detail


def test_a_server_that_goes_down_later_rejects_nothing(server: Scripted, plan: Plan) -> None:
    """What it refused alone while it still took others is not put down to the instance when it refuses all."""
    bad = uids(plan)[2]
    server.script = Always([lambda request: Reply(503) if bad in request.uids else None])
    with sending(dicomweb_target(server.url, concurrency=1), plan) as sender:
        assert len(sender.attempt().arrived) == 7
        server.only = ""
        server.script = Always([Reply(503)])
        for _ in range(4):
            assert isinstance(sender.attempt().error, Busy)
        assert sender.receipt().counts[Kind.UNSENT] == 1
        server.script = []
        assert sender.attempt().error is None
        assert sender.receipt().state is State.DELIVERED


def test_503_with_Retry_After_for_one_instance(server: Scripted, plan: Plan) -> None:
    """The first time it may be meant for all; afterwards it is what it costs."""
    bad = uids(plan)[2]
    server.script = Always([lambda request: Reply(503, headers={"Retry-After": "1"}) if bad in request.uids else None])
    with sending(dicomweb_target(server.url, concurrency=1), plan) as sender:
        for _ in range(2):
            error = sender.attempt().error
            assert isinstance(error, Busy)
            assert error.retry_after == 1
    assert set(server.stored) == set(uids(plan)) - {bad}


@pytest.mark.parametrize("fault", ["401", "403", "404", "503", "500", "reset", "silence", "other host", "login page"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_server_that_fails_at_everything_is_left_in_peace(
    server: Scripted, tmp_path: Path, fault: str, concurrency: int
) -> None:
    studies.ct(tmp_path, 100)
    server.script = Always([FAULTS[fault]])
    sent = push(server, tmp_path, batch_items=10, concurrency=concurrency, idle_timeout_s=0.3)
    assert sent.error is not None
    assert not sent.outcomes
    most = stow_doubts.MOST if fault in ("503", "500", "reset", "login page") else stow_doubts.MOST_LASTING
    assert len(server.of("POST")) <= most + 2 * (concurrency - 1)


def test_busy_midway_keeps_what_was_confirmed(server: Scripted, plan: Plan) -> None:
    server.script = [lambda _: None, Reply(503, headers={"Retry-After": "3"})]
    sent = push(server, plan, batch_items=2)
    assert isinstance(sent.error, Busy)
    assert len(sent.arrived) == 2
    assert len(server.of("POST")) == 2


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, Denied), (403, Denied), (404, NotFound), (405, Misconfigured), (410, NotFound), (501, Misconfigured)],
)
def test_permanent_statuses(server: Scripted, plan: Plan, status: int, error: type[Exception]) -> None:
    server.script = Always([Reply(status, PAGE, "text/html", {"WWW-Authenticate": "Basic realm=x"})])
    sent = push(server, plan)
    assert type(sent.error) is error
    assert str(status) in str(sent.error)
    assert not sent.outcomes
    assert [len(request.parts) for request in server.of("POST")] == [8, 1, 1], "other instances alone were no probe"


@pytest.mark.parametrize(
    "body", [PAGE, b'{"00081199": {"vr": "SQ", "Va', b"<NativeDicomModel><Dic", b"{}", b"[1]", b"OK"]
)
def test_success_that_says_nothing_is_unknown(
    server: Scripted, plan: Plan, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stow, "SETTLE_S", 0.1)
    server.script = [Reply(200, body, "text/html" if body is PAGE else "application/dicom+json")] * 9
    sent = push(server, plan)
    assert isinstance(sent.error, Interrupted)
    assert not sent.outcomes


def test_body_cut_short(server: Scripted, plan: Plan) -> None:
    def cut(request: Request) -> Reply:
        return Reply(200, as_json(listing(dict.fromkeys(request.uids, 0))), cut=100)

    server.script = Always([cut])
    sent = push(server, plan)
    assert type(sent.error) is Interrupted
    assert "cut short" in sent.error.message
    assert not sent.outcomes


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000])
@pytest.mark.parametrize("status", [200, 409])
def test_answer_without_a_bottom(server: Scripted, plan: Plan, status: int, body: bytes) -> None:
    server.script = [Reply(status, body)] * 20
    sent = push(server, plan)
    assert isinstance(sent.error, Interrupted) if status == 200 else len(sent.rejected) == 8


def test_xml_with_entities_is_not_read(server: Scripted, plan: Plan) -> None:
    bomb = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">]><NativeDicomModel>&a;</NativeDicomModel>'
    server.script = [Reply(200, bomb, XML)] * 9
    assert isinstance(push(server, plan).error, Interrupted)


def test_gzipped_answer(server: Scripted, plan: Plan) -> None:
    def zipped(request: Request) -> Reply:
        body = gzip.compress(as_json(listing(dict.fromkeys(request.uids, 0))))
        return Reply(200, body, headers={"Content-Encoding": "gzip"})

    server.script = [zipped]
    assert kinds(push(server, plan)) == [Kind.DELIVERED] * 8


def _deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("chunked", [0, 1, 70])
@pytest.mark.parametrize(
    ("pack", "name"),
    [
        (lambda data: gzip.compress(data[:40]) + gzip.compress(data[40:]), "X-GZIP"),
        (zlib.compress, "deflate"),
        (_deflated, "deflate"),
        (lambda data: gzip.compress(data) + bytes(100), "gzip"),
        (lambda data: gzip.compress(data) + b"\x1f\x8c, or so", "gzip"),
        (lambda data: gzip.compress(data[:40]) + gzip.compress(data[40:]) + bytes(100), "gzip"),
        (lambda data: zlib.compress(data) + bytes(100), "deflate"),
        (lambda data: gzip.compress(data) + b"\x1f", "gzip"),
    ],
    ids=["members", "zlib", "raw", "padded", "rubbish", "members padded", "zlib padded", "half a mark"],
)
def test_compressed_answers(
    server: Scripted, plan: Plan, pack: Callable[[bytes], bytes], name: str, chunked: int
) -> None:
    def packed(request: Request) -> Reply:
        body = pack(as_json(listing(dict.fromkeys(request.uids, 0))))
        return Reply(200, body, headers={"Content-Encoding": name}, chunked=chunked)

    server.script = [packed]
    assert kinds(push(server, plan)) == [Kind.DELIVERED] * 8


@pytest.mark.parametrize("chunked", [0, 1])
@pytest.mark.parametrize(
    "body",
    [gzip.compress(as_json(listing()))[:-9], gzip.compress(as_json(listing())) + gzip.compress(b" ")[:-9]],
    ids=["first", "second"],
)
def test_compressed_answer_without_its_end(server: Scripted, plan: Plan, body: bytes, chunked: int) -> None:
    server.script = Always([Reply(200, body, headers={"Content-Encoding": "gzip"}, chunked=chunked)])
    sent = push(server, plan)
    assert isinstance(sent.error, Interrupted)
    assert "cut short" in sent.error.message


def test_body_of_blanks_is_none(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(200, b"\r\n", "text/plain")]
    assert kinds(push(server, plan)) == [Kind.DELIVERED] * 8


def test_head_with_a_line_that_is_no_field(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(503, headers={"X-Odd": "1\r\nno field at all", "Retry-After": "7"})]
    sent = push(server, plan, idle_timeout_s=1)
    assert isinstance(sent.error, Busy)
    assert sent.error.retry_after == 7


def test_chunked_answer(server: Scripted, plan: Plan) -> None:
    def chunked(request: Request) -> Reply:
        return Reply(200, as_json(listing(dict.fromkeys(request.uids, 0))), chunked=50)

    server.script = [chunked, chunked]
    assert kinds(push(server, plan, batch_items=4)) == [Kind.DELIVERED] * 8
    assert server.connections == 1


# ---- 413 and proxies that limit bodies


def test_413_halves(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path, 32, side=64)  # 15 kB each
    server.body_limit = 70_000
    all_delivered(push(server, tmp_path), server)
    refused = [request for request in server.of("POST") if request.length > server.body_limit]
    assert len(refused) <= 5
    assert all(len(request.body) == 0 for request in refused)


def test_413_for_one_instance(server: Scripted, plan: Plan, tmp_path: Path) -> None:
    studies.multiframe(tmp_path / "study" / "large.dcm", 1)  # 0.5 MB
    server.body_limit = 100_000
    sent = push(server, scan([tmp_path / "study"]))
    assert list(sent.rejected) == ["large.dcm"]
    assert "larger than the server takes" in sent.rejected["large.dcm"]
    assert len(sent.arrived) == 8


def test_proxy_that_limits_bodies_to_1_MB(server: Scripted, tmp_path: Path) -> None:
    """As nginx does it: 413 when it has seen the head, and the connection closed on what still comes."""
    studies.ct(tmp_path, 40, side=256)  # 5.5 MB
    server.body_limit = 1 << 20
    server.continues = False
    all_delivered(push(server, tmp_path, concurrency=4), server)
    assert sum(request.length > server.body_limit for request in server.of("POST")) <= 8


def test_proxy_that_resets_instead_of_413(server: Scripted, tmp_path: Path) -> None:
    """Nothing shows that this is no broken link: each instance goes alone, and what follows in smaller requests."""
    studies.ct(tmp_path, 40, side=256)
    plan = scan([tmp_path])
    limit = 1 << 20
    server.script = Always([lambda request: Reply(resets=True) if request.length > limit else None])
    all_delivered(push(server, plan, batch_bytes=3 << 20), server)
    assert len([request for request in server.of("POST") if request.length > limit]) <= 2


def test_what_was_suspected_is_forgotten(server: Scripted, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stow, "SUSPICION_S", 0.05)
    server.script = Always([Reply(resets=True)])
    assert isinstance(push(server, plan).error, Interrupted)
    server.script = []
    assert stow._stumbled
    time.sleep(0.1)
    all_delivered(push(server, scan([plan.root])), server)  # another dispatch
    assert not stow._stumbled


# ---- early answers, Expect


def big(tmp_path: Path) -> Plan:
    studies.multiframe(tmp_path / "big" / "large.dcm", 40)  # 20 MB: more than buffers take
    return scan([tmp_path / "big"])


@pytest.mark.parametrize(("status", "error"), [(401, Denied), (403, Denied), (404, NotFound), (429, Busy), (503, Busy)])
@pytest.mark.parametrize("closes", [True, False])
def test_answer_before_the_body_is_respected(
    server: Scripted, tmp_path: Path, status: int, error: type[Exception], closes: bool
) -> None:
    server.continues = False
    server.script = [Reply(status, PAGE, "text/html", reads=300_000, closes=closes)]
    sent = push(server, big(tmp_path))
    assert type(sent.error) is error
    assert sent.moved < 15_000_000


def test_early_success_counts_only_what_went_out(server: Scripted, tmp_path: Path) -> None:
    plan = big(tmp_path)
    server.continues = False
    server.script = [Reply(200, as_json(listing(dict.fromkeys(uids(plan), 0))), reads=300_000, closes=True)]
    sent = push(server, plan)
    all_delivered(sent, server)
    assert len(server.of("POST")) == 2


def test_expect_100_continue(server: Scripted, tmp_path: Path) -> None:
    sent = push(server, big(tmp_path))
    all_delivered(sent, server)
    assert server.of("POST")[0].headers["expect"] == "100-continue"


@pytest.mark.parametrize("status", [401, 413, 503])
def test_expect_refused_sends_no_body(server: Scripted, tmp_path: Path, status: int) -> None:
    server.script = [Reply(status, PAGE, "text/html", reads=0)] * 10
    sent = push(server, big(tmp_path))
    assert sent.moved == 0
    assert sent.error if status != 413 else sent.rejected


def test_expect_ignored(server: Scripted, tmp_path: Path) -> None:
    """The wait is short, and the next push does without."""
    server.continues = False
    plan = big(tmp_path)
    all_delivered(push(server, plan), server)
    all_delivered(push(server, plan), server)
    assert ["expect" in request.headers for request in server.of("POST")] == [True, False]


def test_expect_not_understood(server: Scripted, tmp_path: Path) -> None:
    server.script = [Reply(417, reads=0)]
    all_delivered(push(server, big(tmp_path)), server)
    assert "expect" not in server.of("POST")[1].headers


def test_100_continue_that_nobody_asked_for(plan: Plan) -> None:
    with scripted() as server:
        original = server._usual

        def usual(request: Request) -> Reply:
            return original(request)

        server._usual = usual  # type: ignore[method-assign]
        real = server._handle

        def handle(connection: Any, request: Request) -> bool:
            connection.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nX: y\r\n\r\n")
            return real(connection, request)

        server._handle = handle  # type: ignore[method-assign]
        assert kinds(push(server, plan)) == [Kind.DELIVERED] * 8


# ---- redirects


@pytest.mark.parametrize("status", [307, 308])
def test_redirect_within_the_server(server: Scripted, plan: Plan, status: int) -> None:
    server.script = [Reply(status, headers={"Location": "/rs/studies"})]
    target = dicomweb_target(server.url.replace("/rs", "/old"), concurrency=1)
    all_delivered(attempt(target, plan), server)


@pytest.mark.parametrize("status", [301, 302, 303])
def test_redirect_that_would_lose_the_body(server: Scripted, plan: Plan, status: int) -> None:
    server.script = Always([Reply(status, headers={"Location": "/rs/studies"})])
    sent = push(server, plan)
    assert isinstance(sent.error, Misconfigured)
    assert "/rs/studies" in sent.error.message


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_to_another_host_is_not_followed(server: Scripted, plan: Plan, status: int) -> None:
    with scripted() as other:
        location = f"http://user:pass-word@127.0.0.1:{other.port}/rs/studies?token=t0ken"
        server.script = Always([Reply(status, headers={"Location": location})])
        sent = push(server, plan, http_user="lab", http_password="pa55word-1234")
        assert isinstance(sent.error, Misconfigured)
        assert f"http://127.0.0.1:{other.port}" in sent.error.message
        assert "pass-word" not in sent.error.message
        assert "t0ken" not in sent.error.message
        assert not other.requests


@pytest.mark.parametrize("location", ["http://[::1/rs", "http://a:99999999/rs", "//[x"])
def test_redirect_to_what_is_no_url(server: Scripted, plan: Plan, location: str) -> None:
    server.script = Always([Reply(307, headers={"Location": location})])
    sent = push(server, plan)
    assert isinstance(sent.error, Misconfigured)
    assert "not a URL" in sent.error.message


@pytest.mark.parametrize(
    ("location", "path"), [("/rs/a b", "/rs/a%20b"), ("/rs/\xfc\x01%20", "/rs/%C3%BC%01%20"), ("?x=a b", "/rs/studies")]
)
def test_redirect_that_is_not_encoded(server: Scripted, plan: Plan, location: str, path: str) -> None:
    server.script = [Reply(307, headers={"Location": location})]
    push(server, plan)
    assert [request.path for request in server.requests][:2] == ["/rs/studies", path]


def test_redirect_to_the_root(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(307, headers={"Location": f"http://127.0.0.1:{server.port}"})]
    push(server, plan)
    assert server.requests[1].path == "/"


def test_redirect_loop(server: Scripted, plan: Plan) -> None:
    server.script = Always([Reply(307, headers={"Location": "/rs/studies"})])
    sent = push(server, plan)
    assert isinstance(sent.error, Misconfigured)
    assert "too often" in sent.error.message


# ---- broken links


@pytest.mark.parametrize("step", [Reply(resets=True, reads=20_000), Reply(resets=True), Reply(hangs=True)])
def test_link_that_breaks(server: Scripted, plan: Plan, step: Reply) -> None:
    """Once: the same attempt goes on. For good: what was confirmed stays confirmed."""
    idle_s = 1 if step.hangs else 30  # what answers may take its time
    server.script = [lambda _: None, step]
    all_delivered(push(server, plan, batch_items=4, idle_timeout_s=idle_s), server)
    server.stored.clear()
    server.requests.clear()
    server.script = [lambda _: None, *[step] * 20]
    sent = push(server, plan, batch_items=4, idle_timeout_s=idle_s)
    assert type(sent.error) is (TimedOut if step.hangs else Interrupted)
    assert len(sent.arrived) == 4
    server.script = []
    again = attempt(dicomweb_target(server.url), plan, done=sent.arrived)
    assert again.require().state is State.DELIVERED
    assert set(server.of("POST")[-1].uids) <= set(uids(plan)[4:])


def test_reset_after_half_of_the_upload(server: Scripted, tmp_path: Path) -> None:
    plan = big(tmp_path)
    server.script = [Reply(resets=True, reads=10_000_000)]
    sent = push(server, plan)
    assert type(sent.error) is Interrupted
    assert not server.stored
    all_delivered(push(server, plan), server)


def test_server_that_takes_nothing_any_more(server: Scripted, tmp_path: Path) -> None:
    server.script = [Reply(hangs=True, reads=100_000)]
    sent = push(server, big(tmp_path), idle_timeout_s=1)
    assert type(sent.error) is TimedOut
    assert sent.seconds < as_loaded(6)


def test_cancel_while_the_server_hangs(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(hangs=True)]
    cancelled = threading.Event()
    timer = threading.Timer(0.5, cancelled.set)
    timer.start()
    sent = attempt(dicomweb_target(server.url, idle_timeout_s=60), plan, cancelled=cancelled)
    timer.cancel()
    assert isinstance(sent.error, Cancelled)
    assert sent.seconds < as_loaded(3)


def test_other_requests_are_finished_when_one_fails(server: Scripted, plan: Plan) -> None:
    other = threading.Event()

    def refuse(request: Request) -> Reply:
        assert other.wait(60)
        return Reply(503, headers={"Retry-After": "1"})

    def slow(request: Request) -> Reply:
        other.set()
        return Reply(delay_s=0.5)

    server.script = [refuse, slow]
    sent = push(server, plan, batch_items=4, concurrency=2)
    assert isinstance(sent.error, Busy)
    assert len(sent.arrived) == 4


# ---- files


def test_file_that_is_gone_or_changed(server: Scripted, plan: Plan) -> None:
    plan.file(plan.items[1]).unlink()
    plan.file(plan.items[3]).write_bytes(b"other")
    sent = push(server, plan)
    assert sent.require().state is State.PARTIAL
    assert set(sent.rejected) == {plan.items[1].path, plan.items[3].path}
    assert set(server.stored) == set(uids(plan)) - {uids(plan)[1], uids(plan)[3]}


def test_file_that_can_not_be_read_to_its_end(server: Scripted, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    bad = plan.file(plan.items[3]).stat().st_ino

    def broken(fd: int, buffers: Any, offset: int) -> int:
        if os.fstat(fd).st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    sent = push(server, plan)
    assert list(sent.rejected) == [plan.items[3].path]
    assert "can't be read" in sent.rejected[plan.items[3].path]
    assert len(sent.arrived) == 7


def test_changed_while_it_is_sent(server: Scripted, tmp_path: Path) -> None:
    """Its last bytes never go out, so no server can have it; the rest of its batch is sent again."""
    studies.ct(tmp_path / "s", 3)
    victim = studies.multiframe(tmp_path / "s" / "DX.dcm", 20)  # 10 MB
    plan = scan([tmp_path / "s"])
    changed = threading.Event()

    def moved(sent: Sent, count: int) -> None:
        if sent.moved > 1_000_000 and not changed.is_set():
            changed.set()
            with victim.open("r+b") as file:
                file.seek(5_000_000)
                file.write(b"x" * 1000)

    target = dicomweb_target(server.url, concurrency=1, bandwidth_limit=30_000_000)
    sent = attempt(target, plan, moved=moved)
    assert list(sent.rejected) == ["DX.dcm"]
    assert "chang" in sent.rejected["DX.dcm"]
    assert len(server.stored) == 3
    assert len(sent.arrived) == 3


def test_bandwidth_limit(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path, 20, side=128)  # 0.8 MB
    plan = scan([tmp_path])
    sent = push(server, plan, bandwidth_limit=400_000, concurrency=3)
    all_delivered(sent, server)
    assert 1.5 < sent.seconds < as_loaded(4)


def test_told_from_several_threads_once_each(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path, 60)
    plan = scan([tmp_path])
    told: list[str] = []

    def tell(sent: Sent, item: Item, outcome: Any) -> None:
        told.append(item.path)

    sent = attempt(dicomweb_target(server.url, batch_items=4, concurrency=8), plan, told=tell)
    all_delivered(sent, server)
    assert sorted(told) == [item.path for item in plan.items]
