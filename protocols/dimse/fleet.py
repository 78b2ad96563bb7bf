"""Several associations that empty one queue: the instances of a plan, in order, each to whoever is free.

Every association takes instances in the plan's order, so that within one association the order of a series is kept.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from imaging.header import MAX_UID_CHARS, Header
from imaging.pixels import Unfit
from imaging.transcode import NoRoom, converted, fallbacks
from protocols.dimse import contexts
from protocols.dimse.association import MAX_CONTEXTS, Association, associate
from protocols.dimse.contexts import UNCOMPRESSED, Pair, names, of_class
from protocols.dimse.message import Response
from protocols.dimse.status import Meaning, meaning
from protocols.dimse.store import Changed, Instance, Sender
from protocols.dimse.transport import VERIFICATION, Peer
from protocols.net.hiding import identifying
from protocols.net.words import clean
from transfer.errors import Busy, Cancelled, Denied, DispatchError, Interrupted, Rejected, Retryable
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

WINDOW = 16  # operations outstanding, if the peer grants it: hides 16 round trips, and repeats at most 16 instances
# A conversion may take minutes, and peers end associations on which nothing happens (Orthanc after 30 s).
KEEP_ALIVE_S = 8


class Fleet:
    """Sends the pending items of a plan over up to `concurrency` associations.

    Args:
        transcode: what may be done about a transfer syntax that the peer refuses; see `imaging.transcode`.
        throttle: what all associations together may send.

    Attributes:
        notes: what people should know although everything was delivered.
    """

    def __init__(
        self, peer: Peer, plan: Plan, report: PushReport, concurrency: int, transcode: str, throttle: Throttle
    ) -> None:
        self.peer, self.plan, self.report = peer, plan, report
        self.concurrency, self.transcode, self.throttle = concurrency, transcode, throttle
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._todo: deque[Item] = deque()
        self._asked: list[Pair] = []
        self._errors: list[BaseException] = []
        self._refusals: list[BaseException] = []  # of associations beside or after one that stood
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def deliver(self) -> None:
        """Send everything; return when every item has an outcome.

        Raises:
            Retryable: some have none; what was confirmed has been told.
            Permanent: nothing can be sent. Cancelled: as `report.check` says.
        """
        items = [item for item in self.plan.pending if self._can_ask(item)]
        for group in contexts.groups((_pair(item) for item in items), self.transcode, MAX_CONTEXTS - 1):
            classes = {sop_class for sop_class, _ in group}
            self._run([item for item in items if _header(item).SOPClassUID in classes], group)

    def _can_ask(self, item: Item) -> bool:
        """Reject an item whose presentation context can't be written down; nothing else would come of it."""
        header = _header(item)
        for name in ("SOPClassUID", "TransferSyntaxUID"):
            uid: str = getattr(header, name)
            if not (0 < len(uid) <= MAX_UID_CHARS and uid.isascii()):
                self.report(item, Outcome(Kind.REJECTED, f"its {name} is no UID: no peer can be asked to take it"))
                return False
        return True

    def _run(self, items: Sequence[Item], asked: list[Pair]) -> None:
        """Send items whose contexts fit into one association.

        This thread opens the first association, and the others follow once that one stands: a peer that refuses us
        does so once.
        """
        self._todo, self._asked = deque(items), asked
        self._errors, self._refusals, self._threads = [], [], []
        self._work(self._more)
        for thread in self._threads:
            thread.join()
        left = sum(item.path not in self.report.outcomes for item in items)
        error = min(self._errors, key=_weight, default=min(self._refusals, key=_weight, default=None))
        if left and error in self._refusals:
            raise Interrupted(f"{self.peer.where}: {left} of {len(items)} instances have no answer: {error}") from error
        if error is not None and (left or _weight(error) < 0):
            raise error
        if left:
            raise Interrupted(f"{self.peer.where}: {left} of {len(items)} instances have no answer")
        note = f"not every association was granted or lasted: {error}"
        if error is not None and note not in self.notes:
            self.notes.append(note)

    def _more(self) -> None:
        for _ in range(min(self.concurrency, len(self._todo)) - 1):
            thread = threading.Thread(target=self._work, name="association", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self, established: Callable[[], None] | None = None) -> None:
        """Serve the queue over one association, and over a new one if an instance had to be kept back midway.

        Args:
            established: called once the first association stands; None for the thread of a further one.
        """
        stands, first = False, established is not None
        try:
            while self._todo and not self._stop.is_set():
                stands = False
                association = associate(self.peer, self._contexts(), self.report.check, window=WINDOW)
                stands = True
                if established is not None:
                    established()
                    established = None
                if association.accepted:
                    _Run(self, association).serve()
                elif first:
                    self._refuse_all(association)
                else:  # what the first one takes is not refused because of another one
                    stands = False
                    association.release()
                    raise Interrupted(f"{self.peer.where}: a further association was granted, but nothing of it")  # noqa: TRY301
                first = False
        except BaseException as exc:  # raised by who waits for all of them
            # An association that isn't granted stops nobody: the queue is emptied by those that are.
            refused = isinstance(exc, DispatchError) and not isinstance(exc, Cancelled) and not stands
            with self._lock:
                (self._refusals if refused and not first else self._errors).append(exc)
            lost = isinstance(exc, Retryable) and not isinstance(exc, Busy)
            if not (refused or lost):
                self._stop.set()

    def _contexts(self) -> list[tuple[str, tuple[str, ...]]]:
        wanted: list[tuple[str, tuple[str, ...]]] = [(sop_class, (syntax,)) for sop_class, syntax in self._asked]
        if any(syntax not in UNCOMPRESSED for _, syntax in self._asked):
            wanted.append((VERIFICATION, UNCOMPRESSED[1:]))
        return wanted

    def next(self) -> Item | None:
        """Take the next item out of the queue; None if there is none, or no more shall be sent."""
        with self._lock:
            return self._todo.popleft() if self._todo and not self._stop.is_set() else None

    def stop(self) -> None:
        """Let no association take another item."""
        self._stop.set()

    def refusal(self, association: Association, header: Header) -> str:
        """Say which syntaxes were offered for an instance that can't be sent, and which of them the peer takes."""
        offered, accepted = (
            of_class(self._asked, header.SOPClassUID),
            of_class(association.accepted, header.SOPClassUID),
        )
        more = set(fallbacks(header.TransferSyntaxUID, "lossless")) - set(
            fallbacks(header.TransferSyntaxUID, self.transcode)
        )
        return (
            f"the peer does not accept {names([header.SOPClassUID])} in {names([header.TransferSyntaxUID])}; "
            f"offered: {names(offered)}; accepted: {names(accepted)}"
            + (f"; transcode is {self.transcode}, with lossless others would be offered" if more else "")
        )

    def _refuse_all(self, association: Association) -> None:
        """Reject what is left: the peer accepted the association, but no context of it."""
        while (item := self.next()) is not None:
            self.report(item, Outcome(Kind.REJECTED, self.refusal(association, _header(item))))


class _Run:
    """What one association does: takes items, sends them, tells their outcomes."""

    def __init__(self, fleet: Fleet, association: Association) -> None:
        self.fleet, self.association = fleet, association
        self.plan, self.report, self.peer = fleet.plan, fleet.report, fleet.peer
        self.outstanding: dict[int, Item] = {}
        self.error: DispatchError | None = None  # the peer's refusal of more than one instance

    def serve(self) -> None:
        """Send items until there are no more, or an instance had to be kept back; then end the association."""
        sender = Sender(self.association, self.fleet.throttle, self.report.moved, self.report.check)
        try:
            with sender:
                while (item := self.fleet.next()) is not None:
                    self.report.check()
                    self._send(sender, item)
                self._settle(sender, 0)
        except Changed:
            self.association.abort()
        except BaseException:
            if sender.torn:
                self.association.drop()
            else:
                self.association.abort()
            raise
        else:
            self.association.release()
        if self.error is not None:
            raise self.error

    def _send(self, sender: Sender, item: Item) -> None:
        """Send an item, having read what it can of it while the peer was busy with the one before."""
        with ExitStack() as stack:
            try:
                instance = self._open(sender, item, stack)
                sender.prepare(instance)
            except (Rejected, Changed) as exc:
                self.report(item, Outcome(Kind.REJECTED, str(exc.args[0])))
                return
            self._settle(sender, sender.window - 1)
            if self.error is not None:
                return  # which leaves the item without an outcome: it is sent when the peer is asked again
            try:
                sender.transmit(instance)
            except Changed as exc:
                self.report(item, Outcome(Kind.REJECTED, str(exc)))
                self._settle(sender, 0)
                raise
            self.outstanding[instance.message_id] = item

    def _open(self, sender: Sender, item: Item, stack: ExitStack) -> Instance:
        """Open an item's file, or a converted copy of it if the peer doesn't take its transfer syntax."""
        header = _header(item)
        fd = stack.enter_context(self.plan.open(item))

        def verify() -> None:
            self.plan.check(item, fd)

        offset, size = header.dataset_offset, item.size
        context = self.association.accepted.get(_pair(item))
        if context is None:
            accepted = of_class(self.association.accepted, header.SOPClassUID)
            targets = [to for to in fallbacks(header.TransferSyntaxUID, self.fleet.transcode) if to in accepted]
            if not targets:
                raise Rejected(self.fleet.refusal(self.association, header))
            self._settle(sender, 0)
            keep_alive = self._keep_alive(sender)
            try:
                copy = stack.enter_context(converted(fd, offset, header.TransferSyntaxUID, targets, check=keep_alive))
            except Unfit as exc:
                raise Rejected(str(exc)) from exc
            except NoRoom as exc:
                raise Busy(str(exc)) from exc
            fd_sent, offset, size = copy.fd, 0, copy.size
            context = self.association.accepted[header.SOPClassUID, copy.syntax]
        else:
            fd_sent = fd
        return Instance(fd_sent, offset, size, context, header.SOPClassUID, header.SOPInstanceUID, verify)

    def _keep_alive(self, sender: Sender) -> Callable[[], None]:
        """Make what a long conversion calls: it stops it if the dispatch shall stop, and sends C-ECHO now and then."""
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
        """Wait for responses until at most so many are outstanding."""
        while len(self.outstanding) > most:
            self._tell(sender.receive())

    def _tell(self, response: Response) -> None:
        """Tell the outcome that a response gives to the item that it is for."""
        where, number, status = self.peer.where, response.message_id, response.status
        item = self.outstanding.get(-1 if number is None else number)
        if item is None:
            raise Interrupted(f"{where}: the peer answered a message that was not sent ({number}): outcome unknown")
        if status is None:
            raise Interrupted(f"{where}: the peer's response has no status: outcome unknown", item=item.shown)
        means, words = meaning(status)
        detail = f"status {status:04X}: {words}"
        if response.comment:
            detail += f" ({clean(response.comment, identifying(self.plan, [item]))})"
        del self.outstanding[number or 0]
        if means is Meaning.SUCCESS:
            self.report(item, DELIVERED)
        elif means is Meaning.WARNING:
            self.report(item, Outcome(Kind.WARNING, detail))
        elif means is Meaning.ALREADY:
            self.report(item, Outcome(Kind.ALREADY, detail))
        elif means is Meaning.FAILURE:
            self.report(item, Outcome(Kind.REJECTED, detail))
        else:
            # Nothing more is sent, but what is outstanding gets its answer, and the association a proper end.
            kind, said = (Busy, "can't store now") if means is Meaning.BUSY else (Denied, "does not let us store")
            self.error = self.error or kind(f"{where}: the peer {said}: {detail}", item=item.shown)
            self.fleet.stop()


def _weight(error: BaseException) -> int:
    """Which of several errors tells most: bugs and cancelling first, then what somebody must change."""
    if not isinstance(error, DispatchError) or isinstance(error, Cancelled):
        return -1
    if not isinstance(error, Retryable):
        return 0
    return 1 if isinstance(error, Busy) else 2


def _header(item: Item) -> Header:
    if item.header is None:
        raise RuntimeError(f"{item.shown} is not DICOM and should not have come here")
    return item.header


def _pair(item: Item) -> Pair:
    header = _header(item)
    return header.SOPClassUID, header.TransferSyntaxUID
