"""Stores instances by STOW-RS (PS3.18 section 10.5): batches that stream from disk, answers read per instance.

What an answer says of an instance decides; the status decides only where it says nothing:

    2xx, named in 00081199             delivered, with a warning if 00081196 is there
    named in 00081198 (reason 00081197) rejected; already there; or, for want of resources, once more, alone, at the end
    2xx without a body                 delivered (202: each alone, as some of them may have failed)
    2xx, not named                     the server is asked whether it has it (QIDO); else alone; else unknown, and
                                       sent again by the next attempt. Where as many were accepted under other UIDs
                                       as are open, and none failed, these are they: delivered with a warning
    400, 409, 415, 422, not named      each alone: one bad instance costs only itself; alone it is rejected
    413                                smaller batches, now and later; alone it is rejected
    any other status, a redirect that  each alone: if the server takes others, it is rejected (4xx, 500, 501, 505), or
    can't be followed, a link that     left for the next attempt (what may pass), in which it comes last, and alone; the
    breaks, silence, a login page      third one rejects it. If it takes nothing: as `dicomweb.STATUS_ERRORS`, see
                                       `stow_doubts`. With Retry-After, the first time: Busy at once

No instance goes out whole more than twice in one push. What went out whole before the link broke is asked for (QIDO).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from protocols.dicomweb import readback, stow_answer
from protocols.dicomweb import service as dicomweb
from protocols.dicomweb.readback import Unverifiable
from protocols.dicomweb.service import JSON, XML, Service
from protocols.dicomweb.stow_answer import Lists
from protocols.dicomweb.stow_body import Batch, StowBody, batches, uid_of
from protocols.dicomweb.stow_doubts import Doubts, together
from protocols.http.answer import Answer
from protocols.net.connection import SLICE_S
from protocols.net.hiding import identifying
from transfer.duplicates import Duplicates
from transfer.errors import (
    Busy,
    Cancelled,
    DispatchError,
    Interrupted,
    Misconfigured,
    Rejected,
    Retryable,
    TimedOut,
)
from transfer.fanout import in_threads
from transfer.outcome import DELIVERED, ELSEWHERE, NAMELESS, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

PIECE_BYTES = 1 << 20  # read and sent at once: many small files, or a part of a large one
EXPECT_BYTES = 1 << 20  # bodies from this size ask before they go, as long as nothing was accepted (curl's limit)
WHOLE_STATUSES = (400, 409, 415, 422)  # are about what was sent
LASTING_STATUSES = (500, 501, 505)  # of an instance that is refused alone while others are taken: it won't pass
GATEWAY_STATUSES = (502, 504)  # of a gateway that doesn't know what became of the request
SETTLE_S = 2.0  # how long a server may take until what it took shows up in its searches
FULL = 10  # instances, one after the other, that a server has no room for before it is taken to be full
# A proxy that limits bodies may reset the connection instead of answering 413. What such a push learned holds for the
# next attempts, for so many seconds.
SUSPICION_S = 900.0
LEAST_LIMIT_BYTES = 256_000  # no proxy's limit is lower
_suspected: dict[str, tuple[int, float]] = {}
# What was on its way when something failed goes last in the next attempt: by dispatch and place, the paths, until when.
_stumbled: dict[str, tuple[frozenset[str], float]] = {}


def _forget() -> None:
    """Drop instances that are no longer suspected: there may be many dispatches, with many paths."""
    now = time.monotonic()
    for key in [key for key, (_, until) in list(_stumbled.items()) if until <= now]:
        _stumbled.pop(key, None)  # another dispatch may have done it


class StowPush:
    """One push: sends the pending instances of a plan, and reports the outcome of each.

    Attributes:
        unlisted: how many instances the server accepted without naming them in its answer.
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
        self._batch_bytes, self._batch_items, self._concurrency = batch_bytes, batch_items, concurrency
        self._suspects: frozenset[str] = frozenset()
        _forget()
        self._stumbled, _ = _stumbled.get(self._key + plan.dispatch_id, (frozenset[str](), 0.0))
        self._doubts = Doubts(
            plan, report, concurrency, known=bool(self._stumbled or report.put_off), alive=self._answers
        )
        self._queue: deque[Batch] = deque()
        self._throttle = Throttle(bandwidth_limit)
        self._turn = threading.Condition()
        self._asking = threading.Lock()
        self._patience = SETTLE_S
        self._busy = 0  # workers that have a batch, and may bring back parts of it
        self._failed = False
        self._ceiling: int | None = None  # bytes; larger requests were refused with 413
        self._full = 0  # instances, one after the other, that the server had no room for
        self._unknown: list[str] = []  # instances that no answer names
        self._later: list[Retryable] = []  # why instances are left for the next attempt

    def run(self) -> None:
        """Send everything; returns when every instance has an outcome.

        Raises:
            DispatchError: some have none; those that were confirmed have been reported.
        """
        duplicates = Duplicates(self.plan, self.report)
        items = duplicates.begin()
        while items:
            self._send_all(items)
            items = duplicates.settle()

    def _send_all(self, items: Iterable[Item]) -> None:
        parts: tuple[list[Item], list[Item], list[Item]] = [], [], []
        for item in items:
            parts[2 if item.path in self.report.put_off else item.path in self._stumbled].append(item)
        self._queue = deque()
        for part in parts[:2]:
            self._queue += batches(part, self._batch_bytes, self._batch_items, self._concurrency)
        parts[2].sort(key=lambda item: self.report.tries[item.path])  # what was tried least comes first
        self._queue += [Batch((item,), last=True) for item in parts[2]]
        in_threads(self._work, min(self._concurrency, len(self._queue)), "stow")
        self._later += self._doubts.judge(self._report)
        if self._later:
            raise together(self._key, self._later)
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
                self.report.check()
                with self.report.under_way():
                    again = self._send(batch, buffer)
            except BaseException:
                self._failed = True
                raise
            finally:
                with self._turn:
                    self._busy -= 1
                    self._queue.extendleft(reversed([one for one in again if one.soon or not one.last]))
                    self._queue.extend(one for one in again if one.last and not one.soon)
                    self._turn.notify_all()

    def _next(self) -> Batch | None:
        """Wait for a batch to send; None if none is left, or another thread has failed."""
        with self._turn:
            while not self._failed:
                if self._queue:
                    self._busy += 1
                    return self._queue.popleft()
                if not self._busy:
                    break
                self._turn.wait(SLICE_S)
        return None

    def _send(self, batch: Batch, buffer: bytearray) -> list[Batch]:
        """Send one batch and report the outcomes; return the batches to send again."""
        while True:
            body = StowBody(batch.items, self.plan, buffer, self._throttle.piece, self._pace, self.report.moved)
            if self._ceiling is not None and body.length > self._ceiling and len(batch.items) > 1:
                return batch.halves()
            try:
                answer, content = self._post(body)
            except Rejected as exc:  # a file that isn't any more what was planned: the others go without it
                self._report(body.current, Outcome(Kind.REJECTED, exc.message))
                batch = Batch(tuple(item for item in batch.items if item is not body.current), batch.last)
                if not batch.items:
                    return []
            except (Interrupted, TimedOut, Misconfigured) as exc:  # of the last kind: a redirect that can't be followed
                if not body.out and exc.retryable:
                    raise
                return self._doubted(batch, body, exc, exc.message.partition(": ")[2] or exc.message)
            else:
                return self._judge(batch, body, answer, content)

    def _suspect(self, batch: Batch, body: StowBody, exc: DispatchError) -> None:
        """Remember, also for later attempts, which instances were under way when something failed, and their size."""
        until = time.monotonic() + SUSPICION_S
        with self._turn:
            self._suspects |= {item.path for item in batch.items}
            _stumbled[self._key + self.plan.dispatch_id] = self._suspects, until
            if isinstance(exc, Interrupted) and len(batch.items) > 1 and body.length > LEAST_LIMIT_BYTES:
                self._ceiling = max(LEAST_LIMIT_BYTES, body.length // 4)
                _suspected[self._key] = self._ceiling, until

    def _post(self, body: StowBody) -> tuple[Answer, bytes]:
        headers = {
            "Accept": dicomweb.ACCEPT,
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={body.boundary}',
        }
        expect = (not self._doubts.stored or self._ceiling is not None) and body.length >= EXPECT_BYTES
        with self.service.session.request("POST", self.path, headers, body, expect=expect) as answer:
            if answer.status < 300:
                return answer, answer.read().strip()
            content = b""
            with suppress(Interrupted):  # a server that refuses a body may not wait until its words are read
                content = answer.read()
            return answer, content

    def _pace(self, count: int) -> None:
        """Wait until so many bytes may be sent."""
        dicomweb.pause(self._throttle.delay(count), self.report.check)

    # ---- what an answer means

    def _judge(self, batch: Batch, body: StowBody, answer: Answer, content: bytes) -> list[Batch]:
        status = answer.status
        if status == 413:
            return self._too_large(batch, body, answer, content)
        lists = Lists.of(content)
        if status >= 300 and status not in WHOLE_STATUSES and not (lists and status in LASTING_STATUSES):
            return self._refused_whole(batch, body, answer, content)
        again: list[Batch] = []
        unnamed: list[Item] = []
        whole = body.whole
        full: list[Busy] = []
        for at, item in enumerate(batch.items):
            uid = uid_of(item)
            if lists and uid in lists.failed:
                outcome = self._failure(item, lists.failed[uid], batch, answer)
                if isinstance(outcome, Busy):
                    full.append(outcome)
                    again += self._without_room(item, outcome, batch)
                elif isinstance(outcome, Batch):
                    again.append(outcome)
                else:
                    self._report(item, outcome)
            elif lists and uid in lists.accepted and at < whole:
                self._report(item, stow_answer.warning(lists.accepted[uid]) or DELIVERED)
            else:
                unnamed.append(item)
        with self._turn:
            self._full = self._full + len(full) if len(full) == len(batch.items) else 0
        if self._full >= FULL:
            raise Busy(f"{self._key}: {full[-1].message}", retry_after=full[-1].retry_after)  # no use in sending more
        if unnamed:
            again += self._unnamed(Batch(tuple(unnamed), batch.last), batch, body, lists, answer, content)
        return again

    def _refused_whole(self, batch: Batch, body: StowBody, answer: Answer, content: bytes) -> list[Batch]:
        error, said = self._error(batch, answer, content), self._said(batch, answer, content)
        unsure, lasting = answer.status in GATEWAY_STATUSES, answer.status in LASTING_STATUSES
        return self._doubted(batch, body, error, said, unsure=unsure, lasting=lasting)

    def _doubted(
        self,
        batch: Batch,
        body: StowBody,
        error: DispatchError,
        said: str,
        *,
        unsure: bool | None = None,
        lasting: bool = False,
    ) -> list[Batch]:
        """Return the batches to send after one failed, perhaps because of one of its instances.

        Args:
            said: the server's words or reaction.
            unsure: whether it may have been stored nevertheless; None to judge by the error.
            lasting: whether it would be the same another time.

        Raises:
            DispatchError: the given error, if the server is its cause.
        """
        if body.out:
            self._suspect(batch, body, error)
        if self._doubts.is_server(error):
            raise error
        if unsure is None:
            unsure = isinstance(error, Interrupted) or (isinstance(error, TimedOut) and bool(self._doubts.stored))
        if unsure or isinstance(error, Interrupted | TimedOut):
            self.report.unanswered.update(item.path for item in body.items[: body.whole])
        if unsure and body.whole:
            there = self._listed(batch.items)
            for item in there:
                self._report(item, DELIVERED)
            batch = Batch(tuple(item for item in batch.items if item not in there), batch.last)
        if len(body.items) > 1:
            return self._doubts.apart(batch)
        for item in batch.items:
            self._doubts.failed_alone(item, said, error, lasting=lasting)
        return []

    def _listed(self, items: tuple[Item, ...]) -> list[Item]:
        """Return those of these instances that the server lists, as far as it answers."""
        with self._asking:
            return readback.listed(self.service, items, self.report.check)

    def _answers(self) -> bool:
        """Return True if the server answers a search in any way that doesn't mean that it is down."""
        path = self.service.path(self.service.qido, "studies", query=[("limit", "1")])
        try:
            status, _, _ = self.service.get(path, dicomweb.ACCEPT)
        except Cancelled:
            raise
        except DispatchError:
            return False
        return dicomweb.STATUS_ERRORS.get(status) is not Busy

    def _without_room(self, item: Item, refusal: Busy, batch: Batch) -> list[Batch]:
        """Handle an instance that the server has no room for now; some say so of instances that they can never take."""
        if not batch.last:
            return [Batch((item,), last=True)]
        with self._turn:
            self._later.append(refusal)
        self.report.put_off[item.path] = refusal.message.removesuffix(f": {item.shown}")
        return []

    def _unnamed(
        self, rest: Batch, batch: Batch, body: StowBody, lists: Lists | None, answer: Answer, content: bytes
    ) -> list[Batch]:
        """Return the batches to send for instances that no list of the answer names."""
        alone = len(batch.items) == 1
        promised = answer.media_type in (JSON, XML) and not answer.framed  # a list, which may have been cut off
        if answer.status < 300 and not content and not answer.early and not promised:
            if answer.status == 202 and not alone:
                return rest.alone()
            self._taken(rest.items, "202 without a list: taken, with a warning or for later processing", answer)
            return []
        others = lists.others if lists else []
        if others and (len(others) == len(rest.items) or alone):
            # Failures without a UID, as many as there are instances without a word: theirs, if not in this order.
            for item, reason in zip(rest.items, others, strict=False):
                self._report(item, Outcome(Kind.REJECTED, stow_answer.failure(reason)))
            return []
        if answer.status < 300 and not answer.early:
            return self._settled(rest, batch, body, lists, answer, content)
        if not alone:
            return rest.alone()
        if answer.status < 300:
            return self._open(rest)
        if answer.status in LASTING_STATUSES:
            return self._refused_whole(rest, body, answer, content)
        self._report(rest.items[0], Outcome(Kind.REJECTED, self._said(rest, answer, content)))
        return []

    def _taken(self, items: Iterable[Item], words: str, answer: Answer) -> None:
        """Report instances that were accepted according to the status alone."""
        for item in items:
            with self._turn:
                self.unlisted += 1
            self._report(item, Outcome(Kind.WARNING, words) if answer.status == 202 or words[:1] != "2" else DELIVERED)

    def _settled(
        self, rest: Batch, batch: Batch, body: StowBody, lists: Lists | None, answer: Answer, content: bytes
    ) -> list[Batch]:
        """Settle instances that a successful answer doesn't name; return the batches to send again.

        A gateway that gives instances its own UIDs would store an instance again each time it is sent.
        """
        strangers = lists.under_other_uids(map(uid_of, batch.items)) if lists else 0
        page = "html" in answer.media_type and lists is None
        missing = self._asked(rest.items, 0.0 if strangers or page else self._patience)
        left = rest.items if missing is None else missing
        for item in rest.items:
            if item not in left:
                self._report(item, DELIVERED)
        if not left:
            return []
        if lists and strangers == len(rest.items) and not lists.failed and not lists.others:
            words = NAMELESS if lists.nameless == strangers else ELSEWHERE
            for item in left:
                self._report(item, Outcome(Kind.WARNING, words))
            return []
        if page or (lists is None and missing is None and _begins_list(answer, content)):
            said = self._said(rest, answer, content)
            remedy = "; is it a login page? Then check url and credentials" if page else ""
            words = f"the answer holds no list of instances: {said}{remedy}"
            rest = Batch(tuple(left), batch.last)
            return self._doubted(rest, body, Interrupted(f"{self._key}: {words}"), words, unsure=False)
        rest = Batch(tuple(left), batch.last)
        if not (batch.last and missing is None and lists is None):
            return self._open(rest)
        self._taken(
            left, f"accepted ({answer.status}), but not named in the answer; the server can't be searched", answer
        )
        return []

    def _asked(self, items: tuple[Item, ...], wait_s: float) -> tuple[Item, ...] | None:
        """Return those of these instances that the server doesn't have; None if it can't be searched."""
        with self._asking:  # one thread at a time: the questions are few, or the server is odd
            try:
                missing = tuple(readback.unlisted(self.service, items, self.report.check, wait_s))
            except Cancelled:
                raise
            except (Unverifiable, DispatchError):
                return None
            if len(missing) == len(items):
                self._patience = 0.0  # what doesn't show up by then rarely does
            return missing

    def _open(self, rest: Batch) -> list[Batch]:
        """Return batches for instances of which nothing is known: each alone, then in the next attempt."""
        if not rest.last:
            return rest.alone()
        with self._turn:
            self._unknown += [item.shown for item in rest.items]
        return []

    def _failure(
        self, item: Item, failure: stow_answer.Failure, batch: Batch, answer: Answer
    ) -> Outcome | Batch | Busy:
        """Handle an instance that the answer names as failed; return the batches to send again."""
        text = stow_answer.failure(failure)
        if failure.comment:
            text += f": {self._hiding((item,)).clean(failure.comment)!r}"
        if failure.code in stow_answer.ALREADY:
            return Outcome(Kind.ALREADY, text)
        if stow_answer.is_busy(failure.code):
            return Busy(f"{text}: {item.shown}", retry_after=answer.retry_after)
        if failure.code in stow_answer.ONCE_MORE and not batch.last:
            return Batch((item,), last=True)
        return Outcome(Kind.REJECTED, text)

    def _too_large(self, batch: Batch, body: StowBody, answer: Answer, content: bytes) -> list[Batch]:
        if len(batch.items) > 1:
            with self._turn:
                self._ceiling = min(self._ceiling or body.length, body.length * 3 // 4)
            return batch.halves() if answer.early or not body.out else batch.alone()
        text = f"larger than the server takes ({batch.items[0].size} bytes): {self._said(batch, answer, content)}"
        self._report(batch.items[0], Outcome(Kind.REJECTED, text))
        return []

    def _report(self, item: Item, outcome: Outcome) -> None:
        self._doubts.settled(arrived=outcome.arrived)
        self.report(item, outcome)

    def _error(self, batch: Batch, answer: Answer, content: bytes) -> DispatchError:
        return self._hiding(batch.items).error(answer, content, self.path)

    def _said(self, batch: Batch, answer: Answer, content: bytes) -> str:
        service = self._hiding(batch.items)
        said = service.words(content, answer)
        return f"{answer.status} {service.clean(answer.reason)}".rstrip() + (f": {said!r}" if said else "")

    def _hiding(self, items: Iterable[Item]) -> Service:
        return self.service.hiding(identifying(self.plan, items))


def _begins_list(answer: Answer, content: bytes) -> bool:
    """Return True if an answer began as a list of instances that can't be read."""
    return answer.media_type in (JSON, XML) and any(tag in content for tag in (b"00081199", b"NativeDicomModel"))
