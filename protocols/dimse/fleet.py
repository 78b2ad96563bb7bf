"""Several associations that empty one queue: the instances of a plan, in order, each to whoever is free.

Every association takes instances in the plan's order, so that within one association the order of a series is kept.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from protocols.dimse import contexts
from protocols.dimse.association import Link, associate
from protocols.dimse.contexts import LOSSLESS, UNCOMPRESSED, Pair, names
from protocols.dimse.message import Response
from protocols.dimse.status import Meaning, meaning
from protocols.dimse.store import Changed, Instance, Sender
from protocols.dimse.transport import Peer
from transfer.errors import Busy, Cancelled, Denied, DispatchError, Interrupted, Rejected, Retryable
from transfer.header import Header
from transfer.plan import Item, Plan
from transfer.receipt import DELIVERED, Kind, OnOutcome, Outcome
from transfer.throttle import Throttle

WINDOW = 16  # operations outstanding, if the peer grants it: hides 16 round trips, and repeats at most 16 instances
NEVER = "never"


class Fleet:
    """Sends the pending items of a plan over up to `concurrency` associations.

    Args:
        transcode: `never`, `lossless` or `any`: what may be done about a transfer syntax that the peer refuses.
        throttle: what all associations together may send.
    """

    def __init__(
        self, peer: Peer, plan: Plan, on_outcome: OnOutcome, concurrency: int, transcode: str, throttle: Throttle
    ) -> None:
        self.peer, self.plan, self.on_outcome = peer, plan, on_outcome
        self.concurrency, self.transcode, self.throttle = concurrency, transcode, throttle
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._todo: deque[Item] = deque()
        self._offered: list[Pair] = []
        self._errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def deliver(self) -> None:
        """Send everything; return when every item has an outcome.

        Raises:
            Retryable: some have none; what was confirmed has been told.
            Permanent: nothing can be sent. Cancelled: as `on_outcome.check` says.
        """
        items = self.plan.pending
        fallbacks = UNCOMPRESSED if self.transcode == NEVER else (*UNCOMPRESSED, *LOSSLESS)
        for group in contexts.groups((_pair(item) for item in items), fallbacks):
            classes = {sop_class for sop_class, _ in group}
            self._offered = group
            self._todo = deque(item for item in items if _header(item).SOPClassUID in classes)
            self._run()

    def _run(self) -> None:
        """Empty the queue: this thread opens the first association, and the others follow once that one stands."""
        self._errors, self._threads = [], []
        self._stop.clear()
        wanted = len(self._todo)
        self._work(self._more)
        for thread in self._threads:
            thread.join()
        left = [item for item in self.plan.pending if item.path not in self.on_outcome.outcomes]
        left = [item for item in left if _pair(item)[0] in {pair[0] for pair in self._offered}]
        error = min(self._errors, key=_weight, default=None)
        if left:
            raise error or Interrupted(f"{self.peer.where}: {len(left)} of {wanted} instances have no answer")
        if error is not None:
            if _weight(error) < 0:
                raise error
            self.notes.append(f"not every association lasted: {error}")

    def _more(self) -> None:
        for _ in range(min(self.concurrency - 1, len(self._todo))):
            thread = threading.Thread(target=self._work, name="association", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self, established: Callable[[], None] = lambda: None) -> None:
        """Serve the queue over one association, and over a new one if an instance had to be kept back midway."""
        try:
            while self._todo and not self._stop.is_set():
                link = associate(self.peer, _syntaxes(self._offered), self._check, window=WINDOW)
                if not link.accepted:
                    self._refuse_all()
                    return
                try:
                    established()
                    established = lambda: None  # noqa: E731
                    self._serve(link)
                except Changed:
                    link.drop()
                except BaseException:
                    link.abort()
                    raise
                else:
                    link.release()
        except BaseException as exc:  # raised by whoever waits for all of them
            with self._lock:
                self._errors.append(exc)
            if not isinstance(exc, Retryable) or isinstance(exc, Busy):
                self._stop.set()

    def _check(self) -> None:
        self.on_outcome.check()

    def _next(self) -> Item | None:
        with self._lock:
            return self._todo.popleft() if self._todo and not self._stop.is_set() else None

    def _serve(self, link: Link) -> None:
        outstanding: dict[int, Item] = {}
        with Sender(link, self.throttle, self.on_outcome.moved, self._check) as sender:
            while (item := self._next()) is not None:
                self._check()
                try:
                    outstanding[self._send(sender, link, item)] = item
                except Rejected as exc:
                    self.on_outcome(item, Outcome(Kind.REJECTED, exc.message))
                except Changed as exc:
                    self.on_outcome(item, Outcome(Kind.REJECTED, str(exc)))
                    while outstanding:
                        self._settle(sender.receive(), outstanding)
                    raise
                while len(outstanding) >= sender.window:
                    self._settle(sender.receive(), outstanding)
            while outstanding:
                self._settle(sender.receive(), outstanding)

    def _send(self, sender: Sender, link: Link, item: Item) -> int:
        header = _header(item)
        with ExitStack() as stack:
            fd = stack.enter_context(self.plan.open(item))
            offset, size = header.dataset_offset, item.size
            context = link.accepted.get(_pair(item))
            if context is None:
                raise self._refused(link, header)
            instance = Instance(
                fd, offset, size, context, header.SOPClassUID, header.SOPInstanceUID, lambda: self.plan.check(item, fd)
            )
            return sender.send(instance)

    def _refused(self, link: Link, header: Header) -> Rejected:
        tried = contexts.offered(self._offered, header.SOPClassUID)
        taken = contexts.offered(link.accepted, header.SOPClassUID)
        return Rejected(
            f"the peer accepts {names([header.SOPClassUID])} not as {names([header.TransferSyntaxUID])}; "
            f"offered: {names(tried)}; accepted: {names(taken)}"
        )

    def _refuse_all(self) -> None:
        """Reject what is left: the peer accepted the association, but no context of it."""
        while (item := self._next()) is not None:
            header = _header(item)
            tried = names(contexts.offered(self._offered, header.SOPClassUID))
            self.on_outcome(
                item,
                Outcome(
                    Kind.REJECTED,
                    f"the peer accepts no {names([header.SOPClassUID])}; offered: {tried}; accepted: none",
                ),
            )

    def _settle(self, response: Response, outstanding: dict[int, Item]) -> None:
        """Tell the outcome that a response gives to the item that it is for."""
        item = outstanding.get(response.message_id or 0)
        if item is None:
            raise Interrupted(
                f"{self.peer.where}: the peer answered message {response.message_id}, which was not asked: "
                "outcome unknown"
            )
        if response.status is None:
            raise Interrupted(f"{self.peer.where}: the peer's response holds no status: outcome unknown")
        del outstanding[response.message_id or 0]
        means, words = meaning(response.status)
        detail = f"status {response.status:04X}: {words}"
        if response.comment:
            detail += f" ({response.comment})"
        if means is Meaning.SUCCESS:
            self.on_outcome(item, DELIVERED)
        elif means is Meaning.WARNING:
            self.on_outcome(item, Outcome(Kind.WARNING, detail))
        elif means is Meaning.ALREADY:
            self.on_outcome(item, Outcome(Kind.ALREADY, detail))
        elif means is Meaning.BUSY:
            raise Busy(f"{self.peer.where}: the peer can't store now: {detail}", item=item.shown)
        elif means is Meaning.DENIED:
            raise Denied(f"{self.peer.where}: the peer does not let us store: {detail}", item=item.shown)
        else:
            self.on_outcome(item, Outcome(Kind.REJECTED, detail))


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


def _syntaxes(pairs: Sequence[Pair]) -> list[tuple[str, tuple[str, ...]]]:
    return [(sop_class, (syntax,)) for sop_class, syntax in pairs]
