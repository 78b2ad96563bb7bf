"""One run of a dispatch: its targets, its files, its deliveries, its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.schemas.objects import State as RunState
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.states import AwaitingRetry, Cancelled, Completed, Failed

from blocks.base import NO_ORIGIN, Target
from tasks import DRIVERS
from tasks.dispatch import audited, line, rest, running, waiting
from tasks.dispatch.asked import Naming
from tasks.dispatch.delivery import Delivery, summary
from tasks.dispatch.ends import LeftToAnother, Paused, knows, say_ended, say_refused, sentence
from tasks.dispatch.flood import Flood, rows
from tasks.dispatch.gone import reject_gone
from tasks.dispatch.hours import check_hours
from tasks.dispatch.keeping import Given, keep_files
from tasks.dispatch.lately import loaded
from tasks.dispatch.leaving import is_left
from tasks.dispatch.looks import Looks
from tasks.dispatch.patience import is_outage, patiently
from tasks.dispatch.progress import Live, live
from tasks.dispatch.push import failure_of, hook_task, push_task
from tasks.dispatch.report import has_run_before, pieces, progress_shown, report
from tasks.dispatch.rows import rows_given_up
from tasks.dispatch.slots import NoSlot
from tasks.dispatch.stage import Staged, stage_files
from tasks.dispatch.stoppable import GRACE_S, stoppable
from tasks.dispatch.studies import Studies, studies_of
from tasks.targets import check_destination
from transfer import deadletters, silent
from transfer import live as shown
from transfer.errors import Cancelled as DispatchCancelled
from transfer.errors import DispatchError, LedgerAway, SourceAway
from transfer.globs import patterns
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.plan import Origin, Plan
from transfer.receipt import Receipt, State, overall
from transfer.staging import STAGED_BY, Way, discard
from transfer.studies import Each
from transfer.unitlist import folders_of

R = TypeVar("R")


class Dispatch:
    """A dispatch to several targets within a flow run; made by `dispatching`."""

    def __init__(
        self,
        flow_run_id: str,
        targets: Sequence[Target],
        home: Home,
        ledger: Ledger,
        shown_live: Live,
        naming: Naming,
        priority: str,
        origin: Origin = NO_ORIGIN,
        owner: str = "",
    ) -> None:
        self.flow_run_id, self.targets, self.home, self.ledger = flow_run_id, targets, home, ledger
        self.who = ""  # who asked for it, for the audit trail
        self.live, self.naming = shown_live, naming
        self.cancelled, self.paused = running.flag(flow_run_id), running.pause(flow_run_id)
        # Not that of a process which had the run before, and may be about to clear its own.
        self.staging = home.staging / f"{flow_run_id}{STAGED_BY}{owner}"
        self.deliveries: list[Delivery] = []
        self.studies: Studies | None = None  # of a flood
        self.staged: Staged | None = None  # of any other
        self.earlier: dict[str, Any] = {}  # the receipts of an earlier part, or of what is retried
        in_line = line.stands(flow_run_id)
        self.looks = Looks(flow_run_id, home, ledger, in_line, priority, origin)
        self.left = False  # whether it was told to stop only because its process ends
        self.away: SourceAway | None = None  # or because the share of its files does not answer any more
        self._beside: asyncio.Task[None] | None = None  # looks whether it does

    @property
    def _open(self) -> list[Target]:
        return self.looks.open(self.targets)

    async def goes_on(self, paths: list[str], exclude: str, each: str) -> bool:
        """Return True if there is something to do; False if the run must wait, or is over.

        Looks at the targets alone: what waits is neither read nor staged, once or again. Of files that have not been
        read it is made sure that there are any.

        Raises:
            NotFound, Denied, Misconfigured: there is nothing to send. SourceAway: nobody can know.
        """
        await self._answer(paths, each)
        if self.looks.is_new and (each or running.whole() or not line.may_rest() or _shows_its_plan()):
            return True
        try:
            looks = asyncio.gather(*(self.looks.look(target) for target in self._open))
            await self._stoppable(looks, idle=lambda: True)
            if self.looks.is_new and not self._open:
                await self._readable(waiting.can_be_read, self.home, self.flow_run_id, paths, exclude)
        except asyncio.CancelledError as exc:
            if not self.cancelled.is_set():
                raise
            raise await self._stopped_early("waited") from exc
        if self._open:
            return True
        if self.cancelled.is_set() or self.paused.is_set():  # a short look ends before it is told
            raise await self._stopped_early("waited")
        return self.looks.is_new and any(last for _, last in self.looks.failed.values())  # for the receipts

    async def _answer(self, paths: list[str], each: str) -> None:
        """Check that the shares answer in which the files lie, where the run may rest: it would hold its place.

        Raises:
            SourceAway: one does not.
        """
        if not line.may_rest():
            return
        within = await asyncio.to_thread(folders_of, paths) if each == Each.UNIT else []
        try:
            await self._stoppable(silent.check((*paths, *within), silent.ANSWER_S), idle=lambda: True)
        except asyncio.CancelledError as exc:
            if not self.cancelled.is_set():
                raise
            raise await self._stopped_early("waited") from exc
        self._beside = asyncio.create_task(self._stop_if_away((*paths, *within)))

    async def _stop_if_away(self, paths: Sequence[str]) -> None:
        """Stop where a share does not answer any more while it is read: no thread that reads there ends until it does.

        The run rests then, and holds no place of the worker's or the target's.
        """
        self.away = await silent.away(paths)
        self.cancelled.set()

    async def ends(self) -> None:
        """End what is done beside the rest, and give back what was taken and not used."""
        if self._beside is not None:
            self._beside.cancel()
        await self.looks.release()

    async def stage(
        self, paths: list[str], exclude: str, origin: Origin, copy_first: bool = False, each: str = ""
    ) -> Plan:
        """Plan and stage the files, of a flood when they are needed; a run that is taken up again keeps its id."""
        by_name = any(DRIVERS.of(target).facts.by_name for target in self._open)
        way = Way.COPY if copy_first else Way.NAME if by_name else Way.READ
        self.earlier = self.looks.rest.document or await self._retried()
        try:
            if each:
                how = origin, self.staging, self.cancelled, way, by_name or copy_first, len(self._open)
                what = self.home, self.flow_run_id, paths, Each(each), patterns(exclude)
                self.studies = await self._readable(studies_of, *what, *how)
                self.studies.lack(self.earlier.get("studies", ()))
                return self.ledger.runs.same_dispatch(self.flow_run_id, self.studies.plan)
            paths = await self._readable(deadletters.instead, self.home, self.flow_run_id, paths)
            staged = await self._stoppable(stage_files(paths, exclude, origin, self.staging, self.cancelled, way))
        except (asyncio.CancelledError, DispatchCancelled) as exc:
            if not self.cancelled.is_set():
                raise
            raise await self._stopped_early() from exc
        self.staged = staged
        return self.ledger.runs.same_dispatch(self.flow_run_id, staged.plan)

    async def _retried(self) -> dict[str, Any]:
        """Return the receipts of a run that is retried; {} if there are none."""
        if not has_run_before():
            return {}

        async def read() -> dict[str, Any] | None:
            async with get_client() as client:
                return await rest.receipts(client, self.home, self.flow_run_id)

        return await patiently(read) or {}

    async def _stopped_early(self, did: str = "read its files") -> DispatchError:
        if self.away:
            return self.away
        if self.paused.is_set():
            return Paused(f"the dispatch was paused while it {did}")
        if await is_left(self.flow_run_id):
            return LeftToAnother(f"its process ended while the dispatch {did}")
        return DispatchCancelled(f"the dispatch was cancelled while it {did}")

    async def deliver(self, plan: Plan, force: bool) -> list[Receipt]:
        """Push to all targets at once; none of them ever holds up another.

        Returns:
            The receipts of the targets for which something was to be done.
        """
        left = [one for one in self.targets if not self.looks.left(one).ended] if self.looks.is_new else self._open
        self.deliveries = [self._delivery(target, plan, force) for target in left]
        self.earlier = {}  # which may be 40 MB, of 100,000 files
        for delivery in self.deliveries:
            delivery.may_rest = line.may_rest()
            await asyncio.to_thread(delivery.resume, self.looks.left(delivery.target))
        before = [delivery.attempts for delivery in self.deliveries]
        naming = asyncio.create_task(self._name(plan))
        artifacts = {name: UUID(one) for name, one in self.looks.rest.artifacts.items()}
        async with progress_shown(self.deliveries, self.live, artifacts):
            try:
                await asyncio.gather(*(self._deliver(delivery) for delivery in self.deliveries))
            finally:
                await naming
            if self.paused.is_set():
                self.cancelled.set()
            if self.cancelled.is_set():  # a paused one goes on when it is resumed, as one does whose process ends
                self.left = not self.paused.is_set() and await is_left(self.flow_run_id)
                for delivery in filter(lambda one: one.stopped, self.deliveries):
                    goes_on = self.left or self.away or self.paused.is_set()
                    delivery.stopped = State.WAITING if goes_on else State.CANCELLED
                    if self.away and not self.left:
                        self.looks.waits[delivery.target.name] = rest.for_what_is_away(self.away)
        self.looks.rest.artifacts = {name: str(one) for name, one in artifacts.items()}
        receipts = [delivery.receipt() for delivery in self.deliveries]
        for delivery, receipt, attempts in zip(self.deliveries, receipts, before, strict=True):
            if delivery.attempts > attempts:
                await asyncio.to_thread(audited.delivery_ends, delivery, receipt, self.flow_run_id, self.who)
        return receipts

    def _delivery(self, target: Target, plan: Plan, force: bool) -> Delivery:
        driver, where, paused = DRIVERS.of(target), (self.ledger, self.home, self.cancelled), self.paused
        if self.studies is None:
            delivery = Delivery(driver, target, plan, *where, paused=paused, force=force)
            reject_gone(delivery, self.earlier.get("targets", {}).get(target.name))
            return delivery
        self.studies.plan, run = plan, (self.flow_run_id, self.who, self.looks.rest.studies(target.name))
        return Flood(driver, target, self.studies, *where, *run, paused=paused, force=force)

    async def _name(self, plan: Plan) -> None:
        """Show the plan, to who asked for that; put the dispatch's id into the run's name."""
        if _shows_its_plan():
            receipts = [delivery.receipt(waiting=True) for delivery in self.deliveries]
            whole = pieces(plan.dispatch_id, self.flow_run_id, State.WAITING, receipts)
            await asyncio.to_thread(shown.write, self.home, self.flow_run_id, shown.PLAN, whole)
        with suppress(httpx.HTTPError, PrefectException):  # no reason not to deliver
            await self.naming.known(plan.dispatch_id)

    async def _deliver(self, delivery: Delivery) -> None:
        target, logger = delivery.target, get_run_logger()
        known = {*self.looks.waits, *self.looks.failed, *self.looks.held}
        if self.looks.is_new and target.name not in known:  # once more, since it has read its files meanwhile
            await self.looks.look(target, has_read=True)
        if target.name in self.looks.waits:
            delivery.stopped = State.WAITING
            logger.info("%s: waits until %s", target.name, self.looks.waits[target.name].until.isoformat())
            return
        if target.name in self.looks.failed:
            return
        began = delivery.attempts
        try:
            # Once a push has begun, its own retries decide; before, a server that is away is waited for.
            if not delivery.hook_tries or not delivery.wants_hook:  # else everything has arrived in an earlier part
                await self._pausable(
                    delivery,
                    patiently(lambda: self._push(delivery), lambda: delivery.attempts > began),
                    # It waits for a slot of the target, or for its next attempt: no driver is at work.
                    idle=lambda: delivery.attempts == began or delivery.error is not None,
                )
            if delivery.wants_hook and not delivery.beside:
                await stoppable(hook_task(delivery)(delivery), lambda: self._stops)
            if delivery.beside and not self._stops:
                self.looks.wait_for_the_same(delivery)
        except NoSlot:
            delivery.stopped = State.WAITING
            self.looks.stand_in_line(target)
        except Exception as exc:  # one target's failure, whatever it is, must not end the other deliveries
            if delivery.again and not self._stops:
                delivery.stopped = State.WAITING
                self.looks.waits[target.name] = rest.next_attempt(
                    target.name, delivery.again.timestamp(), delivery.hook_tries
                )
                return
            if isinstance(exc, LedgerAway) and line.may_rest() and not self._stops:
                delivery.stopped, self.looks.waits[target.name] = State.WAITING, rest.for_the_ledger(exc)
                return
            whole = is_outage(exc) and delivery.receipt().state is State.DELIVERED
            if whole or (delivery.hook == "failed" and not delivery.stopped):
                return
            if delivery.error is None and not delivery.stopped:
                logger.exception("%s: unexpected error", target.name)
                delivery.error = failure_of(exc, target.name)
        except asyncio.CancelledError:
            if not self._stops:
                raise
        if self._stops and delivery.receipt().unsent:  # what came stays
            delivery.stopped = State.CANCELLED
            delivery.ends()

    async def _push(self, delivery: Delivery) -> None:
        """Push as soon as the target's concurrency limit has room, and hold a slot of it while the push runs."""
        async with self.looks.held.pop(delivery.target.name, None) or await self.looks.slot(delivery.target):
            # Beside the push, which doesn't wait for the trail's disk.
            begun = asyncio.create_task(
                asyncio.to_thread(audited.delivery_begins, delivery, self.flow_run_id, self.who)
            )
            try:
                await push_task(delivery)(delivery)
            finally:
                await begun

    @property
    def _stops(self) -> bool:
        return self.cancelled.is_set() or self.paused.is_set()

    async def _pausable(self, delivery: Delivery, work: Awaitable[R], idle: Callable[[], bool]) -> R:
        """Wait for a push; when the run is paused, until the items under way are sent: they would be sent again."""

        def stops() -> bool:
            return self.cancelled.is_set() or (self.paused.is_set() and (idle() or not delivery.is_under_way))

        return await stoppable(work, stops, lambda: 0.0 if idle() else GRACE_S)

    async def _stoppable(self, work: Awaitable[R], idle: Callable[[], bool] = lambda: False) -> R:
        """Wait for work; when the run is cancelled, let the work stop by itself, or cancel it if it is idle."""

        def stops() -> bool:
            if self.paused.is_set():
                self.cancelled.set()
            return self.cancelled.is_set()

        return await stoppable(work, stops, lambda: 0.0 if idle() else GRACE_S)

    async def _readable(self, look: Callable[..., R], *args: Any) -> R:
        """Look at the source in a thread; when the run is cancelled, leave that, since its share may hang."""
        return await self._stoppable(asyncio.to_thread(look, *args), idle=lambda: True)

    async def conclude(self, dispatch_id: str = "", new: Sequence[Receipt] = ()) -> RunState[Any]:
        """Save the receipts and return the state in which the flow run ends its part, or all of it.

        Args:
            dispatch_id: of the plan; "" if nothing was read in this part.
            new: the receipts of this part.
        """
        running.still_ours(self.flow_run_id)
        if not dispatch_id and self.looks.is_new:
            return waiting.unread(self.home, self.ledger, self.flow_run_id, self.looks.rest, self.looks.waits)
        self.looks.rest.unread = False
        dispatch_id = dispatch_id or str(self.looks.rest.document["dispatch_id"])
        receipts = self._receipts(new)
        state = overall([receipt.state for receipt in receipts])
        outputs = {d.target.name: f"{d.hook_result}\n{d.hook_output}" for d in self.deliveries if d.hook_result}
        rests = bool(self.looks.waits) and (bool(self.away) or not self.cancelled.is_set())
        studies = self.looks.rest.document.get("studies")
        if studies is not None:
            studies = rows_given_up(studies, {name: why for name, (why, last) in self.looks.failed.items() if last})
        if self.studies is not None:
            studies = rows(self.studies, self.deliveries, studies or ())
        if new or self.looks.failed:
            brief = rests and bool(self.looks.rest.document)
            what = self.home, dispatch_id, self.flow_run_id, state, receipts, outputs
            await patiently(lambda: report(*what, brief=brief, studies=studies))
            said = self.ledger, dispatch_id, receipts, self.deliveries, self.looks.failed
            await asyncio.to_thread(say_ended, *said)
        message = "; ".join(sentence(receipt) for receipt in receipts)
        if rests and line.may_rest():
            for delivery in self.deliveries:
                name = delivery.target.name
                self.looks.rest.left[name] = delivery.leave(self.looks.left(delivery.target))
            await asyncio.to_thread(rest.save, self.home, self.ledger, self.flow_run_id, self.looks.rest)
        elif self.looks.rest.kept and not self.left:
            await asyncio.to_thread(rest.forget, self.ledger, self.flow_run_id)
        if self.paused.is_set() and any(delivery.stopped is State.WAITING for delivery in self.deliveries):
            return rest.paused(message)
        if self.left and any(delivery.stopped for delivery in self.deliveries):
            return Cancelled(message=message)  # of which the engine makes that it goes on
        if rests:
            first = min(wait.until for wait in self.looks.waits.values())
            return AwaitingRetry(scheduled_time=first, message=rest.message(self.looks.waits.values(), message))
        staged = self.staged, self.staging, self.cancelled
        unsent = any(one.unsent for one in receipts)
        flood = None if studies is None else Given(self.studies, studies)
        try:  # it may read the source once more
            await self._stoppable(keep_files(self.home, self.flow_run_id, *staged, state, unsent, flood))
        except asyncio.CancelledError:
            if not self.cancelled.is_set():
                raise
            state = state if self.away or self.paused.is_set() or running.stopping() else State.CANCELLED
        if state is State.DELIVERED:
            return Completed(message=message)
        return Cancelled(message=message) if state is State.CANCELLED else Failed(message=message)

    def _receipts(self, new: Sequence[Receipt]) -> list[Receipt]:
        """Return the receipt of every target: of this part, or of the last one that had to do with it."""
        found = {receipt.target: receipt for receipt in new}
        for name, one in self.looks.rest.document.get("targets", {}).items() if self.looks.rest.document else ():
            if name not in found:
                found[name] = Receipt.from_json(name, one)
        for name, (why, last) in self.looks.failed.items():
            left = self.looks.rest.left[name]
            found[name] = replace(
                found[name],
                attempts=left.attempts,
                error=why,
                notes=tuple(summary(left.failures)),
                stopped=None if last else State.WAITING,
                seconds=max(0.0, time.time() - left.begun) if left.begun else found[name].seconds,
            )
        return [found[target.name] for target in self.targets if target.name in found]


@asynccontextmanager
async def dispatching(targets: list[str], priority: str, naming: Naming, origin: Origin) -> AsyncIterator[Dispatch]:
    """Load the targets and open the ledger for the current flow run; remove its staging folder at the end.

    Raises:
        NotFound, Misconfigured: a target doesn't exist or may not be sent to.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("a dispatch runs inside a flow run")
    flow_run, flow_run_id, home = context.flow_run, str(context.flow_run.id), Home.current()
    chosen = await patiently(lambda: _load(targets))
    knows(target.name for target in chosen)
    for target in chosen:
        if target.enabled:
            check_destination(target)
            check_hours(target, priority)
    # A thread for each target that is pushed to, and some to spare: a hung one must not hold up another.
    executor = ThreadPoolExecutor(len(chosen) + 8, thread_name_prefix="push")
    asyncio.get_running_loop().set_default_executor(executor)
    async with AsyncExitStack() as stack:
        ledger = stack.enter_context(Ledger(home.ledger))
        # After its end is noted there: what is ours in it and not at work is taken for left.
        stack.callback(running.forget, flow_run_id)
        shown_live = await stack.enter_async_context(live(home, flow_run_id))
        owner = ledger.runs.owner_of(running.whole() or flow_run_id) or ""
        dispatch = Dispatch(flow_run_id, chosen, home, ledger, shown_live, naming, priority, origin, owner)
        stack.push_async_callback(dispatch.ends)
        dispatch.looks.rest = await patiently(lambda: rest.load(home, ledger, flow_run, [one.name for one in chosen]))
        dispatch.who = audited.requester(flow_run)
        is_part = bool(running.whole() and owner)  # it belongs to the process of the run that it is a part of
        if is_part:
            ledger.runs.begins(flow_run_id, owner)
        try:
            yield dispatch
        except DispatchError as exc:
            if not isinstance(exc, Paused | LeftToAnother | LedgerAway | SourceAway):
                await asyncio.to_thread(rest.forget, ledger, flow_run_id)
            raise
        except Exception as exc:  # a fault of ours
            await asyncio.to_thread(say_refused, exc)
            raise
        finally:
            await asyncio.to_thread(discard, dispatch.staging, getattr(dispatch.staged, "plan", None))
            if is_part:
                ledger.runs.ends(flow_run_id, owner, goes_on=rest.rests(ledger, flow_run_id))


def _shows_its_plan() -> bool:
    run = getattr(FlowRunContext.get(), "flow_run", None)
    return bool(run and run.labels.get(shown.SHOW_PLAN))


async def _load(names: list[str]) -> list[Target]:
    async with get_client() as client:
        return await loaded(client, names)
