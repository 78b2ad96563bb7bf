"""Labels at XNAT, for any patient ID, date and script: fit for XNAT, the same each time, never one for two."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imaging.header import Header
from protocols.xnat.answers import ImageSession
from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.xnat.names import (
    DIGEST_CHARS,
    MAX_LABEL_CHARS,
    Name,
    Names,
    XnatStudy,
    candidates,
    entry_name,
    header_of,
    label_of,
    values_of,
)
from tests.targets.xnat import serving, xnat_target
from transfer.outcome import Kind
from transfer.plan import Item, Plan

FIT = re.compile(r"[A-Za-z0-9_-]+")
text = st.text(max_size=80)
# What LO, DA and TM hold by the standard, and what is found in them all the same.
patient_ids = st.one_of(
    text, st.sampled_from(["", " ", "A/1", "A:1", "A 1", "Müller^Jörg", "山田", "田中", "..", "a" * 64])
)
dates = st.one_of(
    st.dates().map(lambda day: day.strftime("%Y%m%d")), st.sampled_from(["", "2020.01.02", "unknown"]), text
)
times = st.one_of(
    st.times().map(lambda time: time.strftime("%H%M%S.%f")), st.sampled_from(["", "1011", "10:11:12"]), text
)
foreign = st.text(st.characters(min_codepoint=0x370, max_codepoint=0x9FFF, categories=["L"]), min_size=1, max_size=64)
uids = st.integers(1, 10**20).map(lambda number: f"2.25.{number}")


def study_of(
    uid: str, patient: str = "P", date: str = "20240229", time: str = "101112", sop: str = "2.25.1.9"
) -> XnatStudy:
    header = Header.of("1.2.840.10008.5.1.4.1.1.2", sop, "1.2.840.10008.1.2.1", uid, uid + ".1", 300, PatientID=patient,
                    StudyDate=date, StudyTime=time)  # fmt: skip
    item = Item("1.dcm", 1, 1, header)
    return XnatStudy(uid, (item,), (item,))


class Archive:
    """A project as the driver sees it: its sessions by label. Stands where a Client does."""

    def __init__(self) -> None:
        self.sessions: dict[str, tuple[str, str, str]] = {}  # label: study, patient's ID, subject

    def archive(self, study: XnatStudy, name: Name) -> None:
        known = self.sessions.get(name.session)
        assert known is None or known[0] == study.uid, "two studies in one session"
        self.sessions[name.session] = (study.uid, header_of(study.items[0]).PatientID, name.subject)

    def sessions_of(self, project: str, uid: str) -> list[tuple[str, str]]:
        return sorted((label, subject) for label, (study, _, subject) in self.sessions.items() if study == uid)

    def labels_of(self, project: str, subject: str) -> list[str]:
        return [label for label, (_, _, found) in self.sessions.items() if found == subject]

    def session(self, project: str, label: str) -> ImageSession | None:
        found = self.sessions.get(label)
        return ImageSession("XNAT_E1", found[0], label, found[1]) if found else None

    def files(self, project: str, label: str) -> list[tuple[str, str]]:
        return []


def names_of(archive: Archive, **settings: Any) -> Names:
    target = xnat_target("https://xnat.example.org", **settings)
    return Names(archive, target, Plan("0123456789abcdef0123", Path("/nowhere"), ()))  # type: ignore[arg-type]


# ---- labels


@given(text)
def test_labels_are_fit_for_xnat(value: str) -> None:
    label, exact = label_of(value)
    assert FIT.fullmatch(label)
    assert len(label) <= MAX_LABEL_CHARS
    assert exact == (label == value)
    assert label_of(value) == (label, exact)
    assert label_of(label)[0] == label, "a label needs no change"


@given(
    st.text("abcXYZ019_-", min_size=1, max_size=MAX_LABEL_CHARS).filter(lambda value: any(c.isalnum() for c in value))
)
def test_what_is_fit_is_left_alone(value: str) -> None:
    assert label_of(value) == (value, True)


@given(foreign, foreign)
def test_other_scripts_stay_distinct(one: str, other: str) -> None:
    if one != other:
        assert label_of(one)[0] != label_of(other)[0]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("PAT-1_a", "PAT-1_a"),
        ("PAT 1.2/3", "PAT_1_2_3"),
        ("Müller^Jörg", "Muller_Jorg"),
        ("12.345.678-9", "12_345_678-9"),
    ],
)
def test_plain_cases_look_as_in_xnat(value: str, label: str) -> None:
    assert label_of(value)[0] == label


@given(patient_ids, dates, times, uids)
def test_templates_take_any_values(patient: str, date: str, time: str, uid: str) -> None:
    study = study_of(uid, patient, date, time)
    values = values_of(study, "0123456789abcdef0123")
    for template in (
        "{PatientID}",
        "{PatientID}_{StudyDate}_{StudyTime}",
        "{AccessionNumber}",
        "{Modality}/{StudyDate}",
    ):
        label, _ = label_of(template.format(**values))
        assert FIT.fullmatch(label)
    if not patient.strip():
        assert uid not in values["PatientID"]
        assert values["PatientID"].startswith("unknown-"), "an unknown patient is told by the study"


def test_dates_fall_back() -> None:
    names = names_of(Archive())
    assert names.name(study_of("2.25.7", "A", "", "")).session == "A_unknown_unknown"
    assert names.name(study_of("2.25.8", "A", "20200102", "101112.345000")).session == "A_20200102_101112"
    assert names.name(study_of("2.25.9", "A", "2020.01.03", "10:11:12")).session == "A_20200103_101112"


def test_a_value_comes_from_any_file_of_the_study() -> None:
    study = study_of("2.25.7", "A", "", "")
    header = header_of(study.items[0])
    dated = replace(header, shared=replace(header.shared, StudyDate="20210405"))
    second = study.items[0].but(path="2.dcm", header=dated)
    values = values_of(replace(study, items=(study.items[0], second)), "")
    assert values["StudyDate"] == "20210405"


@given(st.text("0123456789./ é", max_size=64))
def test_names_of_files(uid: str) -> None:
    assert re.fullmatch(r"[\w-][\w.-]*\.dcm", entry_name(uid), re.ASCII)
    assert entry_name("1.2.3") == "1.2.3.dcm"


@given(st.text("ab_", min_size=1, max_size=MAX_LABEL_CHARS), uids)
def test_candidates(label: str, uid: str) -> None:
    found = list(candidates(label, uid))
    assert found[0] == label
    assert len(set(found)) == 3
    assert all(len(one) <= MAX_LABEL_CHARS for one in found)
    assert found == list(candidates(label, uid))
    assert len(found[1]) - len(label) <= DIGEST_CHARS + 1


# ---- whole projects


@given(st.lists(st.tuples(uids, patient_ids, dates), min_size=1, max_size=12, unique_by=lambda one: one[0]),
       st.sampled_from(["{PatientID}_{StudyDate}_{StudyTime}", "{PatientID}_{StudyDate}", "{PatientID}", "same"]),
       st.booleans())  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_studies_and_patients_are_never_merged(found: list[tuple[str, str, str]], template: str, at_once: bool) -> None:
    archive = Archive()
    all_of_them = [study_of(*one) for one in found]
    given_names: dict[str, Name] = {}
    names = names_of(archive, session=template)
    for study in all_of_them:
        if not at_once:
            names = names_of(archive, session=template)
        given_names[study.uid] = names.name(study)
        assert given_names[study.uid].existing is None
        if not at_once:
            archive.archive(study, given_names[study.uid])
    if at_once:
        for study in all_of_them:
            archive.archive(study, given_names[study.uid])
    assert len({name.session for name in given_names.values()}) == len(all_of_them)
    patients: dict[str, set[str]] = {}
    for study in all_of_them:
        patient = header_of(study.items[0]).PatientID.strip() or study.uid
        patients.setdefault(given_names[study.uid].subject, set()).add(patient)
    assert all(len(ids) == 1 for ids in patients.values()), patients
    # Series that come later, in any order: each goes to its own session.
    for study in reversed(all_of_them):
        name = names_of(archive, session=template).name(study)
        assert (name.session, name.subject) == (given_names[study.uid].session, given_names[study.uid].subject)
        assert name.existing is not None
        assert name.existing.uid == study.uid


# ---- nothing of a patient shows


@given(st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="\\*"), min_size=4, max_size=30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_label_in_what_is_told(tmp_path_factory: pytest.TempPathFactory, patient: str) -> None:
    folder, study = tmp_path_factory.mktemp("odd"), studies.uid(56)
    studies.dicom(folder / "1.dcm", study=study, PatientID=patient, SpecificCharacterSet="ISO_IR 192")
    with serving(tmp_path_factory.mktemp("xnat")) as server:
        label = label_of(patient)[0]
        server.rules.refused = {study: (409, f"{label}_20240229_101112 of {patient} ({label}): 4711-0815")}
        sent = attempt(xnat_target(server.url), folder)
        assert {outcome.kind for outcome in sent.outcomes.values()} == {Kind.REJECTED}
        detail = sent.outcomes["1.dcm"].detail
        assert detail.startswith("CONFLICT: ***") or "***" in detail
        for secret in {patient, label}:
            assert secret.lower() not in detail.lower()
        assert not server.store.experiments
        server.rules.refused = {}
        server.store.prearchive.clear()
        sent = attempt(xnat_target(server.url), folder)
        assert sent.arrived == {"1.dcm"}
        assert all(FIT.fullmatch(one.label) for one in server.store.experiments.values())
