"""Names of folders at the target: whatever a header holds becomes one safe path component per field."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.header import Header
from talaria.testing import studies
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


def marked(shown: str, value: str) -> str:
    return f"{shown}~{hashlib.sha256(value.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


@pytest.mark.parametrize(
    "value",
    [
        "P1", "12_3", "a.b", "a..", "Müller", "山田^太郎", "\u202ex", "$(id)", "-rf", "~", "x" * 120, "ü" * 60,
        "sub-01", "4711-0815", "0f8fad5b-d9cb-469f-a165-70867728950e",
    ],
)  # fmt: skip
def test_what_is_fit_stays_as_it_is(value: str) -> None:
    assert sanitised(value) == value
    assert sanitised(f"  {value} ") == value, "blanks around a value count for nothing (PS3.5 section 6.2, LO)"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a/b", "a_b"), ("a\\b", "a_b"), ("../../etc/passwd", "_.._etc_passwd"), (".complete", "complete"),
        (". .x", "x"), (".incoming-1", "incoming-1"), ("a\0b\nc", "a_b_c"), ("\ud800x", "_x"), ("\u3000x\u3000", "x"),
        ("x" * 121, "x" * 111), ("ü" * 61, "ü" * 55), (".", UNKNOWN), ("..", UNKNOWN), (UNKNOWN, UNKNOWN),
        ("Mu\u0308ller", "Müller"), ("12_3~0123abcd", "12_3"),
    ],
)  # fmt: skip
def test_what_is_changed_gets_a_mark(value: str, shown: str) -> None:
    assert sanitised(value) == marked(shown, value)


@pytest.mark.parametrize("value", ["", " ", "   "])
def test_what_is_empty_is_unknown(value: str) -> None:
    assert sanitised(value) == UNKNOWN


ODD = st.text(alphabet=" ./\\\0\n\u3000üu\u0308~_ab0", max_size=12)


@given(st.text(max_size=200) | ODD)
def test_anything_becomes_a_component(value: str) -> None:
    assert_component(sanitised(value), MAX_NAME_BYTES)


@given(st.text(max_size=130) | ODD, st.text(max_size=130) | ODD)
def test_two_values_never_become_one_name(one: str, other: str) -> None:
    if one.strip(" ") != other.strip(" "):
        assert sanitised(one) != sanitised(other)


@given(ODD)
def test_what_a_name_looks_like_is_another_value(value: str) -> None:
    """Somebody's ID is what another one's became."""
    name = sanitised(value)
    if name != value.strip(" "):
        assert sanitised(name) != name


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
    uid = values.pop("SOPInstanceUID", "1.2.3")
    header = Header.of("1.2", uid, "1.2.840.10008.1.2.1", "1.2.3.4", "1.2.3.4.5", 300)
    return Item(path, 1, 1, replace(header, shared=replace(header.shared, **values)))  # type: ignore[arg-type]


def plan_of(*items: Item) -> Plan:
    return Plan("d15", Path("/nowhere"), items)


VALUES = st.fixed_dictionaries({field: st.text(max_size=150) for field in FIELDS if field != "dispatch_id"})


@pytest.mark.parametrize("template", ["{a", "{PatientID", "PatientID}", "{PatientID}}", "{", "{PatientID!", "a{b{c}"])
def test_braces_without_a_partner_are_said_in_plain_words(template: str) -> None:
    with pytest.raises(ValueError, match=r"must stand in pairs|fields are"):
        fields_of(template)


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


# ---- one name for one set of values

SHORT = st.text(alphabet="aAbB1_-./\u0308ä~ ", max_size=4)
TUPLES = st.fixed_dictionaries(
    {
        "PatientID": SHORT,
        "AccessionNumber": SHORT,
        "StudyDate": st.sampled_from(["", "20240101", "2024.01.01", "1"]),
        "StudyInstanceUID": st.sampled_from(["1.2", "1.21", "2.1"]),
        "SeriesNumber": st.sampled_from(["", "1", "11", "2"]),
        "Modality": st.sampled_from(["CT", "", "C"]),
    }
)
TEMPLATES = [
    "{PatientID}", "{PatientID}_{AccessionNumber}", "{PatientID}{AccessionNumber}", "{PatientID}_{StudyDate}",
    "{PatientID}{StudyDate}", "{StudyDate}{PatientID}", "{SeriesNumber}{Modality}", "{StudyInstanceUID}{SeriesNumber}",
    "{Modality}_{StudyInstanceUID}_{AccessionNumber}", "{PatientID}-{SeriesNumber}/{AccessionNumber}",
    "{StudyInstanceUID}.{SeriesNumber}", "x{PatientID}", "{PatientID}__{AccessionNumber}", "{PatientID}/{StudyDate}",
    "{PatientID}{PatientID}",
]  # fmt: skip


def used(template: str, values: dict[str, str]) -> tuple[str, ...]:
    """What of the values makes a difference to a template."""
    return tuple(values[field].strip(" ") for field in fields_of(template))


def folded(folder: str) -> str:
    """As a share without cases, and a file system with normal forms, compare names."""
    return "/".join(
        unicodedata.normalize("NFC", unicodedata.normalize("NFD", part).casefold()) for part in folder.split("/")
    )


@given(TUPLES, TUPLES, st.sampled_from(TEMPLATES))
@settings(max_examples=600)
def test_two_studies_never_get_one_folder(one: dict[str, str], other: dict[str, str], template: str) -> None:
    """Neither within a plan, on any file system, nor in plans of their own."""
    if used(template, one) == used(template, other):
        return
    alone = [names(plan_of(item("1.dcm", **values)), template)["1.dcm"] for values in (one, other)]
    assert alone[0] != alone[1]
    together = names(plan_of(item("1.dcm", **one), item("2.dcm", **other)), template)
    assert folded(together["1.dcm"]) != folded(together["2.dcm"])


@pytest.mark.parametrize(
    ("template", "values", "name"),
    [
        ("{PatientID}_{StudyDate}", {"PatientID": "A_1", "StudyDate": "20240101"}, "A_1_20240101"),
        ("{PatientID}_{StudyDate}", {"PatientID": "A_1", "StudyDate": ""}, "A_1_unknown"),
        ("{StudyDate}{PatientID}", {"PatientID": "A_1", "StudyDate": "20240101"}, "20240101A_1"),
        ("{PatientID}_{StudyInstanceUID}", {"PatientID": "sub_01", "StudyInstanceUID": "1.2.3"}, "sub_01_1.2.3"),
        ("{PatientID}_{AccessionNumber}", {"PatientID": "A-1", "AccessionNumber": "4711"}, "A-1_4711"),
        ("{Modality}_{SeriesNumber}", {"Modality": "CT", "SeriesNumber": "3"}, "CT_3"),
    ],
)
def test_names_of_usual_values_have_no_mark(template: str, values: dict[str, str], name: str) -> None:
    assert names(plan_of(item("1.dcm", **values)), template) == {"1.dcm": name}


@pytest.mark.parametrize("one", ["ab", "Straße", "Ä"])
def test_values_that_differ_in_case_are_told_apart_where_they_meet(one: str) -> None:
    other = one.swapcase() if one != "Straße" else "STRASSE"
    plan = plan_of(item("1.dcm", PatientID=one), item("2.dcm", PatientID=other), item("3.dcm", PatientID="c"))
    assert names(plan, "{PatientID}") == {"1.dcm": marked(one, one), "2.dcm": marked(other, other), "3.dcm": "c"}
    assert names(plan_of(item("1.dcm", PatientID=one)), "{PatientID}") == {"1.dcm": one}


def test_a_folder_that_the_target_takes_for_another_one() -> None:
    plan = plan_of(item("1.dcm", PatientID="ab", StudyDate="20240101"))
    found = names(plan, "x/{PatientID}/{StudyDate}", lambda folder: folder in ("x", "x/ab"))
    assert found == {"1.dcm": f"x/{marked('ab', 'ab')}/20240101"}


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
    dots = marked("unknown", "..")
    assert names(scan([tmp_path]), "{PatientID}/{AccessionNumber}") == {"1.dcm": f"unknown/{dots}"}


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
    assert found == marked("Жучка_1", "Жучка/1")
    assert PurePosixPath(found).name == found
