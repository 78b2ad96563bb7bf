"""Associations: requested, used and ended by pynetdicom, over our own connection.

pynetdicom negotiates (ACSE), keeps the state machine of PS3.8 section 9.2, and does C-ECHO and storage commitment.
`store.Sender` does C-STORE on the borrowed connection; for queries and retrievals see `direct.py`.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar, cast

import pydicom.config
from pydicom.uid import UID
from pynetdicom import _config, build_context
from pynetdicom.association import Association as PynetdicomAssociation
from pynetdicom.pdu_primitives import AsynchronousOperationsWindowNegotiation
from pynetdicom.presentation import PresentationContext

from protocols.dimse.entity import REASONS, Entity, LentSocket
from protocols.dimse.message import aborted
from protocols.dimse.transport import PLAIN_ALERT, Peer, connect, speaks_tls
from protocols.net import tls
from protocols.net.connection import SLICE_S
from transfer.errors import Busy, DispatchError, Interrupted, Misconfigured, TimedOut

_config.LOG_HANDLER_LEVEL = "none"  # its handlers write identifiers, thus patients' data, to the log
# What files and peers hold is passed on as it is; pydicom would warn of each UID that isn't quite one.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

MAX_CONTEXTS = 128  # odd numbers of one byte, PS3.8 section 9.3.2.2
MIN_PDU = 8  # bytes: a PDV header and a fragment, whose length is even (PS3.8 Annex E.2)
RELEASE_S = 3  # an answer to A-RELEASE-RQ is a courtesy: everything was confirmed before
REACTOR_S = 0.001  # between looks at pynetdicom's reactor
GRACE_S = 1  # for pynetdicom to notice its own time limit

REMEDIES = {
    (1, 3): ": correct aet_source, or make it known to the peer",
    (1, 7): ": correct aet_target",
}


# What a rejection says of the peer or of us, whatever is asked for: source and reason (PS3.8 table 9-21).
OF_ANY_REQUEST = ((1, 2), (1, 3), (1, 7), (2, 2))

T = TypeVar("T")


class RejectedRequest(Exception):
    """An A-ASSOCIATE-RJ; the cause of the error that it becomes."""

    def __init__(self, source: int, reason: int) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason


def _nothing() -> None:
    pass


class Negotiated:
    """What both kinds of association know once the peer has accepted one.

    Attributes:
        accepted: context id by (abstract syntax, transfer syntax); empty if the peer accepted none, in which case
            the association is over.
        max_send: largest PDU that the peer accepts, bytes; 0 for any.
    """

    accepted: dict[tuple[str, str], int]
    max_send: int

    def context(self, abstract_syntax: str) -> int | None:
        """Return the id of a context for an abstract syntax, whatever its transfer syntax; None if there is none."""
        return next((number for (abstract, _), number in self.accepted.items() if abstract == abstract_syntax), None)


class Association(Negotiated):
    """One established association, which pynetdicom's threads keep.

    Attributes:
        window: how many operations may be outstanding at once (PS3.7 Annex D.3.3.3); 1 if the peer grants no more.
    """

    def __init__(self, peer: Peer, assoc: PynetdicomAssociation, transport: LentSocket) -> None:
        self.peer = peer
        self.assoc = assoc
        self.transport = transport
        self.accepted = {
            (str(cx.abstract_syntax), str(cx.transfer_syntax[0])): cx.context_id or 0
            for cx in assoc.accepted_contexts
            if cx.transfer_syntax
        }
        invoked = assoc.acceptor.asynchronous_operations[0] if assoc.is_established else 1
        asked = assoc.requestor.asynchronous_operations[0]
        self.window = max(1, asked if invoked == 0 else min(asked, invoked))
        self.max_send = assoc.acceptor.maximum_length or 0

    def call(
        self, doing: str, function: Callable[[PynetdicomAssociation], T], check: Callable[[], None] = _nothing
    ) -> T:
        """Run an operation of pynetdicom's in a thread of its own, so that waiting for it can be stopped.

        Args:
            doing: what it is, for messages.
            function: called with pynetdicom's association.
            check: called several times a second; may raise to stop, which breaks the connection.

        Raises:
            Interrupted: the association ended. TimedOut: the peer is silent, and pynetdicom doesn't notice.
            Other errors: what `check` or the function raised.
        """
        made: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                self._wait_for_reactor()
                made.append(function(self.assoc))
            except BaseException as exc:  # raised in the thread that waits
                failed.append(exc)

        begun = time.monotonic()
        thread = threading.Thread(target=run, name=doing, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(SLICE_S)
                check()
                self._still_heard(doing, begun)
        except BaseException:
            self.transport.hang_up(reset=True)
            self.assoc._is_paused = True  # what an operation that missed its turn waits for
            thread.join(GRACE_S)
            raise
        if failed:
            # pynetdicom raises a RuntimeError for an association that ended before it was asked.
            if isinstance(failed[0], RuntimeError) and not self.assoc.is_established:
                raise self.lost(doing, begun) from failed[0]
            raise failed[0]
        return made[0]

    def _still_heard(self, doing: str, begun: float) -> None:
        """Raise TimedOut for a silence that pynetdicom should have noticed by itself."""
        if time.monotonic() - max(begun, self.transport.heard) > self.peer.idle_timeout_s + 2 * GRACE_S:
            raise TimedOut(f"{self.peer.where}: no answer to {doing} within {self.peer.idle_timeout_s:g} s")

    def _wait_for_reactor(self) -> None:
        """Wait until pynetdicom's reactor has woken up from the operation before this one.

        Otherwise the next operation takes the reactor for paused, sends its request, and loses the response to the
        reactor, which wakes up meanwhile: seen once in some hundred C-FIND to a fast peer.
        """
        while self.assoc._is_paused and self.assoc._reactor_checkpoint.is_set() and self.assoc.is_established:
            time.sleep(REACTOR_S)

    def echo(self, check: Callable[[], None] = _nothing) -> None:
        """Send C-ECHO and wait for the answer.

        Raises:
            Interrupted: the association ended, or the peer answers with a failure. TimedOut: it doesn't answer.
        """
        begun = time.monotonic()
        status = self.call("C-ECHO", lambda assoc: assoc.send_c_echo(), check)
        if "Status" not in status:
            raise self.lost("C-ECHO", begun)
        if status.Status != 0:
            raise Interrupted(f"{self.peer.where}: C-ECHO answered with status {status.Status:04X}")

    def lost(self, doing: str, begun: float) -> DispatchError:
        """Return why an operation of pynetdicom's got no answer, as pynetdicom doesn't tell timeouts from aborts."""
        failure = self.transport.failure
        if isinstance(failure, ssl.SSLError) and self.peer.tls:
            return tls.classify(failure, self.peer.where, has_cert=bool(self.peer.tls.cert))
        if self.transport.timed_out or time.monotonic() - begun >= self.peer.idle_timeout_s:
            return TimedOut(f"{self.peer.where}: no answer to {doing} within {self.peer.idle_timeout_s:g} s")
        return Interrupted(f"{self.peer.where}: the peer ended the association during {doing}")

    def release(self) -> None:
        """End the association in order; abort it if the peer doesn't answer soon."""
        self.assoc.acse_timeout = min(RELEASE_S, self.peer.idle_timeout_s)
        self._try(self.assoc.release, RELEASE_S + GRACE_S)
        self._end()

    def abort(self) -> None:
        """End the association at once."""
        if self.assoc.is_established:
            self._try(self.assoc.abort, GRACE_S)
        self._end()

    def _try(self, end: Callable[[], None], seconds: float) -> None:
        """Let pynetdicom end the association, if it can within this number of seconds.

        It waits without limit for its reactor, which a request of the peer's that comes just now may keep from
        pausing, and for its upper layer, which may be waiting for the other half of a PDU.
        """

        def run() -> None:
            with suppress(Exception):  # nothing that is still to come can change what was confirmed
                end()

        thread = threading.Thread(target=run, name="end", daemon=True)
        thread.start()
        thread.join(seconds)

    def close(self) -> None:
        """Close the connection of an association that has been released."""
        self._end()

    def drop(self) -> None:
        """Break the connection: for a peer that is gone, or in the middle of a PDU, where an abort can't be sent."""
        self.transport.hang_up(reset=True)
        self._end()

    def _end(self) -> None:
        self.transport.hang_up()
        with suppress(Exception):
            self.assoc.kill()
        self.transport.dispose()
        if self.assoc.is_alive():
            self.assoc.join(GRACE_S)


def associate(
    peer: Peer,
    contexts: Sequence[tuple[str, Sequence[str]]],
    check: Callable[[], None] = _nothing,
    *,
    window: int = 1,
    patience: float = 0.0,
    negotiation: Sequence[Any] = (),
    handlers: Sequence[Any] = (),
) -> Association:
    """Connect to the peer and negotiate an association.

    Args:
        contexts: at most 128 of (abstract syntax, transfer syntaxes to choose from).
        check: called several times a second while waiting; may raise to stop.
        window: how many outstanding operations to propose.
        patience: seconds to wait for the peer's answer to the request; 0 for its idle timeout.
        negotiation: further items of pynetdicom's for the request, such as role selections.
        handlers: event handlers of pynetdicom's for requests that the peer makes.

    Returns:
        The association. If the peer took none of the contexts, `accepted` is empty and the association is over.

    Raises:
        Unreachable, TimedOut, Interrupted: no answer. Busy: rejected for now. Misconfigured: rejected for good, or
        the peer speaks something else. NotTrusted, Denied: as `tls.classify` says.
    """
    sock = connect(peer, check)
    return negotiate(
        sock, peer, contexts, check, window=window, patience=patience, negotiation=negotiation, handlers=handlers
    )


def negotiate(
    sock: Any,
    peer: Peer,
    contexts: Sequence[tuple[str, Sequence[str]]],
    check: Callable[[], None] = _nothing,
    *,
    window: int = 1,
    patience: float = 0.0,
    negotiation: Sequence[Any] = (),
    handlers: Sequence[Any] = (),
) -> Association:
    """Negotiate an association over a connected socket, which belongs to it from now on; see `associate`."""
    items = list(negotiation)
    if window > 1:
        operations = AsynchronousOperationsWindowNegotiation()
        operations.maximum_number_operations_invoked = window
        operations.maximum_number_operations_performed = 1
        items.append(operations)
    ae = Entity(peer.calling, sock, peer.idle_timeout_s)
    patience = patience or peer.idle_timeout_s
    ae.acse_timeout, ae.dimse_timeout = patience, peer.idle_timeout_s
    ae.network_timeout = None  # who waits has a limit of its own
    made: list[PynetdicomAssociation | BaseException] = []

    def run() -> None:
        try:
            # The connection is there; the address is for pynetdicom's records.
            made.append(
                ae.associate(
                    "127.0.0.1",
                    peer.port,
                    contexts=[_context(*each) for each in contexts],
                    ae_title=peer.called,
                    max_pdu=peer.max_pdu,
                    ext_neg=items,
                    evt_handlers=list(handlers),
                )
            )
        except BaseException as exc:  # raised in the thread that waits
            made.append(exc)

    begun = time.monotonic()
    # In a thread of its own, so that a wait for a silent peer can be called off.
    thread = threading.Thread(target=run, name="negotiation", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(SLICE_S)
            check()
            if time.monotonic() - begun > patience + GRACE_S:
                break
    except BaseException:
        _give_up(sock, thread)
        raise
    if thread.is_alive():
        _give_up(sock, thread)
        raise _unanswered(peer, patience)
    [assoc] = made
    if isinstance(assoc, BaseException):
        sock.close()
        raise assoc
    transport = cast(LentSocket, assoc.dul.socket)
    association = Association(peer, assoc, transport)
    if assoc.is_established:
        if 0 < association.max_send < MIN_PDU:
            association.abort()
            raise too_small(peer, association.max_send)
        return association
    silent = time.monotonic() - begun >= patience
    association.drop()
    answer = assoc.acceptor.primitive
    if answer is not None and answer.result == 0 and transport.head[:1] == b"\x02":
        if answer.presentation_context_definition_results_list:
            return association
        raise senseless(peer)
    said = RejectedRequest(*transport.head[8:10]) if is_rejected(transport.head) else transport.failure
    raise refused(peer, transport, silent, patience) from said


def _give_up(sock: Any, thread: threading.Thread) -> None:
    """End a negotiation from outside: its threads notice the end of the connection."""
    with suppress(OSError):
        sock.shutdown(2)
    thread.join(GRACE_S)
    sock.close()


def _context(abstract: str, syntaxes: Sequence[str]) -> PresentationContext:
    return build_context(UID(abstract), [UID(syntax) for syntax in syntaxes])


def about_contexts(error: BaseException) -> bool:
    """Return True if an association may have been refused because of its contexts, and not because of us."""
    said = error.__cause__
    if isinstance(said, RejectedRequest):
        return (said.source, said.reason) not in OF_ANY_REQUEST
    return isinstance(error, Interrupted | TimedOut)


def _unanswered(peer: Peer, patience: float) -> TimedOut:
    return TimedOut(f"{peer.where}: no answer to the association request within {patience:g} s")


def senseless(peer: Peer) -> Interrupted:
    """Return the error for an acceptance that can't be read."""
    return Interrupted(f"{peer.where}: the peer's answer to the association request makes no sense")


def too_small(peer: Peer, size: int) -> Misconfigured:
    """Return the error for a peer whose largest PDU, in bytes, has no room for data."""
    return Misconfigured(f"{peer.where}: the peer takes PDUs of {size} bytes only, which hold no data")


class Heard(Protocol):
    """What came of a request: the first bytes of the answer, and what ended the connection."""

    head: bytes
    failure: OSError | None
    timed_out: bool


def is_rejected(head: bytes) -> bool:
    """Return True if an answer that begins so is an A-ASSOCIATE-RJ."""
    return head[:1] == b"\x03" and len(head) >= 10


def refused(peer: Peer, transport: Heard, silent: bool, patience: float) -> DispatchError:
    """Return why there is no association."""
    head = bytes(transport.head)
    if is_rejected(head):
        return rejection(peer, *head[7:10])
    if head[:1] == b"\x07" and len(head) >= 10:
        return Interrupted(f"{peer.where}: {aborted(*head[8:10])} that was asked for")
    if head.startswith(PLAIN_ALERT) and peer.tls is None:
        return _wants_tls(peer)
    if head[:1] == b"\x02" and not (silent or transport.timed_out):
        return senseless(peer)
    if head and head[0] not in (2, 3, 7):
        return Misconfigured(f"{peer.where}: the peer does not speak DICOM on this port: correct host or port")
    if transport.failure is not None and peer.tls is not None:
        return tls.classify(transport.failure, peer.where, has_cert=bool(peer.tls.cert))
    if silent or transport.timed_out:
        return _unanswered(peer, patience)
    if not head and peer.tls is None and speaks_tls(peer):
        return _wants_tls(peer)
    return Interrupted(f"{peer.where}: the peer closed the connection without an answer to the association request")


def _wants_tls(peer: Peer) -> DispatchError:
    return Misconfigured(f"{peer.where}: the peer expects TLS on this port: use a target of type dicom-tls")


def rejection(peer: Peer, result: int, source: int, reason: int) -> DispatchError:
    """Classify A-ASSOCIATE-RJ (PS3.8 section 9.3.4): 1 is for good, 2 for now."""
    words = REASONS.get((source, reason), f"source {source}, reason {reason}")
    if result == 2:
        return Busy(f"{peer.where}: association rejected for now: {words}")
    remedy = REMEDIES.get((source, reason), "")
    return Misconfigured(f"{peer.where}: association rejected: {words}{remedy}")
