"""Associations for queries and retrievals: negotiated and ended as bytes, over our own connection.

pynetdicom's two threads look for work every millisecond, so that each association costs 20 ms to begin and to end:
as much as a study of 100 small instances takes.

Sources: PS3.8 sections 9.3.2 to 9.3.8, PS3.7 Annex D.3.3 (role selection).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from protocols.dimse import answer
from protocols.dimse.association import (
    MIN_PDU,
    RELEASE_S,
    Negotiated,
    RejectedRequest,
    is_rejected,
    refused,
    senseless,
    too_small,
)
from protocols.dimse.entity import HEAD, HEAD_BYTES
from protocols.dimse.message import (
    ABORT,
    ABORT_PDU,
    IMPLEMENTATION_UID,
    IMPLEMENTATION_VERSION,
    P_DATA_TF,
    RELEASE_RP,
    RELEASE_RP_PDU,
    RELEASE_RQ,
    RELEASE_RQ_PDU,
)
from protocols.dimse.stream import SHORT_PDU, Stream
from protocols.dimse.transport import Peer, connect, hang_up
from transfer.errors import DispatchError, Interrupted, TimedOut
from transfer.throttle import Throttle

REQUEST, ACCEPTANCE, REJECTION = 0x01, 0x02, 0x03
MAX_ACCEPTANCE = 1 << 17  # bytes; 128 contexts take 12 kB
MOST_DRAINED = 1 << 24  # bytes that a peer may still send after an abort; who sends more hasn't looked at it
PROPOSED, ABSTRACT, VERSION = 0x20, 0x30, 0x55


@dataclass
class _Heard:
    """The result of a request, as `association.refused` reads it."""

    head: bytes = b""
    failure: OSError | None = None
    timed_out: bool = False


@dataclass(eq=False)
class DirectAssociation(Negotiated):
    """One association that is ours alone.

    Attributes:
        round_trip_s: how long the peer's answer to the request took.
    """

    peer: Peer
    stream: Stream
    accepted: dict[tuple[str, str], int] = field(default_factory=dict)
    max_send: int = 0
    round_trip_s: float = 0.0
    _over: bool = False

    def release(self) -> None:
        """End the association in order, without waiting long for the answer to A-RELEASE-RQ."""
        if self._over:
            return
        stream = self.stream
        stream.check, stream.quiet, stream.moved = _nothing, lambda: 0.0, lambda count: None
        stream.throttle = Throttle(None)
        stream.idle_timeout_s = min(RELEASE_S, self.peer.idle_timeout_s)
        with suppress(DispatchError):
            stream.send(RELEASE_RQ_PDU)
            self._await_end()
        self.close()

    def _await_end(self) -> None:
        while True:
            kind, length = struct.unpack(">BxI", self.stream.take(HEAD_BYTES))
            if kind == RELEASE_RQ:
                self.stream.send(RELEASE_RP_PDU)  # both ask at once: each answers (PS3.8 section 7.2.2.2)
            elif kind != P_DATA_TF:
                return
            while length:
                length -= len(self.stream.take(min(length, MAX_ACCEPTANCE)))
            if kind == RELEASE_RP:
                return

    def abort(self, *, until_closed: bool = False) -> None:
        """End the association at once.

        Args:
            until_closed: whether to wait a little for the peer to close the connection: it may have no room for another
                association before.
        """
        if self.stream.torn:
            self.drop()
            return
        if not self._over:
            self.stream.check = _nothing
            self.stream.idle_timeout_s = min(RELEASE_S, self.peer.idle_timeout_s)
            with suppress(DispatchError):
                self.stream.send(ABORT_PDU)
                if until_closed:
                    self.stream.drain(MOST_DRAINED)
        self.close()

    def close(self) -> None:
        """Close the connection of an association that is over."""
        self._over = True
        hang_up(self.stream.sock)
        self.stream.sock.close()

    def drop(self) -> None:
        """Break the connection: for a peer that is gone, or in the middle of a PDU, where an abort can't be sent."""
        hang_up(self.stream.sock, reset=True)
        self.close()


def associate(
    peer: Peer,
    contexts: Sequence[tuple[str, Sequence[str]]],
    check: Callable[[], None] = lambda: None,
    *,
    providers: Sequence[str] = (),
) -> DirectAssociation:
    """Connect to the peer and negotiate an association.

    Args:
        contexts: at most 128 of (abstract syntax, transfer syntaxes to choose from).
        check: called several times a second while waiting; may raise to stop.
        providers: abstract syntaxes for which we ask to be the SCP.

    Returns:
        The association. If the peer took none of the contexts, `accepted` is empty and the association is over.

    Raises:
        As `association.associate`.
    """
    sock: Any = connect(peer, check)
    try:
        stream = Stream(sock, peer.where, peer.idle_timeout_s, check)
        asked, begun = request(peer, contexts, providers), time.monotonic()
        body = _answer(peer, stream, asked)
    except BaseException:
        sock.close()
        raise
    made = DirectAssociation(peer, stream, round_trip_s=time.monotonic() - begun)
    try:
        syntaxes, made.max_send = answer.accepted(body)
    except ValueError as exc:
        made.abort()
        raise senseless(peer) from exc
    for number, (abstract, _) in zip(range(1, 256, 2), contexts, strict=False):
        if number in syntaxes:
            made.accepted[abstract, syntaxes[number]] = number
    if not made.accepted:
        made.abort()
    elif 0 < made.max_send < MIN_PDU:
        made.abort()
        raise too_small(peer, made.max_send)
    return made


def _nothing() -> None:
    pass


def request(peer: Peer, contexts: Sequence[tuple[str, Sequence[str]]], providers: Sequence[str]) -> bytes:
    """Return an A-ASSOCIATE-RQ."""
    items = [answer.item(answer.APPLICATION, answer.APPLICATION_CONTEXT)]
    for number, (abstract, syntaxes) in zip(range(1, 256, 2), contexts, strict=False):
        inner = answer.item(ABSTRACT, abstract.encode("ascii"))
        inner += b"".join(answer.item(answer.SYNTAX, syntax.encode("ascii")) for syntax in syntaxes)
        items.append(answer.item(PROPOSED, bytes((number, 0, 0, 0)) + inner))
    user = [
        answer.item(answer.MAX_LENGTH, struct.pack(">I", peer.max_pdu)),
        answer.item(answer.IMPLEMENTATION, IMPLEMENTATION_UID.encode("ascii")),
    ]
    for abstract in providers:
        raw = abstract.encode("ascii")
        user.append(answer.item(answer.ROLE, struct.pack(">H", len(raw)) + raw + b"\0\1"))
    user.append(answer.item(VERSION, IMPLEMENTATION_VERSION.encode("ascii")))
    items.append(answer.item(answer.USER, b"".join(user)))
    titles = b"".join(title.encode("ascii").ljust(16) for title in (peer.called, peer.calling))
    body = struct.pack(">HH", 1, 0) + titles + bytes(32) + b"".join(items)
    return struct.pack(">BxI", REQUEST, len(body)) + body


def _answer(peer: Peer, stream: Stream, asked: bytes) -> bytes:
    """Send a request; return the variable field of the A-ASSOCIATE-AC that answers it.

    Raises:
        As `association.associate`.
    """
    heard = _Heard()
    try:
        stream.send(asked)
        stream.peek(2)
        kind = stream.ahead[0]
        if kind == ACCEPTANCE:
            heard.head = stream.take(HEAD_BYTES)
            length = int.from_bytes(heard.head[2:], "big")
            if 0 < length <= MAX_ACCEPTANCE:
                return stream.take(length)
        elif kind in (REJECTION, ABORT):
            stream.peek(SHORT_PDU)
    except TimedOut:
        heard.timed_out = True
    except Interrupted as exc:
        heard.failure = exc.__cause__ if isinstance(exc.__cause__, OSError) else None
    heard.head = heard.head or stream.ahead[:HEAD]
    said = RejectedRequest(*heard.head[8:10]) if is_rejected(heard.head) else heard.failure
    raise refused(peer, heard, heard.timed_out, peer.idle_timeout_s) from said
