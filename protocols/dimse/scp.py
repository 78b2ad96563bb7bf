"""The Storage SCP: receives instances from peers, in threads of its own, one per association.

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
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from protocols.dimse import acceptance
from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.message import C_ECHO_RQ, C_ECHO_RSP, C_STORE_RQ, NO_DATASET, RELEASE_RP_PDU
from protocols.dimse.receive import OUT_OF_RESOURCES, Depot, Responder, receive
from protocols.dimse.stream import (
    AFFECTED_CLASS,
    DATASET_TYPE,
    FIELD,
    MESSAGE_ID,
    RESPONDED_TO,
    STATUS,
    CommandSet,
    Released,
    Stream,
    encoded,
    pdus,
)
from protocols.dimse.transport import ABORT_PDU, VERIFICATION
from transfer.errors import Busy, Cancelled, DispatchError, Interrupted

logger = logging.getLogger(__name__)

MAX_PDU = 131_072  # bytes, as we announce
HANDSHAKE_S = 10  # for a peer to shake hands and to ask for an association, all together
MOST_NEW, MOST_NEW_OF_ONE = 256, 32  # connections that have not been admitted yet: of all peers, of one address
IDLE_S = 60  # silence on an association after which it is ended
BACKLOG = 128
RESPONSE, C_CANCEL_RQ, UNRECOGNIZED = 0x8000, 0x0FFF, 0x0211  # PS3.7 Annexes C and E
TLS_HANDSHAKE = b"\x16"  # how a TLS connection begins (RFC 8446 section 5.1)
Refusal = tuple[int, int, int]  # of an association, PS3.8 table 9-21: result, source, reason
CALLED_UNKNOWN, CALLING_UNKNOWN = (1, 1, 7), (1, 1, 3)  # permanent, by the user
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


@dataclass(frozen=True)
class Caller:
    """The peer that has opened an association: AE titles and address."""

    called: str
    calling: str
    host: str


class Visit(Protocol):
    """What is decided of one association that was admitted."""

    @property
    def services(self) -> frozenset[str]:
        """Abstract syntaxes that are accepted besides storage and verification."""

    def depot(self, request: CommandSet) -> tuple[Depot | None, int]:
        """Return the folder for an instance, or None and the status to refuse it with."""

    def serve(self, association: ServedAssociation, request: CommandSet) -> bool:
        """Serve a request of another service, and read its data set; return False if it is of none that we know."""

    def ended(self) -> None:
        """Note that the association is over."""


class Desk(Protocol):
    """Decides what a Storage SCP accepts."""

    def admit(self, caller: Caller) -> Visit | Refusal:
        """Return what is to be decided of this peer's association, or why it may have none now."""


class StorageScp:
    """A port that accepts instances, from now on until `close`.

    Args:
        aet: our AE title; "" if the desk knows by which we may be called.
        tls_only: whether a peer without TLS is hung up on.

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
    ) -> None:
        self.aet, self.desk, self.tls, self.tls_only = aet, desk, tls, tls_only
        self.idle_timeout_s = idle_timeout_s
        self._closed, self._deaf = threading.Event(), threading.Event()
        self._served = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._new: Counter[str] = Counter()  # connections that have not been admitted yet, by address
        self._listener = _listener(host, port)
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="storage-scp", daemon=True)
        self._thread.start()

    def offer(self, tls: ssl.SSLContext | None) -> None:
        """Accept TLS as well, unless that was enabled before."""
        self.tls = self.tls or tls

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
            host = str(address[0]).removeprefix("::ffff:")
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
        served = sock
        try:
            with ExitStack() as new:
                new.callback(self._settled, host)
                served, association = self._begin(sock, host)
            if association is not None:
                try:
                    association.run()
                finally:
                    association.visit.ended()
        except (OSError, DispatchError) as exc:
            logger.info("association from %s ended: %s", host, exc)
        except Exception:
            logger.exception("association from %s ended", host)
        finally:
            self._over(sock, served)

    def _over(self, *socks: socket.socket) -> None:
        """Close a connection, under its TLS too."""
        with self._lock:
            self._open.difference_update(socks)
            self._served -= 1
        for sock in reversed(socks):
            sock.close()

    def _begin(self, sock: socket.socket, host: str) -> tuple[socket.socket, ServedAssociation | None]:
        """Read an association request; return the connection under its TLS, and the association if it is admitted.

        Raises:
            OSError, Interrupted: the peer does not request one in time.
        """
        end = time.monotonic() + HANDSHAKE_S
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(HANDSHAKE_S)
        first = sock.recv(1, socket.MSG_PEEK)
        if self.tls_only and first and first != TLS_HANDSHAKE:
            raise Interrupted("it does not begin with TLS, which is demanded here")
        if first == TLS_HANDSHAKE and self.tls is not None:
            sock = self.tls.wrap_socket(sock, server_side=True)
            with self._lock:
                self._open.add(sock)
        body = _request(sock, end)
        try:
            asked = acceptance.proposal(body)
        except ValueError:
            sock.sendall(ABORT_PDU)
            return sock, None
        caller = Caller(asked.called, asked.calling, host)
        visit = CALLED_UNKNOWN if self.aet and asked.called != self.aet else self.desk.admit(caller)
        if isinstance(visit, tuple):
            sock.sendall(acceptance.rejection(*visit))
            return sock, None
        try:
            answer, contexts = acceptance.acceptance(body, asked, partial(_choose, visit.services), MAX_PDU)
            sock.sendall(answer)
            return sock, ServedAssociation(self, sock, caller, visit, asked.max_pdu, contexts)
        except BaseException:
            visit.ended()
            raise

    def check(self) -> None:
        """Raise Cancelled once the SCP is closed."""
        if self._closed.is_set():
            raise Cancelled("the Storage SCP is closed")

    def stream(self, sock: socket.socket, caller: Caller) -> Stream:
        """Return a connection as messages."""
        return Stream(sock, f"{caller.calling} at {caller.host}", self.idle_timeout_s, self.check)


class ServedAssociation:
    """One association of a peer's, from its acceptance to its end.

    Attributes:
        contexts: abstract and transfer syntax of what was accepted, by context id.
        max_pdu: the largest PDU that the peer takes, bytes; 0 for any.
    """

    def __init__(
        self,
        scp: StorageScp,
        sock: socket.socket,
        caller: Caller,
        visit: Visit,
        max_pdu: int,
        contexts: dict[int, tuple[str, str]],
    ) -> None:
        self.visit, self.caller, self.contexts, self.max_pdu = visit, caller, contexts, max_pdu
        self.stream = scp.stream(sock, caller)
        self.respond = Responder(self.stream, self.max_pdu)
        self.depot: Depot | None = None  # for the instance that is being received
        self.stream.moved = self._moved

    def run(self) -> None:
        stream = self.stream
        try:
            while True:
                request = stream.command()
                if request.kind == C_STORE_RQ:
                    self._store(request)
                elif request.kind == C_ECHO_RQ:
                    self._answer_echo(request)
                elif not self.visit.serve(self, request):
                    self._answer_unknown(request)
        except Released:
            stream.send(RELEASE_RP_PDU)
        except (DispatchError, OSError):
            if not stream.torn:
                with suppress(OSError):
                    stream.sock.sendall(ABORT_PDU)
            raise

    def _store(self, request: CommandSet) -> None:
        if request.context not in self.contexts or not request.has_dataset:
            raise Interrupted(f"{self.stream.where}: a request in a context that was not accepted")
        depot, status = self.visit.depot(request)
        if depot is None:
            self.stream.skip()
            self.respond(request, status)
            if status == OUT_OF_RESOURCES:
                raise Busy("no instances are accepted now")
        else:
            depot.heard = self.stream.heard  # it may have come with its request
            self.depot = depot
            status = receive(self.stream, request, self.contexts[request.context][1], depot, self.respond)
            self.depot = None
        if status == OUT_OF_RESOURCES and depot is not None and depot.failure is not None:
            # Sources go on through A700; a full disk must not take the rest of the study one by one.
            raise depot.failure

    def _moved(self, count: int) -> None:
        if self.depot is not None:
            self.depot.heard = self.stream.heard

    def _answer_unknown(self, request: CommandSet) -> None:
        """Answer a request that nobody serves, so that its sender doesn't wait; answers and cancellations have none."""
        if request.has_dataset:
            self.stream.skip()
        kind = request.kind
        if kind is None or kind & RESPONSE or kind == C_CANCEL_RQ:
            return
        answer: dict[int, int | str | bytes] = {
            FIELD: kind | RESPONSE,
            RESPONDED_TO: request.number(MESSAGE_ID) or 0,
            DATASET_TYPE: NO_DATASET,
            STATUS: UNRECOGNIZED,
        }
        self.stream.send(pdus(request.context, encoded(answer), None, self.max_pdu))

    def _answer_echo(self, request: CommandSet) -> None:
        answer: dict[int, int | str | bytes] = {
            AFFECTED_CLASS: VERIFICATION,
            FIELD: C_ECHO_RSP,
            RESPONDED_TO: request.number(MESSAGE_ID) or 0,
            DATASET_TYPE: NO_DATASET,
            STATUS: 0,
        }
        self.stream.send(pdus(request.context, encoded(answer), None, self.max_pdu))


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
    """Return the first offered syntax, for any SOP class of the storage service; an uncompressed one for others."""
    if abstract in services:
        return next((syntax for syntax in offered if syntax in UNCOMPRESSED), acceptance.NO_SYNTAX)
    if abstract.startswith(OTHERS) and abstract not in STORED:
        return acceptance.NO_CLASS
    return offered[0] if offered else acceptance.NO_SYNTAX
