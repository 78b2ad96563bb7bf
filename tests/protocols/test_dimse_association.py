"""Associations over a connection of ours: lent and taken back, kept alive, ended; several of them on one queue."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom
import pytest

from protocols.dimse import conveyor
from protocols.dimse.association import Association, associate
from protocols.dimse.fleet import Fleet
from protocols.dimse.store import OutgoingInstance, Sender
from protocols.dimse.transport import Peer, speaks_dicom, speaks_tls
from talaria.testing import process, studies
from talaria.testing.process import as_loaded
from tests.servers.scp import Scp, scp
from tests.servers.steps import Abort, Answer, Close, Reject, Silence, Store, Wait
from tests.targets.dicom_tls import certificates
from transfer.errors import Cancelled, Interrupted, TimedOut
from transfer.outcome import Kind
from transfer.plan import Plan, scan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
VERIFICATION = "1.2.840.10008.1.1"
OFFERED = [(CT, [EXPLICIT]), (VERIFICATION, [EXPLICIT])]


def peer_of(server: Scp, **settings: float) -> Peer:
    return Peer("127.0.0.1", server.port, idle_timeout_s=settings.get("idle_timeout_s", 5))


@contextmanager
def linked(server: Scp, window: int = 1) -> Iterator[Association]:
    association = associate(peer_of(server), OFFERED, window=window)
    try:
        yield association
    finally:
        association.release()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    folder = tmp_path / "study"
    studies.ct(folder, 4)
    return scan([folder])


def instance_of(plan: Plan, number: int, context: int, fd: int) -> OutgoingInstance:
    header = plan.items[number].header
    assert header is not None
    return OutgoingInstance(
        fd, header.dataset_offset, plan.items[number].size, context, header.SOPClassUID, header.SOPInstanceUID
    )


def store(sender: Sender, plan: Plan, number: int, context: int) -> int | None:
    fd = os.open(plan.file(plan.items[number]), os.O_RDONLY)
    try:
        instance = instance_of(plan, number, context, fd)
        sender.prepare(instance)
        sender.transmit(instance)
    finally:
        os.close(fd)
    return sender.receive().status


def test_pynetdicom_goes_on_after_the_connection_was_lent(plan: Plan) -> None:
    with scp() as server:
        with linked(server) as association:
            for number in range(3):
                association.echo()
                with Sender(association, Throttle(None)) as sender:
                    assert store(sender, plan, number, association.accepted[CT, EXPLICIT]) == 0
            association.echo()
        assert server.wait_closed()
        assert [association.ended for association in server.associations] == ["released"]
    assert (len(server.kept), server.echoes) == (3, 4)


def test_nothing_of_pynetdicom_runs_while_the_connection_is_lent(plan: Plan) -> None:
    """Its threads look for work every millisecond else: what guards against a release of it that does so again."""
    with scp() as server, linked(server) as association, Sender(association, Throttle(None)):
        threads = [association.assoc, association.assoc.dul]
        end = time.monotonic() + 20
        while not all(map(_rests, threads)):
            assert time.monotonic() < end, "a thread of pynetdicom's goes on"
            time.sleep(0.001)


def _rests(thread: threading.Thread) -> bool:
    """Return True if a thread waits for an event without a time limit, so that nothing but the event wakes it."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code is not threading.Event.wait.__code__:
        frame = frame.f_back
    return frame is not None and frame.f_locals["timeout"] is None


def test_echo_between_instances(plan: Plan) -> None:
    with scp() as server, linked(server) as association:
        with Sender(association, Throttle(None)) as sender:
            sender.echo(association.accepted[VERIFICATION, EXPLICIT])
            assert store(sender, plan, 0, association.accepted[CT, EXPLICIT]) == 0
            sender.echo(association.accepted[VERIFICATION, EXPLICIT])
        assert server.echoes == 2


def test_a_conversion_keeps_the_association_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conveyor, "KEEP_ALIVE_S", 0)
    folder = tmp_path / "study"
    folder.mkdir()
    shutil.copy(studies.data_file("rtdose_rle.dcm"), folder / "1.dcm")
    plan, told = scan([folder]), PushReport()
    taken = {EXPLICIT, IMPLICIT}
    with scp(accept=lambda context: next(iter(taken & set(context.offered)), 4)) as server:
        Fleet(peer_of(server), plan, told, 1, "lossless", Throttle(None)).deliver()
    assert [outcome.kind for outcome in told.outcomes.values()] == [Kind.DELIVERED]
    assert server.echoes > 3  # ten frames


def test_an_end_between_two_instances_is_told(plan: Plan) -> None:
    with scp(on_store=lambda store: [0, Abort(2, 6)]) as server:
        association = associate(peer_of(server), OFFERED)
        with Sender(association, Throttle(None)) as sender:
            assert store(sender, plan, 0, association.accepted[CT, EXPLICIT]) == 0
            with pytest.raises(Interrupted, match=r"invalid PDU parameter value|broke the connection"):
                store(sender, plan, 1, association.accepted[CT, EXPLICIT])
        association.drop()


def test_an_association_that_ended_can_not_be_lent(plan: Plan) -> None:
    with scp() as server:
        association = associate(peer_of(server), OFFERED)
        association.release()
        with pytest.raises(Interrupted), Sender(association, Throttle(None)):
            pass


def test_operations_of_pynetdicom_can_be_called_off() -> None:
    """C-ECHO to a peer that has fallen silent, and somebody who cancels."""
    cancel = threading.Event()
    told = PushReport(cancelled=cancel)
    with scp(on_associate=lambda proposal: None) as server:
        association = associate(peer_of(server, idle_timeout_s=30), OFFERED)
        threading.Timer(0.3, cancel.set).start()
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            association.call("waiting", lambda assoc: assoc.dimse.get_msg(block=True), told.check)
        association.abort()
        assert time.monotonic() - begun < as_loaded(5)


def test_a_hung_operation_is_TimedOut() -> None:
    with scp() as server:
        association = associate(peer_of(server, idle_timeout_s=0.5), OFFERED)
        server.echoes = 0
        server.on_data = lambda association, count: Silence()
        with pytest.raises(TimedOut, match="C-ECHO"):
            association.echo()
        association.abort()


def test_what_a_port_speaks() -> None:
    with scp() as plain, scp(tls=certificates().accepting()) as secure:
        assert speaks_dicom(peer_of(plain))
        assert not speaks_dicom(peer_of(secure))
        assert speaks_tls(peer_of(secure))
    closed = peer_of(plain)
    assert not speaks_dicom(closed)
    assert not speaks_tls(closed)


def test_a_peer_that_rejects_speaks_dicom() -> None:
    with scp(on_associate=lambda proposal: Reject(1, 1, 7)) as server:
        assert speaks_dicom(peer_of(server))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_every_association_keeps_the_order(concurrency: int, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    studies.ct(folder, 30)
    plan, told = scan([folder]), PushReport()
    order = {item.header.SOPInstanceUID: number for number, item in enumerate(plan.items) if item.header}
    with scp(on_store=lambda store: [Wait(0.02), 0]) as server:
        Fleet(peer_of(server), plan, told, concurrency, "never", Throttle(None)).deliver()
    seen: dict[int, list[int]] = {}
    for one in server.stores:
        seen.setdefault(one.association, []).append(order[one.SOPInstanceUID])
    assert len(seen) == concurrency
    assert all(numbers == sorted(numbers) for numbers in seen.values())


def test_a_refusal_of_all_stops_the_others_and_nothing_confirmed_is_lost(plan: Plan) -> None:
    told = PushReport()

    def script(store: Store) -> int:
        return 0xA702 if store.number >= 2 else 0

    with scp(on_store=script) as server, pytest.raises(Exception, match="A702"):
        Fleet(peer_of(server), plan, told, 2, "never", Throttle(None)).deliver()
    assert len(told.outcomes) == len(server.kept)
    assert server.wait_closed()
    assert {association.ended for association in server.associations} == {"released"}


def test_a_failing_ledger_is_no_error_of_the_peer(plan: Plan) -> None:
    def record(item: object, outcome: object) -> None:
        raise ZeroDivisionError

    with scp() as server, pytest.raises(ZeroDivisionError):
        Fleet(peer_of(server), plan, PushReport(record), 2, "never", Throttle(None)).deliver()


def test_threads_and_sockets_end_with_the_delivery(plan: Plan) -> None:
    threads, files = threading.active_count(), process.open_descriptors()
    with scp(on_store=lambda store: Close()) as server:
        for _ in range(2):
            with pytest.raises(Interrupted):
                Fleet(peer_of(server), plan, PushReport(), 2, "never", Throttle(None)).deliver()
            server.stores.clear()
    process.until(lambda: threading.active_count() <= threads and process.open_descriptors() <= files)


def test_what_arrives_is_the_data_set(plan: Plan) -> None:
    with scp() as server:
        Fleet(peer_of(server), plan, PushReport(), 4, "never", Throttle(None)).deliver()
    for item in plan.items:
        assert item.header is not None
        sent = plan.file(item).read_bytes()[item.header.dataset_offset :]
        assert server.kept[item.header.SOPInstanceUID].data == sent
        assert pydicom.uid.UID(server.kept[item.header.SOPInstanceUID].syntax) == item.header.TransferSyntaxUID


def test_what_a_peer_says_of_a_patient_is_kept_back(plan: Plan) -> None:
    comment = f"unknown {studies.PATIENT_NAME} {studies.PATIENT_ID} {studies.BIRTH_DATE}"
    told = PushReport()
    with scp(on_store=lambda store: Answer(0xC123, comment=comment)) as server:
        Fleet(peer_of(server), plan, told, 1, "never", Throttle(None)).deliver()
    for outcome in told.outcomes.values():
        assert "C123" in outcome.detail
        assert "unknown" in outcome.detail
        assert not [word for word in studies.PHI if word.casefold() in outcome.detail.casefold()]
