"""URLs of servers, as fields of targets have them."""

from __future__ import annotations

from urllib.parse import urlsplit

from blocks.base import CONTROL, check_host


def check_url(value: str, *, credentials: str, schemes: str = "http:// or https://", query: bool = False) -> str:
    """Return an http(s) URL without a slash at its end, or raise ValueError that says what to change.

    Args:
        credentials: the fields in which user and password belong.
        schemes: what a URL of this field may begin with, for messages.
        query: whether it may have a query.
    """
    value = value.strip()
    if CONTROL.search(value) or " " in value or not value.isascii():
        raise ValueError("a URL must be ASCII without blanks: encode other characters with %")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as exc:
        raise ValueError(f"not a URL: {exc}") from exc
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"must begin with {schemes}")
    if parts.username is not None or parts.password is not None:
        # Without the value, which holds the password.
        raise ValueError(f"must not hold a user or password: use {credentials}")
    if not parts.hostname or port == 0:
        raise ValueError("names no host")
    check_host(parts.hostname)
    if parts.fragment or (parts.query and not query):
        raise ValueError("must end with its path: remove what follows ? or #")
    if any(part in (".", "..") for part in parts.path.split("/")):
        raise ValueError("must not hold '.' or '..' in its path")
    value = parts.scheme + value[len(parts.scheme) :]  # in lower case
    return value if query else value.rstrip("/")
