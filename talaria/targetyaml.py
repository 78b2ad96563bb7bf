"""`targets.yaml` as text: parsed, with variables and files in place of their names. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from transfer.errors import Misconfigured
from transfer.validation import what_is_wrong_with_yaml

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
FILE = "file:"


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML's usual reader would silently drop the first."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def document(path: Path) -> dict[Any, Any]:
    """Read the mapping of names to targets of a file, as it stands there.

    Raises:
        Misconfigured: it can't be read, or is not such a file.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as exc:
        raise Misconfigured(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise Misconfigured(f"{path}: is not UTF-8 text") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise Misconfigured(f"{path}: {what_is_wrong_with_yaml(exc)}") from None  # its own words hold the source
    if not isinstance(document, dict) or set(document) != {"targets"} or not isinstance(document["targets"], dict):
        raise Misconfigured(f"{path}: expected one key `targets` with a mapping of names to targets")
    if not document["targets"]:
        raise Misconfigured(f"{path}: names no target")
    found: dict[Any, Any] = document["targets"]
    return found


def read_filled(path: Path) -> dict[str, Any]:
    """Read the values of a file's targets by name, all of them text, numbers, lists or mappings, and filled in.

    Raises:
        Misconfigured: every value that can't be filled in, each in a line.
    """
    found: dict[str, Any] = {}
    wrong = []
    for name, values in document(path).items():
        try:
            found[str(name)] = _sendable(values, str(name), path.parent)
        except Misconfigured as exc:
            wrong.append(exc.message)
    if wrong:
        raise Misconfigured("\n".join(wrong))
    return found


def _sendable(values: Any, name: str, folder: Path) -> Any:
    if not isinstance(values, dict):
        return None
    sent = {}
    for field, value in values.items():
        where = f"target {name}: {field}"
        sent[str(field)] = filled(value, where, folder) if field != "type" else value
        try:
            json.dumps(sent[str(field)])
        except (TypeError, ValueError) as exc:  # a date, bytes, a set, a value that holds itself
            raise Misconfigured(f"{where}: must be text: put it in quotes, or leave the field out") from exc
    return sent


def filled(value: Any, where: str, folder: Path) -> Any:
    """Replace the names of variables and files by their values."""
    if not isinstance(value, str):
        return value
    if value.startswith(FILE) and not value.startswith("file://"):  # file:// is a DICOMweb folder
        path = folder / Path(value.removeprefix(FILE)).expanduser()
        try:
            return path.read_text(encoding="utf-8").strip("\r\n")
        except OSError as exc:
            raise Misconfigured(f"{where}: can't read {path}: {exc.strerror or exc}") from exc
        except UnicodeDecodeError as exc:
            raise Misconfigured(f"{where}: {path} is not UTF-8 text") from exc

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise Misconfigured(f"{where}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    if "${" in _VARIABLE.sub("", value):
        raise Misconfigured(
            f"{where}: after ${{ the name of an environment variable and }} must follow, as in ${{NAME}}; "
            "a value that holds these characters is given by file:PATH"
        )
    return _VARIABLE.sub(variable, value)
