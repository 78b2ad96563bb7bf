"""What XNAT does after the upload, until the session is in the archive."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from talaria.testing import process, studies
from talaria.testing.harness import Sent, attempt, sending
from talaria.testing.process import as_loaded
from tests.servers.xnat import Fault, Reply, Xnat
from tests.targets.xnat import xnat_target
from tests.targets.xnat_push.pushing import LABEL, all_of, fails
from transfer.errors import (
    Busy,
    Interrupted,
    TimedOut,
)
from transfer.outcome import Kind
from transfer.receipt import Level, State


@pytest.mark.parametrize("background", [False, True])
def test_conflict_and_error_in_xnats_words_and_the_others_go_on(server: Xnat, study: Path, background: bool) -> None:
    uids = [studies.uid(56) for _ in range(3)]
    for number, uid in enumerate(uids):
        studies.ct(study / str(number), 2, study=uid)
    server.rules.background = background
    server.rules.refused = {
        uids[0]: (409, f"Session {LABEL} already contains a scan (4) with the same number, but a different UID."),
        uids[1]: (500, f"unable to write {studies.PATIENT_ID}: No space left on device"),
    }
    sent = attempt(xnat_target(server.url), study)
    assert set(sent.rejected) == {f"{n}/CT000{k}.dcm" for n in (0, 1) for k in (1, 2)}
    assert set(sent.arrived) == {"2/CT0001.dcm", "2/CT0002.dcm"}
    assert "with the same number, but a different UID" in sent.rejected["0/CT0001.dcm"]
    assert "CONFLICT" in sent.rejected["0/CT0001.dcm"]
    assert "No space left on device" in sent.rejected["1/CT0001.dcm"]
    assert "ERROR" in sent.rejected["1/CT0001.dcm"]
    assert not any(phi in text for text in sent.rejected.values() for phi in studies.PHI)
    assert sent.require().state is State.PARTIAL


def test_200_is_not_archived_yet(server: Xnat, study: Path) -> None:
    server.rules.background, server.rules.build_s, server.rules.archive_s = True, 0.5, 0.5
    studies.ct(study, 2)
    seen: list[int] = []
    sent = attempt(xnat_target(server.url), study, told=lambda *_: seen.append(len(server.store.experiments)))
    assert all_of(sent, Kind.DELIVERED)
    assert seen == [1, 1], "told before it was archived"


def test_time_is_up_in_the_prearchive(server: Xnat, study: Path) -> None:
    uid = studies.uid(56)
    studies.ct(study, 2, study=uid)
    server.rules.background, server.rules.stays = True, {uid: "READY"}
    begun = time.monotonic()
    sent = attempt(xnat_target(server.url, archive_timeout_s=1), study)
    assert time.monotonic() - begun < as_loaded(5)
    assert all_of(sent, Kind.WARNING)
    assert "prearchive" in sent.outcomes["CT0001.dcm"].detail
    assert sent.require().state is State.DELIVERED


def test_destination_prearchive(server: Xnat, study: Path) -> None:
    studies.ct(study, 3)
    studies.dicom(study / "secondary.dcm", "MR_small.dcm")
    target = xnat_target(server.url, destination="prearchive", verify="listed")
    sent = attempt(target, study)
    assert all_of(sent, Kind.DELIVERED)
    assert sent.require().verified is Level.LISTED
    assert not server.store.experiments
    assert sorted((one.status, len(one.received)) for one in server.store.prearchive) == [("READY", 1), ("READY", 3)]
    again = attempt(target, study)
    assert all_of(again, Kind.ALREADY)
    assert len(server.imports) == 2


def test_an_import_is_never_sent_twice(server: Xnat, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection has been idle, and XNAT closes it after the whole body (RFC 9110 section 9.2.2)."""
    monkeypatch.setattr("protocols.http.session.STALE_S", 0.0)
    posts = Fault("POST", "/data/services/import", hang_up=True, times=9)
    server.faults.append(posts)
    studies.ct(study, 2)
    fails(attempt(xnat_target(server.url), study), Interrupted)
    assert posts.times == 8


def test_silent_while_it_archives(server: Xnat, study: Path) -> None:
    """XNAT answers when all is done, which takes longer than any peer may be silent: its prearchive tells."""
    server.rules.archive_s = 3
    studies.ct(study, 2)
    sent = attempt(xnat_target(server.url, idle_timeout_s=1), study)
    assert all_of(sent, Kind.DELIVERED)
    assert len(server.imports) == 1


def test_silent_and_nothing_there(server: Xnat, study: Path) -> None:
    server.faults.append(Fault("POST", "/data/services/import", hang_up=True, wait_s=4))
    studies.ct(study, 2)
    begun = time.monotonic()
    fails(attempt(xnat_target(server.url, idle_timeout_s=1), study), TimedOut)
    assert time.monotonic() - begun < as_loaded(4)


def test_silent_and_only_what_was_there_before(server: Xnat, study: Path) -> None:
    """An append that XNAT never answers: the session is there, what was sent is not, and may still come."""
    uid = studies.uid(56)
    studies.ct(study / "a", 2, study=uid)
    target = xnat_target(server.url, overwrite="append", idle_timeout_s=1)
    attempt(target, study).require()
    studies.ct(study / "b", 2, study=uid)
    server.faults.append(Fault("POST", "/data/services/import", hang_up=True, wait_s=4))
    fails(attempt(target, study), TimedOut)
    assert all_of(attempt(target, study / "b"), Kind.DELIVERED)


def test_an_earlier_import_still_at_work_is_waited_for(server: Xnat, study: Path) -> None:
    """The link broke after the upload; XNAT goes on, and the next attempt finds what it made."""
    server.rules.archive_s = 2
    server.faults.append(Fault("POST", "/data/services/import", Reply("Bad Gateway", 502), run=True))
    studies.ct(study, 2)
    target = xnat_target(server.url)
    first: list[Sent] = []
    thread = threading.Thread(target=lambda: first.append(attempt(target, study)))
    thread.start()
    process.until(lambda: [one.status for one in server.store.prearchive[:1]] == ["ARCHIVING"])
    second = attempt(xnat_target(server.url), study)
    thread.join()
    fails(first[0], Busy)
    assert all_of(second, Kind.ALREADY)
    assert len(server.imports) == 1


@pytest.mark.parametrize("verify", ["accepted", "listed"])
def test_what_this_run_sent_is_delivered_and_not_there_already(server: Xnat, study: Path, verify: str) -> None:
    """The answer got lost, as a proxy's 502 does it; XNAT archived all the same."""
    studies.ct(study / "old", 1, study=(uid := studies.uid(56)))
    attempt(xnat_target(server.url), study).require()
    studies.ct(study / "new", 2, study=uid)
    server.faults.append(Fault("POST", "/data/services/import", Reply("Bad Gateway", 502), run=True))
    with sending(xnat_target(server.url, overwrite="append", verify=verify), study) as sender:
        assert isinstance(sender.attempt().error, Busy)
        receipt = sender.attempt().require()
    assert {item.path: item.outcome for item in receipt.items} == {
        "new/CT0001.dcm": Kind.DELIVERED, "new/CT0002.dcm": Kind.DELIVERED, "old/CT0001.dcm": Kind.ALREADY,
    }  # fmt: skip
    assert receipt.bytes == sum(file.stat().st_size for file in (study / "new").iterdir())
    assert len(server.imports) == 2
