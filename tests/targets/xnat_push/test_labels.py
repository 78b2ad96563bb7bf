"""Labels of subjects and sessions at XNAT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from tasks.xnat.names import candidates, digest
from tests.servers.xnat import Fault, Xnat, error
from tests.targets.xnat import xnat_target
from tests.targets.xnat_push.pushing import LABEL, _sop, all_of, kinds, sessions
from transfer.outcome import Kind
from transfer.receipt import State


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
