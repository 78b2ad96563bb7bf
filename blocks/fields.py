"""What forms need to know of fields: label, group, order, unit; for Prefect's forms and our pages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Tier = Literal["basic", "advanced"]
SECONDS, BYTES, BYTES_PER_S, TIMES = "s", "B", "B/s", "times"  # as `unit`


class Group(StrEnum):
    """The parts of a form, in their order."""

    CONNECTION = "Connection"
    PATHS = "Paths"
    SIGN_IN = "Sign-in"
    TRUST = "Trust"
    SECURITY = "Security"
    JUMP_HOST = "Jump host"
    USE = "Use"
    HEARD = "What it hears of"
    MESSAGES = "Messages"
    READY = "When it is ready"
    SCHEDULE = "Schedule"
    NAMES = "Names"
    SENT = "What is sent"
    FILES = "Files and folders"
    STORED = "At the store"
    ORIGIN = "Origin"
    CONVERSION = "Conversion"
    COMMITMENT = "Storage commitment"
    AFTER = "After delivery"
    RETRIES = "Retries"
    LIMITS = "Limits and times"
    INFORMATION = "Information"


_PLACES = {str(group): place for place, group in enumerate(Group)}


@dataclass(frozen=True)
class FieldFacts:
    """What a form shows of a field besides its description.

    Attributes:
        title: its label.
        group: the part of the form, one of `Group`, or another package's own.
        tier: whether it is shown at once, or only to those who look for it.
        unit: what its number counts; "" for none.
        placeholder: an example, shown where nothing has been written.
        lines: whether its text may have several lines; of a list, whether only lines are between its parts.
        names: of what it holds names: `target`, `source`; "" for other texts.
    """

    name: str
    title: str
    group: str
    tier: Tier
    unit: str
    placeholder: str
    lines: bool
    names: str = ""


def about(
    group: Group | str,
    *,
    advanced: bool = False,
    unit: str = "",
    placeholder: str = "",
    lines: bool = False,
    names: str = "",
    at: int = 0,
) -> dict[str, Any]:
    """Return the `json_schema_extra` of a field that says how forms show it, beside its `title`.

    Args:
        at: its place among the fields of its group and tier; those with the same follow their declaration.
    """
    extra: dict[str, Any] = {"group": str(group), "tier": "advanced" if advanced else "basic"}
    extra |= {"at": at} if at else {}
    extra |= {"unit": unit} if unit else {}
    extra |= {"lines": True} if lines else {}
    extra |= {"names": names} if names else {}
    return extra | ({"placeholder": placeholder} if placeholder else {})


def facts(model: type[BaseModel], name: str) -> FieldFacts:
    """Return what a form shows of a field; what is not declared, as in another package's type, is made of its name."""
    field = model.model_fields[name]
    extra = _extra(field)
    group = Group.SIGN_IN if "SecretStr" in str(field.annotation) else Group.CONNECTION
    advanced = extra.get("tier", "basic" if field.is_required() else "advanced") == "advanced"
    return FieldFacts(
        name=name,
        title=field.title or _title(name),
        group=str(extra.get("group", group)),
        tier="advanced" if advanced else "basic",
        unit=str(extra.get("unit", SECONDS if name.endswith("_s") else BYTES if name.endswith("_bytes") else "")),
        placeholder=str(extra.get("placeholder", "")),
        lines=bool(extra.get("lines", False)),
        names=str(extra.get("names", "")),
    )


def in_titles(model: type[BaseModel], message: str, quoted: str) -> str:
    """Return a message with the labels of fields in place of their names, where these are no words of a sentence.

    Args:
        quoted: how a label stands in it, as in `"{}"`.
    """

    def titled(word: re.Match[str]) -> str:
        return quoted.format(facts(model, word[0]).title) if word[0] in model.model_fields else word[0]

    return re.sub(r"\b[a-z0-9]+_\w+", titled, message)


def ordered(model: type[BaseModel], names: Mapping[str, Any] | None = None) -> list[FieldFacts]:
    """Return the fields in the order of a form: by group, basic ones first, then as declared.

    Args:
        names: only these; by default all that a target has of its own, without Prefect's `block_type_slug`.
    """
    known = list(model.model_fields)
    wanted = [name for name in known if (name != "block_type_slug" if names is None else name in names)]

    def place(one: FieldFacts) -> tuple[int, str, bool, int, int]:
        at = _extra(model.model_fields[one.name]).get("at", 0)
        own = _PLACES.get(one.group)  # another package's own groups follow the connection, by name
        return (
            (_PLACES[Group.CONNECTION] if own is None else own),
            "" if own is not None else one.group,
            (one.tier == "advanced"),
            at,
            known.index(one.name),
        )

    return sorted((facts(model, name) for name in wanted), key=place)


def groups(model: type[BaseModel]) -> list[tuple[str, list[str]]]:
    """Return the parts of a target's form, each with the names of its fields, all in order."""
    found: dict[str, list[str]] = {}
    for one in ordered(model):
        found.setdefault(one.group, []).append(one.name)
    return list(found.items())


def in_order(schema: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return a type's JSON schema with its properties in the order of a form.

    Prefect's form sorts them by `position`, and takes a property without a title for an instance of its class.
    """
    properties: dict[str, Any] = schema.get("properties", {})
    sorted_ones: dict[str, Any] = {}
    for position, one in enumerate(ordered(model, properties)):
        shown = _plain({key: value for key, value in properties[one.name].items() if key not in ("at", "names")})
        sorted_ones[one.name] = shown | {"title": one.title, "position": position}
    return schema | {"properties": sorted_ones | {name: properties[name] for name in properties.keys() - sorted_ones}}


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value that need not be given as Prefect's form shows it best.

    A null beside it would be a tab of its own; a secret's empty default would be saved, and shown as one that is set.
    """
    without = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
    match schema:
        case {"anyOf": [{"type": _}, {"type": "null"}], "default": None}:
            return without | dict(schema["anyOf"][0])
        case {"format": "password", "default": ""}:
            return without
    return schema


def _extra(field: FieldInfo) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _title(name: str) -> str:
    """Return a label made of a field's name, as in "Base path" of `base_path`."""
    words = name.removesuffix("_s").removesuffix("_bytes").replace("_", " ").strip() or name
    return words[0].upper() + words[1:]
