"""The Storage SCP: receives instances from peers, in threads of its own, one per association, or lends associations.

It negotiates by itself, so that no library is between the connection and the file, and accepts every SOP class and
transfer syntax as it is sent. Who may send what, and where it goes, is decided by its `Desk`: a retrieval by C-MOVE has
one for what it asked for, a listener for modalities another (`protocols.dimse.intake`).
"""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Protocol

from imaging.header import UID
from protocols.dimse import acceptance
from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.message import ABORT_PDU
from protocols.dimse.served import Accepted, Caller, ServedAssociation, Visit
from protocols.net.connection import host_of
from transfer.errors import Cancelled, DispatchError, Interrupted
from transfer.oserrors import words_of

logger = logging.getLogger(__name__)

MAX_PDU = 131_072  # bytes, as we announce
HANDSHAKE_S = 10  # for a peer to shake hands and to ask for an association, all together
MOST_NEW, MOST_NEW_OF_ONE = 256, 32  # connections that have not been admitted yet: of all peers, of one address
IDLE_S = 60  # silence on an association after which it is ended
BACKLOG = 128
NO_TLS = "it begins with TLS, which is not set up for it"
TLS_HANDSHAKE = b"\x16"  # how a TLS connection begins (RFC 8446 section 5.1)
Refusal = tuple[int, int, int]  # of an association, PS3.8 table 9-21: result, source, reason
NO_REASON, CALLED_UNKNOWN, CALLING_UNKNOWN = (1, 1, 1), (1, 1, 7), (1, 1, 3)  # permanent, by the user
CONGESTED, TOO_MANY = (2, 3, 1), (2, 3, 2)  # transient, by the provider: come again later
# Services that are not storage: query and retrieve, worklists, commitment, print, procedure steps, notifications.
OTHERS = (
    "1.2.840.10008.5.1.4.1.2.", "1.2.840.10008.5.1.4.31", "1.2.840.10008.1.20.", "1.2.840.10008.5.1.1.",
    "1.2.840.10008.3.1.2.", "1.2.840.10008.5.1.4.32", "1.2.840.10008.5.1.4.33", "1.2.840.10008.5.1.4.34.",
    "1.2.840.10008.5.1.4.37", "1.2.840.10008.5.1.4.38", "1.2.840.10008.5.1.4.39", "1.2.840.10008.5.1.4.1.1.200.",
    "1.2.840.10008.1.40", "1.2.840.10008.1.42",
)  # fmt: skip

# Storage of what belongs to a study, though it is named as the services above are.
STORED = frozenset((
    "1.2.840.10008.5.1.4.1.1.200.1", "1.2.840.10008.5.1.4.1.1.200.2", "1.2.840.10008.5.1.4.1.1.200.3",
    "1.2.840.10008.5.1.4.1.1.200.7", "1.2.840.10008.5.1.4.1.1.200.8", "1.2.840.10008.5.1.4.34.1",
    "1.2.840.10008.5.1.4.34.7", "1.2.840.10008.5.1.4.34.10", "1.2.840.10008.5.1.1.27", "1.2.840.10008.5.1.1.29",
    "1.2.840.10008.5.1.1.30",
))  # fmt: skip


class Desk(Protocol):
    """Decides what a Storage SCP accepts."""

    def admit(self, caller: Caller) -> Visit | Refusal:
        """Return what is to be decided of this peer's association, or why it may have none now."""


class Lend(Protocol):
    """Has an accepted association served elsewhere, if it returns True: `over` is called at its end then.

    Instead of that, `back` may be called if nothing at all was read from it: it is served here then.
    """

    def __call__(self, accepted: Accepted, over: Callable[[], None], back: Callable[[], None], /) -> bool: ...


class Security(Protocol):
    """Decides by the address of a peer how it may shake hands."""

    def context(self, host: str) -> ssl.SSLContext | None:
        """Return what TLS to use with a peer that begins with it; None for none."""

    def failed(self, host: str, why: str) -> None:
        """Note that a handshake with a peer came to nothing."""


class StorageScp:
    """A port that accepts instances, from now on until `close`.

    Args:
        aet: our AE title; "" if the desk knows by which we may be called.
        tls_only: whether a peer without TLS is hung up on.
        lend: has associations served by others, of which those that it does not take are served here.
        security: decides on TLS, in the place of `tls`.

    Attributes:
        unsecured: how many connections came to nothing as their TLS did: no handshake, or one that failed.

    Raises:
        OSError: the port can't be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        aet: str,
        desk: Desk,
        tls: ssl.SSLContext | None = None,
        idle_timeout_s: float = IDLE_S,
        *,
        tls_only: bool = False,
        lend: Lend | None = None,
        security: Security | None = None,
    ) -> None:
        self.aet, self.desk, self.tls, self.tls_only = aet, desk, tls, tls_only
        self.idle_timeout_s = idle_timeout_s
        self._lend, self._security = lend, security
        self._closed, self._deaf = threading.Event(), threading.Event()
        self._served = self.unsecured = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._new: Counter[str] = Counter()  # connections that have not been admitted yet, by address
        self._listener = _listener(host, port)
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="storage-scp", daemon=True)
        self._thread.start()

    def deafen(self) -> None:
        """Stop listening; open associations go on."""
        self._deaf.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(HANDSHAKE_S)
        self._listener.close()

    @property
    def connections(self) -> int:
        """How many connections are open."""
        with self._lock:
            return self._served

    def close(self) -> None:
        """Stop listening, and break open associations."""
        self._closed.set()
        self.deafen()
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._deaf.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError:
                if self._deaf.wait(0.05):  # else out of descriptors, for one
                    return
                continue
            host = host_of(address)
            with self._lock:
                full = self._new[host] >= MOST_NEW_OF_ONE or self._new.total() >= MOST_NEW
                if not full:
                    self._new[host] += 1
                    self._served += 1
                    self._open.add(sock)
            if full:
                logger.warning("connection from %s closed: too many that have not asked for an association", host)
                sock.close()
                continue
            try:
                threading.Thread(target=self._run, args=(sock, host), name="store", daemon=True).start()
            except RuntimeError as exc:  # this process, or its user, may have no more threads now
                logger.warning("connection from %s closed: %s", host, exc)
                self._settled(host)
                self._over(sock)

    def _settled(self, host: str) -> None:
        """Note that a connection is admitted, or has ended."""
        with self._lock:
            self._new[host] -= 1
            if not self._new[host]:
                del self._new[host]

    def _run(self, sock: socket.socket, host: str) -> None:
        served, accepted = sock, None
        try:
            with ExitStack() as new:
                new.callback(self._settled, host)
                end = time.monotonic() + HANDSHAKE_S
                served = self._secured(sock, host)
                accepted = self._accepted(served, host, end)
        except (OSError, DispatchError) as exc:
            logger.info("association from %s ended: %s", host, exc)
        except Exception:
            logger.exception("association from %s ended", host)
        if accepted is None:
            self._over(sock, served)
        elif self._lend is None or not self._lend(
            accepted, partial(self._ended, accepted, sock), partial(self._serve_after_all, accepted, sock)
        ):
            self._serve(accepted, sock)

    def _serve(self, accepted: Accepted, sock: socket.socket) -> None:
        try:
            ServedAssociation(accepted, self.check).run()
        except (OSError, DispatchError) as exc:
            logger.info("association from %s ended: %s", accepted.caller.host, exc)
        except Exception:
            logger.exception("association from %s ended", accepted.caller.host)
        finally:
            self._ended(accepted, sock)

    def _serve_after_all(self, accepted: Accepted, sock: socket.socket) -> None:
        try:
            threading.Thread(target=self._serve, args=(accepted, sock), name="store", daemon=True).start()
        except RuntimeError as exc:
            logger.warning("association from %s ended: %s", accepted.caller.host, exc)
            self._ended(accepted, sock)

    def _ended(self, accepted: Accepted, sock: socket.socket) -> None:
        try:
            accepted.visit.ended()
        except Exception:
            logger.exception("the end of an association from %s", accepted.caller.host)
        finally:
            self._over(sock, accepted.sock)

    def _over(self, *socks: socket.socket) -> None:
        """Close a connection, under its TLS too."""
        with self._lock:
            self._open.difference_update(socks)
            self._served -= 1
        for sock in reversed(socks):
            sock.close()

    def _secured(self, sock: socket.socket, host: str) -> socket.socket:
        """Return a new connection, under TLS if the peer begins with that.

        Raises:
            OSError, Interrupted: the handshake fails, or TLS is demanded.
        """
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(HANDSHAKE_S)
        first = sock.recv(1, socket.MSG_PEEK)
        if self.tls_only and first and first != TLS_HANDSHAKE:
            self._count_unsecured()
            raise Interrupted("it does not begin with TLS, which is demanded here")
        if first != TLS_HANDSHAKE:
            return sock
        context = self.tls if self._security is None else self._security.context(host)
        if context is None:
            self._shook_in_vain(host, NO_TLS)
            raise Interrupted(NO_TLS)
        try:
            sock = context.wrap_socket(sock, server_side=True)
        except OSError as exc:
            reason = exc.reason if isinstance(exc, ssl.SSLError) else None
            why = getattr(exc, "verify_message", "") or (reason or "").replace("_", " ").lower()
            self._shook_in_vain(host, why or words_of(exc))
            raise
        with self._lock:
            self._open.add(sock)
        return sock

    def _count_unsecured(self) -> None:
        with self._lock:
            self.unsecured += 1

    def _shook_in_vain(self, host: str, why: str) -> None:
        self._count_unsecured()
        logger.warning("no association for %s: its TLS handshake failed: %s", host, why)
        if self._security is not None:
            self._security.failed(host, why)

    def _accepted(self, sock: socket.socket, host: str, end: float) -> Accepted | None:
        """Read an association request until `end` (`time.monotonic`), and answer it; return the association, if any.

        Raises:
            OSError, Interrupted: the peer does not request one in time.
        """
        body = _request(sock, end)
        try:
            asked = acceptance.proposal(body)
        except ValueError:
            sock.sendall(ABORT_PDU)
            return None
        caller = Caller(asked.called, asked.calling, host, isinstance(sock, ssl.SSLSocket))
        visit = CALLED_UNKNOWN if self.aet and asked.called != self.aet else self.desk.admit(caller)
        if isinstance(visit, tuple):
            sock.sendall(acceptance.rejection(*visit))
            return None
        try:
            answer, contexts = acceptance.acceptance(body, asked, partial(_choose, visit.services), MAX_PDU)
            sock.sendall(answer)
        except BaseException:
            visit.ended()
            raise
        return Accepted(sock, caller, visit, asked.max_pdu, contexts, self.idle_timeout_s)

    def check(self) -> None:
        """Raise Cancelled once the SCP is closed."""
        if self._closed.is_set():
            raise Cancelled("the Storage SCP is closed")


def _listener(host: str, port: int) -> socket.socket:
    """Listen; "" is all addresses, of IPv6 too where this machine has it.

    Raises:
        OSError: the port can't be listened on.
    """
    if not host and socket.has_dualstack_ipv6():
        try:
            return socket.create_server((host, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        except OSError as exc:
            if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # it is switched off
                raise
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def _request(sock: socket.socket, end: float) -> bytes:
    """Read an A-ASSOCIATE-RQ until `end` (`time.monotonic`); return its variable field.

    Raises:
        Interrupted: it is something else. TimeoutError: it is not all there in time.
    """
    kind, length = struct.unpack(">BxI", _exactly(sock, 6, end))
    if kind != acceptance.REQUEST or length > acceptance.MAX_REQUEST:
        raise Interrupted("what came is not an association request")
    return _exactly(sock, length, end)


def _exactly(sock: socket.socket, count: int, end: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        sock.settimeout(max(end - time.monotonic(), 0.001))
        piece = sock.recv(count - len(data))
        if not piece:
            raise Interrupted("the peer closed the connection")
        data += piece
    return bytes(data)


def _choose(services: frozenset[str], abstract: str, offered: tuple[str, ...]) -> str | int:
    """Return the first offered syntax that is a UID, for any SOP class of the storage service.

    Of other services, it is an uncompressed one.
    """
    if abstract in services:
        return next((syntax for syntax in offered if syntax in UNCOMPRESSED), acceptance.NO_SYNTAX)
    if abstract.startswith(OTHERS) and abstract not in STORED:
        return acceptance.NO_CLASS
    return next((syntax for syntax in offered if UID.fullmatch(syntax)), acceptance.NO_SYNTAX)
