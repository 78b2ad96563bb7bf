"""Storage commitment as its SCP: only what is on disk or has arrived is promised, and each report finds its sender."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import build_role, evt

from protocols.dimse import committing
from protocols.dimse.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE
from protocols.dimse.committing import Reports, ReportTo
from protocols.dimse.senders import KnownSender
from protocols.dimse.transport import Peer
from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import free_port, until
from tests.protocols.intake import AET, listening
from tests.servers.orthanc import shared_orthanc
from tests.servers.scu import AE
from tests.targets.dicom import dicom_target
from transfer.errors import Unreachable
from transfer.receipt import Level
from transfer.spool import Spool

CT = "1.2.840.10008.5.1.4.1.1.2"


def request(*uids: str, transaction: str = "") -> Dataset:
    ds = Dataset()
    ds.TransactionUID = transaction or studies.uid()
    ds.ReferencedSOPSequence = []
    for uid in uids:
        one = Dataset()
        one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = CT, uid
        ds.ReferencedSOPSequence.append(one)
    return ds


class Modality:
    """A sender that asks for storage commitment by pynetdicom; it may listen for reports."""

    def __init__(self, aet: str = "CT1") -> None:
        self.aet = aet
        self.reports: list[Dataset] = []
        self.events: list[int] = []
        self.answer = 0
        self.heard = threading.Event()

    def handle(self, event: evt.Event) -> tuple[int, None]:
        self.events.append(int(event.request.EventTypeID))
        if self.answer == 0:
            self.reports.append(event.event_information)
            self.heard.set()
        return self.answer, None

    def associate(self, port: int) -> Any:
        ae = AE(self.aet)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 60
        for each in (CT, PUSH_MODEL):
            ae.add_requested_context(UID(each))
        assoc = ae.associate("127.0.0.1", port, ae_title=AET, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self.handle)])
        assert assoc.is_established
        return assoc

    @contextmanager
    def listening(self, port: int) -> Iterator[None]:
        ae = AE(self.aet)
        ae.add_supported_context(UID(PUSH_MODEL), scu_role=True, scp_role=True)
        server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self.handle)])
        try:
            yield
        finally:
            server.shutdown()


def ask(assoc: Any, ds: Dataset, action: int = 1, instance: str = PUSH_MODEL_INSTANCE) -> int:
    status, _ = assoc.send_n_action(ds, action, UID(PUSH_MODEL), UID(instance))
    return int(status.Status)


def stored(assoc: Any) -> str:
    ds = studies.dataset()
    with studies.quiet():
        assert int(assoc.send_c_store(ds).Status) == 0
    return str(ds.SOPInstanceUID)


def uids(report: Dataset, keyword: str) -> set[str]:
    return {str(one.ReferencedSOPInstanceUID) for one in report.get(keyword) or ()}


def test_the_report_comes_on_the_same_association(tmp_path: Path) -> None:
    modality = Modality()
    with listening(tmp_path / "home") as there:
        assoc = modality.associate(there.port)
        here, strange, arrived = stored(assoc), studies.uid(), studies.uid()
        there.delivered.add(arrived)  # and was removed from the disk
        assert ask(assoc, request(here, strange, arrived)) == 0
        until(lambda: len(modality.reports) == 1)
        assert ask(assoc, request(here)) == 0
        until(lambda: len(modality.reports) == 2)
        assoc.release()
    first, second = modality.reports
    assert uids(first, "ReferencedSOPSequence") == {here, arrived} and uids(first, "FailedSOPSequence") == {strange}
    assert int(first.FailedSOPSequence[0].FailureReason) == 0x0112
    assert uids(second, "ReferencedSOPSequence") == {here} and "FailedSOPSequence" not in second
    assert modality.events == [2, 1]


@pytest.mark.parametrize("error", [Unreachable("the server is away"), OSError(5, "Input/output error")])
def test_who_asks_while_nobody_knows_is_to_ask_again(tmp_path: Path, error: Exception) -> None:
    """That an instance is lost is not said of one that was delivered, while the Prefect server restarts."""
    modality = Modality()

    def away(*asked: Any) -> set[str]:
        raise error

    with listening(tmp_path / "home") as there:
        assoc = modality.associate(there.port)
        here, arrived, delivered = stored(assoc), studies.uid(), there.reception._delivered
        there.delivered.add(arrived)
        there.reception._delivered = away
        assert ask(assoc, request(here, arrived)) == committing.RESOURCE_LIMITATION
        assert ask(assoc, request(here)) == 0, "what lies on the disk is known"
        until(lambda: len(modality.reports) == 1)  # pynetdicom takes one that comes meanwhile for the next answer
        there.reception._delivered = delivered
        assert ask(assoc, request(here, arrived)) == 0
        until(lambda: len(modality.reports) == 2)
        assoc.release()
    assert [uids(one, "ReferencedSOPSequence") for one in modality.reports] == [{here}, {here, arrived}]


def test_the_report_comes_on_a_new_association_where_the_sender_listens(tmp_path: Path) -> None:
    modality, port = Modality(), free_port()
    with (
        modality.listening(port),
        listening(tmp_path / "home", senders=(KnownSender("CT*", "127.0.0.1", port),)) as there,
    ):
        assoc = modality.associate(there.port)
        here = stored(assoc)
        asked = request(here)
        assert ask(assoc, asked) == 0
        assoc.release()
        assert modality.heard.wait(60)
        [report] = modality.reports
        assert report.TransactionUID == asked.TransactionUID and uids(report, "ReferencedSOPSequence") == {here}
        until(lambda: not list(there.reception.spool.reports.iterdir()))


def test_a_report_that_nobody_took_outlives_the_process(tmp_path: Path) -> None:
    modality, port = Modality(), free_port()
    senders = (KnownSender("", "", port),)
    with listening(tmp_path / "home", senders=senders, reports=(first := Reports())) as there:
        assoc = modality.associate(there.port)
        here = stored(assoc)
        assert ask(assoc, request(here)) == 0
        assoc.release()
        until(lambda: any(one.tries for one in first._due.values()))
        assert first.waiting == 1
    with modality.listening(port), listening(tmp_path / "home", senders=senders) as again:
        assert modality.heard.wait(60)
        assert uids(modality.reports[0], "ReferencedSOPSequence") == {here}
        until(lambda: not again.reception.reports.waiting)


def test_who_asks_again_gets_the_new_report_and_nobody_gets_anothers(tmp_path: Path) -> None:
    """Two senders that made up the same transaction UID, and one that has sent meanwhile what it missed."""
    modality, port = Modality(), free_port()
    with listening(tmp_path / "home", senders=(KnownSender("", "", port),)) as there:
        other = Modality("CT9")
        late, transaction = studies.uid(), studies.uid()
        for one in (modality, other):
            assoc = one.associate(there.port)
            assert ask(assoc, request(late, transaction=transaction)) == 0
            assoc.release()
        until(lambda: there.reception.associations == 0)
        assert there.reception.reports.waiting == 2
        there.delivered.add(late)
        assoc = modality.associate(there.port)
        assert ask(assoc, request(late, transaction=transaction)) == 0
        assert there.reception.reports.waiting == 2
        with modality.listening(port):
            assoc.release()
            until(lambda: any(uids(one, "ReferencedSOPSequence") == {late} for one in modality.reports))


def test_no_report_keeps_the_others(tmp_path: Path) -> None:
    """One that nobody can make sense of lies there first."""
    modality, port = Modality(), free_port()
    folder = Spool(tmp_path / "home" / "received" / "ct").reports
    folder.mkdir(parents=True)
    to = {"calling": AET, "called": "CT1", "host": "127.0.0.1", "port": port}
    (folder / "1.json").write_text(json.dumps({"to": to, "report": {"transaction": "1.2"}, "asked": time.time()}))
    with (
        modality.listening(port),
        listening(tmp_path / "home", senders=(KnownSender("", "", port),)) as there,
    ):
        until(lambda: any(one.tries for one in there.reception.reports._due.values()))
        assoc = modality.associate(there.port)
        here = stored(assoc)
        assert ask(assoc, request(here)) == 0
        assoc.release()
        assert modality.heard.wait(60) and uids(modality.reports[0], "ReferencedSOPSequence") == {here}


def test_a_sender_that_is_off_holds_up_no_reports_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try takes seconds, and there may be hundreds of reports for it; when it is back, all come."""
    tried: list[tuple[str, str]] = []
    begin, off, poison = threading.Event(), {"OFF"}, "1.2.0"

    def report(peer: Peer, asked: Mapping[str, Any], check: Callable[[], None]) -> int:
        tried.append((peer.called, str(asked["transaction"])))
        assert begin.wait(60)
        if peer.called in off or asked["transaction"] == poison:
            raise Unreachable(f"{peer.where}: no answer")
        return 0

    monkeypatch.setattr(committing, "_report", report)
    monkeypatch.setattr(committing, "PATIENCE_S", 0.0)
    monkeypatch.setattr(committing, "WAITS_S", (0.1,))
    reports, folder = Reports(), tmp_path / "reports" / "ct"
    for number in range(30):
        reports.put(folder, ReportTo(AET, "OFF", "127.0.0.1", 104), {"transaction": f"1.2.{number}"})
    reports.put(folder, ReportTo(AET, "ON", "127.0.0.1", 104), {"transaction": "1.3"})
    begin.set()
    until(lambda: ("ON", "1.3") in tried)
    assert tried[:2] == [("OFF", poison), ("ON", "1.3")]
    until(lambda: reports.waiting == 30)
    off.clear()
    until(lambda: reports.waiting == 1)
    assert len(list(folder.iterdir())) == 1 and {one for _, one in tried} >= {f"1.2.{n}" for n in range(30)}
    reports.close()


def test_without_room_for_a_report_the_sender_asks_again(tmp_path: Path) -> None:
    modality = Modality()
    with listening(tmp_path / "home", senders=(KnownSender("", "", free_port()),)) as there:
        assoc = modality.associate(there.port)
        here = stored(assoc)
        there.change(keep_free=1 << 60)
        assert ask(assoc, request(here)) == 0x0213 and there.reception.reports.waiting == 0
        assoc.release()


@pytest.mark.parametrize(
    ("ds", "how", "status"),
    [
        (request("1.2.3"), {"action": 2}, 0x0123),
        (request("1.2.3"), {"instance": "1.2.3"}, 0x0112),
        (Dataset(), {}, 0x0110),
        (request("../../etc/passwd"), {}, 0x0110),
        (request("1.2.3", transaction="../1"), {}, 0x0110),
    ],
)
def test_requests_that_make_no_sense(ds: Dataset, how: dict[str, Any], status: int, tmp_path: Path) -> None:
    if "TransactionUID" not in ds:
        ds = Dataset()
        ds.TransactionUID = "1.2.3"
    modality = Modality()
    with listening(tmp_path / "home") as there, studies.quiet():
        assoc = modality.associate(there.port)
        assert ask(assoc, ds, **how) == status
        assert not modality.reports
        stored(assoc)  # the association goes on
        assoc.release()


def test_our_own_sender_is_given_its_proof(tmp_path: Path) -> None:
    files = studies.ct(tmp_path / "study", 5)
    with listening(tmp_path / "home") as there:
        receipt = attempt(
            dicom_target(there.port, aet_target=AET, verify="proven", storage_commitment_wait_s=30), tmp_path / "study"
        ).require()
        assert receipt.verified is Level.PROVEN, receipt.notes
        assert there.reception.counts.instances == len(files)


def test_a_sender_that_proposes_its_role(tmp_path: Path) -> None:
    modality = Modality()
    with listening(tmp_path / "home") as there:
        ae = AE("CT1")
        ae.add_requested_context(UID(PUSH_MODEL))
        assoc = ae.associate(
            "127.0.0.1",
            there.port,
            ae_title=AET,
            ext_neg=[build_role(UID(PUSH_MODEL), scu_role=True, scp_role=False)],
            evt_handlers=[(evt.EVT_N_EVENT_REPORT, modality.handle)],
        )
        assert assoc.is_established
        assert ask(assoc, request(studies.uid())) == 0
        assert modality.heard.wait(60)
        assert modality.events == [2]
        assoc.release()


def test_orthanc_sends_and_asks_for_commitment(tmp_path: Path) -> None:
    """It takes the report on a new association."""
    server = shared_orthanc()
    files = studies.ct(tmp_path / "study", 3)
    for path in files:
        server.request("POST", "/instances", path.read_bytes())
    with listening(tmp_path / "home", senders=(KnownSender(server.aet, "127.0.0.1", server.dicom_port),)) as there:
        server.know(AET, there.port)
        resources = server.get("/instances")
        server.request("POST", f"/modalities/{AET.lower()}/store", json.dumps(resources).encode())
        assert there.reception.counts.instances == 3
        lost = studies.uid()
        instances = [[CT, uid] for uid in (*sorted(server.uids()), lost)]
        asked = json.dumps({"DicomInstances": instances}).encode()
        made = json.loads(server.request("POST", f"/modalities/{AET.lower()}/storage-commitment", asked))
        until(lambda: server.get(made["Path"])["Status"] != "Pending")
        answer = server.get(made["Path"])
        assert {one["SOPInstanceUID"] for one in answer["Success"]} == server.uids()
        assert {one["SOPInstanceUID"] for one in answer["Failures"]} == {lost}
