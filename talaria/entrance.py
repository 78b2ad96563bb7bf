"""Where and how `talaria up` can be reached, and what must be set before other machines can reach it."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from talaria.listener import is_loopback
from talaria.settings import Settings
from transfer import roots
from transfer.home import Home

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_HEADER = re.compile(r"[A-Za-z0-9-]+")


@dataclass(frozen=True)
class Entrance:
    """Where the front door is, and what it demands from clients.

    Attributes:
        port: 0 for any that is free.
        auth: whether it asks for a login.
        hosts: names that a request may address, besides loopback's and its own address.
        certificate, key: files for TLS, "" for none.
        peers: addresses or networks of the proxy that it is behind; none if it isn't.
        user_header, proxy_role: how that proxy names who has logged in, and the role of those who aren't users here.
        upstream: the API of a Prefect server elsewhere, "" for the embedded one.
    """

    host: str
    port: int
    auth: bool = True
    hosts: tuple[str, ...] = ()
    certificate: str = ""
    key: str = ""
    peers: tuple[str, ...] = ()
    user_header: str = ""
    proxy_role: str = ""
    upstream: str = ""

    @property
    def apart(self) -> bool:
        """Whether our own processes have a socket of their own, without TLS and proxy."""
        return bool(self.certificate or self.peers)


def entrance(settings: Settings, home: Home, host: str, port: int, *, auth: bool, upstream: str = "") -> Entrance:
    """Return how `talaria up` is to be reached.

    Raises:
        ValueError: that would let in people who must not come in; the message says what to set.
    """
    certificate, key = (str(Path(one).expanduser().absolute()) if one else "" for one in _pair(settings))
    if not auth and (not is_loopback(host) or settings.behind_proxy):
        raise ValueError(f"--no-auth is for loopback only, not for {'a proxy' if settings.behind_proxy else host}")
    outward = not is_loopback(host) or settings.behind_proxy
    if outward:
        _check_outward(settings, home, host, bool(certificate))
    if certificate:
        _check_certificate(certificate, key)
    names = {one.strip().rstrip(".").lower() for one in settings.hosts.split(",") if one.strip()}
    if wrong := sorted(name for name in names if not _NAME.fullmatch(name)):
        raise ValueError(f"TALARIA_HOSTS: {wrong[0]!r} is not the name of a host (without scheme and port)")
    if outward and not settings.behind_proxy:
        names |= {socket.gethostname().lower()} | ({host.lower()} if _NAME.fullmatch(host.lower()) else set())
    return Entrance(
        host,
        port,
        auth=auth,
        hosts=tuple(sorted(names)),
        certificate=certificate,
        key=key,
        peers=_peers(settings) if settings.behind_proxy else (),
        user_header=_header(settings) if settings.behind_proxy else "",
        proxy_role=_role(settings) if settings.behind_proxy else "",
        upstream=upstream,
    )


def _check_outward(settings: Settings, home: Home, host: str, tls: bool) -> None:
    from talaria.front.users import Users

    where = "--behind-proxy" if settings.behind_proxy else f"--host {host}"
    lacks = []
    if not tls and not settings.behind_proxy:
        lacks.append("--tls-cert and --tls-key, or --behind-proxy (passwords would go in the clear)")
    if not Users(home).all() and not (settings.behind_proxy and settings.proxy_user_header):
        lacks.append("a user (`talaria user add NAME --role admin`)")
    if settings.behind_proxy and not settings.hosts:
        lacks.append("TALARIA_HOSTS, the names by which the proxy is reached")
    given = {roots.SOURCES: settings.sources, roots.PLACES: settings.places}
    lacks += [f"{name}, folders separated by `:`" for name in roots.missing(given)]
    if lacks:
        raise ValueError(f"{where} lets others in, and needs: {'; '.join(lacks)}")


def _pair(settings: Settings) -> tuple[str, str]:
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ValueError("--tls-cert and --tls-key go together")
    if settings.tls_cert and settings.behind_proxy:
        raise ValueError("--behind-proxy is for a proxy that ends TLS: leave out --tls-cert and --tls-key")
    return settings.tls_cert, settings.tls_key


def _check_certificate(certificate: str, key: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, "")
    except (OSError, ssl.SSLError) as exc:
        raise ValueError(f"--tls-cert {certificate} and --tls-key {key} can't be used: {exc}") from exc


def _peers(settings: Settings) -> tuple[str, ...]:
    peers = tuple(one.strip() for one in settings.proxy_peers.split(",") if one.strip())
    for one in peers:
        try:
            ipaddress.ip_network(one, strict=False)
        except ValueError as exc:
            raise ValueError(f"TALARIA_PROXY_PEERS: {one!r} is not an address or network") from exc
    if not peers:
        raise ValueError("TALARIA_PROXY_PEERS is empty: it names the addresses of the proxy")
    return peers


def _header(settings: Settings) -> str:
    if settings.proxy_user_header and not _HEADER.fullmatch(settings.proxy_user_header):
        raise ValueError(f"TALARIA_PROXY_USER_HEADER: {settings.proxy_user_header!r} is not the name of a header")
    return settings.proxy_user_header


def _role(settings: Settings) -> str:
    from talaria.front.access import Role

    if settings.proxy_role:
        Role.of(settings.proxy_role)
    return settings.proxy_role
