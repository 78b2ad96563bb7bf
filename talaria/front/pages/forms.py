"""The form of a target, source or rule, made from its type's fields; and what comes back of it."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from blocks.fields import BYTES, BYTES_PER_S, SECONDS, facts, groups, in_titles
from blocks.fields import Group as Parts
from blocks.named import NamedBlock
from talaria.front.pages.texts import text

KEEP, REPLACE, REMOVE = "keep", "replace", "remove"
INFORMATION = str(Parts.INFORMATION)
_FIELD = re.compile(r"\b[a-z0-9_]+\b")
BUTTONS = ("enabled",)  # fields that are changed by a button of their own
SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
TIMES = {"s": 1, "min": 60, "h": 3600}
UNITS = {BYTES: SIZES, BYTES_PER_S: SIZES, SECONDS: TIMES}
LISTS = ("list", "choices", "rows")  # kinds of fields that hold several values
MOST_ROWS = 40  # of one field that empty ones are added to; those that are there are all shown


@dataclass
class Input:
    """One field of a form.

    Attributes:
        name: in the form; in a row, as in `routes.0.targets`.
        kind: `text`, `area`, `number`, `quantity`, `choice`, `switch`, `secret`, or for several values `list` (of
            texts), `choices` (boxes) or `rows` (of fields).
        value: as the user reads and writes it; of a secret always "".
        units: that a quantity may be given in; `unit` is the one that it is given in.
        chosen: of the options, those that are.
        names: that may be written here, where they are known.
        stored: of a secret, whether there is one, and `action` what is done with it.
        lines: whether its text may have several lines.
        rows: the fields of each row.
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
    chosen: list[str] = field(default_factory=list)
    names: Sequence[str] = ()
    stored: bool = False
    action: str = KEEP
    lines: bool = False
    rows: list[list[Input]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def on(self) -> bool:
        return self.value == "true"

    @property
    def wrong(self) -> bool:
        """Return True if something is wrong with it, or in a row of it."""
        return bool(self.problems) or any(one.problems for row in self.rows for one in row)


@dataclass
class FieldGroup:
    """Fields that stand together; those of `more` are folded away until they are wanted."""

    title: str
    inputs: list[Input]
    more: list[Input]

    @property
    def opened(self) -> bool:
        """Return True if a folded field has to be looked at."""
        return any(one.wrong for one in self.more)


@dataclass(frozen=True)
class Around:
    """What a field's look depends on besides its value.

    Attributes:
        problems: by the names of fields.
        names: that are known, by what they name: `target`, `source`.
        spare: empty rows below those that are filled.
    """

    problems: Mapping[str, list[str]] = field(default_factory=dict)
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    spare: int = 1


def form(
    cls: type[NamedBlock],
    values: Mapping[str, Any],
    stored: Collection[str] = (),
    around: Around = Around(),
) -> list[FieldGroup]:
    """Return the form of a type.

    Args:
        values: by field, as JSON or as they were typed; defaults stand for the others.
        stored: the secrets that are set.
    """
    found = []
    for title, names in groups(cls):
        inputs = [
            (_input(cls, name, values, around, stored=name in stored), facts(cls, name).tier == "advanced")
            for name in names
            if name not in BUTTONS and not (name == "direction" and not getattr(cls, "can_query", True))
        ]
        if inputs:
            plain = [one for one, advanced in inputs if not advanced]
            found.append(FieldGroup(title, plain, [one for one, advanced in inputs if advanced]))
    return found


def tabs(groups: list[FieldGroup]) -> list[tuple[str, list[FieldGroup]]]:
    """Return the parts of a form by tab: what people should know stands in a tab of its own."""
    about = [group for group in groups if group.title == INFORMATION]
    return [("configuration", [group for group in groups if group not in about]), ("information", about)]


def _input(
    cls: type[BaseModel],
    name: str,
    values: Mapping[str, Any],
    around: Around,
    *,
    stored: bool = False,
    before: str = "",
) -> Input:
    """Return a field of a form; `before` is what its name begins with in a row."""
    about, known = cls.model_fields[name], facts(cls, name)
    kind, options = kind_of(about)
    one = Input(
        before + name,
        known.title,
        about.description or "",
        kind,
        about.is_required(),
        placeholder=known.placeholder,
        unit=known.unit,
        options=options,
        names=around.names.get(known.names, ()),
        stored=stored,
        lines=known.lines,
        problems=around.problems.get(before + name, []),
    )
    if kind == "secret":
        one.action = str(values.get(f"{name}.do", KEEP))
        return one
    one.kind = "area" if kind == "text" and known.lines else kind
    value = values.get(name, None if about.is_required() else about.get_default(call_default_factory=True))
    if kind in LISTS:
        _fill(one, about, value, around)
        return one
    one.value = written(value)
    if sizes := UNITS.get(known.unit):
        one.kind, one.units = "quantity", [*sizes]
        given = values.get(f"{name}.unit")
        one.value, one.unit = (one.value, str(given)) if given in sizes else scaled(value, sizes)
    return one


def _fill(one: Input, about: FieldInfo, value: Any, around: Around) -> None:
    """Put the values of a list into its field: a list as JSON has it, or the text that was typed."""
    there = value if isinstance(value, list | tuple) else []
    if one.kind == "choices":
        one.chosen = value.split() if isinstance(value, str) else [written(each) for each in there]
    elif one.kind == "list":
        within = ", " if "." in one.name else "\n"
        given = within.join(_part(each, commas=not one.lines) for each in there)
        one.value = value if isinstance(value, str) else given
    else:
        model = row_of(about)
        rows = [as_row(each) for each in there]
        rows += [{}] * max(0, min(around.spare, MOST_ROWS - len(rows)))
        one.rows = [
            [_input(model, name, row, around, before=f"{one.name}.{number}.") for name in model.model_fields]
            for number, row in enumerate(rows)
        ]
        for part in (part for row in one.rows for part in row):
            if part.kind == "number" and part.value == written(model.model_fields[part.name.split(".")[-1]].default):
                part.value = ""


def kind_of(about: FieldInfo) -> tuple[str, list[str]]:
    """Return how a field is shown, and what may be chosen."""
    given = [one for one in _parts(about.annotation) if one is not type(None)]
    first = given[0] if given else str
    if get_origin(first) is list:
        (first,) = get_args(first)
        if isinstance(first, type) and issubclass(first, Enum):
            return "choices", [str(one.value) for one in first]
        return ("rows", []) if isinstance(first, type) and issubclass(first, BaseModel) else ("list", [])
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


def row_of(about: FieldInfo) -> type[BaseModel]:
    """Return the model of a field's rows."""
    (model,) = get_args(about.annotation)
    found: type[BaseModel] = model
    return found


def as_row(value: Any) -> Mapping[str, Any]:
    """Return the values of a row, as a model or as JSON has them; what is neither has none."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value if isinstance(value, Mapping) else {}


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def written(value: Any) -> str:
    """Return a value as a form shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _part(value: Any, *, commas: bool) -> str:
    """Return a text of a list as it stands between the others; in quotes, as in JSON, where it would not come back."""
    shown = written(value)
    plain = shown and shown == " ".join(shown.split()) and shown[0] != '"' and not (commas and "," in shown)
    return shown if plain else json.dumps(shown)


def scaled(value: Any, units: Mapping[str, int]) -> tuple[str, str]:
    """Return a quantity in the largest unit in which it is a whole number."""
    smallest = next(iter(units))
    if not isinstance(value, int | float) or isinstance(value, bool) or not value:
        return written(value), smallest
    unit = max((name for name, size in units.items() if value % size == 0), key=units.__getitem__, default=smallest)
    return written(value / units[unit]) if value % units[unit] == 0 else written(value), unit


def read(cls: type[NamedBlock], sent: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Return what a form says: values by field, and the secrets that are replaced (text) or removed (None).

    Values are as they were typed where they can't be converted: the type itself says what is wrong with them.
    """
    values: dict[str, Any] = {}
    secrets: dict[str, str | None] = {}
    for name, about in _shown(cls):
        kind, _ = kind_of(about)
        if kind == "secret":
            action, given = sent.get(f"{name}.do", REPLACE), sent.get(name, "")
            if action == REMOVE:
                secrets[name] = None
            elif action == REPLACE and given.strip():
                secrets[name] = given
        elif kind == "switch":
            values[name] = sent.get(name) == "true"
        elif kind == "choices":
            values[name] = sent.get(name, "").split()
        elif kind == "rows":
            values[name] = [row for row, _ in _rows(row_of(about), name, sent)]
        elif name in sent:
            values[name] = _value(cls, name, sent[name], sent.get(f"{name}.unit", ""))
    return {name: value for name, value in values.items() if value is not ...}, secrets


def typed(cls: type[NamedBlock], sent: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a form as they were typed, to show them again."""
    found: dict[str, Any] = dict(sent)
    for name, about in _shown(cls):
        kind, _ = kind_of(about)
        if kind == "secret":
            found.pop(name, None)
        elif kind == "switch":
            found[name] = sent.get(name) == "true"
        elif kind == "choices":
            found[name] = sent.get(name, "")
        elif kind == "rows":  # numbered as problems number them: without those that were left empty
            found[name] = [given for _, given in _rows(row_of(about), name, sent)]
    return found


def several(cls: type[NamedBlock]) -> tuple[str, ...]:
    """Return the fields that a form sends once for each value."""
    return tuple(name for name, about in _shown(cls) if kind_of(about)[0] == "choices")


def _rows(model: type[BaseModel], name: str, sent: Mapping[str, str]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Return the values of each row that holds something, and what was typed there."""
    numbered = re.compile(rf"{re.escape(name)}\.(\d{{1,4}})\.\w+")
    found = []
    for number in sorted({int(match[1]) for key in sent if (match := numbered.fullmatch(key))}):
        given = {key: sent[f"{name}.{number}.{key}"] for key in model.model_fields if f"{name}.{number}.{key}" in sent}
        default = {key: written(about.default) for key, about in model.model_fields.items()}
        if any(one.strip() not in ("", default[key]) for key, one in given.items()):
            values = {key: _value(model, key, one, "") for key, one in given.items()}
            found.append(({key: value for key, value in values.items() if value is not ...}, given))
    return found


def _shown(cls: type[NamedBlock]) -> Iterable[tuple[str, FieldInfo]]:
    names = [name for _, found in groups(cls) for name in found]
    return [(name, cls.model_fields[name]) for name in names if name not in BUTTONS]


def _value(cls: type[BaseModel], name: str, given: str, unit: str) -> Any:
    """Return the value of a field that was sent; `...` for the default."""
    about = cls.model_fields[name]
    kind, _ = kind_of(about)
    if kind == "list":
        return _listed(given, commas=not facts(cls, name).lines)
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


def _listed(given: str, *, commas: bool) -> list[str]:
    """Return the texts of a list: one in each line, or between commas; in quotes as in JSON, where they need them."""
    found = []
    for line in given.splitlines():
        try:
            quoted = json.loads(line) if line.strip().startswith('"') else None
        except ValueError:
            quoted = None
        if isinstance(quoted, str):
            found.append(quoted)
        else:
            found += [one.strip() for one in (line.split(",") if commas else [line]) if one.strip()]
    return found


def unwritten(cls: type[NamedBlock], sent: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the stored secrets that are to be replaced by nothing, as problems."""
    stored = cls.secret_fields() & {*sent.get("stored", "").split(",")}
    empty = [name for name in sorted(stored) if sent.get(f"{name}.do") == REPLACE and not sent.get(name, "").strip()]
    return {name: [text("form.unwritten")] for name in empty}


def by_field(cls: type[NamedBlock], errors: Iterable[tuple[Mapping[str, Any], str]]) -> dict[str, list[str]]:
    """Return problems by field, in the words of labels; those of several fields stand at the first that they name.

    Args:
        errors: as `ValidationError.errors()` gives them, each with a sentence.
    """
    found: dict[str, list[str]] = {}
    for error, said in errors:
        named = [word for word in _FIELD.findall(said) if word in cls.model_fields]
        where = [str(part) for part in error["loc"]] or named[:1]
        rows = len(where) > 1 and where[0] in cls.model_fields and kind_of(cls.model_fields[where[0]])[0] == "rows"
        # That of a row's list stands at the list; that of a whole row at its first field.
        place = ".".join(where[:3]) if rows else where[0] if where else ""
        if rows and len(where) == 2:
            place += "." + next(iter(row_of(cls.model_fields[where[0]]).model_fields))
        whole = ".".join(where)
        short = said.removeprefix(f"{whole}: ").removeprefix(f"{place} ").removeprefix(f"{place}: ")
        found.setdefault(place, []).append(in_titles(cls, short, "“{}”"))
    return found


def summary(cls: type[NamedBlock], problems: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """Return every problem with its field's id and label, for the top of the form."""
    return [
        (name, f"{label}: {one}" if (label := _label(cls, name)) else one)
        for name, several in problems.items()
        for one in several
    ]


def _label(cls: type[NamedBlock], name: str) -> str:
    """Return the label of a field, or of one in a row; "" for what is none."""
    first, *row = name.split(".")
    if name == "name":
        return text("form.name")
    if first not in cls.model_fields:
        return ""
    title = facts(cls, first).title
    if len(row) != 2:
        return title
    return text(
        "form.in_row", title=title, row=int(row[0]) + 1, field=facts(row_of(cls.model_fields[first]), row[1]).title
    )
