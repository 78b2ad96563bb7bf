"""Answers to an association request that no library makes, and instances that can't be asked for.

What the standard has a receiver ignore is ignored; what makes no sense is called so at once, and costs no thread.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import UID

from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tasks.dicom import driver
from tests.servers import wire
from tests.servers.scp import Association, Scp, scp
from tests.servers.steps import Abort, Accept, Raw, Reject, Script, Silence, Store
from tests.servers.wire import Proposal
from tests.targets.dicom import dicom_target
from transfer.errors import Busy, Cancelled, DispatchError, Interrupted, Misconfigured, TimedOut, Unreachable
from transfer.receipt import State

IDLE_S = 2.0
SOON_S = 1.5  # well within the idle timeout: nothing waits for what can't come
CT = "1.2.840.10008.5.1.4.1.1.2"
LIMIT = wire.item(0x51, struct.pack(">I", 16384))
IMPLEMENTATION = wire.item(0x52, b"1.2.3")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    studies.ct(tmp_path / "study", 3)
    return tmp_path / "study"


def target_of(peer: Scp, **settings: Any) -> Any:
    return dicom_target(peer.port, **({"aet_target": peer.aet, "idle_timeout_s": IDLE_S} | settings))


@pytest.fixture
def broken_threads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What threads died of."""
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))
    return seen


@pytest.mark.parametrize(
    ("rejection", "error"),
    [
        (Reject(1, 1, 4), Misconfigured),
        (Reject(1, 3, 1), Misconfigured),
        (Reject(1, 0, 0), Misconfigured),
        (Reject(2, 9, 9), Busy),
        (Reject(0, 1, 1), Misconfigured),
        (Reject(3, 1, 1), Misconfigured),
        (Reject(255, 255, 255), Misconfigured),
    ],
    ids=str,
)
def test_rejections_that_no_table_has(
    rejection: Reject, error: type[DispatchError], study: Path, broken_threads: list[object]
) -> None:
    with scp(on_associate=lambda proposal: rejection) as peer:
        sent = attempt(target_of(peer), study)
        assert type(sent.error) is error
        assert "rejected" in str(sent.error)
        assert sent.seconds < as_loaded(SOON_S)
    assert not broken_threads


def answer(
    proposal: Proposal,
    *,
    application: bytes | None = None,
    contexts: Callable[[Proposal], list[tuple[int, int, bytes | None]]] | None = None,
    user: bytes | None = LIMIT + IMPLEMENTATION,
    version: int = 1,
    tail: bytes = b"",
) -> bytes:
    """An A-ASSOCIATE-AC, PS3.8 table 9-17."""
    body = struct.pack(">HH", version, 0) + b"CALLED".ljust(16) + b"CALLING".ljust(16) + bytes(32)
    body += wire.item(0x10, b"1.2.840.10008.3.1.1.1") if application is None else application
    made = contexts(proposal) if contexts else [(cx.id, 0, cx.offered[0].encode()) for cx in proposal.contexts]
    for number, result, syntax in made:
        inner = b"" if syntax is None else wire.item(0x40, syntax)
        body += wire.item(0x21, struct.pack(">BBBB", number, 0, result, 0) + inner)
    body += (b"" if user is None else wire.item(0x50, user)) + tail
    return struct.pack(">BBI", 2, 0, len(body)) + body


def every(result: int, syntax: bytes | None) -> Callable[[Proposal], list[tuple[int, int, bytes | None]]]:
    return lambda proposal: [(cx.id, result, syntax) for cx in proposal.contexts]


IGNORED: dict[str, dict[str, Any]] = {
    "unknown user items": {"user": LIMIT + wire.item(0x7F, b"abcdef") + IMPLEMENTATION + wire.item(0x60, b"")},
    "a version name that is no ASCII": {"user": LIMIT + IMPLEMENTATION + wire.item(0x55, "Zürich".encode())},
    "an answer to an identity that was not told": {"user": LIMIT + wire.item(0x59, b"\0\2ok") + IMPLEMENTATION},
    "an implementation that is no UID": {"user": LIMIT + wire.item(0x52, b"")},
    "no user information": {"user": None},
    "no maximum length": {"user": IMPLEMENTATION},
    "a maximum length of two bytes": {"user": wire.item(0x51, b"\0\1") + IMPLEMENTATION},
    "another protocol version": {"version": 3},
    "no application context": {"application": b""},
    "an application context that is no ASCII": {"application": wire.item(0x10, b"\xff\xfe")},
    "an unknown item": {"tail": wire.item(0x7A, b"what")},
    "contexts with even numbers among the others": {
        "contexts": lambda proposal: (
            [(2, 0, b"1.2.840.10008.1.2")] + [(cx.id, 0, cx.offered[0].encode()) for cx in proposal.contexts]
        )
    },
}


@pytest.mark.parametrize("odd", IGNORED)
def test_what_is_ignored(odd: str, study: Path, broken_threads: list[object]) -> None:
    with scp(on_associate=lambda proposal: Accept(answer(proposal, **IGNORED[odd]))) as peer:
        sent = attempt(target_of(peer, concurrency=1), study)
        assert sent.require().state is State.DELIVERED
        assert len(peer.kept) == 3
        assert driver.check(target_of(peer)).ok
    assert not broken_threads


REFUSED: dict[str, dict[str, Any]] = {
    "accepted without a syntax": {"contexts": every(0, None)},
    "accepted with an empty syntax": {"contexts": every(0, b"")},
    "accepted in a syntax that was not offered": {"contexts": every(0, b"1.2.840.10008.1.2.4.50")},
    "a reason of refusal that no table has": {"contexts": every(9, b"1.2.840.10008.1.2")},
    "a number that was not asked for": {"contexts": lambda proposal: [(201, 0, b"1.2.840.10008.1.2")]},
}


@pytest.mark.parametrize("odd", REFUSED)
def test_what_accepts_nothing(odd: str, study: Path, broken_threads: list[object]) -> None:
    with scp(on_associate=lambda proposal: [Raw(answer(proposal, **REFUSED[odd])), Silence()]) as peer:
        sent = attempt(target_of(peer), study)
        assert sent.require().state is State.FAILED
        assert len(sent.rejected) == 3
        assert all("CT Image Storage" in detail for detail in sent.rejected.values())
    assert not broken_threads


NONSENSE: dict[str, dict[str, Any]] = {
    "no contexts": {"contexts": lambda proposal: []},
    "only contexts with even numbers": {"contexts": lambda proposal: [(2, 0, b"1.2.840.10008.1.2")]},
    "an item longer than the answer": {"tail": b"\x21\x00\xff\xff12"},
    "half an item": {"tail": b"\x21\x00\x00"},
}


@pytest.mark.parametrize("odd", NONSENSE)
def test_what_makes_no_sense(odd: str, study: Path, broken_threads: list[object]) -> None:
    with scp(on_associate=lambda proposal: [Raw(answer(proposal, **NONSENSE[odd])), Silence()]) as peer:
        sent = attempt(target_of(peer), study)
        assert type(sent.error) is Interrupted
        assert "makes no sense" in str(sent.error)
        assert sent.seconds < as_loaded(SOON_S)
    assert not broken_threads


@pytest.fixture
def slow_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A name server that doesn't answer: the system asks it again and again."""
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: over.wait(30) and [])
    yield
    over.set()


@pytest.mark.usefixtures("slow_names")
def test_a_name_server_that_is_silent_is_waited_for_as_long_as_a_connection(study: Path) -> None:
    target = dicom_target(104, host="pacs.example.org", connect_timeout_s=1)
    sent = attempt(target, study)
    assert type(sent.error) is Unreachable
    assert "pacs.example.org" in str(sent.error)
    assert sent.seconds < as_loaded(1 + SOON_S)
    health = driver.check(target)
    assert [probe.result for probe in health.probes][:2] == ["failed", "skipped"]


@pytest.mark.usefixtures("slow_names")
def test_cancelled_while_a_name_is_resolved(study: Path) -> None:
    cancelled = threading.Event()
    threading.Timer(0.5, cancelled.set).start()
    sent = attempt(dicom_target(104, host="pacs.example.org", connect_timeout_s=30), study, cancelled=cancelled)
    assert type(sent.error) is Cancelled
    assert sent.seconds < as_loaded(0.5 + SOON_S)


HALF = {"a head": b"\x04\0\0", "a message": b"\x04\0\0\0\0\x20\0\0\0\x02\x01\x03"}


@pytest.mark.parametrize("half", HALF)
def test_silence_in_the_middle_of_what_follows_the_answer(half: str, study: Path) -> None:
    with scp(on_associate=lambda proposal: [Raw(answer(proposal) + HALF[half]), Silence()]) as peer:
        sent = attempt(target_of(peer), study)
        assert type(sent.error) is TimedOut
        assert str(peer.port) in str(sent.error)
        assert sent.seconds < as_loaded(IDLE_S + SOON_S)


@pytest.mark.parametrize("half", HALF)
def test_cancelled_in_the_middle_of_what_follows_the_answer(half: str, study: Path) -> None:
    cancelled = threading.Event()
    with scp(on_associate=lambda proposal: [Raw(answer(proposal) + HALF[half]), Silence()]) as peer:
        threading.Timer(0.5, cancelled.set).start()
        sent = attempt(target_of(peer, idle_timeout_s=60), study, cancelled=cancelled)
        assert type(sent.error) is Cancelled
        assert sent.seconds < as_loaded(0.5 + SOON_S)
        assert peer.wait_closed()


def test_cancelled_while_half_an_answer_is_there_before_its_time(study: Path) -> None:
    """An abort is told by pynetdicom, which would read that half first, and wait for the other one."""
    studies.multiframe(study / "large.dcm", 40)
    cancelled, said = threading.Event(), threading.Event()

    def on_data(association: Association, size: int) -> Script:
        if size > 1_000_000 and not said.is_set():
            said.set()
            threading.Timer(0.5, cancelled.set).start()
            return Raw(HALF["a head"])
        return None

    with scp(on_data=on_data) as peer:
        target = target_of(peer, idle_timeout_s=60, concurrency=1, bandwidth_limit=4 << 20)
        sent = attempt(target, study, cancelled=cancelled)
        assert type(sent.error) is Cancelled
        assert sent.seconds < as_loaded(5)
        assert peer.wait_closed()


@pytest.mark.parametrize("granted", [8, 9, 13, 14, 40, 1000])
def test_small_grants_are_kept(granted: int, study: Path) -> None:
    """The scripted peer fails the test if a PDU is longer than it granted."""
    with scp(max_pdu=granted) as peer:
        assert attempt(target_of(peer), study).require().state is State.DELIVERED
        assert driver.check(target_of(peer)).ok


@pytest.mark.parametrize("granted", [1, 6, 7])
def test_a_grant_that_holds_nothing(granted: int, study: Path) -> None:
    with scp(max_pdu=granted) as peer:
        sent = attempt(target_of(peer), study)
        assert type(sent.error) is Misconfigured
        assert f"{granted} bytes" in str(sent.error)
        assert not peer.stores
        assert type(driver.check(target_of(peer)).error) is Misconfigured


def odd_instance(path: Path, **changes: str) -> None:
    buffer = BytesIO()
    with studies.quiet():
        ds = studies.dataset("CT_small.dcm")
        syntax = changes.pop("TransferSyntaxUID", str(ds.file_meta.TransferSyntaxUID))
        for keyword, value in changes.items():
            setattr(ds, keyword, value)
        ds.file_meta.TransferSyntaxUID = UID(syntax)
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        pydicom.dcmwrite(
            buffer, ds, implicit_vr=False, little_endian=True, enforce_file_format=False, force_encoding=True
        )
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    "changes",
    [
        {"SOPClassUID": "1.2.Zürich"},
        {"TransferSyntaxUID": "1." + "2" * 70},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_cannot_be_asked_for_costs_only_itself(changes: dict[str, str], study: Path) -> None:
    odd_instance(study / "odd.dcm", **changes)
    with scp() as peer:
        sent = attempt(target_of(peer), study)
        assert sent.require().state is State.PARTIAL
        assert set(sent.rejected) == {"odd.dcm"}
        assert next(iter(changes)) in sent.rejected["odd.dcm"]
        assert len(peer.kept) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"SOPClassUID": "1.2.840.0113.04"},
        {"SOPClassUID": "1.2.abc"},
        {"SOPClassUID": "1." + "2" * 62},
        {"TransferSyntaxUID": "1.2.840.113619.5.2"},
        {"SOPInstanceUID": "abc-def"},
    ],
    ids=str,
)
def test_odd_identifiers_are_sent_as_they_are(changes: dict[str, str], study: Path) -> None:
    odd_instance(study / "odd.dcm", **changes)
    with scp() as peer:
        assert attempt(target_of(peer), study).require().state is State.DELIVERED
        assert len(peer.kept) == 4


def test_people_are_told_once_of_associations_that_were_not_granted(tmp_path: Path) -> None:
    for number in range(60):
        studies.dicom(tmp_path / "study" / f"{number:02}.dcm", SOPClassUID=f"2.25.99.{number}")
    with scp(on_associate=lambda proposal: Abort() if proposal.association % 2 == 0 else None) as peer:
        receipt = attempt(target_of(peer), tmp_path / "study").require()
        assert receipt.state is State.DELIVERED
        assert len(receipt.notes) == 1


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_pause_lets_come_to_its_end_what_is_under_way(concurrency: int, tmp_path: Path) -> None:
    """It was cut off, and went out again when somebody resumed the dispatch."""
    studies.ct(tmp_path, 24)
    paused, got = threading.Event(), list[str]()

    def store(store: Store) -> int:
        got.append(store.SOPInstanceUID)
        if len(got) >= 3:
            paused.set()
        if not goes_on:
            time.sleep(0.3)  # longer than between two looks whether to stop
        return 0

    goes_on = False
    with scp(on_store=store, keep_data=False) as peer:
        target = dicom_target(peer.port, aet_target=peer.aet, concurrency=concurrency)
        sent = attempt(target, tmp_path, paused=paused)
        assert isinstance(sent.error, Cancelled) and "paused" in sent.error.message
        assert len(got) == len(sent.arrived) < 24
        goes_on = True
        assert attempt(target, tmp_path, done=sent.arrived).require().state is State.DELIVERED
    assert len(got) == len({*got}) == 24
