"""The first probes of every check that goes over a network: name, TCP, TLS."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from protocols.http.origin import WebOrigin
from protocols.http.session import Session
from protocols.net.connection import connect, resolve_within, shown
from protocols.net.tls import certificate, certificate_shown, peer_facts
from transfer.errors import DispatchError, NotTrusted
from transfer.health import Health, Probe

EARLIER = "an earlier probe failed"


def go_on() -> None:
    """Do nothing: a check can't be cancelled, and all its waits have an end."""


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
        The connection, which the caller uses or closes; None if a probe failed.
    """
    with health.probe("resolve") as probe:
        probe.detail = shown(resolve_within(host, port, timeout_s, go_on))
    if not health.ok:
        return None
    sock: socket.socket | None = None
    with health.probe("tcp") as probe:
        sock = connect(host, port, timeout_s)
        probe.detail = "connected to {} port {}".format(*sock.getpeername()[:2])
        if greeting is not None:
            probe.detail = greeting(sock)
    if health.ok and sock is not None and shake is not None:
        with health.probe("tls") as probe, _with_certificate(probe, host, port, timeout_s):
            wrapped = shake(sock)
            sock = wrapped
            _seen(probe, wrapped)
    if health.ok:
        return sock
    if sock is not None:
        sock.close()
    return None


def _seen(probe: Probe, sock: ssl.SSLSocket) -> None:
    """Note whom we have shaken hands with."""
    probe.detail = peer_facts(sock)
    if found := certificate(sock.getpeercert(binary_form=True) or b""):
        probe.facts["certificate"] = found


@contextmanager
def _with_certificate(probe: Probe, host: str, port: int, timeout_s: float) -> Iterator[None]:
    """Note also a certificate that is not trusted: people must see it to decide. It is asked for once more."""
    try:
        yield
    except NotTrusted:
        with suppress(DispatchError, OSError):
            if found := certificate_shown(connect(host, port, timeout_s), host, timeout_s):
                probe.facts["certificate"] = found
        raise


def reach_web(health: Health, origin: WebOrigin) -> None:
    """Probe the way to a web server: `proxy` (if there is one), `resolve`, `tcp`, `tls` (if it is https)."""
    secure = origin.scheme == "https"
    if origin.proxy is not None:
        sock = _by_proxy(health, origin)
        health.skip("resolve", "tcp", why="the proxy finds the server" if health.ok else EARLIER)
        if health.ok and sock is not None and secure:
            with health.probe("tls") as probe:
                wrapped = origin.shake(sock, go_on)
                sock = wrapped
                _seen(probe, wrapped)
    else:
        shake = partial(origin.shake, check=go_on) if secure else None
        sock = reach(health, origin.host, origin.port, origin.connect_timeout_s, shake=shake)
    if sock is not None:
        sock.close()
    made = {probe.name for probe in health.probes}
    health.skip(*(name for name in ("resolve", "tcp", *(["tls"] if secure else [])) if name not in made))


def _by_proxy(health: Health, origin: WebOrigin) -> socket.socket | None:
    proxy = origin.proxy
    assert proxy is not None  # noqa: S101 - for the type checker
    with health.probe("proxy") as probe:
        if origin.scheme == "https":
            sock = origin.reach(go_on)
            probe.detail = f"{proxy.url} passes on what is sent to {origin.authority}"
            return sock
        with Session(origin, check=go_on, follow=False) as session, session.request("HEAD", "/") as answer:
            if answer.status in (502, 503, 504):
                raise proxy.refusal(answer.status, answer.reason, origin.authority)
        probe.detail = f"{proxy.url} passes on requests to {origin.authority}"
    return None
