"""Targets that are reached over HTTP, perhaps through a proxy."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from blocks.base import CONTROL, Target, check_host, is_masked
from blocks.fields import Group, about

ENVIRONMENT = "environment"


def proxy_field(whose: str) -> Any:
    """Return the field of a proxy; `whose` environment it may be taken from."""
    return Field(
        default=SecretStr(""),
        description="HTTP proxy to use, as in http://user:password@proxy.example.org:3128; environment takes "
        f"HTTPS_PROXY, HTTP_PROXY and NO_PROXY of the {whose}; empty for none.",
        title="Proxy",
        json_schema_extra=about(Group.CONNECTION, advanced=True, placeholder="http://proxy.example.org:3128"),
    )


class Proxied(Target):
    """What DICOMweb, S3 and XNAT targets have in addition to other targets."""

    proxy: SecretStr = proxy_field("worker")

    @field_validator("proxy")
    @classmethod
    def _proxy(cls, value: SecretStr) -> SecretStr:
        return checked_proxy(value)


def checked_proxy(value: SecretStr) -> SecretStr:
    """Return the value of such a field, as `check_proxy` gives it, or masked as it is."""
    return value if is_masked(value) else SecretStr(check_proxy(value.get_secret_value()))


def check_proxy(value: str) -> str:
    """Return the URL of a proxy, `environment` or "", or raise ValueError, which never holds the value."""
    value = value.strip()
    if value in ("", ENVIRONMENT):
        return value
    form = "write http://host:port, with user:password@ before the host if the proxy needs them, or environment"
    if CONTROL.search(value) or " " in value or not value.isascii():
        raise ValueError(f"proxy must be ASCII without blanks: {form}; encode other characters with %")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as exc:
        raise ValueError(f"proxy is not a URL: {form}") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"proxy is not the URL of an HTTP proxy: {form}")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"proxy holds more than scheme, host and port: {form}")
    if parts.username == "" or (parts.password and not parts.username):
        raise ValueError(f"proxy has a password but no user: {form}")
    check_host(parts.hostname)
    return value
