"""DICOM peers that err, refuse, fall silent or are slow: each fault, and the outcome that it must have.

Whatever happens: it ends in bounded time, nothing is told as delivered that the peer didn't confirm, what is missing
arrives with the next attempt, and nothing that was confirmed is sent a second time.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded, free_port
from tasks.dicom import driver
from tests.servers.scp import Scp, scp
from tests.servers.steps import (
    Abort,
    Answer,
    Close,
    Partly,
    Raw,
    Reject,
    Reset,
    Script,
    Silence,
    Store,
    Wait,
)  # fmt: skip
from tests.servers.wire import Context, Proposal
from tests.targets.dicom import dicom_target
from transfer.errors import (
    Busy,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    TimedOut,
    Unreachable,
)  # fmt: skip
from transfer.outcome import Kind
from transfer.plan import Origin, Plan, scan
from transfer.receipt import State

IDLE_S = 2.0  # the targets' idle timeout here
SLACK_S = 4.0  # for a busy machine, and for ending associations in order
CT = "1.2.840.10008.5.1.4.1.1.2"
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
VERIFICATION = "1.2.840.10008.1.1"
JPEG_2000 = "1.2.840.10008.1.2.4.90"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    return folder


def target_of(peer: Scp, **settings: Any) -> Any:
    return dicom_target(peer.port, **({"aet_target": peer.aet, "idle_timeout_s": IDLE_S} | settings))


def uids(plan: Plan) -> list[str]:
    return [item.header.SOPInstanceUID for item in plan.items if item.header]


def arrived_uids(sent: Sent) -> set[str]:
    return {item.header.SOPInstanceUID for item in sent.plan.items if item.header and item.path in sent.arrived}


def finish(peer: Scp, plan: Plan, first: Sent, **settings: Any) -> Sent:
    """Push what is missing, to a peer that behaves now; assert that all is there and nothing came twice."""
    assert arrived_uids(first) <= set(peer.kept), "told as delivered, but not there"
    peer.on_connect = peer.on_associate = peer.on_store = peer.on_data = peer.on_release = None
    second = attempt(target_of(peer, **settings), plan, done=first.arrived)
    assert second.require().state is State.DELIVERED
    assert set(peer.kept) == set(uids(plan))
    assert not set(first.arrived) & set(second.outcomes)
    assert not [uid for uid in peer.repeated if uid in arrived_uids(first)], "sent again although it was confirmed"
    return second


def once(at: int, script: Script) -> Callable[[Store], Script]:
    """Err at one C-STORE, counted from 1 over all associations, and behave before and after it."""
    return lambda store: script if store.number == at else 0


# ---- the association


REJECTIONS: list[tuple[Reject, type[DispatchError], str]] = [
    (Reject(1, 1, 1), Misconfigured, "no reason given"),
    (Reject(1, 1, 2), Misconfigured, "application context name not supported"),
    (Reject(1, 1, 3), Misconfigured, "calling AE title not recognised"),
    (Reject(1, 1, 7), Misconfigured, "called AE title not recognised"),
    (Reject(1, 2, 1), Misconfigured, "no reason given"),
    (Reject(1, 2, 2), Misconfigured, "protocol version not supported"),
    (Reject(1, 1, 10), Misconfigured, "reason 10"),
    (Reject(2, 1, 1), Busy, "no reason given"),
    (Reject(2, 3, 1), Busy, "temporary congestion"),
    (Reject(2, 3, 2), Busy, "local limit exceeded"),
    (Reject(2, 1, 3), Busy, "calling AE title not recognised"),
]


@pytest.mark.parametrize(("rejection", "error", "words"), REJECTIONS, ids=lambda value: str(value)[:40])
def test_association_rejected(rejection: Reject, error: type[DispatchError], words: str, study: Path) -> None:
    studies.ct(study, 6)
    plan = scan([study])
    with scp(on_associate=lambda proposal: rejection) as peer:
        sent = attempt(target_of(peer), plan)
        assert type(sent.error) is error
        assert words in str(sent.error)
        assert not sent.outcomes
        assert sent.seconds < as_loaded(SLACK_S)
        # A peer that refuses us does so once, not once per association; where that may be over what we asked for, it
        # is asked once for less.
        asked = [len(one.proposal.contexts) for one in peer.associations if one.proposal]
        of_us = (rejection.source, rejection.reason) in ((1, 2), (1, 3), (1, 7), (2, 2))
        assert asked[1:] == ([] if of_us else [2])
        health = driver.check(target_of(peer))
        assert not health.ok
        assert type(health.error) is error
        assert any(words in probe.detail for probe in health.probes if probe.result == "failed")
        finish(peer, plan, sent)


def test_rejection_of_a_title_says_which_setting(study: Path) -> None:
    studies.ct(study, 1)
    for reason, setting in ((3, "aet_source"), (7, "aet_target")):
        with scp(on_associate=lambda proposal, reason=reason: Reject(1, 1, reason)) as peer:
            assert setting in str(attempt(target_of(peer), study).error)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Abort(0, 0), Interrupted),
        (Abort(2, 1), Interrupted),
        (Close(), Interrupted),
        (Reset(), Interrupted),
        (Silence(), TimedOut),
        ([Raw(b"\x02\x00\x00\x00\x01"), Silence()], TimedOut),  # the head of a PDU, and no more
        ([Raw(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"), Close()], Misconfigured),
        ([Raw(struct.pack(">BBI", 2, 0, 4) + b"junk"), Silence()], DispatchError),
    ],
    ids=str,
)
def test_no_answer_to_the_association_request(script: Script, error: type[DispatchError], study: Path) -> None:
    studies.ct(study, 3)
    plan = scan([study])
    with scp(on_associate=lambda proposal: script) as peer:
        sent = attempt(target_of(peer), plan)
        assert isinstance(sent.error, error), repr(sent.error)
        assert not sent.outcomes
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S)
        health = driver.check(target_of(peer))
        assert not health.ok
        assert isinstance(health.error, error)
        finish(peer, plan, sent)


def test_accepts_the_connection_and_nothing_else(study: Path) -> None:
    studies.ct(study, 3)
    with scp(on_connect=lambda number: Silence()) as peer:
        sent = attempt(target_of(peer), study)
    assert isinstance(sent.error, TimedOut), repr(sent.error)
    assert sent.seconds < as_loaded(IDLE_S + SLACK_S)


def test_the_connection_itself_times_out(study: Path) -> None:
    """A listener with a full queue drops what wants to connect, as a firewall does."""
    studies.ct(study, 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = []
        for _ in range(3):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(address)
            waiting.append(one)
        time.sleep(0.2)
        try:
            sent = attempt(dicom_target(address[1], connect_timeout_s=1), study)
        finally:
            for one in waiting:
                one.close()
    assert isinstance(sent.error, Unreachable), repr(sent.error)
    assert 0.9 < sent.seconds < as_loaded(1 + SLACK_S)


def test_the_name_is_not_known(study: Path) -> None:
    studies.ct(study, 1)
    sent = attempt(dicom_target(104, host="no-such-host.invalid"), study)
    assert isinstance(sent.error, Unreachable), repr(sent.error)
    assert "no-such-host.invalid" in str(sent.error)
    health = driver.check(dicom_target(104, host="no-such-host.invalid"))
    assert [probe.result for probe in health.probes][:2] == ["failed", "skipped"]


def test_ipv6(study: Path) -> None:
    studies.ct(study, 3)
    with scp(host="::1") as peer:
        assert attempt(target_of(peer, host="::1"), study).require().state is State.DELIVERED
        assert attempt(target_of(peer, host="[::1]"), study).require().state is State.DELIVERED


def test_titles_and_pass_through(study: Path) -> None:
    studies.ct(study, 1)
    seen: list[Proposal] = []
    with scp(on_associate=seen.append) as peer:
        assert attempt(target_of(peer, aet_target="A B.C-16 CHARS!!", aet_source="me too"), study).require()
        origin = Origin("MODALITY1", "CALLED2", "127.0.0.1")
        plan = scan([study], origin=origin)
        passing = target_of(peer, pass_sender_aet=True, pass_receiver_aet=True, host="sender")
        assert attempt(passing, plan).require()
        bare = attempt(passing, scan([study]))
    assert [(one.called, one.calling) for one in seen] == [
        ("A B.C-16 CHARS!!", "me too"),
        ("CALLED2", "MODALITY1"),
    ]
    assert isinstance(bare.error, Misconfigured), repr(bare.error)


# ---- one instance: what each status means


STATUSES: list[tuple[int, Kind | type[DispatchError]]] = [
    (0x0000, Kind.DELIVERED),
    (0xB000, Kind.WARNING),
    (0xB006, Kind.WARNING),
    (0xB007, Kind.WARNING),
    (0xB123, Kind.WARNING),
    (0x0111, Kind.ALREADY),
    (0xA700, Kind.REJECTED),  # for now, each time, while others are stored
    (0xA702, Kind.REJECTED),
    (0xA900, Kind.REJECTED),
    (0xA9FF, Kind.REJECTED),
    (0xC000, Kind.REJECTED),
    (0xC123, Kind.REJECTED),
    (0x0110, Kind.REJECTED),
    (0x0117, Kind.REJECTED),
    (0x0122, Kind.REJECTED),
    (0x0124, Denied),
    (0x7777, Kind.REJECTED),  # what no clause knows says not that it was kept
]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize(("status", "wanted"), STATUSES, ids=lambda value: f"{value:04X}" if type(value) is int else "")
def test_status(status: int, wanted: Kind | type[DispatchError], concurrency: int, study: Path) -> None:
    studies.ct(study, 8)
    plan = scan([study])
    victim = uids(plan)[3]
    with scp(
        on_store=lambda store: Answer(status, comment="see the log") if store.SOPInstanceUID == victim else 0
    ) as peer:
        if status == 0x0111:
            peer.on_store = lambda store: Answer(status, kept=True) if store.SOPInstanceUID == victim else 0
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        path = plan.items[3].path
        if isinstance(wanted, Kind):
            receipt = sent.require()
            assert sent.outcomes[path].kind is wanted
            assert set(sent.outcomes) == {item.path for item in plan.items}
            assert len(sent.arrived) == 8 - (wanted is Kind.REJECTED)
            assert receipt.state is (State.PARTIAL if wanted is Kind.REJECTED else State.DELIVERED)
            if wanted in (Kind.WARNING, Kind.REJECTED):
                assert f"{status:04X}" in sent.outcomes[path].detail
                assert "see the log" in sent.outcomes[path].detail
            if wanted is not Kind.REJECTED:
                assert set(peer.kept) == set(uids(plan))
        else:
            assert type(sent.error) is wanted
            assert f"{status:04X}" in str(sent.error)
            assert path not in sent.outcomes
            assert not sent.rejected
            finish(peer, plan, sent, concurrency=concurrency)
        assert sent.seconds < as_loaded(SLACK_S)
        assert not peer.repeated


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_peer_without_resources_is_left_in_peace(concurrency: int, study: Path) -> None:
    studies.ct(study, 30)
    plan = scan([study])
    with scp(on_store=lambda store: 0xA700 if store.number > 8 else 0) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        assert type(sent.error) is Busy
        assert "A700" in str(sent.error)
        assert not sent.rejected
        assert len(peer.stores) < 8 + 16, "it was asked again and again"
        assert sent.seconds < as_loaded(SLACK_S)
        finish(peer, plan, sent, concurrency=concurrency)


def test_no_patient_shows_in_an_error_comment(study: Path) -> None:
    """Peers write what they like into (0000,0902); only so much of it is taken over, and on one line."""
    studies.ct(study, 1)
    with scp(on_store=lambda store: Answer(0xC001, comment="x" * 60 + "\r\n\x1b[2J")) as peer:
        sent = attempt(target_of(peer), study)
    detail = next(iter(sent.rejected.values()))
    assert detail.isprintable()


# ---- one instance: no answer, or a wrong one


FAULTS: list[Script] = [
    Abort(0, 0),
    Abort(2, 6),
    Close(),
    Reset(),
    Partly(3),
    Partly(20),
    Silence(),
    [Raw(b"\x04\x00\x00\x00"), Silence()],  # stays silent in the middle of a PDU
    Answer(message_id=4711, kept=False),
    Answer(status=None, kept=False),
    Answer(bare=True, kept=False),
    [Raw(b"\x04\x00\xff\xff\xff\xff\x00\x00"), Silence()],  # a PDU of 4 GB is announced
    [Raw(b"\x99\x00\x00\x00\x00\x04abcd"), Silence()],  # a PDU of no known type
    [Raw(struct.pack(">BBIIBB", 4, 0, 6, 0xFFFFFFFF, 1, 3)), Silence()],  # a PDV longer than its PDU
]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("script", FAULTS, ids=lambda value: str(value)[:60])
def test_a_fault_that_passes_costs_nothing(script: Script, concurrency: int, study: Path) -> None:
    """What was outstanding goes out again, last and after a pause; nothing that was confirmed does."""
    studies.ct(study, 10)
    plan = scan([study])
    with scp(on_store=once(5, script)) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        assert sent.require().state is State.DELIVERED
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S)
        faulty = peer.stores[4].SOPInstanceUID
        assert [store.SOPInstanceUID for store in peer.stores].count(faulty) == 2
        assert peer.stores[-1].SOPInstanceUID == faulty
        assert len(peer.stores) == 11
        assert set(peer.kept) == set(uids(plan))
        assert not peer.repeated


@pytest.mark.parametrize("script", [Abort(), Close(), Reset(), Wait(60)], ids=str)
def test_fault_in_the_middle_of_an_instance(script: Script, study: Path) -> None:
    """It ends, or stops reading, while data comes."""
    studies.ct(study, 2)
    studies.multiframe(study / "large.dcm", 60)  # 31 MB: more than both sockets hold
    plan = scan([study])
    with scp(on_data=lambda association, size: script if size > 1_000_000 else None) as peer:
        sent = attempt(target_of(peer, concurrency=1), plan)
        assert sent.require().state is State.PARTIAL
        assert sent.seconds < as_loaded(2 * IDLE_S + SLACK_S)
        assert set(sent.rejected) == {"large.dcm"}
        assert "times" in sent.rejected["large.dcm"]
        assert set(peer.kept) == {uid for uid, item in zip(uids(plan), plan.items, strict=True) if item.size < 1 << 20}


def test_a_single_instance_that_breaks_the_association_is_not_called_bad(study: Path) -> None:
    """Nothing says that the peer would take another one."""
    studies.ct(study, 1)
    plan = scan([study])
    with scp(on_store=lambda store: Abort()) as peer:
        sent = attempt(target_of(peer), plan)
        assert type(sent.error) is Interrupted
        assert "aborted" in str(sent.error)
        assert not sent.outcomes
        finish(peer, plan, sent)


def test_a_response_with_a_coerced_uid_confirms_its_message(study: Path) -> None:
    """The message ID tells what is confirmed (PS3.7 section 9.1.1.1.2); some peers change UIDs, or leave them out."""
    studies.ct(study, 3)
    with scp(on_store=once(2, Answer(uid="1.2.3.4"))) as peer:
        sent = attempt(target_of(peer, concurrency=1), study)
        assert sent.require().state is State.DELIVERED


def test_silence_at_release_delays_nothing_for_long(study: Path) -> None:
    studies.ct(study, 4)
    with scp(on_release=lambda number: Silence()) as peer:
        sent = attempt(target_of(peer), study)
        assert sent.require().state is State.DELIVERED
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S)


@pytest.mark.parametrize("script", [Abort(), Close(), Reset()], ids=str)
def test_a_rude_end_after_everything_changes_nothing(script: Script, study: Path) -> None:
    studies.ct(study, 4)
    with scp(on_release=lambda number: script) as peer:
        assert attempt(target_of(peer), study).require().state is State.DELIVERED


# ---- slow and odd, but right


def test_one_byte_at_a_time(study: Path) -> None:
    studies.ct(study, 6)
    with scp(write_size=1, split=True) as peer:
        sent = attempt(target_of(peer), study)
        assert sent.require().state is State.DELIVERED
        assert driver.check(target_of(peer)).ok


def test_slow_answers_are_no_silence(study: Path) -> None:
    """Each answer comes within the idle timeout, all together take longer."""
    studies.ct(study, 4)
    with scp(on_store=lambda store: [Wait(0.7), 0]) as peer:
        sent = attempt(target_of(peer, concurrency=1, idle_timeout_s=1.2), study)
    assert sent.require().state is State.DELIVERED
    assert sent.seconds > 2.8


@pytest.mark.parametrize("max_pdu", [4096, 4097, 16_384, 65_536, 131_072, 0])
def test_granted_pdu_size_is_kept(max_pdu: int, study: Path) -> None:
    """The scripted peer fails the test if a PDU is longer than it granted."""
    studies.ct(study, 3, side=64)
    studies.multiframe(study / "large.dcm", 10)  # 5 MB
    plan = scan([study])
    with scp(max_pdu=max_pdu) as peer:
        sent = attempt(target_of(peer), plan)
        assert sent.require().state is State.DELIVERED
        for uid, item in zip(uids(plan), plan.items, strict=True):
            assert item.header
            assert peer.kept[uid].data == plan.file(item).read_bytes()[item.header.dataset_offset :]


@pytest.mark.parametrize("max_pdu", [0, 4096, 16_384])
def test_our_own_limit_of_pdus_is_announced_and_kept(max_pdu: int, study: Path) -> None:
    studies.ct(study, 2, side=128)
    sizes: list[int] = []
    with scp(max_pdu=0, on_data=lambda association, size: sizes.append(size)) as peer:
        assert attempt(target_of(peer, max_pdu=max_pdu), study).require().state is State.DELIVERED
        assert {one.proposal.max_pdu for one in peer.associations if one.proposal} == {max_pdu}
    if max_pdu:
        steps = [after - before for before, after in pairwise(sizes) if after > before]
        assert max(steps) <= max_pdu


def test_without_a_window_one_request_at_a_time(study: Path) -> None:
    studies.ct(study, 8)
    with scp(watch=True) as peer:
        assert attempt(target_of(peer), study).require().state is State.DELIVERED
        assert peer.early == 0, "a request came before the one before it was answered"


@pytest.mark.parametrize("window", [(1, 1), (2, 1), (4, 1), (0, 0), (100, 100)])
def test_asynchronous_window(window: tuple[int, int], study: Path) -> None:
    """As many requests are outstanding as were granted, and answers are matched by message ID in any order."""
    studies.ct(study, 17)
    plan = scan([study])
    outstanding = 1 if window == (1, 1) else 2
    refused = set(uids(plan)[5:7])
    with scp(
        window=window, reverse=outstanding, on_store=lambda store: 0xC000 if store.SOPInstanceUID in refused else 0
    ) as peer:
        sent = attempt(target_of(peer, concurrency=1), plan)
        sent.require()
        assert set(peer.kept) == set(uids(plan)) - refused
        assert arrived_uids(sent) == set(uids(plan)) - refused
        assert set(sent.rejected) == {item.path for item in plan.items[5:7]}
        ids = [store.message_id for store in peer.stores]
        assert len(set(ids)) == len(ids)


def test_abort_with_several_outstanding(study: Path) -> None:
    studies.ct(study, 24)
    plan = scan([study])
    with scp(window=(8, 1), reverse=4, on_store=once(9, Abort())) as peer:
        sent = attempt(target_of(peer, concurrency=1), plan)
        assert sent.require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        assert not peer.repeated


# ---- several associations


def test_as_many_associations_as_asked_for(study: Path) -> None:
    studies.ct(study, 40)
    plan = scan([study])
    with scp(on_store=lambda store: [Wait(0.02), 0]) as peer:
        assert attempt(target_of(peer, concurrency=3), plan).require().state is State.DELIVERED
        assert peer.most_open == 3
        assert peer.wait_closed()
        assert {one.ended for one in peer.associations} == {"released"}
        # Within each association the plan's order is kept.
        order = {uid: place for place, uid in enumerate(uids(plan))}
        for association in {store.association for store in peer.stores}:
            places = [order[store.SOPInstanceUID] for store in peer.stores if store.association == association]
            assert places == sorted(places)


def test_no_more_associations_than_instances(study: Path) -> None:
    studies.ct(study, 2)
    with scp() as peer:
        assert attempt(target_of(peer, concurrency=16), study).require()
        assert len(peer.associations) <= 2


def test_a_peer_that_takes_one_association_at_a_time(study: Path) -> None:
    """It rejects the others for now: everything goes over the one that it granted, and people are told."""
    studies.ct(study, 30)
    with scp(on_store=lambda store: [Wait(0.01), 0]) as peer:
        peer.on_associate = lambda proposal: Reject(2, 3, 2) if peer.open > 1 else None
        receipt = attempt(target_of(peer, concurrency=4), study).require()
        assert receipt.state is State.DELIVERED
        assert not peer.repeated


@pytest.mark.parametrize("reason", [Reject(1, 1, 1), Reject(1, 3, 2)], ids=str)
def test_a_link_that_breaks_beside_a_peer_that_takes_one_association(study: Path, reason: Reject) -> None:
    """That it refuses the others for good is no reason to give up what the one has not sent."""
    studies.ct(study, 30)
    with scp(on_store=lambda store: Abort() if store.number == 10 else [Wait(0.01), 0]) as peer:
        peer.on_associate = lambda proposal: reason if peer.open > 1 else None
        assert attempt(target_of(peer, concurrency=4), study).require().state is State.DELIVERED
        assert len(peer.kept) == 30


def test_a_peer_that_grants_no_association_after_a_break_is_tried_again_later(study: Path) -> None:
    studies.ct(study, 10)
    plan = scan([study])
    with scp(on_store=once(4, Abort())) as peer:
        peer.on_associate = lambda proposal: Reject(2, 3, 1) if proposal.association > 1 else None
        sent = attempt(target_of(peer, concurrency=1), plan)
        assert type(sent.error) is Busy
        assert "congestion" in str(sent.error)
        assert len(sent.arrived) == 3
        assert not sent.rejected
        assert sent.seconds < as_loaded(SLACK_S + 2)
        finish(peer, plan, sent)


def test_a_further_association_of_which_nothing_is_granted_rejects_nothing(study: Path) -> None:
    studies.ct(study, 30)
    with scp(on_store=lambda store: [Wait(0.01), 0]) as peer:
        peer.accept = lambda context: context.offered[0] if len(peer.associations) < 2 else 3
        receipt = attempt(target_of(peer, concurrency=2), study).require()
        assert receipt.state is State.DELIVERED


def test_a_peer_that_lets_the_others_wait(study: Path) -> None:
    """As `storescp` without --fork: it accepts connections, but serves one association after the other."""
    studies.ct(study, 30)
    with scp(on_store=lambda store: [Wait(0.02), 0]) as peer:
        peer.on_associate = lambda proposal: Wait(30) if proposal.association > 1 else None
        sent = attempt(target_of(peer, concurrency=4), study)
        assert sent.require().state is State.DELIVERED
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S + 1)
        assert len(peer.kept) == 30


def test_one_association_of_several_breaks(study: Path) -> None:
    studies.ct(study, 40)
    plan = scan([study])
    with scp(on_store=lambda store: Reset() if store.association == 2 else [Wait(0.02), 0]) as peer:
        sent = attempt(target_of(peer, concurrency=3), plan)
        assert sent.require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        assert not peer.repeated


# ---- presentation contexts


@pytest.mark.parametrize("reason", [1, 2, 3, 4])
def test_no_context_is_accepted(reason: int, study: Path) -> None:
    studies.ct(study, 50)
    with scp(accept=lambda context: reason) as peer:
        sent = attempt(target_of(peer), study)
        receipt = sent.require()
        assert receipt.state is State.FAILED
        assert len(sent.rejected) == 50
        assert sent.seconds < as_loaded(SLACK_S), "at once, not one timeout per instance"
        detail = next(iter(sent.rejected.values()))
        assert "CT Image Storage" in detail
        assert "Explicit VR Little Endian" in detail
        assert len(peer.associations) <= 4
        assert not peer.stores


def test_only_some_classes_are_accepted(study: Path) -> None:
    paths = studies.sample(study, others=False)
    with scp(accept=lambda context: context.offered[0] if context.abstract_syntax == CT else 3) as peer:
        sent = attempt(target_of(peer), study)
        assert sent.require().state is State.PARTIAL
        ct = {item.path for item in sent.plan.items if item.header and item.header.SOPClassUID == CT}
        assert sent.arrived == ct
        assert set(sent.rejected) == {item.path for item in sent.plan.items} - ct
        assert len(paths) == len(sent.outcomes)


def test_refused_syntax_names_offered_and_accepted(study: Path) -> None:
    studies.dicom(study / "a.dcm", "MR_small_jp2klossless.dcm")
    with scp(accept=lambda context: IMPLICIT if IMPLICIT in context.offered else 4) as peer:
        sent = attempt(target_of(peer, transcode="never"), study)
        detail = sent.rejected["a.dcm"]
        assert "JPEG 2000" in detail
        assert "Implicit VR Little Endian" in detail
        assert "transcode is never" in detail
        assert not peer.stores


def test_more_contexts_than_an_association_holds(study: Path) -> None:
    """200 SOP classes, private ones among them: split over associations, each within its 128 contexts."""
    for number in range(200):
        path = studies.dicom(study / f"{number:03}.dcm", SOPClassUID=f"2.25.4711.{number}" if number else CT)
        assert path.exists()
    plan = scan([study])
    with scp() as peer:
        assert attempt(target_of(peer), plan).require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        for one in peer.associations:
            assert one.proposal
            assert 1 <= len(one.proposal.contexts) <= 128
        # An association or a few for each group, not one per instance.
        assert len(peer.associations) <= 60


def test_every_syntax_of_a_class_is_offered_on_its_own(study: Path) -> None:
    studies.every_syntax(study)
    seen: list[Proposal] = []
    with scp(on_associate=seen.append) as peer:
        sent = attempt(target_of(peer), study)
        assert sent.require().state is State.DELIVERED
        held = {(item.header.SOPClassUID, item.header.TransferSyntaxUID) for item in sent.plan.items if item.header}
        offered = {(one.abstract_syntax, syntax) for one in seen[0].contexts for syntax in one.offered}
        assert held <= offered
        assert all(len(one.offered) == 1 for one in seen[0].contexts)
        # As they are: no conversion where the peer takes what is there.
        for item in sent.plan.items:
            assert item.header
            store = peer.kept[item.header.SOPInstanceUID]
            assert store.syntax == item.header.TransferSyntaxUID
            assert store.data == sent.plan.file(item).read_bytes()[item.header.dataset_offset :]


# ---- check


def test_check_tells_what_the_peer_accepts(study: Path) -> None:
    def accept(context: Context) -> str | int:
        return next((syntax for syntax in context.offered if syntax in (IMPLICIT, JPEG_2000)), 4)

    with scp(accept=accept) as peer:
        health = driver.check(target_of(peer))
        assert health.ok, health.to_json("x")
        assert peer.echoes == 1
        assert not peer.stores
        assert peer.wait_closed()
        assert peer.associations[-1].ended == "released"
        text = " ".join(probe.detail for probe in health.probes)
        assert "JPEG 2000" in text
        assert "Explicit VR Little Endian" not in text


@pytest.mark.parametrize("most", [64, 16, 8])
def test_a_peer_that_ends_an_association_with_many_contexts_is_asked_for_few(most: int, study: Path) -> None:
    for number in range(40):
        studies.dicom(study / f"{number:02}.dcm", SOPClassUID=f"2.25.4711.{number}" if number else CT)
    plan = scan([study])
    with scp(on_associate=lambda proposal: Abort() if len(proposal.contexts) > most else None) as peer:
        sent = attempt(target_of(peer), plan)
        assert sent.require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        aborted = [one for one in peer.associations if one.proposal and len(one.proposal.contexts) > most]
        assert len(aborted) <= 2, "it was not learnt"
        health = driver.check(target_of(peer))
        assert health.ok, health.to_json("x")
        assert "contexts" in " ".join(probe.detail for probe in health.probes)


def test_check_of_an_echo_that_fails(study: Path) -> None:
    with scp(
        accept=lambda context: 3 if context.abstract_syntax == "1.2.840.10008.1.1" else context.offered[0]
    ) as peer:
        health = driver.check(target_of(peer))
        assert not health.ok
        assert next(probe for probe in health.probes if probe.result == "failed").detail


@contextmanager
def silent_after_accept() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        yield listener.getsockname()[1]


def test_check_of_a_hung_peer_is_bounded() -> None:
    """As after `kill -STOP`: the kernel accepts, the program doesn't."""
    with silent_after_accept() as port:
        begun = time.monotonic()
        health = driver.check(dicom_target(port, idle_timeout_s=1))
        assert time.monotonic() - begun < as_loaded(1 + SLACK_S)
    assert isinstance(health.error, TimedOut), health.to_json("x")
