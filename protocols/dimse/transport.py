"""The connection below an association: made by us, so that its errors have names, and lent to pynetdicom.

pynetdicom's own transport logs the cause of a failure and keeps it to itself, reads without a time limit (a peer
that sends three bytes of a PDU and falls silent holds its thread for ever) and looks for data by `select`, which
knows no descriptor above 1023. `Transport` keeps its interface to the state machine and does these otherwise.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydicom.uid import UID
from pynetdicom import AE, PYNETDICOM_IMPLEMENTATION_UID, build_context
from pynetdicom._globals import APPLICATION_CONTEXT_NAME
from pynetdicom.association import Association
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.transport import T_CONNECT, AddressInformation, AssociationSocket

from protocols import tls
from transfer.errors import DispatchError, Interrupted, Misconfigured, TimedOut, Unreachable

SLICE_S = 0.2  # how often a wait looks whether it shall stop
VERIFICATION = "1.2.840.10008.1.1"
PROBE_S = 3  # for a second opinion on what a port speaks
VERDICT_S = 0.3  # a peer that takes our certificate may stay silent; one that doesn't says so at once
REACTOR_S = 0.001  # how often pynetdicom's threads look for work
RECEIVE = 65_536  # bytes
ABORT_PDU = b"\x07\0\0\0\0\4\0\0\0\0"
HEAD = 16  # bytes: enough for every PDU that ends an association
PLAIN_ALERT = b"\x15\x03"  # how a TLS alert begins (RFC 8446 section 5.1): what a TLS peer answers to a plain request

# PS3.8 table 9-21: why an association was rejected, by source and reason.
REASONS = {
    (1, 1): "no reason given",
    (1, 2): "application context name not supported",
    (1, 3): "calling AE title not recognised",
    (1, 7): "called AE title not recognised",
    (2, 1): "no reason given",
    (2, 2): "protocol version not supported",
    (3, 1): "temporary congestion",
    (3, 2): "local limit exceeded",
}
# PS3.8 table 9-26: why the peer's provider aborted.
ABORT_REASONS = {
    0: "no reason given",
    1: "unrecognised PDU",
    2: "unexpected PDU",
    4: "unrecognised PDU parameter",
    5: "unexpected PDU parameter",
    6: "invalid PDU parameter value",
}


@dataclass(frozen=True)
class Peer:
    """Whom to talk to, and how long to wait for it.

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
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def resolve(peer: Peer) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """Return the addresses of the peer, in the system's order.

    Raises:
        Unreachable: its name is not known.
    """
    try:
        found = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise Unreachable(f"{peer.host}: the name can't be resolved: {reason}") from exc
    return [(family, address) for family, _, _, _, address in found]


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


def connect_tcp(peer: Peer, check: Callable[[], None] = lambda: None) -> socket.socket:
    """Connect without TLS; see `connect`."""
    failure: OSError | None = None
    for family, address in resolve(peer):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            code = sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                _wait(sock, select.POLLOUT, peer.connect_timeout_s, check)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, errno.errorcode.get(code, ""))  # noqa: TRY301
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as exc:
            failure = exc
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise Unreachable(f"{peer.where}: {_no_connection(failure, peer)}") from failure


def _no_connection(exc: OSError | None, peer: Peer) -> str:
    if isinstance(exc, TimeoutError):
        return f"no answer within {peer.connect_timeout_s:g} s"
    code = exc.errno if exc else None
    if code == errno.ECONNREFUSED:
        return "connection refused: nothing listens on this port"
    return f"no connection: {errno.errorcode.get(code, 'unknown') if code else exc}"


def handshake(
    sock: socket.socket, peer: Peer, settings: tls.Tls, check: Callable[[], None] = lambda: None
) -> ssl.SSLSocket:
    """Shake hands on a connected socket, which is closed if that fails; see `connect`."""
    try:
        context = settings.client()
        wrapped = context.wrap_socket(sock, server_hostname=peer.host, do_handshake_on_connect=False)
    except BaseException:
        sock.close()
        raise
    try:
        wrapped.setblocking(False)
        while True:
            try:
                wrapped.do_handshake()
                break
            except ssl.SSLWantReadError:
                _wait(wrapped, select.POLLIN, peer.connect_timeout_s, check)
            except ssl.SSLWantWriteError:
                _wait(wrapped, select.POLLOUT, peer.connect_timeout_s, check)
    except OSError as exc:
        wrapped.close()
        raise _no_handshake(exc, peer, settings) from exc
    except BaseException:
        wrapped.close()
        raise
    return wrapped


def _no_handshake(exc: OSError, peer: Peer, settings: tls.Tls) -> DispatchError:
    if isinstance(exc, TimeoutError):
        error: DispatchError = TimedOut(
            f"{peer.where}: no answer to the TLS handshake within {peer.connect_timeout_s:g} s"
        )
    else:
        error = tls.classify(exc, peer.where, has_cert=bool(settings.cert))
    # Peers without TLS answer its first bytes in one of three ways: by an A-ABORT, which `classify` knows for what
    # it is, by hanging up, or not at all.
    if isinstance(error, Interrupted | TimedOut) and speaks_dicom(peer):
        return Misconfigured(f"{peer.where}: the peer speaks DICOM without TLS on this port: use its TLS port, or a "
                             "target of type dicom")  # fmt: skip
    return error


def verdict(sock: ssl.SSLSocket, peer: Peer, settings: tls.Tls) -> None:
    """Wait shortly for the peer's opinion of our certificate: TLS 1.3 gives it after the handshake.

    The socket is closed if it is a bad one.

    Raises:
        Misconfigured, Denied, Interrupted: the peer ended the connection, as `tls.classify` says.
    """
    if sock.version() != "TLSv1.3" or not _poll(sock, select.POLLIN, VERDICT_S):
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


def _wait(sock: socket.socket, events: int, seconds: float, check: Callable[[], None]) -> None:
    """Wait until the socket is ready; TimeoutError after `seconds`."""
    poll = select.poll()
    poll.register(sock, events)
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if poll.poll(min(left, SLICE_S) * 1000):
            return
        check()


class Transport(AssociationSocket):
    """A connected socket under pynetdicom's state machine, which can be lent to a sender of our own.

    While it is lent (`lend`), the threads of pynetdicom rest and only the borrower reads and writes; after
    `take_back` they go on where they were, so that release and abort are theirs again.

    Attributes:
        head: the first bytes that came from the peer: they tell a rejection from an abort, from no DICOM at all.
        ahead: bytes that were read and not yet asked for.
        heard: when something came from the peer last; `time.monotonic`.
        failure: what ended the connection, if that was an error of the socket or of TLS.
        timed_out: whether the peer fell silent in the middle of a PDU, or took no more bytes.
    """

    def __init__(self, assoc: Association, sock: socket.socket, idle_timeout_s: float) -> None:
        super().__init__(assoc, client_socket=sock)
        # Told as for the acceptor of a connection; ours belongs to the requestor, and the state machine asks for it.
        self.event_queue.get_nowait()
        self._is_connected = False
        self._ready.clear()
        sock.setblocking(False)
        self.head = b""
        self.ahead = bytearray()
        self.heard = time.monotonic()
        self.failure: OSError | None = None
        self.timed_out = False
        self._idle_timeout_s = idle_timeout_s
        self._sock = sock
        self._ended = False
        self._kind = 0
        self._lent = threading.Event()
        self._resting = threading.Event()
        self._returned = threading.Event()
        # pynetdicom's thread must not keep a process alive that has nothing else to do.
        assoc.dul.daemon = True

    def connect(self, primitive: T_CONNECT) -> None:
        """Tell the state machine that the connection is there."""
        with suppress(OSError):
            self.assoc.requestor.address_info = AddressInformation.from_tuple(self._sock.getsockname())
        self._is_connected = True
        primitive.result = "Evt2"
        self.provider_queue.put(primitive)
        self._ready.set()

    @property
    def ready(self) -> bool:
        """Whether there is something to read. The state machine asks all the time; it rests here while lent."""
        if self._lent.is_set():
            self._resting.set()
            self._returned.wait()
        if self.ahead:
            return True
        if self.socket is None or not self._is_connected or self._ended:
            return False
        # A look at the descriptor doesn't do: bytes of TLS need not hold any for us. So what is there is read.
        try:
            self._fetch()
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError as exc:
            self._fail(exc)
        # The end of the connection is told by a read that gets nothing.
        return True

    def _fetch(self) -> None:
        if self.socket is None:
            self._ended = True
            return
        piece = self.socket.recv(RECEIVE)
        self._ended = not piece
        self.heard = time.monotonic()
        self.ahead += piece
        if len(self.head) < HEAD:
            self.head = (self.head + piece)[:HEAD]

    def _fail(self, exc: OSError) -> None:
        self._ended = True
        self.failure = self.failure or exc

    def recv(self, nr_bytes: int) -> bytearray:
        """Read so many bytes, or fewer if the connection ends; OSError if the peer falls silent in between."""
        while len(self.ahead) < nr_bytes and not self._ended:
            try:
                self._fetch()
            except (BlockingIOError, ssl.SSLWantReadError):
                self._await(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._await(select.POLLOUT)
            except OSError as exc:
                self._fail(exc)
        data = self.ahead[:nr_bytes]
        del self.ahead[:nr_bytes]
        return self._understood(data)

    def _understood(self, data: bytearray) -> bytearray:
        """Replace reasons that the standard doesn't list: they'd end pynetdicom's thread. `head` has the real ones."""
        if len(data) == 6:
            self._kind = data[0]
        elif len(data) == 4 and self._kind == 0x03 and (data[2], data[3]) not in REASONS:
            data[2:4] = b"\1\1"
        elif len(data) == 4 and self._kind == 0x07:
            data[2:4] = bytes((data[2] if data[2] in (0, 2) else 2, data[3] if data[3] in ABORT_REASONS else 0))
        return data

    def send(self, bytestream: bytes) -> None:
        """Write all bytes; an end of the connection becomes an event of the state machine."""
        left = memoryview(bytestream)
        try:
            while left and self.socket is not None:
                try:
                    left = left[self.socket.send(left) :]
                except (BlockingIOError, ssl.SSLWantWriteError):
                    self._await(select.POLLOUT)
                except ssl.SSLWantReadError:
                    self._await(select.POLLIN)
        except OSError as exc:
            with suppress(BlockingIOError, ssl.SSLWantReadError):
                try:
                    self._fetch()  # why the peer hung up, if it said so
                except ssl.SSLError as alert:
                    self.failure = alert
                except OSError:
                    pass
            self._fail(exc)
            self.event_queue.put("Evt17")

    def _await(self, events: int) -> None:
        if self.socket is None or not _poll(self.socket, events, self._idle_timeout_s):
            self.timed_out = True
            raise TimeoutError("the peer fell silent")

    def lend(self) -> socket.socket:
        """Hand the socket out, once pynetdicom's threads have let go of it.

        Both look for work every millisecond, which would cost as much as sending a small instance. The reactor of
        the association is paused by its own checkpoint, as pynetdicom's `release` does; the upper layer's in `ready`.
        """
        self._resting.clear()
        self._returned.clear()
        self.assoc._reactor_checkpoint.clear()
        self._lent.set()
        while not (self._resting.wait(REACTOR_S) and self.assoc._is_paused):
            if not self.assoc.dul.is_alive() or not self.assoc.is_alive():
                self.take_back()
                raise Interrupted("the peer ended the association")
            time.sleep(REACTOR_S)
        return self._sock

    def take_back(self) -> None:
        """Let pynetdicom's threads go on with the socket."""
        self._lent.clear()
        with suppress(OSError):
            self._sock.setblocking(False)
        self.assoc._reactor_checkpoint.set()
        self._returned.set()

    def hang_up(self, *, reset: bool = False) -> None:
        """End the connection from any thread; whoever waits for it wakes up."""
        with suppress(OSError):
            if reset:  # what is still in the buffers must not reach the peer
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def dispose(self) -> None:
        """Close the socket for good, after the association's threads have ended."""
        self._returned.set()
        self.assoc.dul.join(self._idle_timeout_s)
        with suppress(OSError):
            self._sock.close()


class Entity(AE):
    """An application entity whose associations run over a connection that is already there."""

    def __init__(self, ae_title: str, sock: socket.socket, idle_timeout_s: float) -> None:
        super().__init__(ae_title)
        self._connection = sock
        self._idle_timeout_s = idle_timeout_s

    def _create_socket(self, assoc: Association, address: object, tls_args: object) -> Transport:
        return Transport(assoc, self._connection, self._idle_timeout_s)


def _poll(sock: socket.socket, events: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(sock, events)
    return bool(poll.poll(seconds * 1000))


def speaks_tls(peer: Peer) -> bool:
    """Tell whether the peer answers a TLS handshake, whatever its certificate is."""
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
    """Tell whether the peer answers a plain association request, whatever its answer is."""
    request = A_ASSOCIATE()
    request.application_context_name = UID(APPLICATION_CONTEXT_NAME)
    request.calling_ae_title, request.called_ae_title = peer.calling, peer.called
    context = build_context(VERIFICATION)
    context.context_id = 1
    request.presentation_context_definition_list = [context]
    limit, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    implementation.implementation_class_uid = UID(PYNETDICOM_IMPLEMENTATION_UID)
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
