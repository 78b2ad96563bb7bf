"""The form of a target, made from its type's fields; and what comes back of it."""

from __future__ import annotations

import re
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from blocks import TYPES, Target
from blocks.fields import BYTES, BYTES_PER_S, SECONDS, facts, groups, in_titles
from blocks.fields import Group as Parts
from talaria.front.pages.texts import text

KEEP, REPLACE, REMOVE = "keep", "replace", "remove"
INFORMATION = str(Parts.INFORMATION)
_FIELD = re.compile(r"\b[a-z0-9_]+\b")
BUTTONS = ("enabled",)  # fields that are changed by a button of their own
SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
TIMES = {"s": 1, "min": 60, "h": 3600}
UNITS = {BYTES: SIZES, BYTES_PER_S: SIZES, SECONDS: TIMES}


@dataclass
class Input:
    """One field of a form.

    Attributes:
        kind: `text`, `area`, `number`, `quantity`, `choice`, `switch` or `secret`.
        value: as the user reads and writes it; of a secret always "".
        units: that a quantity may be given in; `unit` is the one that it is given in.
        stored: of a secret, whether there is one, and `action` what is done with it.
        lines: whether its text may have several lines.
        problems: what is wrong with it.
    """

    name: str
    title: str
    help: str
    kind: str
    required: bool
    value: str = ""
    placeholder: str = ""
    unit: str = ""
    units: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    stored: bool = False
    action: str = KEEP
    lines: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def on(self) -> bool:
        return self.value == "true"


@dataclass
class FieldGroup:
    """Fields that stand together; those of `more` are folded away until they are wanted."""

    title: str
    inputs: list[Input]
    more: list[Input]

    @property
    def opened(self) -> bool:
        """Return True if a folded field has to be looked at."""
        return any(one.problems for one in self.more)


def form(
    cls: type[Target],
    values: Mapping[str, Any],
    stored: Collection[str] = (),
    problems: Mapping[str, list[str]] = types.MappingProxyType({}),
) -> list[FieldGroup]:
    """Return the form of a type.

    Args:
        values: by field, as JSON or as they were typed; defaults stand for the others.
        stored: the secrets that are set.
        problems: by field.
    """
    found = []
    for title, names in groups(cls):
        inputs = [
            (_input(cls, name, values, name in stored, problems.get(name, [])), facts(cls, name).tier == "advanced")
            for name in names
            if name not in BUTTONS and not (name == "direction" and not cls.can_query)
        ]
        if inputs:
            plain = [one for one, advanced in inputs if not advanced]
            found.append(FieldGroup(title, plain, [one for one, advanced in inputs if advanced]))
    return found


def tabs(groups: list[FieldGroup]) -> list[tuple[str, list[FieldGroup]]]:
    """Return the parts of a form by tab: what people should know about a target stands in a tab of its own."""
    about = [group for group in groups if group.title == INFORMATION]
    return [("configuration", [group for group in groups if group not in about]), ("information", about)]


def _input(cls: type[Target], name: str, values: Mapping[str, Any], stored: bool, problems: list[str]) -> Input:
    about, known = cls.model_fields[name], facts(cls, name)
    kind, options = _kind(about)
    one = Input(
        name,
        known.title,
        about.description or "",
        kind,
        about.is_required(),
        placeholder=known.placeholder,
        unit=known.unit,
        options=options,
        stored=stored,
        lines=known.lines,
        problems=problems,
    )
    if kind == "secret":
        one.action = str(values.get(f"{name}.do", KEEP))
        return one
    one.kind = "area" if kind == "text" and known.lines else kind
    value = values.get(name, None if about.is_required() else about.get_default(call_default_factory=True))
    one.value = _written(value)
    if sizes := UNITS.get(known.unit):
        one.kind, one.units = "quantity", [*sizes]
        given = values.get(f"{name}.unit")
        one.value, one.unit = (one.value, str(given)) if given in sizes else _scaled(value, sizes)
    return one


def _kind(about: FieldInfo) -> tuple[str, list[str]]:
    """Return how a field is shown, and what may be chosen."""
    given = [one for one in _parts(about.annotation) if one is not type(None)]
    first = given[0] if given else str
    if first is SecretStr:
        return "secret", []
    if first is bool:
        return "switch", []
    if isinstance(first, type) and issubclass(first, Enum):
        empty = [""] if type(None) in _parts(about.annotation) else []
        return "choice", empty + [str(one.value) for one in first]
    if first in (int, float):
        return "number", []
    return "text", []


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _scaled(value: Any, units: Mapping[str, int]) -> tuple[str, str]:
    """Return a quantity in the largest unit in which it is a whole number."""
    smallest = next(iter(units))
    if not isinstance(value, int | float) or isinstance(value, bool) or not value:
        return _written(value), smallest
    unit = max((name for name, size in units.items() if value % size == 0), key=units.__getitem__, default=smallest)
    return _written(value / units[unit]) if value % units[unit] == 0 else _written(value), unit


def read(cls: type[Target], sent: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Return what a form says: values by field, and the secrets that are replaced (text) or removed (None).

    Values are as they were typed where they can't be converted: the type itself says what is wrong with them.
    """
    values: dict[str, Any] = {}
    secrets: dict[str, str | None] = {}
    for name, about in _shown(cls):
        kind, _ = _kind(about)
        if kind == "secret":
            action, given = sent.get(f"{name}.do", REPLACE), sent.get(name, "")
            if action == REMOVE:
                secrets[name] = None
            elif action == REPLACE and given.strip():
                secrets[name] = given
        elif kind == "switch":
            values[name] = sent.get(name) == "true"
        elif name in sent:
            values[name] = _value(cls, name, sent[name], sent.get(f"{name}.unit", ""))
    return {name: value for name, value in values.items() if value is not ...}, secrets


def typed(cls: type[Target], sent: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a form as they were typed, to show them again."""
    found: dict[str, Any] = dict(sent)
    for name, about in _shown(cls):
        kind, _ = _kind(about)
        if kind == "secret":
            found.pop(name, None)
        elif kind == "switch":
            found[name] = sent.get(name) == "true"
    return found


def _shown(cls: type[Target]) -> Iterable[tuple[str, FieldInfo]]:
    names = [name for _, found in groups(cls) for name in found]
    return [(name, cls.model_fields[name]) for name in names if name not in BUTTONS]


def _value(cls: type[Target], name: str, given: str, unit: str) -> Any:
    """Return the value of a field that was sent; `...` for the default."""
    about = cls.model_fields[name]
    kind, _ = _kind(about)
    optional = type(None) in _parts(about.annotation)
    stripped = given.strip()
    if not stripped and (optional or kind in ("number", "choice")):
        return None if optional else ...
    if kind == "number":
        size = UNITS.get(facts(cls, name).unit, {}).get(unit, 1)
        if size == 1:
            return stripped
        try:
            number = float(stripped) * size
        except ValueError:
            return stripped
        return int(number) if number.is_integer() else number
    return given if facts(cls, name).lines else stripped


def unwritten(cls: type[Target], sent: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the stored secrets that are to be replaced by nothing, as problems."""
    stored = cls.secret_fields() & {*sent.get("stored", "").split(",")}
    empty = [name for name in sorted(stored) if sent.get(f"{name}.do") == REPLACE and not sent.get(name, "").strip()]
    return {name: [text("form.unwritten")] for name in empty}


def by_field(cls: type[Target], errors: Iterable[tuple[Mapping[str, Any], str]]) -> dict[str, list[str]]:
    """Return problems by field, in the words of labels; those of several fields stand at the first that they name.

    Args:
        errors: as `ValidationError.errors()` gives them, each with a sentence.
    """
    found: dict[str, list[str]] = {}
    for error, said in errors:
        named = [word for word in _FIELD.findall(said) if word in cls.model_fields]
        place = str(error["loc"][0]) if error["loc"] else (named[0] if named else "")
        short = said.removeprefix(f"{place}: ").removeprefix(f"{place} ")
        found.setdefault(place, []).append(in_titles(cls, short, "“{}”"))
    return found


def summary(cls: type[Target], problems: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """Return every problem with its field's id and label, for the top of the form."""
    labels = {"name": text("form.name")}
    labels |= {name: facts(cls, name).title for name in problems if name in cls.model_fields}
    return [
        (name, f"{labels[name]}: {one}" if name in labels else one)
        for name, several in problems.items()
        for one in several
    ]


@dataclass(frozen=True)
class Setting:
    """A setting of a saved target, as its page shows it."""

    title: str
    value: str
    secret: bool = False


def settings(target: Target) -> list[tuple[str, list[Setting]]]:
    """Return the settings of a target that are not the defaults, by group; of secrets only that they are stored."""
    cls, found = type(target), []
    for title, names in groups(cls):
        shown = []
        for name in names:
            about, value = cls.model_fields[name], getattr(target, name)
            if value == about.get_default(call_default_factory=True) or name in ("enabled", "contact", "description"):
                continue
            known = facts(cls, name)
            if isinstance(value, SecretStr):
                shown += [Setting(known.title, "", secret=True)] if value.get_secret_value() else []
                continue
            number, unit = _scaled(value, UNITS[known.unit]) if known.unit in UNITS else (_written(value), "")
            words = (
                {"true": text("yes"), "false": text("no")}.get(number, number) if isinstance(value, bool) else number
            )
            shown.append(Setting(known.title, f"{words} {unit}".strip()))
        if shown:
            found.append((title, shown))
    return found


def differences(cls: type[Target], mine: Mapping[str, Any], theirs: object) -> list[tuple[str, str, str]]:
    """Return the fields in which a form and a saved target differ: label, and both values."""
    if not isinstance(theirs, cls):
        return []
    found = []
    for name, value in mine.items():
        other = _written(getattr(theirs, name))
        if _written(value) != other:
            found.append((facts(cls, name).title, _written(value), other))
    return found


def first_line(cls: type[Target]) -> str:
    """Return what a type is, in a line."""
    return (cls.__doc__ or "").partition("\n")[0]


def kind(cls: type[Target]) -> str:
    """Return what people call a type."""
    return str(cls.get_block_type_name()).removesuffix(" Target")


def kinds() -> list[dict[str, Any]]:
    """Return the types of target, as tiles."""
    return [
        {"name": name, "title": kind(cls), "about": first_line(cls), "query": cls.can_query}
        for name, cls in TYPES.items()
    ]
