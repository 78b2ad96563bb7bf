"""The forms that Prefect makes of our deployments: each parameter with a label and a sentence, in the order given."""

from __future__ import annotations

import inspect

import pytest

from talaria.engine.parameters import TITLES, form
from talaria.engine.table import FLOWS


@pytest.mark.parametrize("name", FLOWS)
def test_each_parameter_has_a_label_and_a_sentence(name: str) -> None:
    flow, _ = FLOWS[name]
    shown = form(flow)["properties"]
    names = list(inspect.signature(flow.fn).parameters)
    assert sorted(shown, key=lambda one: shown[one]["position"]) == names
    titles = [str(shown[one]["title"]) for one in names]
    assert len(set(titles)) == len(titles)
    for title, one in zip(titles, names, strict=True):
        assert title[0].isupper() and "_" not in title and " uid" not in title and " aet" not in title, one
        assert str(shown[one]["description"])[:1] in {*"ABCDEFGHIJKLMNOPQRSTUVWXYZ`"}, one
        assert str(shown[one]["description"]).rstrip().endswith("."), one


def test_labels_say_more_than_names() -> None:
    known = {name for flow, _ in FLOWS.values() for name in inspect.signature(flow.fn).parameters}
    assert known >= TITLES.keys()
    assert form(FLOWS["dispatch"][0])["properties"]["force"]["title"] == "Send again what has arrived"
    assert form(FLOWS["dispatch"][0])["properties"]["sender_aet"]["title"] == "Sender AE title"
