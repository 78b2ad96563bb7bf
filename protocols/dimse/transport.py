"""The connection below an association: made by us, so that its errors have names."""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from pydicom.uid import UID
from pynetdicom import build_context
from pynetdicom._globals import APPLICATION_CONTEXT_NAME
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification

from protocols.dimse.message import ABORT_PDU, IMPLEMENTATION_UID, VERIFICATION
from protocols.net import connection, tls
from transfer.errors import Denied, DispatchError, Interrupted, Misconfigured, TimedOut

PROBE_S = 3  # for a second opinion on what a port speaks
VERDICT_S = 0.3  # a peer that takes our certificate may stay silent; one that doesn't says so at once
PLAIN_ALERT = b"\x15\x03"  # how a TLS alert begins (RFC 8446 section 5.1): what a TLS peer answers to a plain request


@dataclass(frozen=True)
class Peer:
    """The node to connect to, and how long to wait for it.

    Attributes:
        connect_timeout_s: for a TCP connection and its TLS handshake, seconds each.
        idle_timeout_s: silence after which the peer counts as hung, seconds.
        max_pdu: bytes; what we announce, and send at most; 0 for no limit.
        tls: None for a plain connection.
    """

    host: str
    port: int
    called: str = "ANY-SCP"
    calling: str = "TALARIA"
    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 60.0
    max_pdu: int = 131_072
    tls: tls.Tls | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        """The peer's address for messages."""
        return connection.place(self.host, self.port)


def resolve(
    peer: Peer, check: Callable[[], None] = lambda: None
) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    """Return the addresses of the peer, in the system's order; see `connection.resolve_within`."""
    return connection.resolve_within(peer.host, peer.port, peer.connect_timeout_s, check)


def connect(peer: Peer, check: Callable[[], None] = lambda: None) -> socket.socket:
    """Connect to the first address of the peer that answers, and shake hands if it speaks TLS.

    Args:
        check: called several times a second while waiting; may raise to stop.

    Raises:
        Unreachable: no connection. TimedOut: connected, but the handshake got no answer.
        Interrupted, NotTrusted, Misconfigured, Denied: as `tls.classify` says.
    """
    sock = connect_tcp(peer, check)
    return sock if peer.tls is None else handshake(sock, peer, peer.tls, check)


def hang_up(sock: socket.socket, *, reset: bool = False) -> None:
    """End a connection without closing its socket, from any thread.

    Args:
        reset: whether what is still in the buffers must not reach the peer.
    """
    with suppress(OSError):
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not that of TLS, which another thread may be using


def connect_tcp(peer: Peer, check: Callable[[], None] = lambda: None) -> socket.socket:
    """Connect without TLS; see `connect`."""
    return connection.connect(peer.host, peer.port, peer.connect_timeout_s, check)


def handshake(
    sock: socket.socket, peer: Peer, settings: tls.Tls, check: Callable[[], None] = lambda: None
) -> ssl.SSLSocket:
    """Shake hands on a connected socket, which is closed if that fails; see `connect`."""
    try:
        return connection.handshake(sock, peer.host, peer.where, settings, peer.connect_timeout_s, check)
    except (Interrupted, TimedOut) as error:
        # Peers without TLS answer its first bytes in one of three ways: by an A-ABORT, which `tls.classify` knows for
        # what it is, by hanging up, or not at all.
        if speaks_dicom(peer):
            raise Misconfigured(f"{peer.where}: the peer speaks DICOM without TLS on this port: use its TLS port, or a "
                                "target of type dicom") from error  # fmt: skip
        raise
    except (Misconfigured, Denied) as error:
        version, suites = tls.offered(settings, partial(_shake, peer)) if _no_common(error) else ("", [])
        if suites:
            raise Misconfigured(
                f"{peer.where}: the peer offers {', '.join(suites)} by {version}, which tls_profile {settings.profile} "
                "does not allow: have it renewed, or set tls_profile to legacy"
            ) from error
        raise


def _no_common(error: DispatchError) -> bool:
    """Return True if a handshake may have failed because no version or cipher suite is common."""
    reason = (getattr(error.__cause__, "reason", None) or "").upper()
    return any(word in reason for word in ("HANDSHAKE_FAILURE", "VERSION", "PROTOCOL", "INSUFFICIENT", "CIPHER"))


def _shake(peer: Peer, context: ssl.SSLContext) -> ssl.SSLSocket:
    sock = connect_tcp(peer)
    try:
        sock.settimeout(min(peer.connect_timeout_s, PROBE_S))
        return context.wrap_socket(sock)
    except BaseException:
        sock.close()
        raise


def verdict(sock: ssl.SSLSocket, peer: Peer, settings: tls.Tls) -> None:
    """Wait briefly for the peer's verdict on our certificate: with TLS 1.3 it comes after the handshake.

    The socket is closed if the certificate is refused.

    Raises:
        Misconfigured, Denied, Interrupted: the peer ended the connection, as `tls.classify` says.
    """
    if sock.version() != "TLSv1.3" or not poll(sock, select.POLLIN, VERDICT_S):
        return
    try:
        ended = not sock.recv(1)
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return
    except OSError as exc:
        sock.close()
        raise tls.classify(exc, peer.where, has_cert=bool(settings.cert)) from exc
    if ended:
        sock.close()
        raise tls.classify(ConnectionResetError(), peer.where, has_cert=bool(settings.cert))


def poll(sock: socket.socket, events: int, seconds: float) -> bool:
    """Return True if a socket is ready within this number of seconds."""
    ready = select.poll()
    ready.register(sock, events)
    return bool(ready.poll(seconds * 1000))


def speaks_tls(peer: Peer) -> bool:
    """Return True if the peer answers a TLS handshake, whatever its certificate is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with connect_tcp(peer) as sock:
            sock.settimeout(min(peer.connect_timeout_s, PROBE_S))
            context.wrap_socket(sock).close()
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")  # it understood, and refuses
    except (OSError, DispatchError):
        return False
    return True


def speaks_dicom(peer: Peer) -> bool:
    """Return True if the peer answers a plain association request, whatever its answer is."""
    request = A_ASSOCIATE()
    request.application_context_name = UID(APPLICATION_CONTEXT_NAME)
    request.calling_ae_title, request.called_ae_title = peer.calling, peer.called
    context = build_context(VERIFICATION)
    context.context_id = 1
    request.presentation_context_definition_list = [context]
    limit, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    implementation.implementation_class_uid = UID(IMPLEMENTATION_UID)
    request.user_information = [limit, implementation]
    try:
        with connect_tcp(peer) as sock:
            sock.settimeout(min(peer.connect_timeout_s, PROBE_S))
            sock.sendall(A_ASSOCIATE_RQ(request).encode())
            answer = sock.recv(1)
            with suppress(OSError):
                sock.sendall(ABORT_PDU)
    except (OSError, DispatchError):
        return False
    return answer in (b"\x02", b"\x03", b"\x07")
