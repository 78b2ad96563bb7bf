"""Sends instances over one association and reports their outcomes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Protocol

from imaging.header import UID, Damaged, Header
from imaging.mend import NOTE, mended
from imaging.pixels import Unfit
from imaging.transcode import Converted, NoRoom, converted, fallbacks
from protocols.dimse.association import Association
from protocols.dimse.backlog import Backlog
from protocols.dimse.contexts import Pair, of_class
from protocols.dimse.message import VERIFICATION, Response
from protocols.dimse.pace import Pace
from protocols.dimse.status import Meaning, meaning
from protocols.dimse.store import Changed, OutgoingInstance, ReleasedByPeer, Sender
from protocols.dimse.transport import Peer
from protocols.net.hiding import identifying
from protocols.net.words import clean
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Rejected, TimedOut
from transfer.meter import Meter
from transfer.outcome import DELIVERED, ELSEWHERE, Kind, Outcome
from transfer.plan import Item, Plan, header_of
from transfer.receipt import PushReport
from transfer.throttle import Throttle

# A conversion may take minutes, and peers end associations on which nothing happens (Orthanc after 30 s).
KEEP_ALIVE_S = 8
LONG_S = 0.1  # that a response takes, for other associations to be of use at once
MOST_REFUSED = 2  # in a row, after others on the same association: maybe it is that one which takes no more


class Carrier(Protocol):
    """The owner of conveyors over one or several associations, and what they share."""

    peer: Peer
    plan: Plan
    report: PushReport
    backlog: Backlog
    throttle: Throttle
    pace: Pace
    transcode: str
    padded: list[Item]
    last: DispatchError | None

    def grow(self, count: int) -> None:
        """Open this many more associations."""

    def refusal(self, association: Association, header: Header) -> str:
        """Return why an instance can't be sent over an association."""


class Conveyor:
    """Carries instances of a fleet's backlog over one association.

    Args:
        take: returns the next instance; None at the end.
        alone: whether nothing else may be outstanding beside an instance.

    Attributes:
        taken: how many instances it took.
    """

    def __init__(
        self, fleet: Carrier, association: Association, take: Callable[[], Item | None], *, alone: bool = False
    ) -> None:
        self.fleet, self.association, self.take, self.alone = fleet, association, take, alone
        self.plan, self.report, self.backlog = fleet.plan, fleet.report, fleet.backlog
        self.where = fleet.peer.where
        self.taken = self.answers = 0
        self._refused = 0  # in a row, for now
        self._outstanding: dict[int, tuple[Item, float]] = {}
        self._meter = Meter()
        self._awaits = 0.0  # since when a response is waited for; 0 if none is

    def serve(self) -> None:
        """Send instances until there are no more, or the association ends; outstanding ones become suspects then.

        Raises:
            Busy: no room here for a converted instance.
            Other errors: those that are not about this association.
        """
        sender = Sender(self.association, self.fleet.throttle, self.report.moved, self._check)
        try:
            with sender, self.report.under_way():
                self._carry(sender)
                sender.release()
        except Changed:
            self.association.abort()
        except (Interrupted, TimedOut) as exc:
            self._end(sender, exc)
            outstanding = [item for item, _ in self._outstanding.values()]
            if isinstance(exc, ReleasedByPeer) and self.answers:
                self.backlog.released(outstanding, self.answers)
            else:
                self.report.unanswered.update(item.path for item in outstanding)
                self.backlog.broke(outstanding, exc, self.answers, sender.patience, alone=self.alone)
            self.fleet.last = exc
        except BaseException as exc:
            self._end(sender, exc)
            raise
        else:
            self.association.close()
        finally:
            self._meter.close()

    def _carry(self, sender: Sender) -> None:
        try:
            while not self.report.begins_no_more and self._lasts() and (item := self.take()) is not None:
                self.taken += 1
                self.report.check()
                self._send(sender, item)
            self._settle(sender, 0)
        except (Interrupted, TimedOut):
            # The peer may have confirmed more than we have looked at.
            with suppress(Interrupted):
                for response in sender.drain():
                    self._take(response)
            raise

    def _end(self, sender: Sender, why: BaseException) -> None:
        if sender.torn:
            self.association.drop()
        elif isinstance(why, ReleasedByPeer):
            self.association.close()
        else:
            self.association.abort()

    def _lasts(self) -> bool:
        """Return False if the peer would end the association with the next instance, or refuses all on this one."""
        if self._refused and (self.alone or MOST_REFUSED <= self._refused < self.answers):
            return False
        return not self.backlog.full(self.taken)

    def _check(self) -> None:
        """Check whether to stop, between pieces and in every wait; ask for more associations in a long one."""
        self.report.check()
        if self._awaits and not self.alone and time.monotonic() - self._awaits > LONG_S:
            self.fleet.grow(self.fleet.pace.hang())

    def _send(self, sender: Sender, item: Item) -> None:
        """Send an item, after reading as much of it as possible while the peer was busy with the one before."""
        with ExitStack() as stack:
            try:
                if self.alone:
                    sender.patience = self.backlog.patience(item, self.fleet.peer.idle_timeout_s)
                instance = self._open(sender, item, stack)
                sender.prepare(instance)
                self._settle(sender, 0 if self.alone else sender.window - 1)
            except (Rejected, Changed) as exc:
                self.report(item, Outcome(Kind.REJECTED, str(exc.args[0])))
                return
            except (Interrupted, TimedOut):
                if self._outstanding:
                    self.backlog.put_back(item)
                else:  # it was being converted: whoever tries it next must not do so for ever
                    self._outstanding[0] = item, time.monotonic()
                raise
            self._outstanding[instance.message_id] = item, time.monotonic()
            try:
                sender.transmit(instance)
            except Changed as exc:
                del self._outstanding[instance.message_id]
                self.report(item, Outcome(Kind.REJECTED, str(exc)))
                self._settle(sender, 0)
                raise
            self._outstanding[instance.message_id] = item, time.monotonic()
            if self.alone:
                self._settle(sender, 0)

    def _open(self, sender: Sender, item: Item, stack: ExitStack) -> OutgoingInstance:
        """Open an item's file, or a converted copy of it if the peer doesn't take its transfer syntax."""
        header = header_of(item)
        fd = stack.enter_context(self.plan.open(item))

        def verify() -> None:
            self.plan.check(item, fd)

        offset, size = header.dataset_offset, item.size
        context = self.association.accepted.get(pair(item))
        if context is None:
            accepted = of_class(self.association.accepted, header.SOPClassUID)
            targets = [to for to in fallbacks(header.TransferSyntaxUID, self.fleet.transcode) if to in accepted]
            if not targets:
                raise Rejected(self.fleet.refusal(self.association, header))
            self._settle(sender, 0)
            keep_alive = self._keep_alive(sender)
            copy = self._copy(stack, converted(fd, offset, header.TransferSyntaxUID, targets, check=keep_alive), item)
            fd_sent, offset, size = copy.fd, 0, copy.size
            context = self.association.accepted[header.SOPClassUID, copy.syntax]
        elif header.odd:
            self._settle(sender, 0)
            copy = self._copy(stack, mended(fd, header, self._keep_alive(sender)), item)
            fd_sent, offset, size = copy.fd, 0, copy.size
        else:
            fd_sent = fd
        return OutgoingInstance(fd_sent, offset, size, context, header.SOPClassUID, header.SOPInstanceUID, verify)

    def _copy(self, stack: ExitStack, copy: AbstractContextManager[Converted], item: Item) -> Converted:
        if header_of(item).odd:
            self.fleet.padded.append(item)
        try:
            return stack.enter_context(copy)
        except (Unfit, Damaged) as exc:
            raise Rejected(str(exc)) from exc
        except OSError as exc:  # a broken disk, a share that is gone
            raise Rejected(f"can't be read: {exc.strerror}") from exc
        except NoRoom as exc:
            raise Busy(str(exc)) from exc

    def _keep_alive(self, sender: Sender) -> Callable[[], None]:
        """Return a function for long conversions to call: it stops them with the dispatch, and sends C-ECHO."""
        said = time.monotonic()
        context = self.association.context(VERIFICATION)

        def check() -> None:
            nonlocal said
            self.report.check()
            if context is not None and time.monotonic() - said > KEEP_ALIVE_S:
                sender.echo(context)
                said = time.monotonic()

        return check

    def _settle(self, sender: Sender, most: int) -> None:
        """Wait for responses until at most this many are outstanding."""
        while len(self._outstanding) > most:
            self._awaits = time.monotonic()
            response = sender.receive()
            self._awaits = 0.0
            self._take(response)

    def _take(self, response: Response) -> None:
        """Report the outcome of the item that a response is about."""
        number, status = response.message_id, response.status
        item, sent = self._outstanding.get(-1 if number is None else number, (None, 0.0))
        if item is None:
            raise Interrupted(
                f"{self.where}: the peer answered a message that was not sent ({number}): outcome unknown"
            )
        if status is None:
            raise Interrupted(f"{self.where}: the peer's response has no status: outcome unknown", item=item.shown)
        means, words = meaning(status)
        detail = f"status {status:04X}: {words}"
        if response.comment:
            detail += f" ({clean(response.comment, identifying(self.plan, [item]))})"
        del self._outstanding[number or 0]
        self.answers += 1
        if means is Meaning.BUSY:
            self._refused += 1
            busy = Busy(f"{self.where}: the peer can't store now: {detail}", item=item.shown)
            self.backlog.refused(item, busy, certain=not self.alone or self.answers == 1)
        elif means is Meaning.DENIED:
            self.backlog.refused(
                item, Denied(f"{self.where}: the peer does not let us store: {detail}", item=item.shown)
            )
        else:
            self._refused = 0
            outcome = OUTCOMES[means] if means is Meaning.SUCCESS else Outcome(OUTCOMES[means].kind, detail)
            if means is Meaning.SUCCESS and header_of(item).odd:
                outcome = Outcome(Kind.DELIVERED, NOTE)
            if outcome.arrived and _is_renamed(item, response):
                kind = Kind.ALREADY if means is Meaning.ALREADY else Kind.WARNING
                outcome = Outcome(kind, "; ".join(filter(None, (ELSEWHERE, outcome.detail))))
            self.report(item, outcome)
            self.backlog.answered(item, arrived=outcome.arrived, sent=sent, carried=self.answers)
        if not self.alone:
            self.fleet.grow(self.fleet.pace.look(self._meter))


OUTCOMES = {
    Meaning.SUCCESS: DELIVERED,
    Meaning.WARNING: Outcome(Kind.WARNING),
    Meaning.ALREADY: Outcome(Kind.ALREADY),
    Meaning.FAILURE: Outcome(Kind.REJECTED),
}


def _is_renamed(item: Item, response: Response) -> bool:
    """Return True if the peer confirms an instance under another UID: some archives and gateways replace them."""
    uid = response.sop_instance
    return uid != header_of(item).SOPInstanceUID and UID.fullmatch(uid) is not None


def pair(item: Item) -> Pair:
    """Return the SOP class and the transfer syntax of an item."""
    header = header_of(item)
    return header.SOPClassUID, header.TransferSyntaxUID
