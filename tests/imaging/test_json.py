"""Values of DICOM JSON, as servers write them."""

from __future__ import annotations

from typing import Any

import pytest

from imaging import json as dicomjson


@pytest.mark.parametrize(
    ("tag", "vr", "value", "shown"),
    [
        ("0020000D", "UI", ["1.2.3\0"], "1.2.3"),
        ("00080050", "SH", ["A1 "], "A1"),
        ("00080050", "SH", ["A1\0\0"], "A1"),
        ("00081030", "LO", [" Thorax\0"], "Thorax"),
        ("00100010", "PN", [{"Alphabetic": "Muster^Anna\0"}], "Muster^Anna"),
        ("00080061", "CS", ["CT\0", "MR "], ["CT", "MR"]),
        ("00080061", "CS", ["CT\\MR"], ["CT", "MR"]),
        ("00080061", "CS", "CT \\MR\0", ["CT", "MR"]),
        ("00081030", "LT", ["a\\b"], "a\\b"),
        ("00080050", "SH", "A1", "A1"),
        ("00100010", "PN", {"Alphabetic": "Muster^Anna"}, "Muster^Anna"),
        ("00100010", "PN", "Muster^Anna", "Muster^Anna"),
        ("00201208", "IS", 7, 7),
        ("00201208", "IS", 0, 0),
        ("00100010", "PN", [{"Alphabetic": None}], ""),
        ("00100010", "PN", [{"Alphabetic": None, "Ideographic": "山田", "Phonetic": None}], "=山田"),
        ("00100010", "PN", [{}], ""),
        ("00080050", "SH", [], ""),
        ("00080050", "SH", None, ""),
        ("00080050", "SH", [None], ""),
    ],
)
def test_values(tag: str, vr: str, value: Any, shown: Any) -> None:
    row: dict[str, Any] = {tag: {"vr": vr, "Value": value}}
    (found,) = dicomjson.keyworded(row).values()
    assert found == shown
    if isinstance(shown, str) and vr != "PN":
        assert dicomjson.text(row, tag) == shown
