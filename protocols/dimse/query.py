"""C-FIND over our own connection: a query's answers as they arrive.

Sources: PS3.4 Annex C.4.1 (C-FIND, statuses), C.6.1 and C.6.2 (Patient Root, Study Root).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from protocols.dimse import identifier
from protocols.dimse.command import (
    AFFECTED_CLASS,
    COMMENT,
    DATASET_TYPE,
    FIELD,
    MESSAGE_ID,
    PRIORITY,
    RESPONDED_TO,
    STATUS,
    CommandSet,
    encoded,
)
from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.direct import DirectAssociation, associate
from protocols.dimse.message import RELEASE_RP_PDU
from protocols.dimse.stream import Released, pdus
from protocols.dimse.transport import Peer
from protocols.net.hiding import forms
from protocols.net.words import clean
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, TimedOut
from transfer.throttle import Throttle

STUDY_ROOT_FIND, PATIENT_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.1.1"
C_FIND_RQ, C_FIND_RSP, C_CANCEL_RQ, C_ECHO_RQ = 0x0020, 0x8020, 0x0FFF, 0x0030
C_GET_RQ, C_MOVE_RQ = 0x0010, 0x0021
SERVICES: dict[int | str | bytes, str] = {C_FIND_RQ: "C-FIND", C_GET_RQ: "C-GET", C_MOVE_RQ: "C-MOVE"}
PENDING = (0xFF00, 0xFF01)  # PS3.4 table C.4-1
CANCELLED = 0xFE00
MEDIUM, FOLLOWS = 0, 1
PRIVATE = ("PatientName", "PatientID", "AccessionNumber")  # keys whose values show in no message


class Conversation:
    """An association whose connection is lent to us during the block; released at its end, or aborted."""

    def __init__(
        self,
        association: DirectAssociation,
        check: Callable[[], None] = lambda: None,
        throttle: Throttle | None = None,
        moved: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.association, self.peer, self.stream = association, association.peer, association.stream
        self._check, self._throttle, self._moved = check, throttle or Throttle(None), moved
        self._message_id = 0
        self.released = False

    def __enter__(self) -> Self:
        self.stream.check, self.stream.throttle, self.stream.moved = self._check, self._throttle, self._moved
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.released:
            with suppress(DispatchError):
                self.stream.send(RELEASE_RP_PDU)
            self.association.close()
        elif kind is None or (issubclass(kind, DispatchError) and not issubclass(kind, Interrupted | TimedOut)):
            idle = not self.stream.ahead and not self.stream.torn and not self._outstanding
            if idle:
                self.association.release()
            else:
                self.association.abort()
        else:
            self.association.abort()

    _outstanding = False  # whether a request has no final response yet
    _unanswered = ""  # what was asked for last, as long as nothing has come since

    def ask(self, context: int, elements: dict[int, int | str | bytes], data: bytes | None) -> int:
        """Send a request, with a data set if there is one; return its message id."""
        self._message_id = self._message_id % 0xFFFF + 1
        dataset_type = 0x0101 if data is None else FOLLOWS
        command = encoded({**elements, MESSAGE_ID: self._message_id, DATASET_TYPE: dataset_type})
        self.stream.send(pdus(context, command, data, self.association.max_send))
        self._outstanding, self._unanswered = True, SERVICES.get(elements[FIELD], "")
        return self._message_id

    def cancel(self, context: int, message_id: int) -> None:
        """Ask the peer to stop answering (C-CANCEL, PS3.7 section 9.3.2.3); the final response still comes."""
        command = encoded({FIELD: C_CANCEL_RQ, RESPONDED_TO: message_id, DATASET_TYPE: 0x0101})
        self.stream.send(pdus(context, command, None, self.association.max_send))

    def command(self) -> CommandSet:
        """Wait for the next message.

        Raises:
            Interrupted, TimedOut: the association ended.
        """
        try:
            found = self.stream.command()
        except Released as exc:
            self.released = True
            raise Interrupted(f"{self.peer.where}: the peer released the association") from exc
        except Interrupted as exc:
            if self._unanswered:  # so Orthanc refuses a service to a node
                may = f"is {self.peer.calling} registered there, and allowed that?"
                exc.message += f" when it was asked by {self._unanswered}: {may}"
            raise
        self._unanswered = ""
        return found

    def final(self, command: CommandSet, keys: Mapping[str, str], doing: str) -> None:
        """Raise an error if the final status of C-FIND is not success."""
        self._outstanding = False
        code = command.number(STATUS)
        if code is None:
            raise Interrupted(f"{self.peer.where}: {doing} was answered without a status")
        if code == 0:
            return
        hidden = {form for key, value in keys.items() if key in PRIVATE for form in forms(value)}
        comment = clean(command.text(COMMENT), hidden)
        raise refusal(f"{self.peer.where}: {doing}", code, comment)


def refusal(what: str, code: int, comment: str) -> DispatchError:
    """Return the error for a final status of C-FIND other than success (PS3.4 table C.4-1, PS3.7 Annex C)."""
    text = f"{what} answered with status {code:04X}" + (f" ({comment})" if comment else "")
    if code & 0xFF00 == 0xA700 or code in (0x0213, CANCELLED):  # FE00 unasked: Orthanc, where its limit is reached
        return Busy(text)
    if code == 0x0124:
        return Denied(text)
    return Misconfigured(text)


class Finder(Conversation):
    """Sends queries to one peer, one after the other.

    Attributes:
        root: abstract syntax of the information model that the peer accepts, Study Root if possible.
        quickest_s: how long the peer took, at its best, from a request to the first answer.
    """

    def __init__(self, association: DirectAssociation, check: Callable[[], None] = lambda: None) -> None:
        super().__init__(association, check)
        self.quickest_s = association.round_trip_s
        self._take(association)

    def _take(self, association: DirectAssociation) -> None:
        """Use an association."""
        self.association, self.stream = association, association.stream
        roots = [root for root in (STUDY_ROOT_FIND, PATIENT_ROOT_FIND) if association.context(root) is not None]
        self.root = roots[0]
        context = association.context(self.root)
        assert context is not None  # noqa: S101 - one of those that were accepted
        self._context = context
        self._syntax = next(syntax for (root, syntax), number in association.accepted.items() if number == context)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Give the association up during the block, so that another can have its place, and associate anew after it.

        Not while answers are expected. A peer may allow one association, and a target limits how many it gets.

        Raises:
            As `finder`.
        """
        self.association.release()
        yield
        self._take(_associated(self.peer, self._check))
        self.__enter__()

    def ask_for(
        self, level: str, keys: Mapping[str, str], wanted: Sequence[str] = (), charset: str = "", most: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Yield what matches, as the peer gives it, values by keyword.

        Args:
            level: PATIENT, STUDY, SERIES or IMAGE.
            keys: values to match.
            wanted: keywords of further values in the answer.
            charset: of the values, "" if they are ASCII.
            most: number of answers after which the peer is asked to stop; 0 for no limit.

        Raises:
            Interrupted, TimedOut: the answer is not complete. Busy: the peer has no room for it now, or gives no more.
            Denied: not authorised. Misconfigured: the peer can't answer this query; the message has its status.
        """
        values = dict.fromkeys(wanted, "") | dict(keys) | {"QueryRetrieveLevel": level}
        try:
            data = identifier.built(values, charset, self._syntax)
        except UnicodeEncodeError as exc:  # of what another answer had, as a UID
            raise Misconfigured(
                f"{self.peer.where}: a UID, code or date that this query needs has other letters than ASCII"
            ) from exc
        begun = time.monotonic()
        message_id = self.ask(self._context, {AFFECTED_CLASS: self.root, FIELD: C_FIND_RQ, PRIORITY: MEDIUM}, data)
        count, stopped = 0, False
        answers = identifier.Answers(self._syntax, charset)
        while True:
            command = self.command()
            if begun:
                self.quickest_s = min(self.quickest_s, time.monotonic() - begun)
                begun = 0.0
            if command.kind == C_ECHO_RQ:
                continue
            if command.kind != C_FIND_RSP:
                raise Interrupted(f"{self.peer.where}: the peer sent an unexpected message in answer to C-FIND")
            answer = self._dataset() if command.has_dataset else b""
            if command.number(STATUS) not in PENDING:
                if stopped and command.number(STATUS) == CANCELLED:
                    self._outstanding = False
                else:
                    self.final(command, values, "C-FIND")
                return
            if stopped or not answer:
                continue
            count += 1
            yield answers.read(answer)
            if most and count >= most:
                stopped = True
                self.cancel(self._context, message_id)

    def _dataset(self) -> bytes:
        try:
            return self.stream.dataset()
        except Released as exc:
            self.released = True
            raise Interrupted(f"{self.peer.where}: the peer released the association") from exc


def finder(peer: Peer, check: Callable[[], None] = lambda: None) -> Finder:
    """Associate with a peer to query it; use the result as a context manager.

    Raises:
        Misconfigured: it accepts neither Study Root nor Patient Root C-FIND. Others: as `associate`.
    """
    return Finder(_associated(peer, check), check)


def _associated(peer: Peer, check: Callable[[], None]) -> DirectAssociation:
    association = associate(peer, [(STUDY_ROOT_FIND, UNCOMPRESSED), (PATIENT_ROOT_FIND, UNCOMPRESSED)], check)
    if not association.accepted:
        raise Misconfigured(
            f"{peer.where}: the peer accepts neither Study Root nor Patient Root C-FIND: it can't be queried"
        )
    return association
