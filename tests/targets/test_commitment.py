"""Verification of DICOM deliveries: storage commitment, and asking the peer what it has.

The receipt never claims a level that was not reached, says why it was not, and takes back what the peer turns out
not to have.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from protocols.dimse import commitment
from protocols.dimse.association import associate
from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.message import VERIFICATION
from protocols.dimse.transport import Peer
from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded, free_port
from tests.servers.dcmtk import dcmqrscp, storescp
from tests.servers.orthanc import Orthanc, shared_orthanc
from tests.servers.scp import Scp, scp
from tests.servers.steps import Abort, Answer, Close, Commit, Report, Script, Silence, Store, Wait
from tests.servers.wire import Proposal
from tests.targets.dicom import AET, dicom_target
from tests.targets.dicom_tls import certificates, tls_target
from transfer.errors import Cancelled
from transfer.plan import Plan, scan
from transfer.receipt import Level, State

WAIT_S = 4.0  # for a report, unless a case says otherwise
STOP_S = 5


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    studies.ct(tmp_path / "study", 5)
    return scan([tmp_path / "study"])


def uid(plan: Plan, place: int) -> str:
    header = plan.items[place].header
    assert header
    return header.SOPInstanceUID


def settings(port: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "verify": "proven",
        "storage_commitment_port": port,
        "storage_commitment_host": "127.0.0.1",
        "storage_commitment_wait_s": WAIT_S,
        "idle_timeout_s": 2,
        **more,
    }


def push(peer: Scp, plan: Plan, port: int = 0, **more: Any) -> Sent:
    done = more.pop("done", ())
    return attempt(dicom_target(peer.port, aet_target=peer.aet, **settings(port, **more)), plan, done=done)


def notes(sent: Sent) -> str:
    return " | ".join(sent.require().notes)


def assert_proven(sent: Sent) -> None:
    receipt = sent.require()
    assert receipt.state is State.DELIVERED
    assert receipt.verified is Level.PROVEN, receipt.notes


# ---- a scripted peer


def test_reported_on_the_same_association(plan: Plan) -> None:
    with scp() as peer:
        sent = push(peer, plan)
        assert_proven(sent)
        assert set(peer.commits[0].uids) == {uid(plan, place) for place in range(5)}
        assert peer.reported == [("", 0)], "a report is answered with success"
        assert peer.wait_closed()
        assert {one.ended for one in peer.associations} == {"released"}


@pytest.mark.parametrize("delay_s", [0, 0.5, 3.5])
def test_reported_on_a_new_association(delay_s: float, plan: Plan) -> None:
    port = free_port()
    with scp(on_commit=lambda commit: [0, Report(port=port, delay_s=delay_s)]) as peer:
        sent = push(peer, plan, port, storage_commitment_wait_s=8)
        assert_proven(sent)
        assert peer.reported[0][1] == 0
        assert sent.seconds < as_loaded(delay_s + 6)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()


def test_reported_on_the_same_association_although_there_is_a_listener(plan: Plan) -> None:
    with scp(on_commit=lambda commit: [0, Report(delay_s=0.3)]) as peer:
        assert_proven(push(peer, plan, free_port()))


def test_reported_late_on_the_same_association(plan: Plan) -> None:
    """Later than the idle timeout, within the time that commitment may take."""
    with scp(on_commit=lambda commit: [0, Report(delay_s=3)]) as peer:
        assert_proven(push(peer, plan, storage_commitment_wait_s=8))


def test_reported_before_the_request_is_answered(plan: Plan) -> None:
    with scp(on_commit=lambda commit: [Report(), 0]) as peer:
        assert_proven(push(peer, plan))


def test_reported_too_late(plan: Plan) -> None:
    """The receipt says what was reached instead, and nothing is taken back."""
    port = free_port()
    with scp(on_commit=lambda commit: [0, Report(port=port, delay_s=3)]) as peer:
        sent = push(peer, plan, port, storage_commitment_wait_s=1)
        assert sent.require().state is State.DELIVERED
        assert sent.require().verified is Level.LISTED
        assert "no report within 1 s" in notes(sent)
        assert len(sent.arrived) == 5
        assert sent.seconds < as_loaded(6)


def test_the_association_ends_before_the_report(plan: Plan) -> None:
    with scp(on_commit=lambda commit: [0, Close()]) as peer:
        sent = push(peer, plan, storage_commitment_wait_s=30)
        assert sent.require().verified is Level.LISTED
        assert "or before the association" in notes(sent)
        assert sent.seconds < as_loaded(10)


def test_never_reported(plan: Plan) -> None:
    with scp(on_commit=lambda commit: 0) as peer:
        begun = time.monotonic()
        sent = push(peer, plan, storage_commitment_wait_s=1.5)
        assert time.monotonic() - begun < as_loaded(1.5 + 5)
        assert sent.require().verified is Level.LISTED
        assert "no report" in notes(sent)


@pytest.mark.parametrize("anew", [False, True])
def test_partly_failed(anew: bool, plan: Plan) -> None:
    """What the peer doesn't commit itself to is taken back, with its reason; the rest stays delivered."""
    port = free_port()
    lost = uid(plan, 1)

    def on_commit(commit: Commit) -> Script:
        return [0, Report(failed={lost: 0x0112}, port=port if anew else None)]

    with scp(on_commit=on_commit) as peer:
        sent = push(peer, plan, port if anew else 0)
        receipt = sent.require()
        assert receipt.state is State.PARTIAL
        assert receipt.verified is Level.PROVEN
        assert set(sent.rejected) == {plan.items[1].path}
        assert "0112" in sent.rejected[plan.items[1].path]
        assert "no such object instance" in sent.rejected[plan.items[1].path]
        assert len(sent.arrived) == 4
        # The next attempt sends what was taken back, and asks for all of it again.
        peer.on_commit = None
        again = push(peer, plan, done=sent.arrived)
        assert_proven(again)
        assert set(again.outcomes) == {plan.items[1].path}
        assert len(peer.commits[-1].uids) == 5


@pytest.mark.parametrize("refusal", [0x0213, Abort()], ids=str)
def test_what_a_peer_failed_stays_so_if_it_takes_no_more_transactions(
    refusal: Script, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for thousands of instances at a time."""
    monkeypatch.setattr(commitment, "BATCH", 2)
    lost = uid(plan, 1)

    def on_commit(commit: Commit) -> Script:
        return [0, Report(failed={lost: 0x0112})] if lost in commit.uids else refusal

    with scp(on_commit=on_commit) as peer:
        sent = push(peer, plan)
        assert sent.require().state is State.PARTIAL and sent.require().verified is Level.LISTED
        assert set(sent.rejected) == {plan.items[1].path}
        assert "not proven: storage commitment of 3 of 5 instances" in notes(sent)
        assert len(peer.commits) == 2
    if refusal == 0x0213:
        assert "status 0213" in notes(sent)


def test_a_failure_without_a_reason_is_one(plan: Plan) -> None:
    lost = uid(plan, 1)
    with scp(on_commit=lambda commit: [0, Report(failed={lost: None})]) as peer:
        sent = push(peer, plan)
        assert set(sent.rejected) == {plan.items[1].path}
        assert sent.require().verified is Level.PROVEN


def test_all_failed(plan: Plan) -> None:
    with scp(on_commit=lambda commit: [0, Report(failed=dict.fromkeys(commit.uids, 0x0213))]) as peer:
        sent = push(peer, plan)
        assert sent.require().state is State.FAILED
        assert len(sent.rejected) == 5


def test_a_report_that_leaves_some_out_proves_them_not(plan: Plan) -> None:
    with scp(on_commit=lambda commit: [0, Report(missing=(uid(plan, 0), uid(plan, 1)))]) as peer:
        sent = push(peer, plan)
        assert sent.require().state is State.DELIVERED
        assert sent.require().verified is Level.LISTED
        assert "2 of 5" in notes(sent)


def test_a_report_on_another_transaction_proves_nothing(plan: Plan) -> None:
    with scp(on_commit=lambda commit: [0, Report(transaction="1.2.3.4")]) as peer:
        sent = push(peer, plan, storage_commitment_wait_s=1)
        assert sent.require().verified is Level.LISTED
        assert peer.reported[0][1] != 0, "it was told that nobody waits for this"


@pytest.mark.parametrize(
    "script",
    [
        0x0110, 0x0122, 0x0213, Answer(status=None), Abort(), Close(), Silence(), [0, Abort()], [0, Close()],
        [0, Silence()],
    ],
    ids=str,
)  # fmt: skip
def test_no_commitment_but_everything_else(script: Script, plan: Plan) -> None:
    """Whatever the peer does instead: the delivery stands, is verified as far as possible, and the reason is told."""
    with scp(on_commit=lambda commit: script) as peer:
        sent = push(peer, plan, storage_commitment_wait_s=2)
        receipt = sent.require()
        assert receipt.state is State.DELIVERED
        assert receipt.verified is Level.LISTED
        assert "not proven" in notes(sent)
        assert sent.seconds < as_loaded(12)
        assert not peer.repeated


def test_no_context_for_commitment(plan: Plan) -> None:
    with scp(accept=lambda context: 3 if "1.20.1" in context.abstract_syntax else context.offered[0]) as peer:
        sent = push(peer, plan)
        assert sent.require().verified is Level.LISTED
        assert "storage commitment" in notes(sent)
        assert not peer.commits


def test_neither_commitment_nor_query(plan: Plan) -> None:
    storage = "1.2.840.10008.5.1.4.1.1."
    with scp(accept=lambda context: context.offered[0] if context.abstract_syntax.startswith(storage) else 3) as peer:
        sent = push(peer, plan)
        assert sent.require().state is State.DELIVERED
        assert sent.require().verified is Level.ACCEPTED
        assert "not proven" in notes(sent)
        assert "not listed" in notes(sent)


def test_what_was_delivered_before_is_proven_too(plan: Plan) -> None:
    with scp() as peer:
        first = push(peer, plan, verify="accepted")
        assert not peer.commits
        again = push(peer, plan, done=first.arrived)
        assert_proven(again)
        assert not again.outcomes
        assert len(peer.commits[0].uids) == 5
        assert len(peer.stores) == 5


def test_many_instances(tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1200, side=2)
    plan = scan([tmp_path / "study"])
    with scp() as peer:
        sent = push(peer, plan, storage_commitment_wait_s=20)
        assert_proven(sent)
        assert sum(len(commit.uids) for commit in peer.commits) == 1200


def test_another_title_for_commitment(plan: Plan) -> None:
    with scp() as peer:
        assert_proven(push(peer, plan, storage_commitment_aet="COMMIT"))
        called = {one.proposal.called for one in peer.associations if one.proposal and _asks_commitment(one.proposal)}
        assert called == {"COMMIT"}


def _asks_commitment(proposal: Any) -> bool:
    return any(context.abstract_syntax.endswith(".1.20.1") for context in proposal.contexts)


def test_a_port_that_is_taken(plan: Plan) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, scp() as peer:
        sent = push(peer, plan, taken.getsockname()[1])
        assert_proven(sent)  # on the same association
        assert "can't listen" in notes(sent)


def test_dispatches_share_the_port(tmp_path: Path) -> None:
    port = free_port()
    plans = []
    for number in range(4):
        studies.ct(tmp_path / str(number), 3)
        plans.append(scan([tmp_path / str(number)]))
    with scp(on_commit=lambda commit: [0, Report(port=port, delay_s=0.5)]) as peer, ThreadPoolExecutor(4) as pool:
        for sent in pool.map(lambda plan: push(peer, plan, port), plans):
            assert_proven(sent)
            assert not sent.require().notes


def test_foreign_visitors_of_the_listener_do_no_harm(plan: Plan) -> None:
    """Port scanners, web browsers and reports that nobody asked for."""
    port = free_port()

    def visit(commit: Commit) -> Script:
        for greeting in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\x01\x00\x00\x00\x00\x04abcd", b"\x16\x03\x01\x00\x05hello"):
            with socket.create_connection(("127.0.0.1", port), 2) as visitor:
                visitor.sendall(greeting)
        return [0, Report(port=port, transaction="1.2.3"), Report(port=port, delay_s=0.5)]

    with scp(on_commit=visit) as peer:
        assert_proven(push(peer, plan, port))
        assert {status for _, status in peer.reported} == {0, 0x0112}


def test_cancelled_while_waiting_for_the_report(plan: Plan) -> None:
    cancelled = threading.Event()
    timer = threading.Timer(1.0, cancelled.set)
    timer.start()
    port = free_port()
    with scp(on_commit=lambda commit: 0) as peer:
        target = dicom_target(peer.port, aet_target=peer.aet, **settings(port, storage_commitment_wait_s=60))
        begun = time.monotonic()
        sent = attempt(target, plan, cancelled=cancelled)
        assert isinstance(sent.error, Cancelled), repr(sent.error)
        assert time.monotonic() - begun < as_loaded(1 + STOP_S)
        assert len(sent.arrived) == 5, "what was confirmed stays confirmed"
    timer.cancel()


@pytest.mark.parametrize("level", ["listed", "proven"])
def test_cancelled_while_an_association_is_asked_for_to_verify(plan: Plan, level: str) -> None:
    cancelled = threading.Event()

    def asked(proposal: Proposal) -> Script:
        if proposal.association == 1:
            return None
        cancelled.set()
        return Silence()

    with scp(on_associate=asked) as peer:
        target = dicom_target(peer.port, aet_target=peer.aet, **settings(verify=level, idle_timeout_s=60))
        sent = attempt(target, plan, cancelled=cancelled)
        assert isinstance(sent.error, Cancelled), sent
        assert len(sent.arrived) == 5


# ---- with TLS


@pytest.mark.parametrize("anew", [False, True])
def test_commitment_with_tls(anew: bool, plan: Plan) -> None:
    """A report on a new association comes with TLS as well, and with a certificate that we trust."""
    made = certificates()
    port = free_port()
    report = ssl.create_default_context(cafile=str(made.ca))
    report.load_cert_chain(made.server.cert, made.server.key)
    with scp(
        tls=made.accepting(), report_tls=report, on_commit=lambda commit: [0, Report(port=port if anew else None)]
    ) as peer:
        client = made.authority.leaf("reporter-client")
        target = tls_target(
            peer.port,
            aet_target=peer.aet,
            tls_cert=str(client.cert),
            tls_key=str(client.key),
            tls_key_password="",
            **settings(port if anew else 0),
        )
        assert_proven(attempt(target, plan))


# ---- listed


def test_listed(plan: Plan) -> None:
    with scp() as peer:
        sent = push(peer, plan, verify="listed")
        assert sent.require().verified is Level.LISTED
        assert not sent.require().notes
        assert not peer.commits


def test_confirmed_but_not_there(plan: Plan) -> None:
    """The peer said success and doesn't list the instance: it is taken back."""
    lost = uid(plan, 2)
    with scp(on_store=lambda store: Answer(kept=False) if store.SOPInstanceUID == lost else 0) as peer:
        sent = push(peer, plan, verify="listed")
        assert sent.require().state is State.PARTIAL
        assert set(sent.rejected) == {plan.items[2].path}
        assert "list" in sent.rejected[plan.items[2].path]
        peer.on_store = None
        again = push(peer, plan, verify="listed", done=sent.arrived)
        assert again.require().state is State.DELIVERED
        assert again.require().verified is Level.LISTED


def test_listed_with_some_delay(plan: Plan) -> None:
    """Archives index what they got a little later: they are asked again before anything is taken back."""
    late: list[Store] = []

    def on_store(store: Store) -> Script:
        late.append(store)
        return Answer(kept=False)

    with scp(on_store=on_store) as peer:
        begun = time.monotonic()

        def index() -> None:
            while len(late) < 5 and time.monotonic() - begun < 10:
                time.sleep(0.05)
            time.sleep(1.5)
            with peer.lock:
                peer.kept.update({store.SOPInstanceUID: store for store in late})

        indexer = threading.Thread(target=index)
        indexer.start()
        sent = push(peer, plan, verify="listed")
        indexer.join()
        assert sent.require().state is State.DELIVERED
        assert sent.require().verified is Level.LISTED


def test_a_peer_that_cannot_list(plan: Plan) -> None:
    with scp(finds=False) as peer:
        sent = push(peer, plan, verify="listed")
        assert sent.require().state is State.DELIVERED
        assert sent.require().verified is Level.ACCEPTED
        assert "not listed" in notes(sent)


def test_listed_by_dcmqrscp(plan: Plan, tmp_path: Path) -> None:
    with dcmqrscp(tmp_path / "server") as server:
        # With several associations at once it gives two instances one file name, and loses the first of them.
        target = dicom_target(server.port, aet_target=server.aet, verify="listed", concurrency=1)
        receipt = attempt(target, plan).require()
        assert (receipt.state, receipt.verified, receipt.notes) == (State.DELIVERED, Level.LISTED, ())


def test_storescp_can_neither(plan: Plan, tmp_path: Path) -> None:
    with storescp(tmp_path / "server") as server:
        sent = attempt(dicom_target(server.port, aet_target=server.aet, **settings(free_port())), plan)
        assert sent.require().state is State.DELIVERED
        assert sent.require().verified is Level.ACCEPTED
        assert notes(sent)


# ---- Orthanc


def orthanc_target(server: Orthanc, port: int, **more: Any) -> Any:
    return dicom_target(
        server.dicom_port, aet_target=server.aet, **settings(port, storage_commitment_wait_s=15, **more)
    )


def test_orthanc_commits(plan: Plan) -> None:
    server, port = shared_orthanc(), free_port()
    server.know(AET, port)
    sent = attempt(orthanc_target(server, port), plan)
    assert_proven(sent)
    assert not sent.require().notes


def test_orthanc_lost_one(plan: Plan) -> None:
    """Orthanc answers success to C-STORE, but did not keep the instance: commitment finds it out."""
    server, port = shared_orthanc(), free_port()
    server.know(AET, port)
    server.drop(uid(plan, 3))
    sent = attempt(orthanc_target(server, port), plan)
    assert sent.require().state is State.PARTIAL
    assert sent.require().verified is Level.PROVEN
    assert set(sent.rejected) == {plan.items[3].path}
    assert "0112" in sent.rejected[plan.items[3].path]
    server.drop()
    again = attempt(orthanc_target(server, port), plan, done=sent.arrived)
    assert_proven(again)


def test_orthanc_does_not_list_what_it_lost(plan: Plan) -> None:
    server = shared_orthanc()
    server.drop(uid(plan, 3))
    sent = attempt(orthanc_target(server, 0, verify="listed"), plan)
    assert sent.require().state is State.PARTIAL
    assert set(sent.rejected) == {plan.items[3].path}


def test_orthanc_that_does_not_know_us_lists(plan: Plan) -> None:
    """It reports only to modalities that it was told of: without, the delivery is listed and the receipt says why."""
    server = shared_orthanc()
    sent = attempt(orthanc_target(server, free_port(), aet_source="STRANGER"), plan)
    assert sent.require().state is State.DELIVERED
    assert sent.require().verified is Level.LISTED
    assert "not proven" in notes(sent)


def test_a_wait_within_a_script_is_no_answer(plan: Plan) -> None:
    """N-ACTION itself is answered late, within the idle timeout."""
    with scp(on_commit=lambda commit: [Wait(1), 0, Report()]) as peer:
        assert_proven(push(peer, plan))


def test_many_operations_on_one_association() -> None:
    """A fast peer's answers are not lost between two operations of pynetdicom's."""
    with scp() as peer:
        link = associate(Peer("127.0.0.1", peer.port, idle_timeout_s=3), [(VERIFICATION, UNCOMPRESSED)])
        try:
            for _ in range(400):
                link.echo()
        finally:
            link.abort()
        assert peer.echoes == 400
