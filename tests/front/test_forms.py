"""The form of a target: made from any type's fields, read back as the type takes it, secrets never in it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from blocks import RULES, SOURCES, TYPES
from blocks.named import NamedBlock
from talaria.front.pages import forms, shown_settings
from talaria.front.pages.site import templates
from talaria.front.pages.texts import TEXTS, option_label, text
from tests.targets.fields import NEEDED
from transfer.validation import what_is_wrong

SECRET = "swordfish"


# The most that a form of sources and rules has to bring back.
WHOLE: dict[str, tuple[type[NamedBlock], dict[str, Any]]] = {
    "inbox": (
        SOURCES["inbox"],
        {"folder": "/data/in", "targets": ["a", "b"], "interval_s": 300, "description": "x\ny"},
    ),
    "list": (SOURCES["list"], {"file": "/data/todo.csv", "query": "pacs", "targets": ["a"], "at_once": 3}),
    "listener": (
        SOURCES["dicom"],
        {
            "routes": [{"targets": ["a", "b"], "modality": "CT,MR"}, {"targets": ["c"], "called": "ROUTER"}],
            "peers": [{"aet": "CT*", "host": "10.1.0.0/16", "port": 104}, {"aet": "MR 1"}],
        },
    ),
    "many": (
        SOURCES["dicom"],
        {
            "routes": [{"targets": ["a"], "modality": "CT", "calling": str(number)} for number in range(60)],
            "peers": [{"aet": f"S{number}"} for number in range(70)],
        },
    ),
    "webhook": (RULES["webhook"], {"url": "https://a.example/", "on": ["target.down", "disk.low"], "targets": ["a-*"]}),
    "email": (RULES["email"], {"host": "mail.example", "sender": "a@b.org", "to": ["c@d.org", "e@f.org"]}),
    "command": (
        RULES["command"],
        {"command": "page", "arguments": ["--to=a, b", "", " two  blanks ", '"quoted"', "two\nlines", "\u00a0"]},
    ),
}


def inputs(groups: list[forms.FieldGroup]) -> dict[str, forms.Input]:
    return {one.name: one for group in groups for one in [*group.inputs, *group.more]}


def sent(groups: list[forms.FieldGroup]) -> dict[str, str]:
    """What a browser sends of a form as it is."""
    found = {}
    for name, one in inputs(groups).items():
        if one.kind == "switch":
            found |= {name: "true"} if one.on else {}
        elif one.kind == "secret":
            found |= {name: "", f"{name}.do": "keep"} if one.stored else {name: ""}
        elif one.kind == "choices":
            found |= {name: "\n".join(one.chosen)} if one.chosen else {}
        elif one.kind == "rows":
            found |= {part.name: part.value for row in one.rows for part in row}
        else:
            found |= {name: one.value} | ({f"{name}.unit": one.unit} if one.units else {})
    return found


@pytest.mark.parametrize("kind", NEEDED)
def test_a_form_that_is_sent_as_it_was_shown_changes_nothing(kind: str) -> None:
    cls = TYPES[kind]
    target = cls(**NEEDED[kind])
    shown = forms.form(cls, target.model_dump(mode="json"))
    values, secrets = forms.read(cls, sent(shown))
    assert secrets == {}
    again = cls(**values, **{name: one for name, one in NEEDED[kind].items() if name in cls.secret_fields()})
    assert again.model_dump(mode="json") == target.model_dump(mode="json")


@pytest.mark.parametrize("kind", WHOLE)
def test_lists_and_rows_come_back_as_they_were_shown(kind: str) -> None:
    cls, given = WHOLE[kind]
    before = cls(**given)
    shown = forms.form(cls, before.model_dump(mode="json"), stored=cls.secret_fields())
    values, secrets = forms.read(cls, sent(shown))
    again = cls(**values, **{name: one for name, one in given.items() if name in cls.secret_fields()})
    assert secrets == {} and again.model_dump(mode="json") == before.model_dump(mode="json")
    assert shown_settings.differences(cls, values, before) == []
    # What was typed wrongly is shown as it was typed, at the same places.
    typed = forms.form(cls, forms.typed(cls, sent(shown)), stored=cls.secret_fields())
    assert {name: one.value for name, one in inputs(typed).items()} == {
        name: one.value for name, one in inputs(shown).items()
    }


def test_every_event_has_words_of_its_own() -> None:
    shown = inputs(forms.form(RULES["email"], {}))["on"]
    assert len({option_label(one) for one in shown.options} - {*shown.options}) == len(shown.options)


def test_names_are_told_apart_by_lines_and_commas() -> None:
    values, _ = forms.read(SOURCES["inbox"], {"targets": " a , b\n\n c,\n"})
    assert values["targets"] == ["a", "b", "c"]


def test_what_is_wrong_in_a_row_stands_in_that_row() -> None:
    cls = SOURCES["dicom"]
    form = {"targets": "a", "peers.0.aet": "", "peers.3.aet": "CT", "peers.3.port": "many", "peers.7.host": "10.0/99"}
    form |= {"routes.1.modality": "CT", "peers.2.port": "0"}
    values, _ = forms.read(cls, form)
    assert values["peers"] == [{"aet": "CT", "port": "many"}, {"host": "10.0/99"}]
    with pytest.raises(ValidationError) as raised:
        cls(**values)
    errors = [(dict(one), what_is_wrong([one], cls.model_fields)) for one in raised.value.errors()]
    found = forms.by_field(cls, errors)
    assert found.keys() == {"peers.0.port", "peers.1.host", "routes.0.targets"}
    assert found["routes.0.targets"] == ["is required"] and "is not a network" in found["peers.1.host"][0]
    assert ("peers.1.host", f"Who may send, line 2: Host: {found['peers.1.host'][0]}") in forms.summary(cls, found)
    (shown,) = [
        one
        for one in inputs(forms.form(cls, forms.typed(cls, form), around=forms.Around(found))).values()
        if one.name == "peers"
    ]
    assert [[part.value for part in row] for row in shown.rows][:2] == [["CT", "", "many"], ["", "10.0/99", ""]]
    assert shown.wrong and shown.rows[1][1].problems == found["peers.1.host"]


@pytest.mark.parametrize("value", ["text", 3, None, [1, "a"], [{"aet": ["x"]}], {"a": 1}])
def test_what_was_stored_wrongly_can_be_shown_to_be_mended(value: Any) -> None:
    for name in ("inbox", "listener", "email"):
        cls, _ = WHOLE[name]
        assert forms.form(cls, dict.fromkeys(cls.model_fields, value))


@pytest.mark.parametrize("kind", NEEDED)
def test_every_field_has_its_place_a_label_and_a_help(kind: str) -> None:
    cls = TYPES[kind]
    shown = inputs(forms.form(cls, {}))
    missing = set(cls.model_fields) - set(shown) - {"block_type_slug", "enabled"}
    assert missing <= ({"direction"} if not cls.can_query else set())
    assert all(one.title and one.help for one in shown.values())
    assert len({one.title for one in shown.values()}) == len(shown)


@pytest.mark.parametrize("kind", NEEDED)
def test_no_secret_is_in_a_form(kind: str) -> None:
    cls = TYPES[kind]
    values = dict.fromkeys(cls.secret_fields(), SecretStr(SECRET))
    shown = inputs(forms.form(cls, values, stored=cls.secret_fields()))
    assert all(shown[name].value == "" and shown[name].stored for name in cls.secret_fields())
    typed = forms.typed(cls, dict.fromkeys(cls.secret_fields(), SECRET))
    assert SECRET not in json.dumps(typed)


@pytest.mark.parametrize(
    ("given", "unit", "value"),
    [
        ("90", "s", 90),
        ("1.5", "min", 90),
        ("2", "h", 7200),
        (" 45 ", "s", 45),
        ("soon", "min", "soon"),
        ("5", "days", 5),
    ],
)
def test_times_are_read_in_their_unit(given: str, unit: str, value: Any) -> None:
    values, _ = forms.read(TYPES["dicom"], {"idle_timeout_s": given, "idle_timeout_s.unit": unit})
    assert str(values["idle_timeout_s"]) == str(value)


@pytest.mark.parametrize(
    ("value", "shown", "unit"), [(60, "1", "min"), (90, "90", "s"), (7200, "2", "h"), (0.5, "0.5", "s")]
)
def test_times_are_shown_in_their_largest_whole_unit(value: float, shown: str, unit: str) -> None:
    one = inputs(forms.form(TYPES["dicom"], {"idle_timeout_s": value}))["idle_timeout_s"]
    assert (one.value, one.unit) == (shown, unit)


def test_an_empty_field_means_none_or_the_default() -> None:
    values, _ = forms.read(TYPES["s3"], {"bucket": "b", "region": "", "multipart_bytes": "", "prefix": "", "sse": ""})
    assert values["region"] is None and values["sse"] is None and values["prefix"] == ""
    assert "multipart_bytes" not in values


@pytest.mark.parametrize(
    ("form", "secrets"),
    [
        ({"password": "", "password.do": "keep"}, {}),
        ({"password": "", "password.do": "replace"}, {}),  # an empty field never removes a secret
        ({"password": "new", "password.do": "replace"}, {"password": "new"}),
        ({"password": "new"}, {"password": "new"}),
        ({"password": "new", "password.do": "keep"}, {}),
        ({"password": "", "password.do": "remove"}, {"password": None}),
        ({"password": " blanks stay "}, {"password": " blanks stay "}),
    ],
)
def test_a_secret_is_kept_replaced_or_removed(form: dict[str, str], secrets: dict[str, str | None]) -> None:
    assert forms.read(TYPES["sftp"], form)[1] == secrets


def test_what_is_wrong_stands_at_the_field_that_it_names() -> None:
    cls = TYPES["s3"]
    errors = [
        ({"loc": ("bucket",), "type": "x"}, "bucket: is required"),
        ({"loc": (), "type": "x"}, "kms_key_id belongs to sse aws:kms or aws:kms:dsse: set sse too"),
    ]
    found = forms.by_field(cls, errors)
    assert found["bucket"] == ["is required"]
    (place,) = set(found) - {"bucket"}
    assert place in ("kms_key_id", "sse") and "kms_key_id" not in found[place][0]
    assert all(words for _, words in forms.summary(cls, found))


def test_settings_of_a_target_show_no_secret_and_no_default() -> None:
    target = TYPES["sftp"](**NEEDED["sftp"], password=SECRET)
    shown = [one for _, found in shown_settings.settings(target) for one in found]
    assert [one.value for one in shown if one.secret] == [""]
    assert SECRET not in str(shown) and "files.example.org" in [one.value for one in shown]


def test_texts_have_what_they_are_filled_with() -> None:
    assert text("who", name="a{b}", role="admin") == "a{b} (admin)"
    assert all(words.strip() for words in TEXTS.values())


@pytest.mark.parametrize(
    ("contact", "link"),
    [("pacs-team@example.org", "pacs-team@example.org"), ('a+b?cc="x@y.org', "a%2Bb%3Fcc%3D%22x@y.org")],
)
def test_who_is_to_be_asked_is_written_to_at_their_address_alone(contact: str, link: str) -> None:
    page = '{% from "pieces.html" import settings_and_people %}{{ settings_and_people([], one, "parts") }}'
    shown = templates().from_string(page).render(one=SimpleNamespace(contact=contact, description="<i>"))
    assert f'href="mailto:{link}"' in shown and "&lt;i&gt;" in shown
