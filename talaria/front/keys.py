"""Proofs of identity: the worker's and the machine's own credentials, tokens, sessions, a trusted proxy's header."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.requests import cookie_parser

from talaria.front.access import Identity, Role
from talaria.front.sessions import COOKIE, SAFE_COOKIE, Sessions
from talaria.front.tokens import Tokens
from talaria.front.users import Users
from talaria.settings import auth_string, worker_auth
from transfer.home import Home

MACHINE = "talaria"  # the name of whoever has the machine's own token


@dataclass(frozen=True)
class Door:
    """The settings of the front door.

    Attributes:
        auth: whether it asks for a login.
        hosts: names, besides loopback's and the address itself, that a request's Host may have.
        tls: whether the outer socket speaks TLS.
        peers: networks of the proxies that the outer socket trusts; none if it is not behind one.
        user_header: header in which such a proxy names who has logged in, "" for none.
        proxy_role: role of those whom it names and who are not in the users' file.
        inner_port: port of the loopback socket that the product's own processes use, 0 for the outer one.
    """

    auth: bool = True
    hosts: frozenset[str] = frozenset()
    tls: bool = False
    peers: tuple[str, ...] = ()
    user_header: str = ""
    proxy_role: Role | None = None
    inner_port: int = 0
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "networks", tuple(ipaddress.ip_network(peer, strict=False) for peer in self.peers))

    def trusts(self, address: str) -> bool:
        """Return True if a connection comes from a declared proxy."""
        try:
            one = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        plain = getattr(one, "ipv4_mapped", None) or one
        return any(plain.version == network.version and plain in network for network in self.networks)


class KeyRing:
    """All credentials that a state directory knows."""

    def __init__(self, home: Home) -> None:
        self.users, self.tokens, self.sessions = Users(home), Tokens(home), Sessions(home)
        self._worker, self._machine = worker_auth(home), auth_string(home)

    def of_header(self, header: str, *, local: bool) -> Identity | None:
        """Return the identity that an `Authorization` header proves, None for none: `Bearer`, or `Basic` as by Prefect.

        Args:
            local: whether the request came to us over loopback, without a proxy.
        """
        scheme, _, value = header.strip().partition(" ")
        value = value.strip()
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                return None
        elif scheme.lower() != "bearer":
            return None
        return self.of_text(value, local=local)

    def of_text(self, text: str, *, local: bool) -> Identity | None:
        """Return the identity of a credential; a token may have a name and a colon before it."""
        if _same(text, self._worker):
            return Identity("worker", Role.WORKER, "worker")
        if _same(text, self._machine) and local:
            return Identity(MACHINE, Role.ADMIN, "machine")
        return self.tokens.verify(text.rpartition(":")[2])

    def of_login(self, name: str, password: str, *, local: bool) -> Identity | None:
        """Return the identity that a login proves, or None; without a name, the password is the machine's token."""
        name = name.strip()
        text = password.strip()  # blanks are of a password, not of the token
        if not name or _same(f"{name}:{text}", self._machine):
            return self.of_text(text if ":" in text or not name else f"{name}:{text}", local=local)
        return self.users.verify(name, password)

    def session_for(self, one: Identity) -> str | None:
        """Return the cookie of a new session; None for the worker and for tokens, which need none."""
        if one.how == "machine":
            return self.sessions.begin(one.name, self._machine_stamp, "machine")
        if one.how == "session":
            return self.sessions.begin(one.name, self.users.stamp(one.name), "session")
        return None

    def of_cookies(self, header: str, *, tls: bool, local: bool) -> tuple[Identity, str] | None:
        """Return the identity of the session in a request's cookies, and its cookie; None if there is none."""
        cookie = cookie_parser(header).get(SAFE_COOKIE if tls else COOKIE, "")
        session = self.sessions.read(cookie) if cookie else None
        if session is None:
            return None
        name, stamp, how = session
        if how == "machine":
            ours = _same(stamp, self._machine_stamp) and local
            return (Identity(name, Role.ADMIN, "machine"), cookie) if ours else None
        role = self.users.role_of(name)
        if role is None or not _same(stamp, self.users.stamp(name)):
            return None
        return Identity(name, role, "session"), cookie

    @property
    def _machine_stamp(self) -> str:
        return hashlib.sha256(self._machine.encode()).hexdigest()[:16]

    def of_proxy(self, name: str, door: Door) -> Identity | None:
        """Return the identity that a trusted proxy names; the users' file decides the role."""
        role = self.users.role_of(name) or door.proxy_role
        return Identity(name, role, "proxy") if role and name.isprintable() and len(name) <= 128 else None


def header_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    """Return the value of a header; None if it is not there.

    Raises:
        ValueError: it is there more than once.
    """
    values = [value for key, value in headers if key == name]
    if len(values) > 1:
        raise ValueError(f"more than one header {name.decode()}")
    return values[0].decode("latin-1") if values else None


def _same(given: str, known: str) -> bool:
    return bool(known) and hmac.compare_digest(given.encode(), known.encode())
