"""What pages show of the settings of a target, source or rule: labels, values in words, and how two of them differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from blocks.fields import facts, groups, in_titles
from blocks.named import NamedBlock
from talaria.front.pages.forms import UNITS, as_row, kind_of, row_of, scaled, written
from talaria.front.pages.texts import option_label, text

APART = ("enabled", "contact", "description")  # shown elsewhere


@dataclass(frozen=True)
class Setting:
    """A setting of what is saved, as its page shows it."""

    title: str
    value: str
    secret: bool = False


def settings(block: NamedBlock) -> list[tuple[str, list[Setting]]]:
    """Return the settings that are not the defaults, by group; of secrets only that they are stored."""
    cls, found = type(block), []
    for title, names in groups(cls):
        shown = []
        for name in names:
            about, value = cls.model_fields[name], getattr(block, name)
            if value == about.get_default(call_default_factory=True) or name in APART:
                continue
            label = facts(cls, name).title
            if not isinstance(value, SecretStr):
                shown.append(Setting(label, in_words(cls, name, value)))
            elif value.get_secret_value():
                shown.append(Setting(label, "", secret=True))
        if shown:
            found.append((title, shown))
    return found


def in_words(cls: type[NamedBlock], name: str, value: Any) -> str:
    """Return a value of a field as people read it."""
    about, known = cls.model_fields[name], facts(cls, name)
    kind, _ = kind_of(about)
    if isinstance(value, bool):
        return text("yes" if value else "no")
    if kind == "rows":
        model = row_of(about)
        rows = [as_row(one) for one in value or ()]
        return "; ".join(
            ", ".join(
                f"{facts(model, key).title} {_listed(one)}"
                for key, one in row.items()
                if key in model.model_fields and written(one) not in ("", written(model.model_fields[key].default))
            )
            for row in rows
        )
    if kind == "choices":
        return ", ".join(option_label(written(one)) for one in value or ())
    if isinstance(value, list | tuple):
        return _listed(value)
    number, unit = scaled(value, UNITS[known.unit]) if known.unit in UNITS else (written(value), "")
    return f"{number} {unit}".strip()


def _listed(value: Any) -> str:
    return ", ".join(written(one) for one in value) if isinstance(value, list | tuple) else written(value)


def differences(cls: type[NamedBlock], mine: Mapping[str, Any], theirs: object) -> list[tuple[str, str, str]]:
    """Return the fields in which a form and what is saved differ: label, and both values."""
    if not isinstance(theirs, cls):
        return []
    found = []
    for name, value in mine.items():
        yours, others = in_words(cls, name, value), in_words(cls, name, getattr(theirs, name))
        if yours != others and written(value) != written(getattr(theirs, name)):
            found.append((facts(cls, name).title, yours, others))
    return found


def in_labels(cls: type[NamedBlock]) -> Callable[[str], str]:
    """Return what puts labels in the place of a type's fields in a message."""
    return lambda message: in_titles(cls, message, "“{}”")


def first_line(cls: type[NamedBlock]) -> str:
    """Return what a type is, in a line."""
    return (cls.__doc__ or "").partition("\n")[0]


def title_of(cls: type[NamedBlock]) -> str:
    """Return what people call a type."""
    return str(cls.get_block_type_name()).removesuffix(f" {cls.word.capitalize()}")


def tiles(types: Mapping[str, type[NamedBlock]]) -> list[dict[str, Any]]:
    """Return types as tiles to choose from."""
    return [
        {
            "name": name,
            "title": title_of(cls),
            "about": first_line(cls),
            "query": getattr(cls, "can_query", None),
        }
        for name, cls in types.items()
    ]
