"""HTTP proxies: which one a server is reached through, and tunnels to servers with TLS (RFC 9110 section 9.3.6)."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from socket import socket
from urllib import request as environment
from urllib.parse import quote, unquote, urlsplit

from protocols.http.head import head, status_line
from protocols.net.connection import Connection, connect, handshake, place
from protocols.net.tls import Tls
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
        authority = f"{parts.hostname}:{parts.port or DEFAULT_PORTS[parts.scheme]}"
        if not named or _bypassed(authority, found):
            return None
        return cls._parsed(named if "://" in named else f"http://{named}")

    @classmethod
    def _parsed(cls, url: str) -> Proxy:
        parts = urlsplit(url)
        try:
            port = parts.port or DEFAULT_PORTS[parts.scheme]
        except (ValueError, KeyError) as exc:
            # Without the value, which may hold a password.
            raise Misconfigured("the proxy is not an HTTP proxy: write http://host:port") from exc
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        return cls(parts.scheme, parts.hostname or "", port, user, password)

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
        said = f"the proxy {self.url} answers {status} {reason}".rstrip()
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


def _bypassed(authority: str, found: dict[str, str]) -> bool:
    """Return True if NO_PROXY names the server."""
    return bool(environment.proxy_bypass_environment(authority, found))  # type: ignore[attr-defined]
