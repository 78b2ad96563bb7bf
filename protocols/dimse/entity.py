"""The connection as pynetdicom sees it, which can be lent to our own sender.

pynetdicom's own transport logs the cause of a failure and keeps it to itself, reads without a time limit (a peer
that sends three bytes of a PDU and falls silent holds its thread for ever) and looks for data by `select`, which
knows no descriptor above 1023. `LentSocket` keeps its interface to the state machine and does these things differently.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.transport import T_CONNECT, AddressInformation, AssociationSocket

from protocols.dimse.answer import tidied
from protocols.dimse.message import ABORT_REASONS
from protocols.dimse.transport import hang_up, poll

REACTOR_S = 0.001  # how often pynetdicom's threads look for work
RECEIVE = 65_536  # bytes
HEAD = 16  # bytes: enough for every PDU that ends an association
HEAD_BYTES = 6  # of a PDU: type, reserved, length
ACCEPTANCE = b"\x02"  # PDU type of A-ASSOCIATE-AC
MAX_ACCEPTANCE = 1 << 20  # bytes; 128 contexts take 12 kB

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


class LentSocket(AssociationSocket):
    """A connected socket under pynetdicom's state machine, which can be lent to our own sender.

    While it is lent (`lend`), the threads of pynetdicom rest and only the borrower reads and writes; after `take_back`
    they continue, so that release and abort are theirs again.

    Attributes:
        head: the first bytes that came from the peer: they show a rejection, an abort, or that it is not DICOM at all.
        ahead: bytes that were read and not yet asked for.
        heard: when something came from the peer last; `time.monotonic`.
        failure: what ended the connection, if that was an error of the socket or of TLS.
        timed_out: whether the peer fell silent in the middle of a PDU, or took no more bytes.
    """

    def __init__(self, assoc: Association, sock: socket.socket, idle_timeout_s: float) -> None:
        super().__init__(assoc, client_socket=sock)
        # Queued as for the acceptor of a connection; ours belongs to the requestor, and the state machine asks for it.
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
        self._act = assoc.dul.state_machine.do_action
        assoc.dul.state_machine.do_action = self._do_action  # type: ignore[method-assign]

    def _do_action(self, event: str) -> None:
        """Do a step of the state machine; an error in it ends the connection, not pynetdicom's thread."""
        try:
            self._act(event)
        except Exception as exc:  # of a decoder: whatever a peer sends
            self.failure = self.failure or ConnectionAbortedError(errno.ECONNABORTED, f"not understood: {exc}")
            self.hang_up()

    def connect(self, primitive: T_CONNECT) -> None:
        """Report the connection to the state machine."""
        with suppress(OSError):
            self.assoc.requestor.address_info = AddressInformation.from_tuple(self._sock.getsockname())
        self._is_connected = True
        primitive.result = "Evt2"
        self.provider_queue.put(primitive)
        self._ready.set()

    @property
    def ready(self) -> bool:
        """Whether there is something to read. The state machine polls this; it pauses here while the socket is lent."""
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
        # A read that gets nothing shows the end of the connection.
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
        """Read this many bytes, or fewer if the connection ends; OSError if the peer falls silent meanwhile."""
        self._buffer(nr_bytes)
        if nr_bytes == HEAD_BYTES and self.ahead[:1] == ACCEPTANCE and len(self.ahead) >= nr_bytes:
            self._tidy()
        data = self.ahead[:nr_bytes]
        del self.ahead[:nr_bytes]
        return self._understood(data)

    def _buffer(self, nr_bytes: int) -> None:
        while len(self.ahead) < nr_bytes and not self._ended:
            try:
                self._fetch()
            except (BlockingIOError, ssl.SSLWantReadError):
                self._await(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._await(select.POLLOUT)
            except OSError as exc:
                self._fail(exc)

    def _tidy(self) -> None:
        """Replace the peer's acceptance by one that pynetdicom understands, once all of it is here."""
        length = int.from_bytes(self.ahead[2:HEAD_BYTES], "big")
        if length > MAX_ACCEPTANCE:
            return
        end = HEAD_BYTES + length
        self._buffer(end)
        if len(self.ahead) >= end:
            body = tidied(bytes(self.ahead[HEAD_BYTES:end]))
            self.ahead[:end] = self.ahead[:2] + len(body).to_bytes(4, "big") + body

    def _understood(self, data: bytearray) -> bytearray:
        """Replace reasons that the standard doesn't list: they'd end pynetdicom's thread. `head` has the real ones."""
        if len(data) == HEAD_BYTES:
            self._kind = data[0]
        elif len(data) == 4 and self._kind == 0x03:
            data[1] = data[1] if data[1] in (1, 2) else 1
            data[2:4] = data[2:4] if (data[2], data[3]) in REASONS else b"\1\1"
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
        if self.socket is None or not poll(self.socket, events, self._idle_timeout_s):
            self.timed_out = True
            raise TimeoutError("the peer fell silent")

    def lend(self, check: Callable[[], None] = lambda: None) -> socket.socket:
        """Return the socket to the borrower, once pynetdicom's threads have paused.

        Both look for work every millisecond, which would cost as much as sending a small instance. The reactor of
        the association is paused by its own checkpoint, as pynetdicom's `release` does; the upper layer's in `ready`.

        Args:
            check: called while a thread is still reading a PDU from the peer; may raise to stop.

        Raises:
            ConnectionError: the association is over. TimeoutError: the peer fell silent in the middle of a PDU.
        """
        self._resting.clear()
        self._returned.clear()
        self.assoc._reactor_checkpoint.clear()
        self._lent.set()
        try:
            while not (self._resting.wait(REACTOR_S) and self.assoc._is_paused):
                if not self.assoc.dul.is_alive() or not self.assoc.is_alive():
                    raise (TimeoutError if self.timed_out else ConnectionAbortedError)  # noqa: TRY301
                check()
                time.sleep(REACTOR_S)
        except BaseException:
            self.take_back()
            raise
        return self._sock

    def take_back(self) -> None:
        """Give the socket back to pynetdicom's threads."""
        self._lent.clear()
        with suppress(OSError):
            self._sock.setblocking(False)
        self.assoc._reactor_checkpoint.set()
        self._returned.set()

    def hang_up(self, *, reset: bool = False) -> None:
        """End the connection from any thread, and wake up the threads that wait for it."""
        hang_up(self._sock, reset=reset)

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

    def _create_socket(self, assoc: Association, address: object, tls_args: object) -> LentSocket:
        return LentSocket(assoc, self._connection, self._idle_timeout_s)
