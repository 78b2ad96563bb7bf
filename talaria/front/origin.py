"""Where requests come from. Which of them are of our own pages: Host is checked against DNS rebinding, Origin and
Sec-Fetch-Site against other sites. And from which address, behind a proxy."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from talaria.front.keys import Door, header_of
from talaria.settings import LOOPBACK

_DEFAULT = {"http": 80, "https": 443}


def host_is_ours(host: str | None, address: str, door: Door) -> bool:
    """Return True if a Host names us: loopback, the address that was connected to, or a declared name; any port.

    A page of a foreign name that resolves to our address (DNS rebinding) has that name as its Host.
    """
    split = _split(host)
    if split is None:
        return False
    name = split[0]
    if name in LOOPBACK or name in door.hosts:
        return True
    try:
        return ipaddress.ip_address(name) == ipaddress.ip_address(address)
    except ValueError:
        return False


def why_foreign(headers: Iterable[tuple[bytes, bytes]], method: str, schemes: tuple[str, ...]) -> str:
    """Return why a request counts as another site's; "" if it is one of our pages', or of no browser.

    Args:
        schemes: by which our pages may have been loaded.

    Raises:
        ValueError: a header occurs twice.
    """
    headers = list(headers)
    origin, host = header_of(headers, b"origin"), header_of(headers, b"host")
    if origin is not None:
        return "" if _is_origin(origin, host, schemes) else "a page of another origin may not ask"
    site, mode = header_of(headers, b"sec-fetch-site"), header_of(headers, b"sec-fetch-mode")
    foreign = site not in (None, "same-origin", "none")
    opened = mode == "navigate" and method in ("GET", "HEAD") and header_of(headers, b"sec-fetch-dest") == "document"
    return "a page of another origin may not ask" if foreign and not opened else ""


def proves_same_origin(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return True if the browser says that one of our pages sent the request; `why_foreign` has compared Origin."""
    headers = list(headers)
    return header_of(headers, b"origin") is not None or header_of(headers, b"sec-fetch-site") == "same-origin"


def forwarded_for(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the address that a proxy's `X-Forwarded-For` names; "" for none.

    It is the last one: that is what our proxy has seen itself. Those before it are what it was told.
    """
    named = [value for key, value in headers if key == b"x-forwarded-for"]
    last = named[-1].decode("latin-1").rpartition(",")[2].strip().strip('"') if named else ""
    for one in (last, last.rpartition(":")[0], last.partition("]")[0].removeprefix("[")):  # some add a port
        try:
            address = ipaddress.ip_address(one.partition("%")[0])
        except ValueError:
            continue
        return str(getattr(address, "ipv4_mapped", None) or address)
    return ""


def _is_origin(origin: str, host: str | None, schemes: tuple[str, ...]) -> bool:
    scheme, separator, rest = origin.partition("://")
    if not separator or scheme not in schemes:
        return False
    ours, theirs = _split(host), _split(rest)
    if ours is None or theirs is None:
        return False
    default = _DEFAULT[scheme]
    return (ours[0], ours[1] or default) == (theirs[0], theirs[1] or default)


def _split(host: str | None) -> tuple[str, int] | None:
    """Return name and port (0 for none) of a Host; None if it is not valid."""
    if not host or any(letter in host for letter in "/@?#\\ \t,"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    return (name.rstrip(".").lower(), port or 0) if name else None
