"""A server that requests go to: scheme, host and port, and how to reach it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from socket import socket
from ssl import SSLSocket
from urllib.parse import urlsplit

from protocols.http.proxy import Proxy
from protocols.net.connection import Connection, connect, handshake
from protocols.net.tls import Tls

PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class WebOrigin:
    """A server: scheme, host and port, and how to talk to it."""

    scheme: str
    host: str
    port: int
    tls: Tls = field(default=Tls(), repr=False)
    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 60.0
    proxy: Proxy | None = None

    @classmethod
    def of(cls, url: str, tls: Tls, connect_timeout_s: float, idle_timeout_s: float, proxy: str = "") -> WebOrigin:
        """Return the server that a URL names.

        Args:
            proxy: as `Proxy.of` takes it.
        """
        parts = urlsplit(url)
        return cls(
            parts.scheme,
            parts.hostname or "",
            parts.port or PORTS[parts.scheme],
            tls,
            connect_timeout_s,
            idle_timeout_s,
            Proxy.of(proxy, url),
        )

    @cached_property
    def authority(self) -> str:
        """The value of the Host field; with the port only where it isn't the scheme's default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @cached_property
    def where(self) -> str:
        """The server, for messages."""
        return f"{self.scheme}://{self.authority}"

    @property
    def way(self) -> str:
        """The server, and the proxy if there is one, for messages."""
        return f"{self.where} by way of {self.proxy.url}" if self.proxy else self.where

    @property
    def forwards(self) -> Proxy | None:
        """The proxy, if it reads requests and forwards them; for a server with TLS it forwards bytes."""
        return self.proxy if self.scheme == "http" else None

    def reach(self, check: Callable[[], None]) -> socket:
        """Connect to the server, or to the proxy that forwards to it; see `connect`."""
        if self.proxy is None:
            return connect(self.host, self.port, self.connect_timeout_s, check)
        sock = self.proxy.connect(self.tls, self.connect_timeout_s, check)
        if self.scheme == "https":
            self.proxy.tunnel(sock, self.host, self.port, self.connect_timeout_s, check)
        return sock

    def shake(self, sock: socket, check: Callable[[], None]) -> SSLSocket:
        """Shake hands with the server; closes the socket if that fails."""
        return handshake(sock, self.host, self.where, self.tls, self.connect_timeout_s, check)

    def connect(self, check: Callable[[], None]) -> Connection:
        """Make a connection; raises as `connection.connect`, `connection.handshake` and `Proxy` do."""
        sock = self.reach(check)
        if self.scheme == "https":
            sock = self.shake(sock, check)
        return Connection(sock, self.way, self.idle_timeout_s, check, has_cert=bool(self.tls.cert))
