"""Requests of STOW that fail as a whole, for all instances or because of some."""

from __future__ import annotations

import gzip
import time
import zlib
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from protocols.dicomweb import stow, stow_doubts
from talaria.testing import studies
from talaria.testing.harness import sending
from tests.servers.dicomweb import XML, Reply, Request, Scripted, as_json, listing
from tests.targets.dicomweb import dicomweb_target
from tests.targets.stow.pushing import PAGE, Always, all_delivered, kinds, push, uids
from transfer.errors import (
    Busy,
    Denied,
    Interrupted,
    Misconfigured,
    NotFound,
    Retryable,
    Unauthorized,
)
from transfer.outcome import Kind
from transfer.plan import Plan, scan
from transfer.receipt import Level, State


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
    [(401, Unauthorized), (403, Denied), (404, NotFound), (405, Misconfigured), (410, NotFound), (501, Misconfigured)],
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
