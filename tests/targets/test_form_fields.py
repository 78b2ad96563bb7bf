"""What forms know of the fields of a target: label, group, order, unit; and which of them decide who gets secrets."""

from __future__ import annotations

import re
from typing import Any, ClassVar
from unittest import mock

import pytest
from prefect.blocks.core import Block, block_schema_to_key
from pydantic import BaseModel, Field, SecretStr

from blocks import RULES, SOURCES, TYPES, Target
from blocks.dicom import DicomTarget
from blocks.fields import BYTES, BYTES_PER_S, SECONDS, Group, facts, groups, ordered
from blocks.named import NamedBlock
from blocks.proxied import Proxied
from talaria.targetfile import field_names

OWN = [name for name, cls in TYPES.items() if cls.__module__.startswith("blocks.")]
UNITS = {SECONDS: "second", BYTES: "byte", BYTES_PER_S: "bytes per second"}


class Elsewhere(Proxied):
    """A type of another package, which declares nothing of what a form shows."""

    _block_type_slug = "elsewhere-target"
    type_name: ClassVar[str] = "elsewhere"
    where: ClassVar[tuple[str, ...]] = ("base_url",)

    base_url: str = Field(description="Where it is.")
    api_key: SecretStr = SecretStr("")
    wait_s: float = 3
    part_bytes: int = 5
    room: str = Field(default="", json_schema_extra={"group": "Hospital"})


@pytest.mark.parametrize("name", OWN)
def test_every_field_says_how_forms_show_it(name: str) -> None:
    cls, known = TYPES[name], {str(group) for group in Group}
    shown = ordered(cls)
    assert sorted(one.name for one in shown) == sorted(field_names(cls))
    titles = [one.title for one in shown]
    assert sorted(set(titles)) == sorted(titles), "two fields with one label"
    for one in shown:
        field = cls.model_fields[one.name]
        assert field.title, one.name
        extra = field.json_schema_extra
        assert isinstance(extra, dict), one.name
        assert extra["group"] in known, one.name
        assert extra["tier"] in ("basic", "advanced"), one.name
        assert not field.is_required() or one.tier == "basic", one.name
        assert re.fullmatch(r"[A-Z][^.:]*", one.title), one.name
        assert re.fullmatch(r"[A-Z].*\.", str(field.description), re.DOTALL), one.name
        if re.search(r"_s$|_bytes$|^bandwidth_limit$|^max_pdu$", one.name):
            assert one.unit in UNITS, one.name
            assert UNITS[one.unit] in str(field.description).lower().replace("most bytes", "bytes"), one.name
            assert not re.search(r"second|byte", one.title), one.name


@pytest.mark.parametrize("name", [*OWN, "elsewhere"])
def test_prefect_is_given_the_fields_in_the_order_of_a_form(name: str) -> None:
    cls = TYPES.get(name, Elsewhere)
    schema = cls._to_block_schema().fields
    properties: dict[str, Any] = schema["properties"]
    names = [one.name for one in ordered(cls)]
    assert list(properties) == names
    assert [properties[one]["position"] for one in names] == list(range(len(names)))
    assert [properties[one]["title"] for one in names] == [one.title for one in ordered(cls)]
    assert sorted(schema["required"]) == sorted(one for one in names if cls.model_fields[one].is_required())
    assert sorted(schema["secret_fields"]) == sorted(cls.secret_fields())
    assert [one for _, part in groups(cls) for one in part] == names


class Nested(Elsewhere):
    """One whose secrets lie deeper."""

    class Key(BaseModel):
        word: SecretStr = SecretStr("")

    _block_type_slug = "nested-target"
    type_name: ClassVar[str] = "nested"
    key: Key = Key()


@pytest.mark.parametrize("cls", [*TYPES.values(), *SOURCES.values(), *RULES.values(), Elsewhere, Nested])
def test_prefect_asks_for_secret_fields_and_keys_without_a_new_schema_for_each(cls: type[NamedBlock]) -> None:
    """Which took a third of a second whenever a target was saved. The names are private ones of Prefect's."""
    one, names = cls.model_construct(), list(cls.model_fields)
    expected = [Block._field_has_secrets(one, name) for name in names]
    assert any(expected) or not cls.secret_fields()
    key = block_schema_to_key(cls._to_block_schema())
    assert [one._field_has_secrets(name) for name in names] == expected
    with mock.patch.object(cls, "model_json_schema", side_effect=AssertionError):
        assert [one._field_has_secrets(name) for name in names] == expected
        assert cls.__dispatch_key__() == key


def test_a_form_begins_with_the_connection_and_ends_with_the_information() -> None:
    found = groups(DicomTarget)
    assert found[0] == ("Connection", ["host", "port", "aet_target", "aet_source"])
    assert found[-1][0] == "Information"
    assert facts(DicomTarget, "aet_target").title == "Their AE title"
    for name in OWN:
        names = [group for group, _ in groups(TYPES[name])]
        assert names == [str(group) for group in Group if str(group) in names], name


def test_a_type_that_declares_nothing_has_a_form_too() -> None:
    found = {one.name: one for one in ordered(Elsewhere)}
    assert (found["base_url"].title, found["base_url"].group, found["base_url"].tier) == (
        "Base url",
        "Connection",
        "basic",
    )
    assert (found["api_key"].group, found["api_key"].title) == ("Sign-in", "Api key")
    assert (found["wait_s"].unit, found["wait_s"].title, found["wait_s"].tier) == ("s", "Wait", "advanced")
    assert (found["part_bytes"].unit, found["room"].group) == ("B", "Hospital")
    assert [group for group, _ in groups(Elsewhere)][:3] == ["Connection", "Hospital", "Sign-in"]
    assert Elsewhere.leads_secrets_to() >= {"base_url", "proxy"}


LEADS = {  # of those that have secrets, which anybody else could be sent
    "dicom-tls": {"host", "port"},
    "dicomweb": {"url", "token_url", "proxy", "ca_cert"},
    "rsync": {"host", "port", "jump_host", "host_key", "host_key_policy", "jump_host_key"},
    "sftp": {"host", "port", "jump_host", "host_key", "host_key_policy", "jump_host_key"},
    "s3": {"endpoint_url", "region", "proxy", "ca_cert"},
    "xnat": {"host", "proxy", "ca_cert"},
}
ADDRESS = re.compile(r"host|port|(.*_)?url|endpoint_url|proxy|jump_host")


@pytest.mark.parametrize("name", OWN)
def test_what_decides_who_is_sent_the_secrets(name: str) -> None:
    cls: type[Target] = TYPES[name]
    assert cls.leads_secrets_to() == LEADS.get(name, set())
    addresses = {field for field in field_names(cls) if ADDRESS.fullmatch(field)}
    if cls.secret_fields():
        assert addresses <= cls.leads_secrets_to() | {"aet_target"}, "an address that secrets could be sent to"


@pytest.mark.parametrize("name", OWN)
def test_prefect_s_form_has_one_input_for_a_value_that_need_not_be_given(name: str) -> None:
    properties: dict[str, Any] = TYPES[name]._to_block_schema().fields["properties"]
    assert {field for field, schema in properties.items() if "anyOf" in schema} <= {"sse"}  # a list, and none of it
    for field, schema in properties.items():
        assert not (schema.get("format") == "password" and "default" in schema), field
        assert "at" not in schema, field


def test_the_empty_text_of_a_form_is_no_value() -> None:
    target = TYPES["folder"](folder="/data", mode="", dir_mode="", group="", window="", bandwidth_limit="")
    assert (
        target.model_dump(include={"mode", "dir_mode", "group", "window", "bandwidth_limit"}, exclude_none=True) == {}
    )
