"""One plan to one target: everything around a driver's push that all types have in common.

Narrows the plan for the target, asks the ledger what is there already, pushes, and makes the receipt. Independent of
Prefect. May be called again after any error, and then sends only what has no outcome yet.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from itertools import chain, groupby, pairwise
from typing import Any

from blocks.base import Target
from tasks.dispatch import line
from tasks.dispatch.known import Known
from tasks.dispatch.ran import RanFolders
from tasks.dispatch.rest import Left
from tasks.driver import Driver, Facts
from tasks.quiet import Quiet
from transfer.database import LOST
from transfer.errors import Cancelled, DispatchError, LedgerAway, Retryable
from transfer.globs import excluded
from transfer.home import Home
from transfer.layout import names
from transfer.ledger import Ledger
from transfer.outcome import UNSENT, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import Level, Lines, PushReport, Receipt, State

MAX_ATTEMPTS = 1000  # of one run, also if each of them gets a little further
GAIN_BYTES = 65_536  # an attempt that moved less of a file has not got further
OUTPUT_BYTES = 65_536  # of a hook's output, its end is kept
SHOWN_CHARS = 500  # of it, in the run's state
LINE_CHARS = 200  # of the last line that a failed script printed, where only that is shown
BESIDE_S = 1.0  # a run that may rest waits no longer for another one that sends the same
SHOWN_FAILURES = 20  # lines of failed attempts in a receipt


class Progress:
    """How far a delivery has come: items with an outcome, and bytes; safe to read from another thread."""

    def __init__(self, items: int, size: int) -> None:
        self.items, self.size = items, size
        self.done = 0
        self.moved = 0
        self._lock = threading.Lock()

    def add(self, *, done: int = 0, moved: int = 0) -> None:
        with self._lock:
            self.done += done
            self.moved += moved

    @property
    def percent(self) -> float:
        """By bytes, so that a large file moves too; 100 only when every item has its outcome."""
        if self.done >= self.items:
            return 100.0
        by_bytes = self.moved / self.size if self.size else self.done / self.items
        return min(99.0, max(100 * by_bytes, 0.0))


class Delivery:
    """A plan on its way to a target. Not a dataclass, because Prefect would walk through thousands of items.

    Attributes:
        unit: what its progress counts.

    Args:
        paused: set to stop after the items under way, if what has arrived is to be continued later.
        force: whether to forget first what the ledger knows.
    """

    unit = "items"
    beside = ""  # the lock that keeps this run from its work, where another one does the same at the target

    def __init__(
        self,
        driver: Driver[Any],
        target: Target,
        plan: Plan,
        ledger: Ledger,
        home: Home,
        cancelled: threading.Event,
        *,
        paused: threading.Event | None = None,
        force: bool = False,
    ) -> None:
        self.driver, self.target, self.paused = driver, target, paused
        self.ledger, self.home, self.cancelled = ledger, home, cancelled
        self.refused, wanted = sort_out(driver.facts, target, plan)
        self.plan = plan.narrowed(wanted, lacks=lacking(self.refused))
        self.quiet = Quiet(target, self.plan)
        self.attempts = 0
        self.futile = 0  # how many of them the target is to blame for, and did not get further
        self.failures: list[str] = []  # a sentence on each failed attempt
        self.error: DispatchError | None = None
        self.heard = False  # whether an attempt has got answers for what was pending
        self.hook = "none"
        self.hook_output = ""
        self.hook_result = ""  # how it ended, in a sentence without its output
        self.hook_tries = 0  # how often it has failed in this run
        self.stopped: State | None = None
        self.may_rest = False  # whether its run may end its part, instead of waiting for the next attempt
        self.again: datetime | None = None  # when the next attempt may begin, where its run does not wait for it
        self._since = 0.0  # when this run's first attempt began, in seconds since the epoch
        self._reported: dict[str, Outcome] = {}
        self._stumbled: set[str] = set()
        self._unanswered: Counter[str] = Counter()
        self._tries: Counter[str] = Counter()
        self._put_off: dict[str, str] = {}
        self._before: frozenset[str] | None = None
        self._last: Receipt | None = None
        self._report: PushReport | None = None  # of the attempt that was begun last
        self._furthest = 0  # most bytes of a failed attempt
        self._begun: float | None = None  # when the first attempt began, in monotonic seconds
        self._ended = 0.0  # when the last step ended
        self._force = force
        self.check = PushReport(cancelled=cancelled, pausing=paused, between=paused).check
        self.known = Known(ledger, self.key, target, driver.facts, self.plan, self.check)
        self._ran = RanFolders(ledger, *self.key)
        self._folders: dict[str, str] = {}  # by path, where there is a script
        self._changed: set[str] = set()  # folders into which something has come
        self.progress = Progress(len(self.plan.items), self.plan.size)

    @property
    def key(self) -> tuple[str, str, str]:
        """The key of the ledger's rows: dispatch, destination, and its endpoint for a study of this origin."""
        return self.plan.dispatch_id, self.target.name, self.target.endpoint_for(self.plan.origin)

    def push(self) -> Receipt:
        """Make one attempt.

        Raises:
            DispatchError: as the driver does; what was confirmed is in the ledger.
            SentByAnother: another run sends the same there.
        """
        self.attempts += 1
        self.error = None
        self._begun = self._begun or time.monotonic()
        plan, progress = self.plan, self.progress
        mark = progress.done, progress.moved
        try:
            with self._alone("push", self.check):
                if self._before is None:
                    self._since = self.ledger.now()
                    self._begin()
                known = self.known.look(self._reported)
                if self._before is None:
                    self._before = frozenset(path for path, outcome in known.items() if outcome.arrived)
                    for item in plan.items:
                        if item.path in self._before:
                            progress.add(done=1, moved=item.size)
                mark = progress.done, progress.moved
                done = {path: outcome for path, outcome in known.items() if outcome.arrived}
                # Rejected in this run: not at the target, but not sent again either.
                reported = ((item.path, self._reported.get(item.path)) for item in plan.items if item.path not in done)
                rejected = {path: outcome for path, outcome in reported if outcome and not outcome.arrived}
                kept = self._unanswered, self.paused, self._put_off, self._tries, self.ledger.together, self.paused
                self._report = report = PushReport(self._record, self.cancelled, self.moved, *kept)
                report.check()
                with self.ledger.together():
                    for item in self.refused:
                        if item.path not in self._reported:
                            self._record(item, self.refused[item])
                # What an attempt stumbled over comes last in the next one, so that it holds up nothing else.
                items = plan.items
                if self._stumbled:
                    items = tuple(sorted(items, key=lambda item: item.shown in self._stumbled))
                narrowed = plan.narrowed(items, done, rejected=rejected)
                self._last = replace(self.driver.push(self.target, narrowed, report), items=())
                self.heard = bool(narrowed.pending)
        except SentByAnother:
            self.attempts -= 1
            raise
        except DispatchError as exc:
            self.quiet.error(exc)
            exc.target = exc.target or self.target.name
            if exc.item:
                self._stumbled.add(exc.item)
            self.error = exc
            if isinstance(exc, Cancelled):
                self.stopped = State.CANCELLED
            self.futile += not self._got_further(*mark) and not isinstance(exc, LedgerAway)
            self.failures.append(self._failure(exc))
            raise
        finally:
            self.ends()
        self.known.sum_up()
        return self.receipt()

    def _begin(self) -> None:
        self.known.begin(force=self._force)
        if self._force and self.driver.hook is not None and self.target.hook is not None:
            for folder in set(names(self.plan, self.target.hook.layout).values()):
                self._ran.forget(folder)

    def leave(self, left: Left) -> Left:
        """Return what the next part of its run must know; `left` is what this part knew."""
        if not self.attempts or (not left.begun and self.attempts == left.attempts):
            return replace(left, ended=self.stopped is not State.WAITING)
        return Left(
            self.attempts,
            self.futile,
            self.failures,
            self._since,
            self.ledger.now() if self.attempts > left.attempts else left.tried,
            left.since,
            self.again.timestamp() if self.again else 0.0,
            type(self.error).__name__ if self.error else "",
            self.stopped is not State.WAITING,
            sorted(self._stumbled),
            dict(self._unanswered),
            dict(self._tries),
            {path: self.quiet.text(said) for path, said in self._put_off.items()},
            self.hook_tries,
            str(self._last.verified if self._last else Level.ACCEPTED),
            [self.quiet.hide(note) for note in self._last.notes] if self._last else [],
            beside=self.beside,
        )

    def resume(self, left: Left) -> None:
        """Go on where an earlier part of its run left off."""
        self.attempts, self.failures = left.attempts, list(left.failures)
        if not left.begun:  # they were tests: from now on it may fail as often as if it had just come
            return
        self.futile, self._since = left.futile, left.begun
        self._begun = time.monotonic() - (self.ledger.now() - left.begun)
        self._stumbled, self._put_off = set(left.stumbled), dict(left.put_off)
        self._unanswered, self._tries, self.hook_tries = Counter(left.unanswered), Counter(left.tries), left.hook_tries
        self._last = Receipt(self.target.name, (), verified=Level(left.verified), notes=tuple(left.notes))
        key, items = self.key, self.plan.items
        known = self.ledger.outcomes(*key[:2], items, key[2])
        self._reported = self.ledger.outcomes(*key[:2], items, key[2], since=self._since)
        self._before = frozenset(
            path for path, outcome in known.items() if outcome.arrived and path not in self._reported
        )
        for item in items:
            if item.path in known:
                self.progress.add(done=1, moved=item.size)

    def moved(self, count: int) -> None:
        """Count bytes that went out; several threads may call it."""
        self.progress.add(moved=count)

    def ends(self) -> None:
        """Count the delivery's time up to now."""
        self._ended = time.monotonic()

    @property
    def is_under_way(self) -> bool:
        """Whether items are being sent that a pause is to wait for."""
        return self._report is not None and self._report.is_under_way

    @property
    def reason(self) -> DispatchError | None:
        """Why it ended as it did; None if it is delivered, or single items were rejected."""
        return self.error

    @property
    def may_go_on(self) -> bool:
        """Whether another attempt is left; attempts that got further are not counted."""
        return self.futile < self.target.max_attempts and self.attempts < MAX_ATTEMPTS

    def _got_further(self, done: int, moved: int) -> bool:
        """Return True if an attempt has achieved something that the next one need not repeat.

        Args:
            done: how many items had an outcome when it began.
            moved: how many bytes had been moved by then.
        """
        progress = self.progress
        if progress.done > done:
            return True
        if not self.driver.facts.resumes:
            return False
        # Parts of files are kept: bytes are a gain if it came further than any attempt before (rsync counts what it
        # finds there as well), or as long as no more than the plan holds went out (then nothing went out twice).
        came = progress.moved - moved
        further = came >= self._furthest + GAIN_BYTES
        once = came >= GAIN_BYTES and progress.moved <= 1.1 * progress.size + GAIN_BYTES
        self._furthest = max(self._furthest, came)
        return further or once

    def _failure(self, error: DispatchError) -> str:
        words = " ".join(error.message.split())
        if not isinstance(error, Retryable):
            return f"attempt {self.attempts} failed: {words}"
        possible = min(self.attempts - self.futile + self.target.max_attempts, MAX_ATTEMPTS)
        return f"attempt {self.attempts} of {possible} failed: {words}"

    def run_hook(self) -> None:
        """Run the target's own script once; the ledger keeps the result.

        Raises:
            HookFailed: it did not end well, or in time.
            DispatchError: it could not be run (not there, not executable, no login), the connection was lost while it
                ran, or somebody stopped it.
            SentByAnother: another run does it.
        """
        if self.driver.hook is None:
            raise TypeError(f"targets of type {self.target.type_name} have no hook")
        report = PushReport(cancelled=self.cancelled, pausing=self.paused, between=self.paused)
        try:
            with self._alone("hook", report.check):
                if not self._hook_is_done():
                    self._run_hook(report)
        except HookFailed:
            self.hook_tries += 1
            raise
        except DispatchError as exc:
            self.hook_tries += 1
            self.quiet.error(exc)
            exc.target = exc.target or self.target.name
            self.hook, self.hook_output = "failed", ""
            self.hook_result = f"the script was not run to its end: {exc.message}"
            self.stopped = State.CANCELLED if isinstance(exc, Cancelled) else None
            raise
        finally:
            self.ends()

    def _run_hook(self, report: PushReport) -> None:
        assert self.driver.hook is not None  # noqa: S101 - for the type checker
        key = self.key
        try:
            result = self.driver.hook(self.target, self.plan, report, self._ran)
        except DispatchError as exc:
            self.quiet.error(exc)
            self.ledger.record_hook(*key, "failed", None, exc.message)
            raise
        self.hook = "done" if result.exit_code == 0 else "failed"
        self.hook_output = self.quiet.output(result.output.encode()[-OUTPUT_BYTES:].decode("utf-8", "ignore"))
        self.ledger.record_hook(*key, self.hook, result.exit_code, self.hook_output)
        how = "was stopped, its time was up" if result.exit_code is None else f"ended with exit code {result.exit_code}"
        last = self.hook_output.strip().rpartition("\n")[2].strip()[-LINE_CHARS:]
        self.hook_result = f"the script {how}" + (f": {last}" if last and self.hook == "failed" else "")
        if self.hook == "failed":
            raise HookFailed(f"the script {how}: {self.hook_output.strip()[-SHOWN_CHARS:]}", self.target.name)

    @property
    def wants_hook(self) -> bool:
        """Whether the hook is to run: it is configured, everything has arrived, and it has not been done before."""
        if self.driver.hook is None or self.target.hook is None or not self.target.hook.wanted:
            return False
        return not self._hook_is_done() and self.receipt().state is State.DELIVERED

    def _hook_is_done(self) -> bool:
        row = self.ledger.hook(self.plan.dispatch_id, self.target.name)
        if row and row.outcome == "done":
            self.hook = "done"
        return self.hook == "done"

    @contextmanager
    def _alone(self, what: str, check: Callable[[], None]) -> Iterator[None]:
        """Keep every other process, also of another host, from doing the same for this dispatch during the block.

        Of the same dispatch to the same place, started twice, the second waits, and finds all of it done.

        Raises:
            SentByAnother: it has to wait for longer than its run does without resting.
        """
        name, begun = hashlib.sha256("\0".join((*self.key, what)).encode()).hexdigest()[:24], time.monotonic()

        def waits() -> None:
            check()
            if self.may_rest and time.monotonic() > begun + BESIDE_S:
                self.beside = name
                raise SentByAnother(name)

        self.beside, held = "", False
        try:
            with self.home.exclusive(name, waits), self.ledger.exclusive(name, waits):
                held = True
                yield
        finally:
            if held and self.may_rest:
                with suppress(*LOST):  # then they come by themselves
                    line.wake(self.ledger, line.of_the_same(name))

    def receipt(self, *, waiting: bool = False) -> Receipt:
        """Return the receipt of all attempts of this run; before the first one, of what is there already.

        Args:
            waiting: whether it is of a delivery that is about to begin.
        """
        stopped = State.WAITING if waiting else self.stopped
        # What was reported in this run needs no look.
        others = tuple(item for item in self.plan.items if item.path not in self._reported)
        known: dict[str, Outcome] = {}
        before = self._before
        if before is not None:
            known = self.ledger.outcomes(*self.key[:2], others, self.key[2]) if others else {}
        elif not self._force:  # what is forced is sent again
            # What was refused will be tried again.
            known = {path: outcome for path, outcome in self.known.glance().items() if outcome.arrived}
            before = frozenset(known)
        before = before or frozenset()
        items: Sequence[Item] = self.plan.items
        outcomes, size = [], 0
        for item in items:
            outcome = self._reported.get(item.path) or known.get(item.path)
            if outcome and outcome.arrived and item.path in before:
                outcome = outcome.again
            if outcome is None:
                said = self.quiet.text(self._put_off.get(item.path, ""))
                outcome = Outcome(Kind.UNSENT, f"{UNSENT.detail}: {said}") if said else UNSENT
            if outcome.kind in (Kind.DELIVERED, Kind.WARNING):
                size += item.size
            outcomes.append(outcome)
        if self.refused or any(one > other for one, other in pairwise(item.shown for item in items)):
            every = chain(zip(items, outcomes, strict=True), self.refused.items())
            items, outcomes = map(list, zip(*sorted(every, key=_shown), strict=True))
        return Receipt(
            self.target.name,
            Lines(items, outcomes),
            size,
            0.0 if self._begun is None else max(0.0, self._ended - self._begun),
            self._last.verified if self._last else Level.ACCEPTED,
            self.attempts if stopped is State.WAITING else max(1, self.attempts),
            self.hook,
            self.error.message if self.error else None,
            (
                *(map(self.quiet.hide, self._last.notes) if self._last else ()),
                *(summary(self.failures) if self.attempts > 1 else ()),
                *([self.hook_result] if self.hook == "failed" else ()),
            ),
            stopped,
        )

    def _record(self, item: Item, outcome: Outcome) -> None:
        outcome = self.quiet.outcome(outcome)
        if outcome.arrived and self.driver.hook is not None:
            self._run_again_for(item)
        self.known.record(item, outcome, self._since)
        if item.path not in self._reported and item not in self.refused:
            self.progress.add(done=1)
        self._reported[item.path] = outcome

    def _run_again_for(self, item: Item) -> None:
        """Forget that the script was run for the folder of a new item: it has not seen that item."""
        if self.target.hook is None:
            return
        if not self._folders:
            self._folders = names(self.plan, self.target.hook.layout)
        folder = self._folders[item.path]
        if folder not in self._changed:
            self._ran.forget(folder)
            self._changed.add(folder)


class SentByAnother(Exception):
    """Another run does the same at the target; the text is the name of the lock that it holds."""


class HookFailed(Retryable):
    """The target's own script failed; it may be run again, but the data is not sent again."""


def sort_out(facts: Facts, target: Target, plan: Plan) -> tuple[dict[Item, Outcome], list[Item]]:
    """Split a plan into the items that the target doesn't get, each with its outcome, and those that it gets."""
    refused = {item: Outcome(Kind.SKIPPED, item.not_sent) for item in plan.left_out}
    wanted = []
    for item in plan.items:
        if excluded(item.path, target.globs):
            refused[item] = Outcome(Kind.SKIPPED, f"excluded by {target.exclude}")
        elif item.problem:
            refused[item] = Outcome(Kind.REJECTED, item.problem)
        elif facts.dicom_only and item.shared is None:
            refused[item] = Outcome(Kind.REJECTED if item.damaged else Kind.SKIPPED, item.not_sent)
        else:
            wanted.append(item)
    return refused, wanted


def summary(failures: Sequence[str]) -> list[str]:
    """Return the sentences on failed attempts; of many alike ones the first, the last, and the number between."""
    found: list[str] = []
    for _, group in groupby(failures, lambda failure: failure.partition(": ")[2]):
        alike = list(group)
        found += alike if len(alike) < 3 else [alike[0], f"… {len(alike) - 2} more like it", alike[-1]]
    if len(found) > SHOWN_FAILURES:
        half = SHOWN_FAILURES // 2
        found[half:-half] = [f"… {len(found) - 2 * half} more"]
    return found


def lacking(refused: dict[Item, Outcome]) -> int:
    """Return how many files the target should have but does not get; skipped files are not for it."""
    return sum(outcome.kind is Kind.REJECTED for outcome in refused.values())


def _shown(row: tuple[Item, Outcome]) -> str:
    return row[0].shown
