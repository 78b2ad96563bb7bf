"""The first probes of every check that goes over a network: name, TCP, TLS."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable

from protocols.http.session import WebOrigin
from protocols.net.connection import connect, handshake, resolve_within, shown
from protocols.net.tls import peer_facts
from transfer.health import Health


def _go_on() -> None:
    """A check has nobody to stop it; its timeouts do."""


def reach(
    health: Health,
    host: str,
    port: int,
    timeout_s: float,
    *,
    greeting: Callable[[socket.socket], str] | None = None,
    shake: Callable[[socket.socket], ssl.SSLSocket] | None = None,
) -> socket.socket | None:
    """Probe that a name resolves, TCP connects and, with `shake`, a TLS handshake succeeds.

    Args:
        greeting: reads what the peer says first; it becomes the detail of the probe.
        shake: shakes hands; closes the socket if that fails.

    Returns:
        The connection, for the caller to use or to close; None if a probe failed.
    """
    with health.probe("resolve") as probe:
        probe.detail = shown(resolve_within(host, port, timeout_s, _go_on))
    if not health.ok:
        return None
    sock: socket.socket | None = None
    with health.probe("tcp") as probe:
        sock = connect(host, port, timeout_s)
        probe.detail = "connected to {} port {}".format(*sock.getpeername()[:2])
        if greeting is not None:
            probe.detail = greeting(sock)
    if health.ok and sock is not None and shake is not None:
        with health.probe("tls") as probe:
            wrapped = shake(sock)
            sock, probe.detail = wrapped, peer_facts(wrapped)
    if health.ok:
        return sock
    if sock is not None:
        sock.close()
    return None


def reach_web(health: Health, origin: WebOrigin) -> None:
    """Probe the way to a web server."""

    def shake(sock: socket.socket) -> ssl.SSLSocket:
        return handshake(sock, origin.host, origin.where, origin.tls, origin.connect_timeout_s, _go_on)

    secure = shake if origin.scheme == "https" else None
    sock = reach(health, origin.host, origin.port, origin.connect_timeout_s, shake=secure)
    if sock is not None:
        sock.close()
