"""What pydantic finds wrong with a value, as a sentence that says what is allowed.

The value is not repeated, unless a validator of ours does so in its own message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

# By pydantic's own names of its errors; `{range}` is what the field's bounds allow.
_WHOLE = "must be a whole number{range}"
_NUMBER = "must be a number{range}"
_SAID = {
    "missing": "is required",
    "extra_forbidden": "unknown field{names}",
    "model_type": "must be written with its fields, as in {{{first}: …}}",
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
    "too_short": "must not be empty",
    "too_long": "must be at most {max_length}, and are {actual_length}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "list_type": "must be a list, as in [one, two]",
    "dict_type": "must be a mapping",
}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
AET_CHARS = 16  # PS3.5 table 6.2-1, VR AE
OWN = "Value error, "  # what pydantic puts before the message of a validator
NO_NUMBER: tuple[()] = ()  # stands for a value that is none
_HALF = re.compile("[\ud800-\udfff]")
_PARSING = re.compile(", unable to parse string as an? [a-z]+")


def numbers_only(values: Any, fields: Mapping[str, Any]) -> Any:
    """Return a model's values, for a validator before all others, with no truth values where numbers are wanted.

    pydantic takes true for 1: `max_attempts: yes` would be one attempt, and `older_than_s: true` one second.

    Args:
        fields: `model_fields` of the model.
    """
    if not isinstance(values, dict):
        return values
    return {
        name: NO_NUMBER if isinstance(value, bool) and name in fields and _is_number(fields[name].annotation) else value
        for name, value in values.items()
    }


def _is_number(annotation: Any) -> bool:
    kinds = {annotation, *get_args(annotation)}
    return bool(kinds & {int, float}) and not kinds & {bool, str}


def is_text(value: Any) -> bool:
    """Return True if all text in a value from JSON can be written as UTF-8: JSON may hold half of a character."""
    left = [value]  # no calls of itself: JSON may be nested deeper than Python calls
    while left:
        one = left.pop()
        if isinstance(one, str) and _HALF.search(one):
            return False
        if isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
    return True


def what_is_wrong(errors: Iterable[Mapping[str, Any]], fields: Mapping[str, Any]) -> str:
    """Return one line that names everything that is wrong with a model's values.

    Args:
        errors: as `ValidationError.errors()` gives them.
        fields: `model_fields` of the model.
    """
    return "; ".join(_words(error, fields) for error in errors)


# What PyYAML finds wrong, by a part of its words, which may quote the source (it may hold a password), and ours.
_YAML = {
    "stands twice": "a key stands twice",
    "\\t": "indent with blanks, not with a tab",
    "mapping values are not allowed": "a colon is not expected here: put text with a colon in quotes",
    "could not find expected ':'": "a colon after the key is missing, or a quote is not closed",
    "alias": "text that begins with * must stand in quotes",
    "anchor": "text that begins with & must stand in quotes",
    "cannot start any token": "text that begins with this character must stand in quotes",
    "escape": "a backslash within double quotes is not valid: use single quotes",
    "constructor for the tag": "text that begins with ! must stand in quotes",
    "tag": "text that begins with ! must stand in quotes",
    "end of stream": "a quote is not closed",
    "document separator": "a quote is not closed",
    "expected ',' or": "a comma or a closing bracket is missing",
    "expected <block end>": "the indentation is not that of the lines above, or a quote is missing",
    "block": "the indentation is not that of the lines above",
    "unhashable": "a key must be a word",
    "expected the node content": "a value is missing, or a bracket is not closed",
}


def what_is_wrong_with_yaml(error: BaseException) -> str:
    """Return what is wrong with a YAML file, and where, without showing any of its content.

    Args:
        error: what PyYAML raised; its own words show the line, which may hold a password.
    """
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if "special characters" in str(getattr(error, "reason", "")):
        return "holds a character that YAML does not allow"
    words = re.sub(r"'(?!\\t')[^']*'(?= that| but)", "", str(getattr(error, "problem", "") or ""))
    said = next((ours for part, ours in _YAML.items() if part in words), "")
    if isinstance(error, ValueError) and not said:
        said = "a date or number is not valid: put text in quotes"
    return f"{where}not valid YAML" + (f": {said}" if said else "")


def meant(word: str, known: Iterable[str]) -> str:
    """Return a question with the word that was probably meant; "" if none is similar."""
    from difflib import get_close_matches

    plainly = re.sub(r"[\s.+_-]+", "-", word.strip().lower())
    names = {re.sub(r"[\s.+_-]+", "-", name): name for name in known}
    found = get_close_matches(plainly, names, n=1, cutoff=0.6)
    return f"did you mean {names[found[0]]}?" if found else ""


def plain(text: str) -> str:
    """Return a message that was made of pydantic's words in our own words."""
    text = _PARSING.sub("", text.replace(OWN, ""))
    return text.replace("Input should be a valid integer", "must be a whole number").replace("Input should", "must")


def _words(error: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    where, context = ".".join(str(part) for part in error["loc"]), error.get("ctx", {})
    said = _SAID.get(error["type"])
    if said is None:
        said = plain(str(error["msg"]))
    else:
        field = fields.get(str(error["loc"][0])) if error["loc"] else None
        names, first = _inner(field)
        names = f": there are {names}" if names and len(error["loc"]) > 1 else ""
        bounds = _range(getattr(field, "metadata", ()), context)
        said = said.format(**context | {"range": bounds, "names": names, "first": first})
    # Validators that look at several fields name them by themselves.
    return said if not where or said.startswith(f"{where} ") else f"{where}: {said}"


def _inner(field: Any) -> tuple[str, str]:
    """Return the names of the fields of a list's elements, and the first; nothing where they have none."""
    kinds = get_args(getattr(field, "annotation", None))
    names = next((list(one.model_fields) for one in kinds if hasattr(one, "model_fields")), [])
    return ", ".join(names), next(iter(names), "")


def _range(metadata: Iterable[object], context: Mapping[str, Any]) -> str:
    """Return the bounds of a number: the field's or, if they aren't known, the one that the error names."""
    metadata = list(metadata)
    bounds = {
        name: getattr(mark, name) for name in _BOUNDS for mark in metadata if getattr(mark, name, None) is not None
    }
    bounds = bounds or {name: context[name] for name in _BOUNDS if name in context}
    parts = [f"{how} {bounds[name]}" for name, how in _BOUNDS.items() if name in bounds]
    return ", " + " and ".join(parts) if parts else ""


def check_aet(value: str) -> str:
    """Return an AE title without its insignificant blanks, or raise ValueError (PS3.5 table 6.2-1, VR AE)."""
    value = value.strip(" ")
    if not 1 <= len(value) <= AET_CHARS:
        raise ValueError(f"AE title {value!r}: must have 1 to {AET_CHARS} characters")
    if "\\" in value or not value.isascii() or not value.isprintable():
        raise ValueError(f"AE title {value!r}: use ASCII letters, digits, blanks and signs, but no backslash")
    return value
