"""Several associations that send one backlog: the instances of a plan, in order, each over a free association.

Every association takes instances in the plan's order, so that within one association the order of a series is kept.
A broken one is replaced; its outstanding instances are sent last, alone (`protocols.dimse.backlog`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial

from imaging.header import MAX_UID_CHARS, Header
from imaging.mend import NOTE
from imaging.transcode import fallbacks
from protocols.dimse.asking import Asking, ContextGroup
from protocols.dimse.association import Association, about_contexts
from protocols.dimse.backlog import PAUSE_S, Backlog, Suspect
from protocols.dimse.contexts import UNCOMPRESSED, names, of_class
from protocols.dimse.conveyor import Conveyor, pair
from protocols.dimse.message import VERIFICATION
from protocols.dimse.pace import Pace
from protocols.dimse.transport import Peer
from protocols.net.connection import SLICE_S
from transfer.duplicates import Duplicates
from transfer.errors import Busy, Cancelled, Denied, DispatchError, Interrupted, Retryable, TimedOut
from transfer.fanout import gravest
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan, header_of
from transfer.receipt import PushReport
from transfer.throttle import Throttle

AGAIN_S = (0.0, 0.5, 1.5)  # pauses before the tries to replace an association: a peer that fell over comes back
MOST_EMPTY = 3  # associations in a row that end before anything went out


class Fleet:
    """Sends the pending items of a plan over up to `concurrency` associations, as many as pay.

    Args:
        transcode: what may be done about a transfer syntax that the peer refuses; see `imaging.transcode`.
        throttle: limits what all associations send together.

    Attributes:
        notes: what people should know although everything was delivered.
        backlog: what is sent over associations with the same contexts.
        last: the latest reason why an association broke.
    """

    def __init__(
        self, peer: Peer, plan: Plan, report: PushReport, concurrency: int, transcode: str, throttle: Throttle
    ) -> None:
        self.peer, self.plan, self.report = peer, plan, report
        self.concurrency, self.transcode, self.throttle = concurrency, transcode, throttle
        self.notes: list[str] = []
        self.backlog = Backlog(())
        self.pace = Pace(1)
        self.last: DispatchError | None = None
        self.padded: list[Item] = []  # instances that went out with their odd lengths mended
        self.asking = Asking(peer, transcode)
        self._lock = threading.Lock()
        self._group = ContextGroup((), ())
        self._several = False  # whether the plan needs more than one context
        self._errors: list[BaseException] = []
        self._refusals: list[DispatchError] = []  # of associations beside or after one that stood
        self._stood = False
        self._threads: list[threading.Thread] = []

    def deliver(self) -> None:
        """Send everything; return when every item has an outcome.

        Raises:
            Retryable: some have none; what was confirmed has been reported.
            Permanent: nothing can be sent. Cancelled: as `report.check` says.
        """
        duplicates = Duplicates(self.plan, self.report)
        items = duplicates.begin()
        while items:
            self._deliver([item for item in items if self._can_ask(item)])
            items = duplicates.settle()
        if padded := sorted({item.shown for item in self.padded}):
            self.notes.append(f"{NOTE}: {len(padded)} of the instances, such as {padded[0]}")

    def _can_ask(self, item: Item) -> bool:
        """Reject an item whose presentation context can't be encoded."""
        header = header_of(item)
        for name in ("SOPClassUID", "TransferSyntaxUID"):
            uid: str = getattr(header, name)
            if not (0 < len(uid) <= MAX_UID_CHARS and uid.isascii()):
                self.report(item, Outcome(Kind.REJECTED, f"its {name} is not valid: no peer can be asked to take it"))
                return False
        return True

    def _deliver(self, items: Sequence[Item]) -> None:
        """Send items over associations, each of which has the contexts of some of them.

        Items that end without an outcome, or get no association from the peer, don't keep others from being sent.
        """
        asking = self.asking
        several = self._several = len({pair(item) for item in items}) > 1
        left = deque(asking.groups(pair(item) for item in items if pair(item) not in asking.hopeless))
        errors: list[BaseException] = []
        first: DispatchError | None = None
        while left:
            group = left.popleft()
            try:
                self._run([item for item in items if pair(item) in group.serves], group)
            except _TurnedAway as exc:
                first = first or exc.error
                fewer = asking.fewer(group, left) if several or isinstance(exc.error, Interrupted) else None
                instead = fewer or asking.smaller(group, left)
                if instead is not None:
                    left = deque(instead)
                elif not several:
                    raise first from first.__cause__
                else:
                    asking.hopeless |= dict.fromkeys(group.serves, exc.error)
            except Unsettled as exc:
                errors.append(exc.error)
            except Interrupted as exc:
                if not (asking.granted or (left and len(errors) + 1 < MOST_EMPTY)):
                    raise
                errors.append(exc)
        errors += self._turned_away(items)
        if errors:
            raise gravest(errors)

    def _turned_away(self, items: Sequence[Item]) -> list[DispatchError]:
        """Reject items that get no association; return the reason if the peer grants none at all."""
        asking = self.asking
        if not asking.granted:
            return list(asking.hopeless.values())
        for item in items:
            error = asking.hopeless.get(pair(item))
            if error is not None:
                words = error.message.removeprefix(f"{self.peer.where}: ")
                sop_class, syntax = pair(item)
                what = f"an association for {names([sop_class])} in {names([syntax])}"
                self.report(item, Outcome(Kind.REJECTED, f"{words}, each time for {what}; others were granted"))
        return []

    def _run(self, items: Sequence[Item], group: ContextGroup) -> None:
        """Send items whose contexts fit into one association.

        This thread opens the first association, so that a peer which refuses us does so once; others follow as they
        pay.

        Raises:
            Unsettled: some have no outcome.
            _TurnedAway: the peer may have refused the first association over its contexts.
            DispatchError: the peer can't be reached, or doesn't let us send anything.
        """
        self.backlog, self._group = Backlog(items), group
        self._stood, self.last = False, None
        self._errors, self._refusals = [], []
        while self.backlog.turn():
            self.pace, self._threads = Pace(min(self.concurrency, len(self.backlog))), []
            self._work(first=not self._stood)
            while self._threads:
                self._threads.pop().join()
            if self._errors:
                raise gravest(self._errors)
            if len(self.backlog) and not self.backlog.stopped:
                raise self._gone(items)
        if not self.backlog.stopped:
            self._try_suspects()
        self._conclude(items)

    def _conclude(self, items: Sequence[Item]) -> None:
        left = sum(item.path not in self.report.outcomes for item in items)
        if left:
            suspects = self.backlog.suspects()
            self.report.put_off.update({each.item.path: each.words for each in suspects if each.times})
            # What the peer doesn't let us store ends all attempts: only where nothing else is left to try.
            later = [each for each in suspects if not isinstance(each.error, Denied)] or suspects
            error = later[-1].error if later else self.last
            raise Unsettled(self._unsettled(left, len(items), error))
        if self._refusals:
            note = f"not every association was granted or lasted: {gravest(self._refusals)}"
            if note not in self.notes:
                self.notes.append(note)
        if self.backlog.lasts:
            note = f"the peer ends an association after {self.backlog.lasts} instances: it gets no more on one"
            if note not in self.notes:
                self.notes.append(note)

    def _gone(self, items: Sequence[Item]) -> DispatchError:
        """Return the error for a peer that no longer grants an association."""
        left = sum(item.path not in self.report.outcomes for item in items)
        return self._unsettled(left, len(items), self._refusals[-1] if self._refusals else self.last)

    def _unsettled(self, left: int, count: int, error: DispatchError | None) -> DispatchError:
        why = "" if error is None else f": {error.message.removeprefix(f'{self.peer.where}: ')}"
        text = f"{self.peer.where}: {left} of {count} instances are not confirmed{why}"
        kind = type(error) if isinstance(error, Busy | Denied | TimedOut) else Interrupted
        made = kind(text, item=error.item if error else None)
        made.__cause__ = error
        return made

    # ---- all but suspects

    def grow(self, count: int) -> None:
        """Open this many more associations, each in a thread of its own."""
        for _ in range(min(count, len(self.backlog))):
            thread = threading.Thread(target=self._work, kwargs={"further": True}, name="association", daemon=True)
            thread.start()
            self._threads.append(thread)  # whoever waits for all of them takes it out and joins it: it has begun

    def _work(self, *, first: bool = False, further: bool = False) -> None:
        """Serve the backlog over one association, and over a new one as long as there is something to send.

        Args:
            first: whether nothing is known of the peer yet.
            further: whether others serve it already, which continue if no association is granted.
        """
        empty = 0
        try:
            while len(self.backlog) and not self.backlog.stopped:
                self.report.check()
                association = self._first() if first else self._another(patient=not further)
                if association is None:
                    return
                first, further, self._stood = False, False, True
                conveyor = Conveyor(self, association, self.backlog.next)
                conveyor.serve()
                empty = 0 if conveyor.taken else empty + 1
                if empty >= MOST_EMPTY or (empty and isinstance(self.last, TimedOut)):
                    return
        except BaseException as exc:  # raised by who waits for all of them
            with self._lock:
                self._errors.append(exc)
            self.backlog.stop()

    def _first(self) -> Association | None:
        """Open the first association; reject what it has no context for."""
        asking = self.asking
        try:
            association = asking.associate(self._contexts(), self.report.check)
        except Cancelled:
            raise
        except DispatchError as exc:
            again = self._once_more(exc)
            if again is not None:
                self._refusals.append(exc)
                return again
            if isinstance(exc, TimedOut) and not asking.connected:
                raise  # it didn't even shake hands: to ask for less costs as much again
            # Where there is but one pair, the next request is the one for next to nothing.
            if about_contexts(exc) and (not self._several or asking.answers(self.report.check)):
                raise _TurnedAway(exc) from exc
            raise
        asking.granted = max(asking.granted, len(self._group.asked))
        if association.accepted:
            return association
        while (item := self.backlog.next()) is not None:
            self.report(item, Outcome(Kind.REJECTED, self.refusal(association, header_of(item))))
        return None

    def _once_more(self, error: DispatchError) -> Association | None:
        """Request it again if the peer has granted others before, but not after a silence, which costs much time."""
        asking = self.asking
        if isinstance(error, TimedOut) or not (isinstance(error, Retryable) or about_contexts(error)):
            return None
        if asking.granted and not asking.apart:
            return self._another(patient=True)
        if self._group.alone and asking.alive:
            self._wait(AGAIN_S[1])
            return self._another(patient=False)
        return None

    def _another(self, *, patient: bool) -> Association | None:
        """Open a further association, or one in place of another; None if the peer doesn't grant it.

        Args:
            patient: whether to try again; if not, the others continue without it.
        """
        for pause in AGAIN_S if patient else AGAIN_S[:1]:
            self._wait(pause)
            try:
                association = self.asking.associate(self._contexts(), self.report.check)
                if association.accepted:
                    return association
                # What the first one takes is not refused because of another one.
                association.release()
                raise Interrupted(f"{self.peer.where}: a further association was granted, but none of its contexts")
            except Cancelled:
                raise
            except DispatchError as exc:
                self.pace.full()
                with self._lock:
                    self._refusals.append(exc)
        return None

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, SLICE_S))
            self.report.check()

    def _contexts(self) -> list[tuple[str, tuple[str, ...]]]:
        wanted: list[tuple[str, tuple[str, ...]]] = [(sop_class, (syntax,)) for sop_class, syntax in self._group.asked]
        if any(syntax not in UNCOMPRESSED for _, syntax in self._group.asked):
            wanted.append((VERIFICATION, UNCOMPRESSED[1:]))
        return wanted

    def refusal(self, association: Association, header: Header) -> str:
        """Return which syntaxes were offered for an instance that can't be sent, and which the peer accepts."""
        offered = of_class(self._group.asked, header.SOPClassUID)
        accepted = of_class(association.accepted, header.SOPClassUID)
        more = set(fallbacks(header.TransferSyntaxUID, "lossless")) - set(
            fallbacks(header.TransferSyntaxUID, self.transcode)
        )
        return (
            f"the peer does not accept {names([header.SOPClassUID])} in {names([header.TransferSyntaxUID])}; "
            f"offered: {names(offered)}; accepted: {names(accepted)}"
            + (f"; transcode is {self.transcode}, with lossless others would be offered" if more else "")
        )

    # ---- suspects

    def _try_suspects(self) -> None:
        """Try each suspect alone, repeatedly, until it has an outcome or nothing can be said about it."""
        empty = 0
        while to_try := deque(self._judged()):
            while to_try:
                self.report.check()
                association = self._another(patient=True)
                if association is None:
                    return
                conveyor = Conveyor(self, association, partial(self._next_suspect, to_try), alone=True)
                conveyor.serve()
                empty = 0 if conveyor.taken else empty + 1
                if empty >= MOST_EMPTY:
                    return

    def _judged(self) -> Iterable[Suspect]:
        """Reject the suspects that can't be sent; return those that may be tried again."""
        for suspect in self.backlog.suspects():
            outcome = self.backlog.verdict(suspect)
            if outcome is not None:
                self.report(suspect.item, outcome)
            elif not suspect.used_up:
                yield suspect

    def _next_suspect(self, to_try: deque[Suspect]) -> Item | None:
        if not to_try:
            return None
        suspect = to_try.popleft()
        if not isinstance(suspect.error, Busy):
            self._wait(suspect.at + PAUSE_S - time.monotonic())
        return suspect.item


class Unsettled(Exception):
    """Some instances have no outcome; others can still be sent."""

    def __init__(self, error: DispatchError) -> None:
        super().__init__(str(error))
        self.error = error


class _TurnedAway(Exception):
    """The peer refused the first association, maybe because of its contexts."""

    def __init__(self, error: DispatchError) -> None:
        super().__init__(str(error))
        self.error = error
