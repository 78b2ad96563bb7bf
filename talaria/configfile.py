"""The file of targets, sources and rules as text: parsed, variables and files in place of their names.

Each `apply` takes the whole file, and of it the section that it is about. Imports nothing heavy.
"""

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
SHOWN = 40  # characters of a word that is not known
SECTIONS = {"targets": "target", "sources": "source", "notify": "rule"}  # and what messages call an entry of each


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML's usual reader would silently drop the first."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:bool":  # `on:` is a word, and not true
            key.tag = "tag:yaml.org,2002:str"
    own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # `<<` takes in another one's
    keys = [loader.construct_object(key) for key in own]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def document(path: Path, section: str = "targets") -> dict[Any, Any]:
    """Read a section of a file, a mapping of names to values, as it stands there.

    Raises:
        Misconfigured: the file can't be read, is not such a file, or has no such section.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise Misconfigured(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise Misconfigured(f"{path}: is not UTF-8 text") from exc
    found: dict[Any, Any] = sections(text, str(path)).get(section, {})
    if not found:
        raise Misconfigured(f"{path}: names no {SECTIONS[section]}")
    return found


def sections(text: str, path: str) -> dict[str, dict[Any, Any]]:
    """Return the sections of a file's text, as they stand there.

    Args:
        path: what messages call the file.

    Raises:
        Misconfigured: it is not such a file.
    """
    try:
        document = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise Misconfigured(f"{path}: {what_is_wrong_with_yaml(exc)}") from None  # its own words hold the source
    keys = " or ".join(f"`{name}`" for name in SECTIONS)
    if not isinstance(document, dict) or not document:
        raise Misconfigured(f"{path}: expected a mapping with the key {keys}")
    targets = document.get("targets")
    if isinstance(targets, dict) and any(isinstance(one, dict) and "target_type" in one for one in targets.values()):
        raise Misconfigured(f"{path}: is a configuration of mercure's: `talaria target import-mercure` takes it")
    for name, entries in document.items():
        if name not in SECTIONS:
            raise Misconfigured(f"{path}: unknown key {str(name)[:SHOWN]!r}: expected {keys}")
        if not isinstance(entries, dict):
            raise Misconfigured(f"{path}: `{name}` must be a mapping of names to {SECTIONS[name]}s")
    return document


def read_filled(path: Path, section: str = "targets") -> dict[str, Any]:
    """Read the values of a section by name, all of them text, numbers, lists or mappings, and filled in.

    Raises:
        Misconfigured: every value that can't be filled in, each in a line.
    """
    found: dict[str, Any] = {}
    wrong = []
    for name, values in document(path, section).items():
        try:
            found[str(name)] = _sendable(values, f"{SECTIONS[section]} {name}", path.parent)
        except Misconfigured as exc:
            wrong.append(exc.message)
    if wrong:
        raise Misconfigured("\n".join(wrong))
    return found


def _sendable(values: Any, what: str, folder: Path) -> Any:
    if not isinstance(values, dict):
        return None
    sent = {}
    for field, value in values.items():
        where = f"{what}: {field}"
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as exc:  # a date, bytes, a set, a value that holds itself
            raise Misconfigured(f"{where}: must be text: put it in quotes, or leave the field out") from exc
        sent[str(field)] = filled(value, where, folder) if field != "type" else value
    return sent


def filled(value: Any, where: str, folder: Path) -> Any:
    """Replace the names of variables and files by their values, also within lists and mappings."""
    if isinstance(value, list):
        return [filled(one, where, folder) for one in value]
    if isinstance(value, dict):
        return {key: filled(one, where, folder) for key, one in value.items()}
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
