"""Stores instances by STOW-RS (PS3.18 section 10.5): batches that stream from disk, answers read per instance.

What an answer says of an instance decides; the status decides only where it says nothing:

    2xx, named in 00081199             delivered, with a warning if 00081196 is there
    named in 00081198 (reason 00081197) rejected; already there; or, for want of resources, tried again later
    2xx without a body                 delivered (202: bisected, as some of them may have failed)
    2xx, not named                     unknown: sent again in halves, then alone, and once more with the next attempt
    400, 409, 415, 422, not named      bisected: one bad instance costs only itself; alone it is rejected
    413                                halved, and so are the batches that follow; alone it is rejected
    500, not named                     bisected; alone it is sent once more, and then rejected if the server took others
    408, 425, 429, 502, 503, 504, 507  Busy, with Retry-After
    others                             as `dicomweb.STATUS_ERRORS`
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from protocols.dicomweb import service as dicomweb
from protocols.dicomweb import stow_answer
from protocols.dicomweb.service import JSON, XML, Service
from protocols.dicomweb.stow_answer import Lists
from protocols.dicomweb.stow_body import Batch, Body, batches, uid_of
from protocols.http.answer import Answer
from protocols.net.connection import SLICE_S
from protocols.net.hiding import identifying
from transfer.errors import Busy, DispatchError, Interrupted, Rejected, TimedOut
from transfer.fanout import gravest
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

PIECE_BYTES = 1 << 20  # read and sent at once: many small files, or a part of a large one
EXPECT_BYTES = 1 << 20  # bodies from this size ask before they go, as long as nothing was accepted (curl's limit)
WHOLE_STATUSES = (400, 409, 415, 422, 500)  # may be about one instance of the batch
HOPELESS = 3  # instances, each alone, that a server answers with 500 before it is taken to be broken
# A proxy that limits bodies may reset the connection instead of answering 413. What such a push learned holds for the
# next attempts, for so many seconds.
SUSPICION_S = 900.0
LEAST_LIMIT_BYTES = 256_000  # no proxy's limit is lower
_suspected: dict[str, tuple[int, float]] = {}
# A server may also break down at one instance, each time that it gets it. So what was on its way when the link broke
# goes last in the next attempt, and then in quarters: by dispatch and place, the paths, most of them in one request,
# until when.
_stumbled: dict[str, tuple[frozenset[str], int, float]] = {}


def _forget() -> None:
    """Drop what is not suspected any more: there may be many dispatches, of many paths."""
    now = time.monotonic()
    for key in [key for key, (_, _, until) in list(_stumbled.items()) if until <= now]:
        _stumbled.pop(key, None)  # another dispatch may have done it


class Store:
    """One push: sends the pending instances of a plan, and tells the outcome of each.

    Attributes:
        unlisted: instances that the server accepted without naming them in its answer.
    """

    def __init__(
        self,
        service: Service,
        plan: Plan,
        report: PushReport,
        *,
        batch_bytes: int,
        batch_items: int,
        concurrency: int,
        bandwidth_limit: int | None = None,
    ) -> None:
        self.service, self.plan, self.report = service, plan, report
        self.path = service.path(service.stow, "studies")
        self.unlisted = 0
        self._key = f"{service.where}{self.path}"
        limit, until = _suspected.get(self._key, (batch_bytes, 0.0))
        if time.monotonic() < until:
            batch_bytes = min(batch_bytes, limit)
        self._suspects: tuple[frozenset[str], int] = frozenset(), batch_items
        _forget()
        self._stumbled, most, _ = _stumbled.get(self._key + plan.dispatch_id, (frozenset[str](), 1, 0.0))
        parts: tuple[list[Item], list[Item]] = [], []
        for item in plan.pending:
            parts[item.path in self._stumbled].append(item)
        self._queue = deque(batches(parts[False], batch_bytes, batch_items, concurrency))
        self._queue += batches(parts[True], batch_bytes, min(most, batch_items), concurrency)
        self._workers = min(concurrency, max(1, len(self._queue)))
        self._throttle = Throttle(bandwidth_limit)
        self._turn = threading.Condition()
        self._busy = 0  # workers that have a batch, and may bring back parts of it
        self._errors: list[BaseException] = []
        self._ceiling: int | None = None  # bytes; larger requests were refused with 413
        self._arrived = 0
        self._hopeless = 0
        self._unknown: list[str] = []  # instances that no answer names
        self._later: list[Busy] = []  # why instances are left for the next attempt

    def run(self) -> None:
        """Send everything; returns when every instance has an outcome.

        Raises:
            DispatchError: some have none; those that were confirmed have been told.
        """
        threads = [threading.Thread(target=self._work, name="stow", daemon=True) for _ in range(self._workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise gravest(self._errors)
        if self._later:
            waits = [error.retry_after for error in self._later if error.retry_after is not None]
            more = f" (and {len(self._later) - 1} more)" if len(self._later) > 1 else ""
            raise Busy(self._later[0].message + more, retry_after=max(waits) if waits else None)
        if self._unknown:
            raise Interrupted(
                f"{self._key}: the server's answers leave open what became of {len(self._unknown)} instance(s): "
                f"{self._unknown[0]}"
            )

    # ---- workers

    def _work(self) -> None:
        buffer = bytearray(PIECE_BYTES)
        while (batch := self._next()) is not None:
            again: list[Batch] = []
            try:
                again = self._send(batch, buffer)
            except BaseException as exc:
                with self._turn:
                    self._errors.append(exc)
            finally:
                with self._turn:
                    self._busy -= 1
                    self._queue.extendleft(reversed([one for one in again if not one.last]))
                    self._queue.extend(one for one in again if one.last)
                    self._turn.notify_all()

    def _next(self) -> Batch | None:
        """Wait for a batch to send; None if there is none left, or something went wrong."""
        with self._turn:
            while not self._errors:
                if self._queue:
                    self._busy += 1
                    return self._queue.popleft()
                if not self._busy:
                    break
                self._turn.wait(SLICE_S)
        return None

    def _send(self, batch: Batch, buffer: bytearray) -> list[Batch]:
        """Send one batch and tell the outcomes; returns what is to be sent again."""
        self.report.check()
        while True:
            body = Body(batch.items, self.plan, buffer, self._throttle.piece, self._pace, self.report.moved)
            if self._ceiling is not None and body.length > self._ceiling and len(batch.items) > 1:
                return batch.halves()
            try:
                answer, content = self._post(body)
            except Rejected as exc:  # a file that isn't any more what was planned: the others go without it
                self._tell(body.current, Outcome(Kind.REJECTED, exc.message))
                batch = Batch(tuple(item for item in batch.items if item is not body.current))
                if not batch.items:
                    return []
            except (Interrupted, TimedOut) as exc:
                if body.out:
                    self._suspect(batch, body, exc)
                raise
            else:
                return self._judge(batch, body, answer, content)

    def _suspect(self, batch: Batch, body: Body, exc: DispatchError) -> None:
        """Note for the next attempts what was on its way when the link broke."""
        until = time.monotonic() + SUSPICION_S
        with self._turn:
            known, most = self._suspects
            paths = [item.path for item in batch.items]
            if self._stumbled.issuperset(paths):
                most = min(most, -(-len(paths) // 4))
            self._suspects = known.union(paths), most
            _stumbled[self._key + self.plan.dispatch_id] = (*self._suspects, until)
            if isinstance(exc, Interrupted) and len(batch.items) > 1 and body.length > LEAST_LIMIT_BYTES:
                _suspected[self._key] = (max(LEAST_LIMIT_BYTES, body.length // 4), until)

    def _post(self, body: Body) -> tuple[Answer, bytes]:
        headers = {
            "Accept": dicomweb.ACCEPT,
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={body.boundary}',
        }
        expect = not self._arrived and body.length >= EXPECT_BYTES
        with self.service.session.request("POST", self.path, headers, body, expect=expect) as answer:
            if answer.status < 300:
                return answer, answer.read().strip()
            content = b""
            with suppress(Interrupted):  # a server that refuses a body may not wait until its words are read
                content = answer.read()
            return answer, content

    def _pace(self, count: int) -> None:
        """Wait until so many bytes may go."""
        dicomweb.pause(self._throttle.delay(count), self.report.check)

    # ---- what an answer means

    def _judge(self, batch: Batch, body: Body, answer: Answer, content: bytes) -> list[Batch]:
        status = answer.status
        if status == 413:
            return self._too_large(batch, body, answer, content)
        if status >= 300 and status not in WHOLE_STATUSES:
            raise self._error(batch, answer, content)
        lists = Lists.of(content)
        again: list[Batch] = []
        unnamed: list[Item] = []
        whole = body.whole
        refused_for_now = 0
        for at, item in enumerate(batch.items):
            uid = uid_of(item)
            if lists and uid in lists.failed:
                outcome = self._failure(item, lists.failed[uid], batch, answer)
                if isinstance(outcome, Batch):
                    again.append(outcome)
                elif isinstance(outcome, Busy):
                    refused_for_now += 1
                    with self._turn:
                        self._later.append(outcome)
                else:
                    self._tell(item, outcome)
            elif lists and uid in lists.accepted and at < whole:
                self._tell(item, stow_answer.warning(lists.accepted[uid]) or DELIVERED)
            else:
                unnamed.append(item)
        if refused_for_now == len(batch.items):
            raise self._later[-1]  # the server is full: no use in sending it more
        if unnamed:
            again += self._unnamed(Batch(tuple(unnamed), batch.last), batch, lists, answer, content)
        return again

    def _unnamed(self, rest: Batch, batch: Batch, lists: Lists | None, answer: Answer, content: bytes) -> list[Batch]:
        """What becomes of the instances of a batch that no list names."""
        alone = len(batch.items) == 1
        promised = answer.media_type in (JSON, XML) and not answer.framed  # a list, which may have been cut off
        if answer.status < 300 and not content and not answer.early and not promised:
            if answer.status == 202 and not alone:
                return batch.halves()
            warning = Outcome(Kind.WARNING, "202 without a list: taken, with a warning or for later processing")
            with self._turn:
                self.unlisted += len(rest.items)
            for item in rest.items:
                self._tell(item, warning if answer.status == 202 else DELIVERED)
            return []
        others = lists.others if lists else []
        if others and (len(others) == len(rest.items) or alone):
            # Failures without a UID, as many as there are instances without a word: theirs, if not in this order.
            for item, reason in zip(rest.items, others, strict=False):
                self._tell(item, Outcome(Kind.REJECTED, stow_answer.failure(reason)))
            return []
        if answer.status < 300 and lists is None:
            if content and not answer.early:
                said = self._said(rest, answer, content)
                remedy = "; is it a login page? Then check url and credentials" if "html" in answer.media_type else ""
                raise Interrupted(f"{self._key}: the answer holds no list of instances: {said}{remedy}")
            return self._open(rest)
        if not alone:
            return rest.halves()
        if answer.status < 300:
            return self._open(rest)
        return self._refused(rest, answer, content)

    def _open(self, rest: Batch) -> list[Batch]:
        """Instances of which nothing is known: smaller batches, then each alone, then the next attempt."""
        if len(rest.items) > 1:
            return rest.halves()
        if not rest.last:
            return [Batch(rest.items, last=True)]
        with self._turn:
            self._unknown += [item.shown for item in rest.items]
        return []

    def _refused(self, rest: Batch, answer: Answer, content: bytes) -> list[Batch]:
        """One instance, alone in its request, that was refused without a list."""
        item = rest.items[0]
        if answer.status == 500:
            if not rest.last:
                with self._turn:
                    self._hopeless += 1
                if self._hopeless >= HOPELESS and not self._arrived:
                    raise self._error(rest, answer, content)
                return [Batch(rest.items, last=True)]
            if not self._arrived:
                raise self._error(rest, answer, content)
        self._tell(item, Outcome(Kind.REJECTED, self._said(rest, answer, content)))
        return []

    def _failure(
        self, item: Item, failure: stow_answer.Failure, batch: Batch, answer: Answer
    ) -> Outcome | Batch | Busy:
        """What becomes of an instance that the answer names as failed."""
        text = stow_answer.failure(failure)
        if failure.comment:
            text += f": {self._hiding((item,)).clean(failure.comment)!r}"
        if failure.code in stow_answer.ALREADY:
            return Outcome(Kind.ALREADY, text)
        if stow_answer.is_busy(failure.code):
            return Busy(f"{self._key}: {text}: {item.shown}", retry_after=answer.retry_after)
        if failure.code in stow_answer.ONCE_MORE and not batch.last:
            return Batch((item,), last=True)
        return Outcome(Kind.REJECTED, text)

    def _too_large(self, batch: Batch, body: Body, answer: Answer, content: bytes) -> list[Batch]:
        if len(batch.items) > 1:
            with self._turn:
                self._ceiling = min(self._ceiling or body.length, body.length * 3 // 4)
            return batch.halves()
        text = f"larger than the server takes ({batch.items[0].size} bytes): {self._said(batch, answer, content)}"
        self._tell(batch.items[0], Outcome(Kind.REJECTED, text))
        return []

    def _tell(self, item: Item, outcome: Outcome) -> None:
        if outcome.arrived:
            with self._turn:
                self._arrived += 1
        self.report(item, outcome)

    def _error(self, batch: Batch, answer: Answer, content: bytes) -> DispatchError:
        return self._hiding(batch.items).error(answer, content, self.path)

    def _said(self, batch: Batch, answer: Answer, content: bytes) -> str:
        service = self._hiding(batch.items)
        said = service.words(content, answer)
        return f"{answer.status} {service.clean(answer.reason)}".rstrip() + (f": {said!r}" if said else "")

    def _hiding(self, items: Iterable[Item]) -> Service:
        return self.service.hiding(identifying(self.plan, items))
