"""XNAT targets: sessions and their labels, overwriting, what XNAT does after a 200, and what goes wrong on the way."""

from __future__ import annotations

import io
import json
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydantic import ValidationError

from blocks.xnat import XnatTarget
from talaria.testing import process, studies
from talaria.testing.harness import Sent, attempt, sending
from talaria.testing.process import as_loaded
from talaria.testing.relay import relay
from tasks.xnat import check, driver
from tasks.xnat.names import candidates, digest
from tests.servers.certificates import Authority
from tests.servers.xnat import Fault, Refusal, Reply, Xnat, error, xnat
from tests.targets.xnat import PASSWORD, serving, xnat_target
from transfer.errors import (
    Busy,
    Cancelled,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    NotFound,
    NotTrusted,
    TimedOut,
    Unreachable,
)
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, State

LABEL = f"{studies.PATIENT_ID}_{studies.STUDY_DATE}_101112"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Xnat]:
    with serving(tmp_path / "xnat") as running:
        yield running
        assert not running.store.logins, "a session at XNAT was not ended"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    return folder


def sessions(server: Xnat) -> dict[str, tuple[str, int]]:
    """Study and number of files of the archived sessions, by label."""
    return {one.label: (one.uid, len(one.files)) for one in server.store.experiments.values()}


def kinds(sent: Sent) -> dict[str, Kind]:
    return {path: outcome.kind for path, outcome in sent.outcomes.items()}


def all_of(sent: Sent, kind: Kind) -> bool:
    return set(kinds(sent)) == {item.path for item in sent.plan.pending} and set(kinds(sent).values()) == {kind}


def fails(sent: Sent, expected: type[DispatchError]) -> DispatchError:
    assert type(sent.error) is expected, repr(sent.error)
    assert not sent.outcomes
    shown = str(sent.error)
    assert not any(phi in shown for phi in studies.PHI), shown
    return sent.error


# ---- sessions and labels


def test_one_session_per_study(server: Xnat, study: Path) -> None:
    """Two studies of a patient, same day, same second: two sessions, each with its own."""
    uids = sorted(studies.uid(56) for _ in range(3))
    for number, uid in enumerate(uids):
        studies.ct(study / str(number), 2 + number, study=uid)
    sent = attempt(xnat_target(server.url), study)
    assert all_of(sent, Kind.DELIVERED)
    first, *others = uids
    assert sessions(server) == {LABEL: (first, 2)} | {
        f"{LABEL}-{digest(uid)}": (uid, 3 + number) for number, uid in enumerate(others)
    }
    assert {one.subject.label for one in server.store.experiments.values()} == {studies.PATIENT_ID}
    assert len(server.imports) == 3


def test_studies_of_a_day_one_after_the_other(server: Xnat, study: Path, tmp_path: Path) -> None:
    target = xnat_target(server.url, session="{PatientID}_{StudyDate}", overwrite="append")
    a, b = sorted((studies.uid(56) for _ in range(2)), reverse=True)
    studies.ct(study / "a", 2, study=a)
    assert all_of(attempt(target, study / "a"), Kind.DELIVERED)
    studies.ct(study / "b", 3, study=b)
    assert all_of(attempt(target, study / "b"), Kind.DELIVERED)
    label = f"{studies.PATIENT_ID}_{studies.STUDY_DATE}"
    assert sessions(server) == {label: (a, 2), f"{label}-{digest(b)}": (b, 3)}
    # Series that come later find their own session.
    for name, uid in (("c", b), ("d", a)):
        studies.ct(study / name, 4, study=uid)
        assert all_of(attempt(target, study / name), Kind.DELIVERED)
    assert sessions(server) == {label: (a, 6), f"{label}-{digest(b)}": (b, 7)}


def test_a_renamed_session_is_found_by_its_study(server: Xnat, study: Path) -> None:
    uid = studies.uid(56)
    studies.ct(study / "a", 2, study=uid)
    target = xnat_target(server.url, overwrite="append")
    attempt(target, study / "a").require()
    next(iter(server.store.experiments.values())).label = "VISIT_1"
    studies.ct(study / "b", 2, study=uid)
    assert all_of(attempt(target, study / "b"), Kind.DELIVERED)
    assert sessions(server) == {"VISIT_1": (uid, 4)}


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_server_that_does_not_search_by_study(server: Xnat, study: Path, status: int) -> None:
    uid = studies.uid(56)
    target = xnat_target(server.url, overwrite="append")
    server.faults.append(Fault("GET", "/data/projects/P/experiments", error(status, "unknown column"), times=9))
    for name in "ab":
        studies.ct(study / name, 2, study=uid)
        assert all_of(attempt(target, study / name), Kind.DELIVERED)
    assert sessions(server) == {LABEL: (uid, 4)}


def test_a_label_taken_meanwhile(server: Xnat, study: Path, tmp_path: Path) -> None:
    """Another dispatch archives a study under our label while ours is on its way."""
    studies.ct(study, 2)
    rival = studies.ct(tmp_path / "rival", 3)
    service, run = server.rest.service, server.rest.service.run

    def overtaken(*args: Any) -> Any:
        service.run = run  # type: ignore[method-assign]
        attempt(xnat_target(server.url), tmp_path / "rival").require()
        return run(*args)

    service.run = overtaken  # type: ignore[method-assign]
    server.rules.always_merges = True
    sent = attempt(xnat_target(server.url), study)
    assert all_of(sent, Kind.DELIVERED)
    found = sessions(server)
    assert sorted(count for _, count in found.values()) == [2, len(rival)]
    assert set(found) == {LABEL, next(name for name in candidates(LABEL, _uid(sent)) if name != LABEL)}
    assert not server.store.prearchive, "our own entry in conflict was left behind"


def _uid(sent: Sent) -> str:
    header = sent.plan.items[0].header
    assert header
    return header.StudyInstanceUID


def test_subjects_are_never_merged(server: Xnat, study: Path) -> None:
    """IDs that become one label are kept apart, within a plan and over time."""
    target = xnat_target(server.url)
    for name, patient in (("a", "A/1"), ("b", "A:1"), ("c", "A.1"), ("d", "A_1")):
        studies.dicom(study / name / "1.dcm", PatientID=patient, SeriesNumber=1)
    assert all_of(attempt(target, study / "a"), Kind.DELIVERED)
    assert all_of(attempt(target, study / "b"), Kind.DELIVERED)
    assert attempt(target, study).require().state is State.DELIVERED
    by_subject: dict[str, set[str]] = {}
    for one in server.store.experiments.values():
        by_subject.setdefault(one.subject.label, set()).add(one.patient_id)
    assert sorted(by_subject.values(), key=min) == [{"A.1"}, {"A/1"}, {"A:1"}, {"A_1"}]
    # Another study of each goes to the same subject.
    for name, patient in (("d", "A_1"), ("a", "A/1"), ("c", "A.1"), ("b", "A:1")):
        studies.dicom(study / f"{name}2" / "1.dcm", PatientID=patient, SeriesNumber=1, StudyTime="235959")
        assert all_of(attempt(target, study / f"{name}2"), Kind.DELIVERED)
    assert len(server.store.subjects) == 4
    assert len(server.store.experiments) == 8


def test_a_script_that_replaces_patients_ids_splits_nobody(server: Xnat, study: Path) -> None:
    """XNAT's own default script puts the session's label into the patient's ID."""
    target = xnat_target(server.url)
    for name in "abc":
        studies.dicom(study / name / "1.dcm", PatientID="A/1", StudyTime=f"10111{ord(name) - 97}")
        assert all_of(attempt(target, study / name), Kind.DELIVERED)
        for one in server.store.experiments.values():
            one.patient_id = one.label
    assert [one.label for one in server.store.subjects.values()] == [f"A_1-{digest('A/1')}"]


def test_a_subject_of_the_plain_label_stays_its_patients(server: Xnat, study: Path) -> None:
    """Earlier releases put no mark behind the label of an ID that had to be changed."""
    target = xnat_target(server.url)
    studies.dicom(study / "a" / "1.dcm", PatientID="A/1")
    attempt(target, study / "a").require()
    [subject] = server.store.subjects.values()
    subject.label = "A_1"
    for name, patient in (("b", "A/1"), ("c", "A:1")):
        studies.dicom(study / name / "1.dcm", PatientID=patient, StudyTime="235959")
        assert all_of(attempt(target, study / name), Kind.DELIVERED)
    found = sorted((one.subject.label, one.patient_id) for one in server.store.experiments.values())
    assert found == [("A_1", "A/1"), ("A_1", "A/1"), (f"A_1-{digest('A:1')}", "A:1")]


def test_labels_that_differ_in_case_are_two_patients(server: Xnat, study: Path) -> None:
    """XNAT takes `ab` for `AB`."""
    for number, patient in enumerate(("ab", "AB", "Ab")):
        studies.dicom(study / patient / "1.dcm", PatientID=patient)
        if number == 0:
            attempt(xnat_target(server.url), study).require()
    assert attempt(xnat_target(server.url), study).require().state is State.DELIVERED
    by_subject = {one.subject.label.lower(): one.patient_id for one in server.store.experiments.values()}
    assert sorted(by_subject.values()) == ["AB", "Ab", "ab"]


def test_without_patient_and_dates(server: Xnat, study: Path) -> None:
    empty = {"PatientID": "", "StudyDate": "", "StudyTime": ""}
    for name in "ab":
        studies.dicom(study / f"{name}.dcm", **empty)
    assert all_of(attempt(xnat_target(server.url), study), Kind.DELIVERED)
    assert len(server.store.experiments) == 2
    assert len(server.store.subjects) == 2, "two unknown patients are not one"


def test_without_study(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    ds = studies.dataset()
    del ds.StudyInstanceUID
    studies.write(study / "none.dcm", studies.encoded(ds))
    sent = attempt(xnat_target(server.url), study)
    assert kinds(sent) == {"CT0001.dcm": Kind.DELIVERED, "none.dcm": Kind.REJECTED}
    assert "Study Instance UID" in sent.rejected["none.dcm"]


def test_two_files_of_one_instance(server: Xnat, study: Path) -> None:
    data = studies.ct_bytes()
    for name in ("a.dcm", "b.dcm"):
        studies.write(study / name, data)
    studies.write(study / "c.dcm", data[:-1] + bytes([data[-1] ^ 1]))
    sent = attempt(xnat_target(server.url), study)
    assert kinds(sent) == {"a.dcm": Kind.DELIVERED, "b.dcm": Kind.ALREADY, "c.dcm": Kind.REJECTED}
    assert "a.dcm" in sent.outcomes["b.dcm"].detail
    assert "other content" in sent.outcomes["c.dcm"].detail
    assert len(server.imports) == 1
    assert server.instances() == {_sop(sent, "a.dcm"): data}


def _sop(sent: Sent, path: str) -> str:
    header = next(item.header for item in sent.plan.items if item.path == path)
    assert header
    return header.SOPInstanceUID


# ---- overwriting


def test_append_adds_and_touches_nothing_else(server: Xnat, study: Path) -> None:
    uid, series = studies.uid(56), studies.uid(56)
    target = xnat_target(server.url, overwrite="append")
    studies.ct(study, 3, study=uid, series=series)
    attempt(target, study).require()
    before = dict(server.instances())
    [session] = server.store.experiments.values()
    paths = {file.path for file in session.files}
    studies.ct(study, 2, study=uid, series=series, first=4)  # more of the same series
    studies.ct(study / "new", 2, study=uid)  # and another one
    sent = attempt(target, study)
    assert kinds(sent) == {
        "CT0001.dcm": Kind.ALREADY, "CT0002.dcm": Kind.ALREADY, "CT0003.dcm": Kind.ALREADY,
        "CT0004.dcm": Kind.DELIVERED, "CT0005.dcm": Kind.DELIVERED,
        "new/CT0001.dcm": Kind.DELIVERED, "new/CT0002.dcm": Kind.DELIVERED,
    }  # fmt: skip
    assert before.items() <= server.instances().items()
    assert paths <= {file.path for file in session.files}, "what was there has been written again"
    assert len(server.instances()) == 7
    assert server.imports[-1]["overwrite"] == "append"


def test_none_sends_nothing_to_a_session_that_is_there(server: Xnat, study: Path) -> None:
    uid = studies.uid(56)
    studies.ct(study / "a", 2, study=uid)
    attempt(xnat_target(server.url), study).require()
    studies.ct(study / "b", 2, study=uid)
    server.rules.always_merges = True  # `dest=/archive` merges at XNAT, whatever `overwrite` says
    sent = attempt(xnat_target(server.url), study)
    assert {path: kind for path, kind in kinds(sent).items() if path[0] == "a"} == dict.fromkeys(
        ["a/CT0001.dcm", "a/CT0002.dcm"], Kind.ALREADY
    )
    assert set(sent.rejected) == {"b/CT0001.dcm", "b/CT0002.dcm"}
    assert "Session already exists" in sent.rejected["b/CT0001.dcm"]
    assert sent.require().state is State.PARTIAL
    assert len(server.imports) == 1, "it was sent for nothing"
    assert len(server.instances()) == 2


def test_none_goes_on_with_a_session_of_its_own(server: Xnat, study: Path) -> None:
    """What an earlier attempt of the same dispatch left over is added, whatever `overwrite` says."""
    studies.ct(study, 4)
    plan = scan([study])
    first = attempt(xnat_target(server.url), plan.narrowed(plan.items[:2]))
    sent = attempt(xnat_target(server.url), plan, done=first.arrived)
    assert kinds(sent) == {"CT0003.dcm": Kind.DELIVERED, "CT0004.dcm": Kind.DELIVERED}
    assert len(server.instances()) == 4


def test_delete_replaces_what_is_sent(server: Xnat, study: Path) -> None:
    studies.ct(study, 3)
    attempt(xnat_target(server.url), study).require()
    victim = study / "CT0001.dcm"
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (study / "CT0002.dcm").unlink()
    sent = attempt(xnat_target(server.url, overwrite="delete"), study)
    assert all_of(sent, Kind.DELIVERED)
    assert server.instances()[_sop(sent, "CT0001.dcm")] == victim.read_bytes()
    assert len(server.instances()) == 3, "what was not sent stays"


def test_delete_never_touches_another_study(server: Xnat, study: Path) -> None:
    studies.ct(study / "a", 3)
    studies.ct(study / "b", 2)
    target = xnat_target(server.url, overwrite="delete")
    for name in "ab":
        assert all_of(attempt(target, study / name), Kind.DELIVERED)
    assert sorted(count for _, count in sessions(server).values()) == [2, 3]
    assert {query["overwrite"] for query in server.imports} == {"none"}


def test_strict_scans_are_rejected_in_xnats_words(server: Xnat, study: Path) -> None:
    uid, series = studies.uid(56), studies.uid(56)
    server.rules.strict_scans = True
    target = xnat_target(server.url, overwrite="append")
    studies.ct(study, 2, study=uid, series=series)
    attempt(target, study).require()
    studies.ct(study, 1, study=uid, series=series, first=3)
    sent = attempt(target, study)
    assert set(sent.rejected) == {"CT0003.dcm"}
    assert "Session already contains a scan (1) with the same UID and number" in sent.rejected["CT0003.dcm"]
    assert "CONFLICT" in sent.rejected["CT0003.dcm"]


# ---- what comes after the upload


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


# ---- one that fails costs itself alone


class Failing:
    """XNAT that fails, in one way or another, at every import with one of these instances."""

    def __init__(self, server: Xnat, bad: set[str], how: str) -> None:
        self.server, self.bad, self.how = server, bad, how
        self.sent: list[set[str]] = []  # instances of each import
        self._put = server.rest.service._file
        self._run = server.rest.service.run
        server.rules.commit_ignores = False
        server.rest.service._file = self._file  # type: ignore[method-assign]
        server.rest.service.run = self.run  # type: ignore[method-assign]

    def run(self, user: str, params: dict[str, str], uploads: list[Any]) -> Any:
        self.sent.append(set())
        return self._run(user, params, uploads)

    def _file(self, user: str, params: dict[str, str], place: Any, name: str, pieces: Any, auto: bool) -> Any:
        self.sent[-1].add(name.removesuffix(".dcm"))
        if name.removesuffix(".dcm") in self.bad:
            for _ in pieces:
                pass
            if self.how == "aborts":
                raise BrokenPipeError  # the stand-in closes the connection
            raise Refusal(500, "java.lang.NullPointerException")
        return self._put(user, params, place, name, pieces, auto)


def delivered_in_the_end(server: Xnat, study: Path, failing: Failing, attempts: int, **settings: Any) -> Sent:
    """Dispatch until it ends, as the engine does; return the last attempt."""
    plan = scan([study])
    with sending(xnat_target(server.url, concurrency=1, **settings), plan) as sender:
        for _ in range(attempts):
            failing.sent.clear()
            sent = sender.attempt()
            counts = Counter(sop for one in failing.sent for sop in one)
            assert max(counts.values(), default=0) <= 2, "sent more than twice in one attempt"
            if sent.receipt:
                break
        receipt = sender.receipt()
    wrong = {item.path for item in receipt.items if item.outcome is not Kind.DELIVERED}
    assert wrong == {item.path for item in plan.items if item.header and item.header.SOPInstanceUID in failing.bad}
    assert set(server.instances()) == {
        item.header.SOPInstanceUID for item in plan.items if item.header and item.path not in wrong
    }
    assert {item.outcome for item in receipt.items if item.path in wrong} == {Kind.REJECTED}
    assert all("alone" in item.detail for item in receipt.items if item.path in wrong)
    return sent


@pytest.mark.parametrize("how", ["500", "aborts"])
@pytest.mark.parametrize("at", [{0}, {19}, {3, 11}])
def test_a_file_at_which_xnat_fails_each_time(server: Xnat, study: Path, at: set[int], how: str) -> None:
    files = studies.ct(study, 20)
    bad = {_uid_of(files[number]) for number in at}
    delivered_in_the_end(server, study, Failing(server, bad, how), attempts=6)


def _uid_of(file: Path) -> str:
    header = scan([file]).items[0].header
    assert header
    return header.SOPInstanceUID


@pytest.mark.parametrize("how", ["500", "silent"])
def test_studies_that_fail_stop_no_others(server: Xnat, study: Path, how: str) -> None:
    """In the first attempt, whichever come first; the failed ones are named."""
    uids = [studies.uid(56) for _ in range(6)]
    for number, uid in enumerate(uids):
        studies.ct(study / str(number), 2, study=uid)
    run = server.rest.service.run

    def failing(user: str, params: dict[str, str], uploads: list[Any]) -> Any:
        if len(server.imports) <= 2:  # the first two to come
            if how == "silent":
                uploads[0].read(1 << 30)
                time.sleep(2.5)
            raise Refusal(500, "java.lang.NullPointerException")
        return run(user, params, uploads)

    server.rest.service.run = failing  # type: ignore[method-assign]
    with sending(xnat_target(server.url, concurrency=1, idle_timeout_s=1), study) as sender:
        first = sender.attempt()
        assert type(first.error) is (Busy if how == "500" else TimedOut)
        assert len(first.arrived) == 8, "what could go did not go"
        assert len(server.imports) == 6
        receipt = sender.attempt().require()
    assert receipt.state is State.DELIVERED
    assert len(server.imports) <= 10, "two studies of two files, each alone at most"


@pytest.mark.parametrize("status", [403, 404, 405, 415])
@pytest.mark.parametrize("bad", [0, 1, 4])
def test_a_study_that_is_refused_stops_no_others(server: Xnat, study: Path, status: int, bad: int) -> None:
    """As a firewall before XNAT does at something in it."""
    uids = sorted(studies.uid(56) for _ in range(5))
    for number, uid in enumerate(uids):
        studies.ct(study / str(number), 2, study=uid)
    run = server.rest.service.run

    def failing(user: str, params: dict[str, str], uploads: list[Any]) -> Any:
        if len(server.imports) == bad + 1:
            raise Refusal(status, "not here")
        return run(user, params, uploads)

    server.rest.service.run = failing  # type: ignore[method-assign]
    sent = attempt(xnat_target(server.url, concurrency=1), study)
    assert sent.require().state is State.PARTIAL
    assert len(sent.arrived) == 8
    assert len(sent.rejected) == 2
    assert all("not here" in reason for reason in sent.rejected.values())
    assert len(server.imports) == 5


def test_a_server_that_refuses_every_study_is_left_in_peace(server: Xnat, study: Path) -> None:
    for number in range(8):
        studies.ct(study / str(number), 1, study=studies.uid(56))
    server.faults.append(Fault("POST", "/data/services/import", error(403, "Forbidden"), times=99))
    fails(attempt(xnat_target(server.url, concurrency=1), study), Denied)
    assert len(server.imports) == 3
    server.faults.clear()


def test_a_server_that_fails_always_is_left_in_peace(server: Xnat, study: Path) -> None:
    for number in range(8):
        studies.ct(study / str(number), 1, study=studies.uid(56))
    server.faults.append(Fault("POST", "/data/services/import", error(500, "out of memory"), times=99))
    fails(attempt(xnat_target(server.url, concurrency=1), study), Busy)
    assert len(server.imports) == 3
    server.faults.clear()
    busy = Reply("busy", 503, headers={"Retry-After": "7"})
    server.faults.append(Fault("POST", "/data/services/import", busy, times=99))
    problem = fails(attempt(xnat_target(server.url, concurrency=1), study), Busy)
    assert isinstance(problem, Busy)
    assert problem.retry_after == 7
    assert len(server.imports) == 4
    server.faults.clear()


def test_many_unreadable_files_cost_one_more_import(server: Xnat, study: Path) -> None:
    studies.ct(study, 9)
    plan = scan([study])
    server.rules.unreadable = {item.header.SOPInstanceUID for item in plan.items[1:6] if item.header}
    server.rules.commit_ignores = False
    sent = attempt(xnat_target(server.url), plan)
    assert len(sent.arrived) == 4
    assert set(sent.rejected) == {item.path for item in plan.items[1:6]}
    assert len(server.imports) == 2


def test_many_changed_files_cost_one_more_import(server: Xnat, study: Path) -> None:
    uid = studies.uid(56)
    files = studies.ct(study, 9, study=uid)
    studies.multiframe(study / "large.dcm", 8, study=uid)
    plan = scan([study])

    def moved(sent: Sent, count: int) -> None:
        if sent.moved > 500_000:
            for file in files[2:6]:
                file.unlink(missing_ok=True)

    sent = attempt(xnat_target(server.url, bandwidth_limit=4 << 20), plan, moved=moved)
    assert set(sent.rejected) == {file.name for file in files[2:6]}
    assert len(sent.arrived) == 6
    assert len(server.imports) == 2


# ---- what XNAT leaves out, and what it loses


def test_filtered_without_a_word(server: Xnat, study: Path) -> None:
    studies.ct(study, 4)
    plan = scan([study])
    header = plan.items[2].header
    assert header
    server.rules.filtered = {header.SOPInstanceUID}
    sent = attempt(xnat_target(server.url), plan)
    assert set(sent.rejected) == {"CT0003.dcm"}
    assert f"3 of 4 files of series {header.SeriesInstanceUID}" in sent.rejected["CT0003.dcm"]
    assert len(sent.arrived) == 3
    server.rules.filtered = {header.SeriesInstanceUID}
    studies.ct(study / "more", 1)
    plan = scan([study])
    server.store.experiments.clear()
    sent = attempt(xnat_target(server.url), plan)
    assert set(sent.arrived) == {"more/CT0001.dcm"}
    assert "gave no reason" in sent.rejected["CT0001.dcm"]


@pytest.mark.parametrize("said", [True, False])
def test_unreadable_for_xnat(server: Xnat, study: Path, said: bool) -> None:
    studies.ct(study, 5)
    plan = scan([study])
    unreadable = {item.header.SOPInstanceUID for item in plan.items[1:3] if item.header}
    server.rules.unreadable, server.rules.commit_ignores = unreadable, not said
    sent = attempt(xnat_target(server.url), plan)
    assert set(sent.rejected) == {"CT0002.dcm", "CT0003.dcm"}
    assert len(server.instances()) == 3
    if said:
        assert sent.rejected["CT0002.dcm"].startswith("unable to read DICOM object")
    only = attempt(xnat_target(server.url), plan.narrowed(plan.items[1:2]))
    assert set(only.rejected) == {"CT0002.dcm"}


def test_listed_names_what_differs(server: Xnat, study: Path) -> None:
    studies.ct(study / "a", 3)
    studies.ct(study / "b", 2)
    plan = scan([study])
    victim = plan.items[1].header
    assert victim
    server.rules.forget = {victim.SOPInstanceUID}
    sent = attempt(xnat_target(server.url, verify="listed"), plan)
    assert set(sent.rejected) == {"a/CT0002.dcm"}
    assert f"XNAT has 2 of 3 files of series {victim.SeriesInstanceUID}" in sent.rejected["a/CT0002.dcm"]
    assert sent.require().verified is Level.LISTED


def test_listed_takes_back_what_is_gone(server: Xnat, study: Path) -> None:
    studies.ct(study, 3)
    target = xnat_target(server.url, verify="listed")
    first = attempt(target, study)
    [session] = server.store.experiments.values()
    scan_of = next(iter(session.scans.values()))
    scan_of.files.pop(_sop(first, "CT0002.dcm") + ".dcm")
    again = attempt(target, first.plan, done=first.arrived)
    assert set(again.rejected) == {"CT0002.dcm"}
    server.store.experiments.clear()
    gone = attempt(target, first.plan, done=first.arrived)
    assert len(gone.rejected) == 3


def test_proven_says_why_not(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    receipt = attempt(xnat_target(server.url, verify="proven"), study).require()
    assert receipt.verified is Level.LISTED
    assert "checksum" in receipt.notes[0]


def test_names_of_xnats_own(server: Xnat, study: Path) -> None:
    """Some servers rename files: then counts are compared."""
    server.rules.renames = True
    studies.ct(study, 3)
    target = xnat_target(server.url, verify="listed")
    sent = attempt(target, study)
    assert all_of(sent, Kind.DELIVERED)
    assert all_of(attempt(target, study), Kind.ALREADY)
    server.rules.filtered = {_sop(sent, "CT0001.dcm")}
    server.store.experiments.clear()
    assert set(attempt(target, study).rejected) == {"CT0001.dcm", "CT0002.dcm", "CT0003.dcm"}


def test_anonymised_uids(server: Xnat, study: Path) -> None:
    """A project's script replaces UIDs; the names of files still tell whose they are."""
    server.rules.new_uids = True
    studies.ct(study, 3)
    target = xnat_target(server.url, verify="listed")
    assert all_of(attempt(target, study), Kind.DELIVERED)
    assert all_of(attempt(target, study), Kind.ALREADY)
    assert len(server.store.experiments) == 1


# ---- logins and permissions


def test_alias_token(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    alias, secret = server.store.issue_alias("sender")
    assert all_of(attempt(xnat_target(server.url, user=alias, password=secret), study), Kind.DELIVERED)


def test_odd_credentials(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    server.store.add_user("müller", "пароль: 秘密 ")
    server.store.projects["P"].roles["müller"] = "member"
    assert all_of(attempt(xnat_target(server.url, user="müller", password="пароль: 秘密 "), study), Kind.DELIVERED)


def test_wrong_password_is_Denied(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    problem = fails(attempt(xnat_target(server.url, password="wrong-password"), study), Denied)
    assert "wrong-password" not in str(problem)
    assert not server.imports


def test_project_that_is_not_there_or_not_seen_is_NotFound(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    server.store.add_project("HIDDEN", somebody="owner")
    for project in ("NOPE", "HIDDEN"):
        fails(attempt(xnat_target(server.url, project_id=project), study), NotFound)
    assert not server.imports


def test_no_right_to_create_is_Denied(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    server.store.projects["P"].roles["sender"] = "collaborator"
    fails(attempt(xnat_target(server.url), study), Denied)
    assert not server.imports


def test_another_project_in_the_answer_is_Denied(server: Xnat, study: Path) -> None:
    """A server that doesn't tell rights beforehand: the study lands nowhere, and that is noticed."""
    studies.ct(study, 1)
    server.store.projects["P"].roles["sender"] = "collaborator"
    server.rest.knows_permissions = False
    problem = fails(attempt(xnat_target(server.url), study), Denied)
    assert "'null'" in str(problem)
    assert len(server.imports) == 1


def test_session_that_expires_during_an_upload(server: Xnat, study: Path) -> None:
    studies.ct(study, 3)
    server.faults.append(Fault("POST", "/data/services/import", expire=True))
    target = xnat_target(server.url)
    sent = attempt(target, study)
    fails(sent, Interrupted)
    again = attempt(target, study)  # with a fresh login
    assert again.arrived == {item.path for item in again.plan.items}
    assert len(server.store.experiments) == 1


def test_cookie_that_expired_is_not_renewed(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    server.server.basic_renews = False
    server.faults.append(Fault("GET", "/data/prearchive/.*", error(401, "The request requires user authentication")))
    fails(attempt(xnat_target(server.url), study), Interrupted)


def test_login_is_ended_in_every_case(server: Xnat, study: Path) -> None:
    """Also after a cancellation in the middle; the fixture looks after all the others."""
    studies.multiframe(study / "large.dcm", 4)
    cancelled = threading.Event()
    sent = attempt(
        xnat_target(server.url, bandwidth_limit=1 << 20), study, cancelled=cancelled, moved=lambda *_: cancelled.set()
    )
    fails(sent, Cancelled)
    assert ("DELETE", "/data/JSESSION", {}) in server.seen


def test_cancel_while_xnat_is_silent(server: Xnat, study: Path) -> None:
    server.rules.archive_s = 8
    studies.ct(study, 1)
    cancelled = threading.Event()
    timer = threading.Timer(1, cancelled.set)
    timer.start()
    begun = time.monotonic()
    fails(attempt(xnat_target(server.url, idle_timeout_s=60), study, cancelled=cancelled), Cancelled)
    assert time.monotonic() - begun < as_loaded(5)


# ---- servers, proxies and links that misbehave

PAGE = Reply("<!DOCTYPE html><html><head><title>Please log in</title></head><body></body></html>", kind="text/html")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/data/JSESSION", Misconfigured), ("/data/projects", Interrupted), ("/data/prearchive/.*", Interrupted)],
)
def test_a_page_is_no_answer(server: Xnat, study: Path, path: str, expected: type[DispatchError]) -> None:
    studies.ct(study, 1)
    server.faults.append(Fault("GET", path, PAGE))
    assert "Please log in" in str(fails(attempt(xnat_target(server.url), study), expected))


def test_a_page_after_the_upload_is_no_success(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    server.faults.append(Fault("POST", "/data/services/import", PAGE))
    fails(attempt(xnat_target(server.url), study), Interrupted)


@pytest.mark.parametrize("where", ["https://sso.example.org/login?next=secret", "/app/template/Login.vm"])
def test_redirects_are_not_followed(server: Xnat, study: Path, where: str) -> None:
    studies.ct(study, 1)
    away = Reply("", 302, "text/html", {"Location": where})
    server.faults.append(Fault("GET", "/data/JSESSION", away))
    problem = fails(attempt(xnat_target(server.url), study), Misconfigured)
    assert "set host" in str(problem)
    assert "secret" not in str(problem)
    server.faults.append(Fault("POST", "/data/services/import", away))  # the session has expired in the meantime
    fails(attempt(xnat_target(server.url), study), Interrupted)


@pytest.mark.parametrize("read_body", [True, False])
def test_proxy_that_answers_502(server: Xnat, study: Path, read_body: bool) -> None:
    studies.multiframe(study / "large.dcm", 16)  # 8 MB: the answer comes while it is being sent
    reply = Reply("<html><head><title>502 Bad Gateway</title></head></html>", 502, "text/html", {"Retry-After": "17"})
    server.faults.append(Fault("POST", "/data/services/import", reply, read_body=read_body))
    problem = fails(attempt(xnat_target(server.url), study), Busy)
    assert isinstance(problem, Busy)
    assert problem.retry_after == 17
    assert "502 Bad Gateway" in str(problem)


def test_proxy_that_limits_bodies(server: Xnat, study: Path) -> None:
    studies.multiframe(study / "large.dcm", 16)
    studies.ct(study / "small", 2)
    reply = Reply("<html><head><title>413 Request Entity Too Large</title></head></html>", 413, "text/html")
    server.faults.append(Fault("POST", "/data/services/import", reply, read_body=False))
    sent = attempt(xnat_target(server.url, concurrency=1), study)
    assert len(sent.rejected) in (1, 2), "the others go on"
    assert "413 Request Entity Too Large" in next(iter(sent.rejected.values()))


@pytest.mark.parametrize(
    ("status", "words", "expected"),
    [
        (403, "Forbidden", Denied),
        (404, "Unknown importer implementation specified: DICOM-zip", Misconfigured),
        (400, "Parameter dest format error", Misconfigured),
        (400, "unable to read data from file", Interrupted),
        (423, "Duplicate archive attempt. Prearchive session already archiving.", Busy),
        (409, "Session processing may already be in progress: Transfer.", Busy),
        (500, "java.lang.NullPointerException", Busy),
        (503, "down for maintenance", Busy),
    ],
)
def test_refusals(server: Xnat, study: Path, status: int, words: str, expected: type[DispatchError]) -> None:
    studies.ct(study, 1)
    server.faults.append(Fault("POST", "/data/services/import", error(status, words)))
    assert words[:20] in str(fails(attempt(xnat_target(server.url), study), expected))


def test_files_of_a_broken_import_still_being_written(server: Xnat, study: Path) -> None:
    studies.ct(study, 2)
    words = "Concurrent file sends of the same data is not supported."
    server.faults.append(Fault("POST", "/data/services/import", error(400, words)))
    assert all_of(attempt(xnat_target(server.url), study), Kind.DELIVERED)
    assert len(server.imports) == 2
    server.faults.append(Fault("POST", "/data/services/import", error(400, words), times=9))
    server.store.experiments.clear()
    fails(attempt(xnat_target(server.url, idle_timeout_s=1), study), Busy)
    server.faults.clear()


def test_stalled_link_is_TimedOut(server: Xnat, study: Path) -> None:
    studies.multiframe(study / "large.dcm", 16)
    with relay(server.port, stall_after=1 << 20) as link:
        begun = time.monotonic()
        fails(attempt(xnat_target(f"http://127.0.0.1:{link.port}", idle_timeout_s=1), study), TimedOut)
        assert time.monotonic() - begun < as_loaded(8)
    server.store.logins.clear()  # nothing could be said any more


def test_changed_file_stops_its_study_only_for_a_moment(server: Xnat, study: Path) -> None:
    """Nothing of the import with the changed file is archived; the study goes again without it."""
    uid = studies.uid(56)
    studies.ct(study, 3, study=uid)
    victim = studies.multiframe(study / "large.dcm", 8, study=uid)
    plan = scan([study])
    archived: list[int] = []

    def moved(sent: Sent, count: int) -> None:
        archived.append(len(server.store.experiments))
        if sent.moved > 500_000 and len(server.imports) == 1:
            with victim.open("r+b") as file:
                file.write(b"changed")

    sent = attempt(xnat_target(server.url, bandwidth_limit=8 << 20), plan, moved=moved)
    assert set(sent.rejected) == {"large.dcm"}
    assert "changed" in sent.rejected["large.dcm"]
    assert len(sent.arrived) == len(server.instances()) == 3
    assert len(server.imports) == 2
    assert max(archived) == 0


def test_vanished_file(server: Xnat, study: Path) -> None:
    studies.ct(study, 3)
    studies.multiframe(study / "large.dcm", 4)
    plan = scan([study])
    (study / "CT0002.dcm").unlink()
    (study / "large.dcm").unlink()
    sent = attempt(xnat_target(server.url), plan)
    assert set(sent.rejected) == {"CT0002.dcm", "large.dcm"}
    assert len(sent.arrived) == 2


@pytest.mark.parametrize("large", [False, True])
def test_a_data_set_without_its_beginning_arrives_as_a_file(server: Xnat, study: Path, large: bool) -> None:
    """XNAT reads files as PS3.10 has them."""
    uid = studies.uid(56)
    whole = studies.multiframe(study / "large.dcm", 5, study=uid) if large else studies.ct(study, 1, study=uid)[0]
    header = scan([whole]).items[0].header
    assert header
    data = whole.read_bytes()
    whole.with_name("bare.dcm").write_bytes(data[header.dataset_offset :])
    whole.unlink()
    sent = attempt(xnat_target(server.url), study)
    assert all_of(sent, Kind.DELIVERED), sent.rejected or sent.refused
    [got] = server.instances().values()
    ds = pydicom.dcmread(io.BytesIO(got))
    assert ds.file_meta.TransferSyntaxUID == header.TransferSyntaxUID
    assert ds.file_meta.MediaStorageSOPInstanceUID == header.SOPInstanceUID
    assert got.endswith(data[header.dataset_offset :])


def test_large_and_small_files_arrive_whole(server: Xnat, study: Path) -> None:
    uid = studies.uid(56)
    studies.ct(study, 40, side=100, study=uid)
    for frames in (4, 9, 2, 5):
        studies.multiframe(study / f"m{frames}.dcm", frames, study=uid)
    sent = attempt(xnat_target(server.url), study)
    assert all_of(sent, Kind.DELIVERED)
    got = server.instances()
    assert got == {_sop(sent, item.path): sent.plan.file(item).read_bytes() for item in sent.plan.items}
    assert len(server.imports) == 1


def test_bandwidth_limit(server: Xnat, study: Path) -> None:
    for name in "ab":
        studies.multiframe(study / f"{name}.dcm", 2)  # 1 MB each
    sent = attempt(xnat_target(server.url, bandwidth_limit=1 << 20), study)
    assert all_of(sent, Kind.DELIVERED)
    assert 1.5 < sent.seconds < as_loaded(4), "both studies share one limit"


def test_environment_has_no_say(server: Xnat, study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    studies.ct(study, 1)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
    assert all_of(attempt(xnat_target(server.url), study), Kind.DELIVERED)


# ---- TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def _tls(authority: Authority, name: str, **settings: Any) -> ssl.SSLContext:
    leaf = authority.leaf(name, **settings)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.cert, leaf.key)
    return context


def test_tls(authority: Authority, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.ct(study, 3)
    studies.multiframe(study / "large.dcm", 8)
    with xnat(tmp_path / "xnat", tls=_tls(authority, "good")) as server:
        settings = {"user": "lab", "password": "lab"}
        for ca in (str(authority.ca), authority.ca.read_text()):
            target = xnat_target(server.url, ca_cert=ca, **settings)
            sent = attempt(target, study)
            assert sent.arrived == {item.path for item in sent.plan.items}
            health = check(target)
            assert health.ok, health.to_json("x")
            assert "TLSv1.3" in next(probe.detail for probe in health.probes if probe.name == "tls")
        assert len(server.instances()) == 4
        # The environment's trust changes nothing of a target's own.
        other = Authority(tmp_path / "other")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.ca))
        fails(attempt(xnat_target(server.url, ca_cert=str(other.ca), **settings), study), NotTrusted)
        assert type(check(xnat_target(server.url, ca_cert=str(other.ca), **settings)).error) is NotTrusted


@pytest.mark.parametrize("settings", [{"expired": True}, {"hosts": ("elsewhere.example",)}])
def test_bad_certificates_are_NotTrusted(
    authority: Authority, study: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    studies.ct(study, 1)
    with xnat(tmp_path / "xnat", tls=_tls(authority, "bad", **settings)) as server:
        fails(attempt(xnat_target(server.url, ca_cert=str(authority.ca)), study), NotTrusted)


# ---- check


def _probes(target: XnatTarget) -> dict[str, tuple[str, str]]:
    return {probe.name: (probe.result, probe.detail) for probe in check(target).probes}


NAMES = ["resolve", "tcp", "authenticate", "project", "authorize", "version"]


def test_check_tells_each_step(server: Xnat) -> None:
    probes = _probes(xnat_target(server.url))
    assert list(probes) == NAMES
    assert {result for result, _ in probes.values()} == {"ok"}
    assert "1.8.10" in probes["version"][1]
    server.rest.version = "1.7.6"
    assert "1.7.6" in _probes(xnat_target(server.url))["version"][1]
    assert not server.imports


@pytest.mark.parametrize(
    ("settings", "failed", "expected"),
    [
        ({"host": "http://no-such-host.invalid"}, "resolve", Unreachable),
        ({"password": "wrong"}, "authenticate", Denied),
        ({"project_id": "NOPE"}, "project", NotFound),
        ({"project_id": "READ"}, "authorize", Denied),
    ],
)
def test_check_stops_where_it_fails(
    server: Xnat, settings: dict[str, Any], failed: str, expected: type[DispatchError]
) -> None:
    server.store.add_project("READ", sender="collaborator")
    target = xnat_target(server.url, **({"host": server.url} | settings))
    health = check(target)
    assert type(health.error) is expected
    assert sorted(probe.name for probe in health.probes) == sorted(NAMES)
    assert [probe.name for probe in health.probes if probe.result == "failed"] == [failed]
    assert all(probe.detail for probe in health.probes)


def test_check_of_a_name_that_nobody_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: over.wait(5) and [])
    begun = time.monotonic()
    health = check(xnat_target("http://xnat.example.org", connect_timeout_s=0.3))
    assert time.monotonic() - begun < as_loaded(3)
    over.set()
    assert type(health.error) is Unreachable
    assert "not resolved within 0.3 s" in health.probes[0].detail


@pytest.mark.parametrize("host", [f"{'x' * 64}.example.org", "xnat..example.org"])
def test_check_of_a_name_that_no_host_can_have(host: str) -> None:
    health = check(xnat_target(f"https://{host}"))
    assert type(health.error) is Unreachable
    assert host in health.probes[0].detail


def test_check_of_something_else() -> None:
    port = process.free_port()
    health = check(xnat_target(f"http://127.0.0.1:{port}"))
    assert type(health.error) is Unreachable
    json.dumps(health.to_json("x"))


def test_check_of_a_base_url_below_the_host(server: Xnat) -> None:
    """Another path on the same server: there is no XNAT."""
    health = check(xnat_target(server.url + "/elsewhere"))
    assert type(health.error) is Misconfigured


# ---- the block


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "xnat.example.org"},
        {"host": "ftp://xnat.example.org"},
        {"host": "https://user:pw@xnat.example.org"},
        {"host": "https://xnat.example.org/?a=b"},
        {"host": "https://xnat.example.org:port"},
        {"host": "https://xnat.example.org/a b"},
        {"project_id": "../P"},
        {"project_id": "My Project"},
        {"user": "a:b"},
        {"user": ""},
        {"password": ""},
        {"subject": "{PatientName}"},
        {"session": ""},
        {"session": "{PatientID"},
        {"destination": "nirvana"},
        {"overwrite": "always"},
        {"direction": "both"},
    ],
)
def test_settings_that_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        xnat_target("https://xnat.example.org", **settings)


def test_defaults_are_safe() -> None:
    target = XnatTarget(host="https://xnat.example.org/xnat/", project_id="P", user="u", password=PASSWORD)
    assert target.host == "https://xnat.example.org/xnat"
    assert (target.overwrite, target.destination) == ("none", "archive")
    assert PASSWORD not in repr(target) + str(target) + target.model_dump_json()
    assert driver.facts.verifies_by == (Level.ACCEPTED, Level.LISTED)
