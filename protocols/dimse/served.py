"""One association that a peer has opened to us, from its acceptance to its end: stores, echoes, what its visit serves.

It needs nothing of the port that it came in by, so that another process can serve it, and imports little for that.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from protocols.dimse.command import (
    AFFECTED_CLASS,
    DATASET_TYPE,
    FIELD,
    MESSAGE_ID,
    RESPONDED_TO,
    STATUS,
    CommandSet,
    encoded,
)
from protocols.dimse.message import (
    ABORT_PDU,
    C_ECHO_RQ,
    C_ECHO_RSP,
    C_STORE_RQ,
    NO_DATASET,
    RELEASE_RP_PDU,
    VERIFICATION,
)
from protocols.dimse.receive import OUT_OF_RESOURCES, Depot, Responder, receive
from protocols.dimse.stream import BUFFERS, Released, Stream, pdus
from transfer.errors import Busy, DispatchError, Interrupted

RESPONSE, C_CANCEL_RQ, UNRECOGNIZED = 0x8000, 0x0FFF, 0x0211  # PS3.7 Annexes C and E


@dataclass(frozen=True)
class Caller:
    """The peer that has opened an association: AE titles and address, and whether it came over TLS."""

    called: str
    calling: str
    host: str
    tls: bool = False


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


@dataclass(frozen=True, eq=False)
class Accepted:
    """An association that was accepted, and not served yet.

    Attributes:
        sock: its connection, from which nothing was read that comes after the request.
        max_pdu: the largest PDU that the peer takes, bytes; 0 for any.
        contexts: abstract and transfer syntax of what was accepted, by context id.
        idle_timeout_s: seconds of silence after which it is ended.
    """

    sock: socket.socket
    caller: Caller
    visit: Visit
    max_pdu: int
    contexts: dict[int, tuple[str, str]]
    idle_timeout_s: float


class ServedAssociation:
    """Serves an association in this thread.

    Args:
        check: called now and then; may raise to end it.
        buffers: as of a `Stream`.
    """

    def __init__(
        self, accepted: Accepted, check: Callable[[], None] = lambda: None, *, buffers: tuple[int, int] = BUFFERS
    ) -> None:
        caller = accepted.caller
        self.visit, self.caller = accepted.visit, caller
        self.contexts, self.max_pdu = accepted.contexts, accepted.max_pdu
        where = f"{caller.calling} at {caller.host}"
        self.stream = Stream(accepted.sock, where, accepted.idle_timeout_s, check, buffers=buffers)
        self.respond = Responder(self.stream, self.max_pdu)
        self.depot: Depot | None = None  # of what came last
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
        finally:
            stream.close()

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
            if depot is not self.depot:
                self._begin(depot)
            status = receive(self.stream, request, self.contexts[request.context][1], depot, self.respond)
        if status == OUT_OF_RESOURCES and depot is not None and depot.failure is not None:
            # Sources go on through A700; a full disk must not take the rest of the study one by one.
            raise depot.failure

    def _begin(self, depot: Depot) -> None:
        """Receive for a depot from now on, and what was read before it was known as well, at its rate."""
        self.depot = depot
        self.stream.throttle = depot.throttle
        if depot.throttle.limit:
            depot.throttle.delay(len(self.stream.ahead))  # paid for with what comes next
        depot.moved(len(self.stream.ahead))

    def _moved(self, count: int) -> None:
        if self.depot is not None:
            self.depot.heard = self.stream.heard
            self.depot.moved(count)

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
