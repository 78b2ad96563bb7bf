"""What a peer says for itself shows neither secrets nor patients, in whatever form it says them."""

from __future__ import annotations

import pytest

from protocols.net.words import clean, forms


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
