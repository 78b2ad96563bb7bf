"""Answers of STOW that accept instances, in words of the server's own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from protocols.dicomweb import stow
from talaria.testing import studies
from talaria.testing.harness import attempt, sending
from tasks.dicomweb import driver
from tests.servers.dicomweb import Reply, Request, Scripted, as_json, listing
from tests.targets.dicomweb import dicomweb_target
from tests.targets.stow.pushing import Always, all_delivered, kinds, push, uids
from transfer.errors import (
    Busy,
    Interrupted,
    Misconfigured,
)
from transfer.outcome import Kind, Outcome
from transfer.plan import Plan, scan
from transfer.receipt import Level, PushReport, State


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
    monkeypatch.setattr("protocols.http.session.STALE_S", 0.0)

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
