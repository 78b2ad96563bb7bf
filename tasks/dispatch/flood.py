"""Many studies to one target in one run: each is a delivery of its own, and one that fails stops no other.

Each study has its own dispatch id, rows in the ledger, marker at the target, run of the target's script, and receipt.
Their files are planned and staged when their turn comes, and kept no longer.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from blocks.base import Target
from tasks.dispatch import audited
from tasks.dispatch.delivery import SHOWN_FAILURES, Delivery, HookFailed, SentByAnother, summary
from tasks.dispatch.gone import GONE, arrived_rows, reject_gone
from tasks.dispatch.push import failure_of
from tasks.dispatch.rest import Left
from tasks.dispatch.rows import StudyRows, settled
from tasks.dispatch.studies import Studies
from tasks.driver import Driver
from transfer.errors import (
    Cancelled,
    DispatchError,
    Interrupted,
    LedgerAway,
    Retryable,
    TimedOut,
    Unreachable,
    error_named,
)
from transfer.fanout import each
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.lines import Joined
from transfer.plan import Plan
from transfer.receipt import Level, Receipt, State
from transfer.studies import FloodStudy

AT_ONCE = 4  # studies to one target, if it takes so many connections
IN_ROW = 3  # studies that fail one after another say that the target is to blame, unless its check finds it well
LEVELS = [Level.ACCEPTED, Level.LISTED, Level.PROVEN]
logger = logging.getLogger(__name__)


class Flood(Delivery):
    """Many studies on their way to a target.

    Args:
        run: id of the flow run. who: who asked for it.
        before: the rows of the studies in the run's last part; what was settled there stays so.
    """

    unit = "studies"

    def __init__(
        self,
        driver: Driver[Any],
        target: Target,
        studies: Studies,
        ledger: Ledger,
        home: Home,
        cancelled: threading.Event,
        run: str,
        who: str,
        before: Sequence[dict[str, Any]] = (),
        *,
        paused: threading.Event | None = None,
        force: bool = False,
    ) -> None:
        super().__init__(driver, target, studies.plan, ledger, home, cancelled, paused=paused, force=force)
        self.studies, self.run, self.who = studies, run, who
        self._one = target  # with its share of what the target grants a dispatch
        gone = [study.name for study in studies.all if study.problem == GONE]
        earlier = settled(target.name, arrived_rows(studies.earlier.values(), target.name, gone))
        earlier |= settled(target.name, before)
        self._settled = {study.name: earlier[study.name] for study in studies.all if study.name in earlier}
        self._partly: dict[str, Receipt] = {}  # so far, of those that are not settled
        self._open_hooks = [name for name, one in self._settled.items() if one.hook == "failed"]
        self._hook_error: DispatchError | None = None  # of this part's first runs of scripts
        self._why: DispatchError | None = None  # what the last study failed for that is tried again
        self._given_up: DispatchError | None = None  # what a study failed for that is not; the worst of all
        self._in_row, self._most = 0, IN_ROW  # studies that have failed since one arrived, and how many may
        self._sending: dict[str, Delivery] = {}  # by study
        self._guard = threading.Lock()
        self.progress.items, self.progress.size = len(studies.all), 0
        self.progress.add(done=len(self._settled))

    def push(self) -> Receipt:
        """Make one attempt at every study that is not settled.

        Raises:
            DispatchError: the target failed as such, some studies are to be tried again, or some were given up and
                the target has answered for no other one.
            SentByAnother: another run sends the same there.
        """
        self.attempts += 1
        self.error = self._why = None
        self.heard = False  # whether some study's files were answered for in this attempt
        self._since = self._since or self.ledger.now()  # the rows are compared with it
        self._begun = self._begun or time.monotonic()
        self._in_row, self._most, done = 0, IN_ROW, self._done
        try:
            with self._alone("push", self.studies.check):
                waiting = [study for study in self.studies.all if study.name not in self._settled]
                threads = max(1, min(self.target.concurrency, AT_ONCE, len(waiting)))
                limit = self.target.bandwidth_limit
                share = {
                    "concurrency": max(1, self.target.concurrency // threads),
                    "bandwidth_limit": limit and max(1024, limit // threads),
                }
                self._one = self.target.model_copy(update=share)
                # Those that failed come last in the next attempt, so that they hold up no other.
                waiting.sort(key=lambda study: self._tries[study.name])
                each(waiting, self._deliver, threads, f"flood-{self.target.name}")
                if self._why:
                    raise self._why
                if self._given_up and not self.heard:
                    raise self._given_up
        except SentByAnother:
            self.attempts -= 1
            raise
        except DispatchError as exc:
            self.quiet.error(exc)
            exc.target = exc.target or self.target.name
            self.error = exc
            if isinstance(exc, Cancelled):
                self.stopped = State.CANCELLED
            self.futile += self._done == done and not isinstance(exc, LedgerAway)
            self.failures.append(self._failure(exc))
            raise
        finally:
            self.ends()
        return self.receipt()

    def _deliver(self, study: FloodStudy) -> None:
        """Deliver one study.

        Raises:
            DispatchError: the target is to blame, or the run was stopped.
        """
        self.check()
        with ExitStack() as stack:
            try:
                plan = stack.enter_context(self.studies.staged(study))
            except Cancelled:
                raise
            except DispatchError as error:
                # A share that is away where files are read says nothing of the target.
                lost = isinstance(error, Unreachable | TimedOut)
                exc = Interrupted(error.message, item=error.item) if lost else error
                exc.target = self.target.name
                self._stumbles(study, Receipt(self.target.name, (), error=exc.message, missing=1), exc)
                return
            self.ledger.runs.begins_study(self.run, plan.dispatch_id)
            self._sending[study.name] = delivery = self._delivery(study, plan)
            stack.callback(self._sending.pop, study.name)
            audited.delivery_begins(delivery, self.run, self.who)
            try:
                delivery.push()
                if delivery.wants_hook:
                    self._first_hook(study, delivery)
            except Cancelled:
                self._partly[study.name] = delivery.receipt().packed
                raise
            except Exception as exc:  # whatever it is, it must not end the other studies
                if not isinstance(exc, DispatchError):
                    logger.exception("%s: unexpected error with %s", self.target.name, study.name)
                    delivery.error = failure_of(exc, self.target.name)
                assert delivery.error is not None  # noqa: S101 - for the type checker
                self._fails(study, delivery.receipt(), delivery.error)
            else:
                self._settles(study, delivery.receipt())
                self.heard = self.heard or delivery.heard
                self._in_row = 0
            finally:
                receipt = self._settled.get(study.name) or self._partly.get(study.name) or delivery.receipt()
                audited.delivery_ends(delivery, receipt, self.run, self.who)

    def _delivery(self, study: FloodStudy, plan: Plan) -> Delivery:
        what = self.driver, self._one, plan, self.ledger, self.home, self.cancelled
        delivery = Delivery(*what, paused=self.paused, force=self._force)
        reject_gone(delivery, self.studies.earlier.get(study.name, {}).get("targets", {}).get(self.target.name))
        dispatch_id, name, endpoint = delivery.key
        if self.ledger.outcomes(dispatch_id, name, plan.items, endpoint, since=self._since):
            # An earlier attempt of this run has sent some of it: that is not "already" there, nor sent again by force.
            delivery.resume(Left(self._tries[study.name], begun=self._since))
        return delivery

    def _settles(self, study: FloodStudy, receipt: Receipt) -> None:
        with self._guard:
            self._partly.pop(study.name, None)
            self._settled[study.name] = receipt.packed
        self.progress.add(done=1, moved=receipt.bytes)

    def _fails(self, study: FloodStudy, receipt: Receipt, error: DispatchError) -> None:
        """Keep that a study failed at the target; raise if the target is to blame."""
        self.studies.fails(study)
        self._in_row += 1
        if isinstance(error, Unreachable | LedgerAway):
            self._partly[study.name] = receipt.packed
            raise error
        self._stumbles(study, receipt, error)
        if self._in_row < self._most:
            return
        if isinstance(error, Retryable) or not self._is_well():
            raise error
        self._in_row, self._most = 0, 2 * self._most

    def _is_well(self) -> bool:
        """Return True if the target's own check finds nothing wrong: what was refused for good is then the studies'."""
        try:
            return self.driver.check(self._one).ok
        except DispatchError:
            return False

    def _stumbles(self, study: FloodStudy, receipt: Receipt, error: DispatchError) -> None:
        """Keep why a study failed; settle it if no other attempt may do better."""
        self._tries[study.name] += 1
        if not isinstance(error, Retryable) or self._tries[study.name] >= self.target.max_attempts:
            self._settles(study, receipt)
            self._given_up = max(self._given_up or error, error, key=_severity)
        else:
            self._partly[study.name] = receipt.packed
            self._why = error

    @property
    def _done(self) -> int:
        """How many studies are settled that have arrived, or were answered for."""
        return sum(not one.error for one in self._settled.values())

    @property
    def may_go_on(self) -> bool:
        """Whether another attempt is left, and a study for it."""
        return super().may_go_on and len(self._settled) < len(self.studies.all)

    @property
    def is_under_way(self) -> bool:
        """Whether items of some study are being sent that a pause is to wait for."""
        return any(one.is_under_way for one in [*self._sending.values()])

    @property
    def reason(self) -> DispatchError | None:
        """Why it ended as it did: the target failed, or the worst of what studies were given up for."""
        return self.error or self._given_up

    def leave(self, left: Left) -> Left:
        """Return what the next part of its run must know."""
        given_up = type(self._given_up).__name__ if self._given_up else ""
        return replace(super().leave(left), given_up=given_up or left.given_up)

    def resume(self, left: Left) -> None:
        """Go on where an earlier part of its run left off."""
        super().resume(left)
        if left.begun and left.given_up:
            self._given_up = error_named(left.given_up)("an earlier part of its run gave up studies", self.target.name)

    # ---- scripts

    @property
    def wants_hook(self) -> bool:
        """Whether the script is to be run again for some study."""
        return bool(self._open_hooks)

    def _first_hook(self, study: FloodStudy, delivery: Delivery) -> None:
        try:
            delivery.run_hook()
        except Cancelled:
            raise
        except DispatchError as exc:
            delivery.hook = "failed"
            self._open_hooks.append(study.name)
            self._hook_error = self._hook_error or exc

    def run_hook(self) -> None:
        """Run the script again for each study for which it has failed; the first call counts what the push has tried.

        Raises:
            HookFailed: it has failed for some. Cancelled: somebody stopped it.
        """
        first, self._hook_error = self._hook_error, None
        studies = [study for study in self.studies.all if study.name in self._open_hooks]
        try:
            for study in () if first else studies:
                self.check()
                try:
                    with self.studies.staged(study) as plan:
                        self._hook_again(study, self._delivery(study, plan))
                except Cancelled:
                    raise
                except DispatchError as exc:  # of the script, or of a study that can't be read any more
                    first = first or exc
        except Cancelled:
            self.stopped = State.CANCELLED
            raise
        finally:
            self.ends()
        self.hook_tries += first is not None
        self.hook = "failed" if self._open_hooks else "done"
        self.hook_result = ""
        if first:
            self.hook_result = f"the scripts of {len(self._open_hooks)} studies failed"
            raise HookFailed(f"{self.hook_result}: {first.message}", self.target.name)

    def _hook_again(self, study: FloodStudy, delivery: Delivery) -> None:
        error: DispatchError | None = None
        try:
            delivery.run_hook()
            self._open_hooks.remove(study.name)
        except Cancelled:
            raise
        except DispatchError as exc:
            error = exc
        notes = (delivery.hook_result,) if delivery.hook == "failed" else ()
        self._settled[study.name] = replace(self._settled[study.name], hook=delivery.hook, notes=notes)
        if error:
            raise error

    # ---- what is known

    def receipts(self, *, waiting: bool = False) -> dict[str, Receipt]:
        """Return the receipt of every study, by name."""
        stopped = State.WAITING if waiting else self.stopped
        error = None if stopped or not self.error else self.error.message
        name, found = self.target.name, {}
        for study in self.studies.all:
            one = self._settled.get(study.name)
            if one is None:
                one = self._partly.get(study.name) or Receipt(name, (), attempts=0, error=error, missing=1)
                one = replace(one, stopped=stopped)
            found[study.name] = one
        return found

    def receipt(self, *, waiting: bool = False) -> Receipt:
        """Return the receipt of all studies together."""
        found = self.receipts(waiting=waiting)
        stopped = State.WAITING if waiting else self.stopped
        bad = {name: one for name, one in found.items() if one.error and one.state is not State.WAITING}
        error = self.error.message if self.error else None
        if bad and (not error or self.error is self._given_up):
            reasons = {one.error for one in bad.values()}
            count = f"{len(bad)} of {len(found)} studies were not delivered"
            error = f"{count}: {reasons.pop()}" if len(reasons) == 1 else f"{count}, see the notes"
            error = next(iter(bad.values())).error if len(found) == 1 else error
        hooks = {one.hook for one in found.values()}
        notes = [f"{name}: {one.error}" for name, one in itertools.islice(bad.items(), SHOWN_FAILURES)]
        if len(bad) > SHOWN_FAILURES:
            notes.append(f"… {len(bad) - SHOWN_FAILURES} more studies")
        return Receipt(
            self.target.name,
            Joined((name, one.items) for name, one in found.items()),
            sum(one.bytes for one in found.values()),
            0.0 if self._begun is None else max(0.0, self._ended - self._begun),
            min((one.verified for one in found.values()), key=LEVELS.index),
            self.attempts if stopped is State.WAITING else max(1, self.attempts),
            "failed" if "failed" in hooks else "done" if "done" in hooks else "none",
            error,
            (
                *notes,
                *(summary(self.failures) if self.attempts > 1 else ()),
                *((self.hook_result,) if self.hook_result else ()),
            ),
            stopped,
            sum(one.missing for one in found.values()),
        )


def _severity(error: DispatchError) -> tuple[bool, bool]:
    """Rank an error by who must do something: a fault of ours, then what somebody must change, then outages."""
    return type(error) is DispatchError, not isinstance(error, Retryable)


def rows(studies: Studies, deliveries: Sequence[Delivery], before: Sequence[dict[str, Any]]) -> StudyRows:
    """Return a row for each study.

    Args:
        before: the rows of the run's last part.
    """
    receipts = {one.target.name: one.receipts() for one in deliveries if isinstance(one, Flood)}
    return StudyRows(studies.all, studies.ids, receipts, before)
