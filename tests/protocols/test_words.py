"""What a peer says for itself shows neither secrets nor patients, in whatever form it says them."""

from __future__ import annotations

import pytest

from protocols.net.hiding import forms, hiding, quieted
from protocols.net.words import clean, excerpt
from talaria.testing.studies import dataset, encoded
from tests.servers.dicomweb import as_json, as_xml
from transfer.errors import Busy


@pytest.mark.parametrize(
    ("said", "hidden", "shown"),
    [
        ("for Li, Wu and her sister Lise", forms("Li^Wu"), "for ***, *** and her sister Lise"),
        ("山田^太郎 (山田 太郎, Yamada Tarou)", forms("Yamada^Tarou=山田^太郎"), "***^*** (*** ***, *** ***)"),
        ("李 is known", forms("Li^Wei=李^伟"), "*** is known"),
        ("PatientName=M%C3%BCller%5EJ%c3%b6rg", forms("Müller^Jörg"), "PatientName=***"),
        ("id=A+B%20C&x", {"A B C"}, "id=***&x"),
        ("nothing of 77 or a7", {"7"}, "nothing of 77 or a7"),
    ],
)
def test_hidden_values(said: str, hidden: set[str], shown: str) -> None:
    assert clean(said, hidden) == shown


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("/data/7/a.dcm: no space, 7 left", "/data/***/a.dcm: no space, 7 left"),
        ("/data/Li: is there, Li", "/data/***: is there, Li"),
        ("mkdir MUELLER^HANS failed", "mkdir *** failed"),
        ("GET /b/mueller%5Ehans/x", "GET /b/***/x"),
        ("a password: pw", "a password: ***"),
    ],
)
def test_hidden_parts_of_paths(said: str, shown: str) -> None:
    assert hiding(values={"pw"}, parts={"7", "Li", "MUELLER^HANS", ""})(said) == shown


NAMED = {"00100010": {"vr": "PN", "Value": [{"Alphabetic": "Li^Wu"}]}}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(encoded(dataset(PatientName="Li^Wu")), id="DICOM file"),
        pytest.param(b"\x10\0\x10\0\x06\0\0\0Li^Wu ", id="data set"),
        pytest.param(
            b"--b\r\nContent-Type: application/dicom\r\n\r\n\x10\0\x10\0\x06\0\0\0Li^Wu \r\n--b--", id="parts"
        ),
        pytest.param(as_json([NAMED]), id="JSON"),
        pytest.param(as_json([NAMED] * 1000), id="much JSON"),
        pytest.param(as_json([NAMED])[:-3], id="JSON that is cut"),
        pytest.param(as_json({"error": NAMED}), id="JSON within JSON"),
        pytest.param(as_xml({"00100020": {"vr": "LO", "Value": ["Li^Wu"]}}), id="XML"),
        pytest.param(
            b"--b\r\n\r\n" + as_xml({"00100020": {"vr": "LO", "Value": ["Li^Wu"]}}) + b"\r\n--b--", id="parts of XML"
        ),
    ],
)
@pytest.mark.parametrize(
    "kind", ["", "text/plain", "text/html", "application/json", "application/xml", "multipart/related"]
)
def test_data_of_patients_is_no_word_of_a_server(body: bytes, kind: str) -> None:
    """As where they come under another type than was asked for, or cut."""
    assert "Li" not in excerpt(body, kind)


def test_an_error_and_its_origin_are_quieted() -> None:
    with pytest.raises(Busy) as caught, quieted(hiding({"secret-1"}), "pacs"):
        raise Busy("no place for SECRET-1", retry_after=3) from OSError("secret-1")
    error = caught.value
    assert (error.message, error.args, error.target, error.retry_after) == (
        "no place for ***", ("no place for ***",), "pacs", 3,
    )  # fmt: skip
    assert error.__suppress_context__
    assert error.__cause__ is None
