"""The form of a target: made from any type's fields, read back as the type takes it, secrets never in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import SecretStr

from blocks import TYPES
from talaria.front.pages import forms
from talaria.front.pages.texts import TEXTS, text
from tests.targets.fields import NEEDED

SECRET = "swordfish"


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
    shown = [one for _, found in forms.settings(target) for one in found]
    assert [one.value for one in shown if one.secret] == [""]
    assert SECRET not in str(shown) and "files.example.org" in [one.value for one in shown]


def test_texts_have_what_they_are_filled_with() -> None:
    assert text("who", name="a{b}", role="admin") == "a{b} (admin)"
    assert all(words.strip() for words in TEXTS.values())
