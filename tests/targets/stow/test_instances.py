"""What an answer of STOW says about each instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from tests.servers.dicomweb import XML, Reply, Request, Scripted, as_json, as_xml, listing, uid_of
from tests.targets.dicomweb import dicomweb_target
from tests.targets.stow.pushing import PAGE, kinds, push, uids
from transfer.errors import (
    Busy,
    Interrupted,
)
from transfer.outcome import Kind
from transfer.plan import Plan
from transfer.receipt import State


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
