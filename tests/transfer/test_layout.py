"""Names of folders at the target: whatever a header holds becomes one safe path component per field."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaging.header import Header
from tests import studies
from transfer.layout import FIELDS, MAX_NAME_BYTES, UNKNOWN, fields_of, names, sanitised
from transfer.plan import Item, Plan, scan

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def assert_component(name: str, most: int) -> None:
    assert name
    assert "/" not in name
    assert "\\" not in name
    assert not name.startswith(".")
    assert not CONTROL.search(name)
    assert name == name.strip()
    assert len(name.encode()) <= most


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", UNKNOWN), (".", UNKNOWN), ("..", UNKNOWN), ("...", UNKNOWN), ("  ", UNKNOWN), (" . .. ", UNKNOWN),
        ("a/b", "a_b"), ("a\\b", "a_b"), ("../../etc/passwd", "_.._etc_passwd"), (".complete", "complete"),
        (". .x", "x"), ("  .incoming-1", "incoming-1"), ("a\0b\nc", "a_b_c"), ("a.b", "a.b"), ("a..", "a.."),
        ("Müller", "Müller"), ("山田^太郎", "山田^太郎"), ("\ud800x", "_x"), ("\u202ex", "\u202ex"), ("~", "~"),
        ("$(id)", "$(id)"), ("-rf", "-rf"), ("\u3000x\u3000", "x"), ("x" * 121, "x" * 120),
        ("ü" * 61, "ü" * 60), ("a" * 119 + "ü", "a" * 119), ("a" * 119 + " b", "a" * 119),
    ],
)  # fmt: skip
def test_sanitised(value: str, expected: str) -> None:
    assert sanitised(value) == expected


@given(st.text(max_size=200) | st.text(alphabet=" ./\\\0\n\u3000ü", max_size=200))
def test_anything_becomes_a_component(value: str) -> None:
    name = sanitised(value)
    assert_component(name, MAX_NAME_BYTES)
    assert sanitised(name) == name


@pytest.mark.parametrize(
    "template",
    ["{dispatch_id}", "{PatientID}/{StudyInstanceUID}", "in-{StudyDate}_{Modality}", "fixed", "a b/{PatientID}"],
)
def test_templates(template: str) -> None:
    assert set(fields_of(template)) <= set(FIELDS)


@pytest.mark.parametrize(
    "template",
    [
        "", "/", "/abs", "a//b", "a/", "..", "../{PatientID}", "{PatientID}/../x", ".", "{PatientName}", "{}", "{0}",
        "{PatientID!r}", "{PatientID:>99999999}", "{PatientID.__class__}", "{PatientID[0]}", "{", "}", "{PatientID",
        " ", "a/ /b", "{dispatch_id}/{{x}}/..",
    ],
)  # fmt: skip
def test_refuses_templates(template: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        fields_of(template)


def item(path: str, **values: str) -> Item:
    header = Header("1.2", "1.2.3", "1.2.840.10008.1.2.1", "1.2.3.4", "1.2.3.4.5", 300)
    return Item(path, 1, 1, replace(header, **values))  # type: ignore[arg-type]


def plan_of(*items: Item) -> Plan:
    return Plan("d15", Path("/nowhere"), items)


VALUES = st.fixed_dictionaries({field: st.text(max_size=150) for field in FIELDS if field != "dispatch_id"})


@given(
    VALUES, st.sampled_from(["{PatientID}", "{PatientID}/{StudyInstanceUID}", "x_{PatientID}{StudyDate}_{Modality}"])
)
def test_whatever_a_header_holds_stays_below_the_folder(values: dict[str, str], template: str) -> None:
    folder = names(plan_of(item("a.dcm", **values)), template)["a.dcm"]
    parts = folder.split("/")
    assert len(parts) == template.count("/") + 1
    for part in parts:
        assert_component(part, 240)


def test_long_values_that_differ_at_their_end_stay_apart() -> None:
    """A component that must be cut is not mixed up with another one."""
    template = "{PatientID}_{StudyInstanceUID}_{SeriesInstanceUID}_{AccessionNumber}"
    long = {"PatientID": "ü" * 60, "SeriesInstanceUID": "2." + "1" * 62, "AccessionNumber": "9" * 60}
    one = item("1.dcm", StudyInstanceUID="1." + "3" * 61 + "1", **long)
    two = item("2.dcm", StudyInstanceUID="1." + "3" * 61 + "2", **long)
    found = names(plan_of(one, two), template)
    assert found["1.dcm"] != found["2.dcm"]
    assert all(len(name.encode()) <= 240 for name in found.values())
    # A value of usual length is never cut by its neighbours.
    usual = item("3.dcm", PatientID="P" * 64, StudyInstanceUID="1." + "3" * 62)
    assert names(plan_of(usual), "{PatientID}_{StudyInstanceUID}")["3.dcm"] == "P" * 64 + "_1." + "3" * 62


def test_several_studies(tmp_path: Path) -> None:
    for study, patient in (("a", "P1"), ("b", "P2")):
        studies.dicom(tmp_path / study / "1.dcm", PatientID=patient, StudyDate="20240101")
    found = names(scan([tmp_path]), "{PatientID}/{StudyDate}")
    assert found == {"a/1.dcm": "P1/20240101", "b/1.dcm": "P2/20240101"}


def test_the_default_is_the_dispatch(tmp_path: Path) -> None:
    studies.sample(tmp_path)
    plan = scan([tmp_path])
    assert set(names(plan, "{dispatch_id}").values()) == {plan.dispatch_id}


def test_empty_values_are_unknown(tmp_path: Path) -> None:
    studies.dicom(tmp_path / "1.dcm", PatientID="", AccessionNumber="..")
    assert names(scan([tmp_path]), "{PatientID}/{AccessionNumber}") == {"1.dcm": "unknown/unknown"}


def test_a_file_without_header_goes_with_its_nearest(tmp_path: Path) -> None:
    for study in ("a", "b"):
        studies.dicom(tmp_path / study / "images" / "1.dcm", PatientID=study.upper())
        studies.note(tmp_path / study / "images" / "note.json")
        studies.note(tmp_path / study / "results" / "note.json")
    studies.note(tmp_path / "readme.json")
    found = names(scan([tmp_path]), "{PatientID}")
    assert {path: name for path, name in found.items() if path.endswith(".json")} == {
        "a/images/note.json": "A",
        "a/results/note.json": "A",
        "b/images/note.json": "B",
        "b/results/note.json": "B",
        "readme.json": "A",
    }


def test_no_header_at_all(tmp_path: Path) -> None:
    studies.note(tmp_path / "note.json")
    assert names(scan([tmp_path]), "{PatientID}") == {"note.json": "unknown"}


def test_characters_of_other_alphabets(tmp_path: Path) -> None:
    """Decoded by the file's own character set, not by the machine's."""
    studies.dicom(tmp_path / "1.dcm", SpecificCharacterSet="ISO_IR 144", PatientID="Жучка/1")
    found = names(scan([tmp_path]), "{PatientID}")["1.dcm"]
    assert found == "Жучка_1"
    assert PurePosixPath(found).name == found
