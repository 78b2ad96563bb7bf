"""HTTP proxies: which one a server is reached through, and tunnels to servers with TLS (RFC 9110 section 9.3.6)."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from socket import socket
from urllib import request as environment
from urllib.parse import quote, unquote, urlsplit

from protocols.http.head import head, status_line
from protocols.net.connection import Connection, connect, handshake, place
from protocols.net.tls import Tls
from protocols.net.words import clean
from transfer.errors import Denied, DispatchError, Misconfigured, NotTrusted, Unreachable

ENVIRONMENT = "environment"  # the setting that takes the worker's own proxies
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Proxy:
    """A proxy, and our credentials for it."""

    scheme: str
    host: str
    port: int
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @classmethod
    def of(cls, setting: str, url: str) -> Proxy | None:
        """Return the proxy that a target's setting means for a URL; None for a direct connection.

        Raises:
            Misconfigured: the environment names something other than an HTTP proxy.
        """
        setting = setting.strip()
        if setting != ENVIRONMENT:
            return cls._parsed(setting) if setting else None
        parts = urlsplit(url)
        found = environment.getproxies_environment()
        named = found.get(parts.scheme) or found.get("all")
        if not named or _bypassed(parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme], found.get("no", "")):
            return None
        return cls._parsed(named if "://" in named else f"http://{named}")

    @classmethod
    def _parsed(cls, url: str) -> Proxy:
        # No message has the value, which may hold a password; nor is a part of one taken for host and port.
        try:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORTS[parts.scheme]
        except (ValueError, KeyError):
            parts, port = urlsplit(""), 0
        if not parts.hostname or parts.path.strip("/") or parts.query or parts.fragment:
            raise Misconfigured(
                "the proxy is not an HTTP proxy: write http://host:port, and special characters of a password with %"
            )
        return cls(parts.scheme, parts.hostname, port, unquote(parts.username or ""), unquote(parts.password or ""))

    @property
    def url(self) -> str:
        """The proxy, for messages."""
        return f"{self.scheme}://{place(self.host, self.port)}"

    @property
    def full_url(self) -> str:
        """The proxy's URL with our credentials; never for a message."""
        user = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if self.user else ""
        return f"{self.scheme}://{user}{place(self.host, self.port)}"

    @property
    def secrets(self) -> frozenset[str]:
        """What no message may show."""
        return frozenset((self.password, self._credentials)) - {""} if self.password else frozenset()

    @property
    def authorization(self) -> dict[str, str]:
        """The field with our credentials (RFC 9110 section 11.7.2), if the setting has them."""
        return {"Proxy-Authorization": f"Basic {self._credentials}"} if self.user else {}

    @property
    def _credentials(self) -> str:
        return base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def connect(self, tls: Tls, timeout_s: float, check: Callable[[], None]) -> socket:
        """Connect to the proxy itself.

        Args:
            tls: whom to trust, for a proxy that is spoken to over TLS.

        Raises:
            DispatchError: as `connect` and `handshake` do; the message names the proxy.
        """
        try:
            sock = connect(self.host, self.port, timeout_s, check)
            if self.scheme == "https":
                return handshake(sock, self.host, self.url, Tls(ca=tls.ca), timeout_s, check)
        except (Unreachable, NotTrusted, Misconfigured) as exc:
            exc.message = f"the proxy can't be used: {exc.message}"
            exc.args = (exc.message,)
            raise
        return sock

    def tunnel(self, sock: socket, host: str, port: int, timeout_s: float, check: Callable[[], None]) -> None:
        """Make a tunnel to a server from a connection to the proxy, which is closed if that fails.

        Raises:
            Denied, Unreachable, Misconfigured: the proxy refuses. Interrupted, TimedOut: it gives no answer.
        """
        connection = Connection(sock, f"proxy {self.url}", timeout_s, check)
        target = place(host, port)
        fields = {"Host": target, **self.authorization}
        lines = [f"CONNECT {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        try:
            connection.send(memoryview("\r\n".join(lines).encode("latin-1")))
            self._await_passage(connection, target)
        except BaseException:
            connection.close()
            raise

    def _await_passage(self, connection: Connection, target: str) -> None:
        try:
            while (answer := head(connection.head(status_line))).status < 200:
                pass
        except ValueError as exc:
            raise self._no_proxy() from exc
        if answer.status >= 300:
            raise self.refusal(answer.status, answer.reason, target)
        if connection.ahead:  # the server can't have spoken before us
            raise self._no_proxy()

    def _no_proxy(self) -> DispatchError:
        return Misconfigured(f"what answers at {self.url} is not an HTTP proxy: correct proxy")

    def refusal(self, status: int, reason: str, target: str) -> DispatchError:
        """Return the error for the proxy's refusal to pass a request on."""
        said = f"the proxy {self.url} answers {status} {clean(reason, self.secrets)}".rstrip()
        if status == 407 or (status == 401 and self.user):  # tinyproxy confuses them
            what = (
                "refuses these credentials: correct user and password"
                if self.user
                else "asks for credentials: add user:password@"
            )
            return Denied(f"{said}: it {what} in proxy")
        if status in (401, 403):
            return Denied(f"{said}: it does not let us through to {target}")
        if status == 429 or status >= 500:
            return Unreachable(f"{said}: it does not reach {target}")
        return Misconfigured(f"{said}: it makes no connection to {target}: correct proxy")


def _bypassed(host: str, port: int, no_proxy: str) -> bool:
    """Return True if NO_PROXY names a server.

    Its parts are names, which mean what lies below them as well, with or without a dot or `*.` before them; addresses,
    also of IPv6, in brackets or not; networks as 10.0.0.0/8; each with a port or without; and `*`, which means all.
    """
    host = host.lower().rstrip(".").partition("%")[0]
    for entry in no_proxy.lower().replace(",", " ").split():
        if entry == "*":
            return True
        name, wanted = _split(entry)
        if wanted not in ("", str(port)):
            continue
        if _within(host, name):
            return True
        name = name.removeprefix("*").strip(".")
        if name and (host == name or host.endswith(f".{name}")):
            return True
    return False


def _split(entry: str) -> tuple[str, str]:
    """Return the name, address or network of a part of NO_PROXY, and its port, "" for none."""
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
        return name, rest.removeprefix(":")
    name, colon, port = entry.rpartition(":")
    return (name, port) if colon and ":" not in name else (entry, "")


def _within(host: str, network: str) -> bool:
    """Return True if both are addresses, and one is the other or lies in it."""
    try:
        return ip_address(host) in ip_network(network, strict=False)
    except ValueError:
        return False
