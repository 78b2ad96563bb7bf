"""The file of targets and sources: each as people write it, and as `export` writes it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import SecretStr, ValidationError

from blocks import REFUSED, TYPES, Target
from blocks.base import MASK
from blocks.named import NamedBlock, check_name
from talaria.configfile import SHOWN
from tasks.documents import Broken
from transfer.errors import Misconfigured
from transfer.validation import meant, what_is_wrong

B = TypeVar("B", bound=NamedBlock)
# What Prefect adds to a block's own fields.
_PREFECT = ("block_type_slug",)


def made_of(values: Mapping[Any, Any], make: Callable[[str, Any], B], word: str) -> dict[str, B]:
    """Return what is made of all the values in a file, by name.

    Args:
        make: makes one of its name and its values.
        word: what messages call one.

    Raises:
        Misconfigured: all that is wrong, each in a line; or there is none.
    """
    found, wrong = dict[str, B](), []
    for name, one in values.items():
        try:
            found[str(name)] = make(str(name), one)
        except Misconfigured as exc:
            wrong.append(exc.message)
    if wrong:
        raise Misconfigured("\n".join(wrong))
    if not found:
        raise Misconfigured(f"no {word} is named")
    return found


def make(name: str, values: Any) -> Target:
    """Make a target from the values in a file, in which variables and files are filled in.

    Raises:
        Misconfigured: with the field and the remedy; values are not repeated, they may be secrets.
    """
    return entry(Target, TYPES, name, values, refused=REFUSED)


def entry(
    kind: type[B], types: Mapping[str, type[B]], name: str, values: Any, *, refused: Mapping[str, str] | None = None
) -> B:
    """Make a target, a source or a rule from the values in a file; errors as of `make`.

    Args:
        kind: the common class of `types`, which are by name.
        refused: types that can't be used, each with the reason.
    """
    what = f"{kind.word} {name}"
    try:
        check_name(name)
    except ValueError as exc:
        raise Misconfigured(str(exc)) from exc
    if not isinstance(values, dict) or "type" not in values:
        raise Misconfigured(f"{what}: needs a type, one of {', '.join(types)}")
    fields = {str(field): value for field, value in values.items()}
    wanted = str(fields.pop("type"))
    if refused and wanted in refused and wanted not in types:
        raise Misconfigured(f"{what}: {kind.word}s of type {wanted} can't be used: {refused[wanted]}")
    if wanted not in types:
        hint = meant(wanted, types) or f"it is not one of {', '.join(types)}"
        raise Misconfigured(f"{what}: unknown type {wanted[:SHOWN]!r}: {hint}")
    cls = types[wanted]
    known = field_names(cls)
    for field in fields:
        if field not in known:
            hint = meant(field, known) or f"`talaria {kind.seen_to_by or kind.word} types` lists the fields"
            raise Misconfigured(f"{what}: unknown field {field[:SHOWN]!r} of type {wanted}: {hint}")
    try:
        return cls(**fields).named(name)
    except ValidationError as exc:
        raise Misconfigured(f"{what}: " + what_is_wrong(exc.errors(), cls.model_fields)) from exc
    except ValueError as exc:
        raise Misconfigured(f"{what}: {exc}") from exc


def field_names(cls: type[NamedBlock]) -> list[str]:
    """Return the fields that a target or source of this type may have in a file."""
    return [name for name in cls.model_fields if name not in _PREFECT]


def action_for(target: NamedBlock, saved: Iterable[NamedBlock | Broken], *, replace: bool) -> str:
    """Return what applying a target, or a source, does: created, updated, unchanged or replaced.

    Raises:
        Misconfigured: targets of other types have its name, and are not to be replaced.
    """
    alike = [one for one in saved if one.name == target.name]
    others = sorted(f"{one.type_name}/{one.name}" for one in alike if one.type_name != target.type_name)
    if others and not replace:
        raise Misconfigured(
            f"{target.word} {target.name}: {' and '.join(others)} would be replaced by one of type {target.type_name}: "
            "say --replace, or choose another name"
        )
    if others:
        return "replaced"
    if not alike:
        return "created"
    return "unchanged" if same(target, alike[0]) else "updated"


def same(target: NamedBlock, saved: object) -> bool:
    """Return True if what is saved has the type and all the values of this one, secrets included."""
    return type(saved) is type(target) and not differing(target, saved)


def differing(target: NamedBlock, saved: object) -> list[str]:
    """Return the names of the fields, secrets among them, in which a target differs from the saved one.

    Where there is none of its type, these are the fields that are given.
    """
    names = field_names(type(target))
    if type(saved) is not type(target):
        return sorted(target.model_fields_set.intersection(names))
    return sorted(name for name in names if getattr(target, name) != getattr(saved, name))


def values_of(target: NamedBlock, *, secrets: bool = False) -> dict[str, Any]:
    """Return the values of a target that differ from the defaults; without secrets, or masked if `secrets`."""
    values: dict[str, Any] = {"type": target.type_name}
    for name in field_names(type(target)):
        value, field = getattr(target, name), type(target).model_fields[name]
        if value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, SecretStr):
            if secrets and value.get_secret_value():
                values[name] = MASK
            continue
        values[name] = value
    dumped = target.model_dump(mode="json", include=set(values) - {"type"})
    return {"type": target.type_name} | {
        name: dumped.get(name, value) for name, value in values.items() if name != "type"
    }


def all_values_of(target: NamedBlock) -> dict[str, Any]:
    """Return all values of a target, those of secrets masked; nothing of what Prefect keeps of its document."""
    plain = set(field_names(type(target))) - set(target.secret_fields())
    return target.model_dump(mode="json", include=plain) | values_of(target, secrets=True)
