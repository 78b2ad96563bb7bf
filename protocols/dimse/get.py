"""C-GET and C-MOVE over our own connection: one request, and the peer's answers to it.

Sources: PS3.4 sections C.4.2 and C.4.3 (statuses, sub-operation counters), PS3.7 sections 9.3.3 and 9.3.4.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from protocols.dimse import identifier
from protocols.dimse.command import (
    AFFECTED_CLASS,
    COMMENT,
    COMPLETED,
    DESTINATION,
    FAILED,
    FIELD,
    PRIORITY,
    REMAINING,
    STATUS,
    WARNING,
    CommandSet,
)
from protocols.dimse.contexts import UNCOMPRESSED, Pair
from protocols.dimse.direct import DirectAssociation, associate
from protocols.dimse.message import C_STORE_RQ
from protocols.dimse.query import C_GET_RQ, C_MOVE_RQ, CANCELLED, MEDIUM, PENDING, PRIVATE, Conversation
from protocols.dimse.receive import Depot, Responder, receive
from protocols.dimse.stream import MAX_LIST, Released
from protocols.dimse.transport import Peer
from protocols.net.hiding import forms
from protocols.net.words import clean
from transfer.errors import Denied, DispatchError, Interrupted, Misconfigured
from transfer.throttle import Throttle

STUDY_ROOT_GET, PATIENT_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3", "1.2.840.10008.5.1.4.1.2.1.3"
STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2", "1.2.840.10008.5.1.4.1.2.1.2"
C_GET_RSP, C_MOVE_RSP = 0x8010, 0x8021
DESTINATION_UNKNOWN, WARNINGS = 0xA801, 0xB000
INSTANCE_BYTES = 384  # of a response, a request and an instance together; only the smallest instances have fewer
UNSUPPORTED = (0x0122, 0x0211)  # PS3.7 Annex C: SOP class not supported, unrecognised operation

_numbers = itertools.count(int(time.time()) % 30_000)  # message ids of moves: no two of this process at once alike


@dataclass(frozen=True)
class FinalResponse:
    """The final response to a retrieval.

    Attributes:
        status: as the peer gave it.
        completed, failed, warning: its sub-operation counters, None where it leaves one out.
    """

    status: int
    completed: int | None = None
    failed: int | None = None
    warning: int | None = None
    comment: str = ""

    @property
    def whole(self) -> bool:
        """Whether the peer says that everything was sent, and that there was something to send."""
        return self.status == 0 and not self.failed and (self.completed or self.warning or 0) > 0

    @property
    def says_nothing(self) -> bool:
        """Whether the peer calls it a success, and not how much was sent: it may be about to send it."""
        return self.status == 0 and not (self.completed or self.failed or self.warning)

    @property
    def refused(self) -> bool:
        """Whether the peer did not do the retrieval at all."""
        return self.status not in (0, WARNINGS, CANCELLED) and not (self.completed or self.warning)

    @property
    def failed_all(self) -> bool:
        """Whether the peer says that there was something to send, and that nothing of it was sent."""
        return bool(self.failed) and not (self.completed or self.warning)

    @property
    def unsupported(self) -> bool:
        """Whether the peer says that it does not do such a thing, whatever is asked for."""
        return self.status in UNSUPPORTED

    def __str__(self) -> str:
        counts = [
            f"{count} {name}"
            for name, count in (
                ("completed", self.completed),
                ("failed", self.failed),
                ("with a warning", self.warning),
            )
            if count is not None
        ]
        return ", ".join([f"status {self.status:04X}", *counts]) + (f" ({self.comment})" if self.comment else "")


class Retriever(Conversation):
    """An association on which series are requested.

    Attributes:
        pairs: the storage contexts that were asked for; empty for C-MOVE.
        granted: those of them that the peer accepted.
    """

    def __init__(
        self,
        association: DirectAssociation,
        roots: tuple[str, str],
        pairs: frozenset[Pair],
        check: Callable[[], None],
        throttle: Throttle,
        moved: Callable[[int], None],
    ) -> None:
        super().__init__(association, check, throttle, moved)
        self.pairs = pairs
        self.root = next((root for root in roots if association.context(root) is not None), "")
        self._context = association.context(self.root) or 0
        by_number = {number: syntax for (_, syntax), number in association.accepted.items()}
        self.granted = pairs & association.accepted.keys()
        self._syntax = by_number.get(self._context, UNCOMPRESSED[0])
        self._syntaxes = by_number
        self._respond = Responder(self.stream, association.max_send)

    @property
    def stores(self) -> bool:
        """Whether the peer accepted any storage context."""
        return bool(self.granted)

    def _identifier(self, keys: Mapping[str, str], charset: str) -> bytes:
        return identifier.built({key: value for key, value in keys.items() if value}, charset, self._syntax)

    def _ask_to_get(self, keys: Mapping[str, str], charset: str) -> None:
        elements: dict[int, int | str | bytes] = {AFFECTED_CLASS: self.root, FIELD: C_GET_RQ, PRIORITY: MEDIUM}
        self.ask(self._context, elements, self._identifier(keys, charset))

    def answer(self, keys: Mapping[str, str]) -> FinalResponse | None:
        """Request what does not exist (C-GET), and return the final response; None if an instance comes all the same.

        Raises:
            Interrupted, TimedOut: the association ended, as where the peer does not allow us that.
        """
        self._ask_to_get(keys, "")
        while True:
            command = self.command()
            if command.kind == C_STORE_RQ:
                return None
            if command.kind == C_GET_RSP and (answer := self._answer(command, keys)):
                return answer

    def get(self, keys: Mapping[str, str], depot: Depot, charset: str = "") -> FinalResponse:
        """Request instances on this association (C-GET), and receive them.

        Args:
            charset: of the keys, "" for the most likely one, if they are not ASCII.

        Raises:
            Interrupted, TimedOut: the association ended. Busy: the disk is full.
        """
        self._ask_to_get(keys, charset)
        left = 0  # instances that will come, as the peer says
        while True:
            self.stream.expect(INSTANCE_BYTES if left > 0 else 1)
            command = self.command()
            if command.kind == C_STORE_RQ:
                self._store(command, depot)
                left -= 1
            elif command.kind == C_GET_RSP:
                left = command.number(REMAINING) or 0
                if answer := self._answer(command, keys):
                    self.stream.expect(1)
                    return answer
            elif command.has_dataset:
                self._skip()

    def beginning(self, keys: Mapping[str, str], most: int, charset: str = "") -> tuple[bytes, str]:
        """Request instances (C-GET), and return how the data set of the first begins, and its transfer syntax.

        The association is of no use after that. What is returned is empty if nothing comes.

        Args:
            most: bytes after which no more is read.
            charset: as of `get`.

        Raises:
            Interrupted, TimedOut: the association ended.
        """
        self._ask_to_get(keys, charset)
        while True:
            command = self.command()
            if command.kind == C_STORE_RQ and command.has_dataset:
                return self._begin(most), self._syntaxes.get(command.context, "")
            if command.kind == C_GET_RSP and self._answer(command, keys):
                return b"", ""

    def _begin(self, most: int) -> bytes:
        begin = b""
        try:
            while len(begin) < most:
                view = self.stream.piece()
                if view is None:
                    self.stream.fill()
                    continue
                begin += view
                if self.stream.last:
                    break
        except Released as exc:
            self.released = True
            raise Interrupted(f"{self.peer.where}: the peer released the association") from exc
        return begin

    def _store(self, command: CommandSet, depot: Depot) -> None:
        # On whatever context it comes, and whatever roles were granted: peers leave those items out.
        syntax = self._syntaxes.get(command.context)
        if syntax is None or not command.has_dataset:
            raise Interrupted(f"{self.peer.where}: the peer sent an instance in a context that it did not accept")
        try:
            receive(self.stream, command, syntax, depot, self._respond)
        except Released as exc:
            self.released = True
            raise Interrupted(f"{self.peer.where}: the peer released the association") from exc
        if depot.failure is not None:
            raise depot.failure  # sources go on through A700: only the end of the association stops them

    def move(
        self,
        keys: Mapping[str, str],
        destination: str,
        message_id: int,
        quiet: Callable[[], float],
        charset: str = "",
    ) -> FinalResponse:
        """Request instances to be sent to another association (C-MOVE), and wait for the final response.

        Args:
            destination: AE title that receives them.
            message_id: by which they will be recognised.
            quiet: returns when something was last received there, so that silence here alone doesn't count.
            charset: as of `get`.

        Raises:
            Interrupted, TimedOut: the association ended.
        """
        self._message_id = message_id - 1
        self.stream.quiet = quiet
        elements: dict[int, int | str | bytes] = {
            AFFECTED_CLASS: self.root, FIELD: C_MOVE_RQ, PRIORITY: MEDIUM, DESTINATION: destination,
        }  # fmt: skip
        self.ask(self._context, elements, self._identifier(keys, charset))
        while True:
            command = self.command()
            if command.kind == C_MOVE_RSP and (answer := self._answer(command, keys)):
                return answer
            if command.kind != C_MOVE_RSP and command.has_dataset:
                self._skip()

    def _answer(self, command: CommandSet, keys: Mapping[str, str]) -> FinalResponse | None:
        """Return the final response; None for a pending one."""
        if command.has_dataset:
            self._skip()
        status = command.number(STATUS)
        if status in PENDING:
            return None
        self._outstanding = False
        if status is None:
            raise Interrupted(f"{self.peer.where}: the peer answered without a status")
        hidden = {form for key, value in keys.items() if key in PRIVATE for form in forms(value)}
        return FinalResponse(
            status,
            command.number(COMPLETED),
            command.number(FAILED),
            command.number(WARNING),
            clean(command.text(COMMENT), hidden),
        )

    def _skip(self) -> None:
        try:
            self.stream.dataset(MAX_LIST)
        except Released as exc:
            self.released = True
            raise Interrupted(f"{self.peer.where}: the peer released the association") from exc


def next_message_id() -> int:
    """Return a message id for a C-MOVE that no other one of this process has now."""
    return next(_numbers) % 0xFFFF + 1


def getter(
    peer: Peer,
    pairs: Sequence[Pair],
    check: Callable[[], None],
    throttle: Throttle,
    moved: Callable[[int], None],
) -> Retriever:
    """Associate with a peer to retrieve by C-GET.

    Raises:
        As `associate`. `root` shows a peer that doesn't support C-GET.
    """
    classes = list(dict.fromkeys(sop_class for sop_class, _ in pairs))
    contexts: list[tuple[str, Sequence[str]]] = [(STUDY_ROOT_GET, UNCOMPRESSED), (PATIENT_ROOT_GET, UNCOMPRESSED)]
    contexts += [(sop_class, (syntax,)) for sop_class, syntax in pairs]
    association = associate(peer, contexts, check, providers=classes)
    return Retriever(association, (STUDY_ROOT_GET, PATIENT_ROOT_GET), frozenset(pairs), check, throttle, moved)


def mover(peer: Peer, check: Callable[[], None]) -> Retriever:
    """Associate with a peer to retrieve by C-MOVE.

    Raises:
        As `associate`. `root` shows a peer that doesn't support C-MOVE.
    """
    association = associate(peer, [(STUDY_ROOT_MOVE, UNCOMPRESSED), (PATIENT_ROOT_MOVE, UNCOMPRESSED)], check)
    return Retriever(
        association, (STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE), frozenset(), check, Throttle(None), lambda count: None
    )


def failure(peer: Peer, answer: FinalResponse, destination: str = "") -> DispatchError | None:
    """Return the error that a status means for all further requests; None if it means none."""
    if answer.status == DESTINATION_UNKNOWN:
        return Misconfigured(
            f"{peer.where}: the peer doesn't know the move destination {destination}: register this AE title there, "
            "with this machine's address and the port of the Storage SCP (settings scp_aet and scp_port)"
        )
    if answer.status == 0x0124:
        return Denied(f"{peer.where}: the peer refuses the retrieval: {answer}")
    return None
