"""Targets of a mercure configuration (`mercure.json`), as the file of targets has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from blocks import TYPES
from transfer.errors import Misconfigured

# mercure's fields by ours.
_AT = {"host": "ip", "port": "port", "aet_target": "aet_target", "aet_source": "aet_source"}
_AET = {"pass_sender_aet": "pass_sender_aet", "pass_receiver_aet": "pass_receiver_aet"}
_SSH = {"host": "host", "user": "user", "password": "password", "folder": "folder"}
_WEB = ("url", "qido_url_prefix", "wado_url_prefix", "stow_url_prefix", "access_token", "http_user", "http_password")
_S3 = ("region", "bucket", "prefix", "access_key_id", "secret_access_key")
# By mercure's type, which is ours without dashes.
FIELDS: dict[str, dict[str, str]] = {
    "dicom": _AT | _AET,
    "dicomtls": _AT | _AET | {name: name for name in ("tls_key", "tls_cert", "ca_cert")},
    "sftp": _SSH,
    "rsync": _SSH | {"on_complete": "run_on_complete"},
    "xnat": {name: name for name in ("project_id", "host", "user", "password")},
    "dicomweb": {name: name for name in _WEB},
    "s3": {name: name for name in _S3},
    "folder": {"folder": "folder", "exclude": "exclusion_filter"},
}
COMMON = {"contact": "contact", "description": "comment"}
DIRECTIONS = {"push": "store", "pull": "query", "both": "both"}


def is_mercure(document: Any) -> bool:
    """Return True if a JSON document is a configuration of mercure's."""
    targets = document.get("targets") if isinstance(document, dict) else None
    if not isinstance(targets, dict) or not all(isinstance(one, dict) for one in targets.values()):
        return False
    return any("target_type" in one for one in targets.values())


def read(file: Path) -> dict[str, Any]:
    """Return the configuration in a file.

    Raises:
        Misconfigured: it is none.
    """
    try:
        document = json.loads(file.read_text("utf-8-sig"))
    except ValueError:  # also what is not UTF-8; no word of it, as it may hold a password
        document = None
    except OSError as exc:
        raise Misconfigured(f"{file}: {exc.strerror}") from exc
    if not is_mercure(document):
        raise Misconfigured(f"{file} is no configuration of mercure's: its `targets` have each a `target_type`")
    found: dict[str, Any] = document
    return found


def targets(document: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the targets of a configuration by name, and a sentence for each thing that does not come along.

    Names become lower-case, with dashes for what a name may not have. Files of keys and certificates stay where they
    are: their paths come along.
    """
    found: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    ours = {name.replace("-", ""): name for name in TYPES}
    for given, one in document["targets"].items():
        kind = str(one.get("target_type", ""))
        if kind not in FIELDS:
            notes.append(f"{given}: there is no type like mercure's {kind or 'target without a type'}")
            continue
        name = _name(str(given))
        if name in found:
            notes.append(f"{given}: another target has the name {name}")
            continue
        if name != given:
            notes.append(f"{given} is called {name} here")
        fields = FIELDS[kind] | COMMON
        values = {field: one[theirs] for field, theirs in fields.items() if one.get(theirs) not in (None, "")}
        direction = DIRECTIONS.get(str(one.get("direction") or ""))
        if direction and direction != "store":
            values["direction"] = direction
        known = {*fields.values(), "target_type", "direction"}
        notes += [f"{given}: {field} does not come along" for field in sorted(set(one) - known) if one[field]]
        found[name] = {"type": ours[kind], **values}
    for section in ("rules", "modules"):
        if document.get(section):
            notes.append(f"{section} do not come along: {len(document[section])}")
    return found, notes


def _name(given: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", given.lower()).strip("-") or "target"
