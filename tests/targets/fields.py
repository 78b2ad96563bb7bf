"""Fields of each type: the least that it needs, and its secrets."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from blocks import EXTENSIONS, TYPES, Target

SECRET = "s3cr3t-value-of-a-test"
# The least that each of our own types needs.
NEEDED: dict[str, dict[str, Any]] = {
    name: import_module(f"tests.targets.{name.replace('-', '_')}").NEEDED for name in TYPES if name not in EXTENSIONS
}


def secrets_of(cls: type[Target]) -> list[str]:
    return [name for name, field in cls.model_fields.items() if "SecretStr" in str(field.annotation)]


def filled(name: str) -> Target:
    """A target of this type whose password, or the like, is SECRET."""
    values = dict(NEEDED[name])
    for field in ("password", "http_password", "secret_access_key", "tls_key_password"):
        if field in TYPES[name].model_fields:
            values[field] = SECRET
            values |= {"http_user": "u"} if field == "http_password" else {}
            values |= {"access_key_id": "AK"} if field == "secret_access_key" else {}
    return TYPES[name](**values)
