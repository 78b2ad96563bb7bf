"""What pydantic finds wrong with a value, in a sentence that says what is allowed.

The value is not repeated, unless a validator of ours does so in its own message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# By pydantic's own names of its errors; `{range}` is what the field's bounds allow.
_WHOLE = "must be a whole number{range}"
_NUMBER = "must be a number{range}"
_SAID = {
    "missing": "is required",
    "extra_forbidden": "is no field of this type",
    "string_type": "must be text: put it in quotes, or leave the field out",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": _NUMBER,
    "greater_than": "must be a number{range}",
    "greater_than_equal": "must be a number{range}",
    "less_than": "must be a number{range}",
    "less_than_equal": "must be a number{range}",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "enum": "must be {expected}",
    "literal_error": "must be {expected}",
}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
OWN = "Value error, "  # what pydantic puts before the message of a validator
_PARSING = re.compile(", unable to parse string as an? [a-z]+")


def what_is_wrong(errors: Iterable[Mapping[str, Any]], fields: Mapping[str, Any]) -> str:
    """Say all that is wrong with a model's values on one line.

    Args:
        errors: as `ValidationError.errors()` gives them.
        fields: `model_fields` of the model.
    """
    return "; ".join(_words(error, fields) for error in errors)


def plain(text: str) -> str:
    """Take what is pydantic's own out of a message that others made of its words."""
    text = _PARSING.sub("", text.replace(OWN, ""))
    return text.replace("Input should be a valid integer", "must be a whole number").replace("Input should", "must")


def _words(error: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    where, told = ".".join(str(part) for part in error["loc"]), error.get("ctx", {})
    said = _SAID.get(error["type"])
    if said is None:
        said = plain(str(error["msg"]))
    else:
        field = fields.get(str(error["loc"][0])) if error["loc"] else None
        said = said.format(range=_range(getattr(field, "metadata", ()), told), expected=told.get("expected"))
    # Validators that look at several fields name them by themselves.
    return said if not where or said.startswith(f"{where} ") else f"{where}: {said}"


def _range(metadata: Iterable[object], told: Mapping[str, Any]) -> str:
    """The bounds of a number: those of the field or, where they aren't known, the one that the error tells."""
    metadata = list(metadata)
    bounds = {
        name: getattr(mark, name) for name in _BOUNDS for mark in metadata if getattr(mark, name, None) is not None
    }
    bounds = bounds or {name: told[name] for name in _BOUNDS if name in told}
    parts = [f"{how} {bounds[name]}" for name, how in _BOUNDS.items() if name in bounds]
    return ", " + " and ".join(parts) if parts else ""
