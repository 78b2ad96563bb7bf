"""What a peer says for itself shows neither secrets nor patients, in whatever form it says them."""

from __future__ import annotations

import pytest

from protocols.net.hiding import forms, hiding, quieted
from protocols.net.words import clean
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


def test_an_error_and_its_origin_are_quieted() -> None:
    with pytest.raises(Busy) as caught, quieted(hiding({"secret-1"}), "pacs"):
        raise Busy("no place for SECRET-1", retry_after=3) from OSError("secret-1")
    error = caught.value
    assert (error.message, error.args, error.target, error.retry_after) == (
        "no place for ***", ("no place for ***",), "pacs", 3,
    )  # fmt: skip
    assert error.__suppress_context__
    assert error.__cause__ is None
