"""One run of a dispatch: its targets, its files, its deliveries, its end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from prefect import get_client
from prefect.client.schemas.objects import State as RunState
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import AwaitingRetry, Cancelled, Completed, Failed, Scheduled

from blocks.base import Target
from tasks import DRIVERS
from tasks.dispatch import audited, running
from tasks.dispatch.delivery import Delivery
from tasks.dispatch.patience import is_outage, patiently
from tasks.dispatch.progress import Live, live
from tasks.dispatch.push import failure_of, hook_task, push_task
from tasks.dispatch.report import document, progress_shown, report
from tasks.dispatch.slots import slots
from tasks.dispatch.stage import stage_files
from tasks.targets import check_destination, load
from transfer import live as shown
from transfer.errors import Cancelled as DispatchCancelled
from transfer.errors import Denied, DispatchError
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.plan import Origin, Plan
from transfer.receipt import Receipt, State, overall
from transfer.staging import discard
from transfer.window import DispatchWindow

R = TypeVar("R")
OFF_PEAK = "22:00-06:00"  # UTC, unless TALARIA_OFF_PEAK says otherwise
LOOK_S = 0.25  # between two looks at the cancel flag
GRACE_S = 3  # for a driver to stop by itself before it is cancelled; a cancelled run ends within 5
UNPLANNED = "to "  # begins the name of a run whose files have not been read
DISABLED_S = 60  # a dispatch to a disabled target looks again after this


class Dispatch:
    """A dispatch to several targets within a flow run; made by `dispatching`."""

    def __init__(
        self, flow_run_id: str, targets: Sequence[Target], home: Home, ledger: Ledger, shown_live: Live
    ) -> None:
        self.flow_run_id, self.targets, self.home, self.ledger = flow_run_id, targets, home, ledger
        self.who = ""  # who asked for it, for the audit trail
        self.live = shown_live
        self.cancelled, self.paused = running.flag(flow_run_id), running.pause(flow_run_id)
        self.staging = home.staging / flow_run_id
        self.deliveries: list[Delivery] = []
        self.again: datetime | None = None  # when what waits may be tried

    async def stage(self, paths: list[str], exclude: str, origin: Origin) -> Plan:
        """Plan and stage the files; a run that is taken up again keeps its dispatch id."""
        try:
            staged = await self._stoppable(stage_files(paths, exclude, origin, self.staging, self.cancelled))
        except asyncio.CancelledError as exc:
            if not self.cancelled.is_set():
                raise
            raise self._stopped_early() from exc
        except DispatchCancelled as exc:
            raise self._stopped_early() from exc
        return self.ledger.same_dispatch(self.flow_run_id, staged.plan)

    def _stopped_early(self) -> DispatchCancelled:
        if self.paused.is_set():
            return _Paused("the dispatch was paused while its files were read")
        return DispatchCancelled("the dispatch was cancelled while its files were read")

    async def deliver(self, plan: Plan, priority: str, force: bool) -> list[Receipt]:
        """Push to all targets at once; none of them ever holds up another."""
        self.deliveries = [
            Delivery(
                DRIVERS.of(target),
                target,
                plan,
                self.ledger,
                self.home,
                self.cancelled,
                paused=self.paused,
                force=force,
            )
            for target in self.targets
        ]
        await self._name(plan)
        async with progress_shown(self.deliveries, self.live):
            await asyncio.gather(*(self._deliver(delivery, priority) for delivery in self.deliveries))
        receipts = [delivery.receipt() for delivery in self.deliveries]
        for delivery, receipt in zip(self.deliveries, receipts, strict=True):
            if delivery.attempts:
                await asyncio.to_thread(audited.delivery_ends, delivery, receipt, self.flow_run_id, self.who)
        return receipts

    async def _name(self, plan: Plan) -> None:
        """Put the dispatch's id into the run's name, if the run was created before it was known; show the plan."""
        context = FlowRunContext.get()
        flow_run = context.flow_run if context else None
        if flow_run is None:
            return
        if flow_run.name.startswith(UNPLANNED):
            async with get_client() as client:
                await patiently(lambda: client.update_flow_run(flow_run.id, name=f"{plan.dispatch_id} {flow_run.name}"))
        if flow_run.labels.get(shown.SHOW_PLAN):
            receipts = [delivery.receipt(waiting=True) for delivery in self.deliveries]
            whole = document(plan.dispatch_id, self.flow_run_id, State.WAITING, receipts)
            await asyncio.to_thread(shown.write, self.home, self.flow_run_id, shown.PLAN, whole)

    async def _deliver(self, delivery: Delivery, priority: str) -> None:
        target, logger = delivery.target, get_run_logger()
        opening = opens(target, priority)
        if opening:
            delivery.stopped = State.WAITING
            self.again = min(self.again or opening, opening)
            logger.info("%s: waits until %s", target.name, opening.isoformat())
            return
        try:
            # Once a push has begun, its own retries decide; before, a server that is away is waited for.
            await self._stoppable(
                patiently(lambda: self._push(delivery), lambda: delivery.attempts > 0),
                # It waits for a slot of the target, or for its next attempt: no driver is at work.
                idle=lambda: delivery.attempts == 0 or delivery.error is not None,
            )
            if delivery.wants_hook:
                await self._stoppable(hook_task(target)(delivery))
        except Exception as exc:  # one target's failure, whatever it is, must not end the other deliveries
            if delivery.hook == "failed" or (is_outage(exc) and delivery.receipt().state is State.DELIVERED):
                return
            if delivery.error is None:
                logger.exception("%s: unexpected error", target.name)
                delivery.error = failure_of(exc, target.name)
        except asyncio.CancelledError:
            if not self.cancelled.is_set():
                raise
        if self.cancelled.is_set() and delivery.receipt().unsent:
            # What came stays; a paused one goes on with the rest when it is resumed.
            delivery.stopped = State.WAITING if self.paused.is_set() else State.CANCELLED
            delivery.ends()

    async def _push(self, delivery: Delivery) -> None:
        """Push as soon as the target's concurrency limit has room, and hold a slot of it while the push runs."""
        async with get_client() as client, slots(client, delivery.target):
            # Beside the push, which doesn't wait for the trail's disk.
            begun = asyncio.create_task(
                asyncio.to_thread(audited.delivery_begins, delivery, self.flow_run_id, self.who)
            )
            try:
                await push_task(delivery)(delivery)
            finally:
                await begun

    async def _stoppable(self, work: Awaitable[R], idle: Callable[[], bool] = lambda: False) -> R:
        """Wait for work; when the run is cancelled, let the work stop by itself, or cancel it if it is idle."""
        task = asyncio.ensure_future(work)
        while not (await asyncio.wait([task], timeout=LOOK_S))[0]:
            if self.paused.is_set():
                self.cancelled.set()
            if self.cancelled.is_set():
                if not idle():
                    await asyncio.wait([task], timeout=GRACE_S)
                task.cancel()
                break
        return await task

    async def conclude(self, plan: Plan, receipts: list[Receipt]) -> RunState[Any]:
        """Save the receipts and return the state in which the flow run ends."""
        state = overall([receipt.state for receipt in receipts])
        outputs = {d.target.name: f"{d.hook_result}\n{d.hook_output}" for d in self.deliveries if d.hook_result}
        await patiently(lambda: report(self.home, plan.dispatch_id, self.flow_run_id, state, receipts, outputs))
        message = "; ".join(_sentence(receipt) for receipt in receipts)
        if self.paused.is_set() and any(delivery.stopped is State.WAITING for delivery in self.deliveries):
            return paused(message)
        if self.again and not self.cancelled.is_set():
            return AwaitingRetry(scheduled_time=self.again, message=message)
        if state is State.DELIVERED:
            return Completed(message=message)
        return Cancelled(message=message) if state is State.CANCELLED else Failed(message=message)


@asynccontextmanager
async def dispatching(targets: list[str]) -> AsyncIterator[Dispatch]:
    """Load the targets and open the ledger for the current flow run; remove its staging folder at the end.

    Raises:
        NotFound, Misconfigured: a target doesn't exist or may not be sent to.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("a dispatch runs inside a flow run")
    flow_run_id, home = str(context.flow_run.id), Home.current()
    chosen = await patiently(lambda: _load(targets))
    for target in chosen:
        if target.enabled:
            check_destination(target)
    # A thread for each target that is pushed to, and some to spare: a hung one must not hold up another.
    executor = ThreadPoolExecutor(len(chosen) + 8, thread_name_prefix="push")
    asyncio.get_running_loop().set_default_executor(executor)
    async with AsyncExitStack() as stack:
        ledger = stack.enter_context(Ledger(home.ledger))
        dispatch = Dispatch(flow_run_id, chosen, home, ledger, await stack.enter_async_context(live(home, flow_run_id)))
        dispatch.who = audited.requester(context.flow_run)
        # A part of another run belongs to that run's process; no other may take its staging folder for an orphan.
        owner = ledger.unfinished().get(running.whole())
        if owner:
            ledger.run_begins(flow_run_id, owner)
        try:
            yield dispatch
        finally:
            await asyncio.to_thread(discard, dispatch.staging)
            running.forget(flow_run_id)
            if owner:
                ledger.run_ends(flow_run_id)


async def _load(names: list[str]) -> list[Target]:
    async with get_client() as client:
        return await load(client, names)


def opens(target: Target, priority: str, now: datetime | None = None) -> datetime | None:
    """Return the time from which a target may be sent to; None for now."""
    now = now or datetime.now(UTC)
    if not target.enabled:
        return now + timedelta(seconds=DISABLED_S)
    windows = []
    if target.window and priority != "urgent":
        windows.append(DispatchWindow.parse(target.window))
    if priority == "offpeak":
        windows.append(DispatchWindow.parse(os.environ.get("TALARIA_OFF_PEAK") or OFF_PEAK))
    openings = [opening for window in windows if (opening := window.opens(now))]
    return max(openings) if openings else None


class _Paused(DispatchCancelled):
    """The dispatch was paused."""


def paused(message: str) -> RunState[Any]:
    """Return the state of a run that goes on when somebody resumes it."""
    never = datetime.now(UTC) + running.UNTIL_RESUMED
    return Scheduled(scheduled_time=never, name=running.PAUSED, message=message)


def refusal(error: DispatchError) -> RunState[Any]:
    """Return the state of a run that could not begin, or was stopped before it began."""
    if isinstance(error, _Paused):
        return paused(error.message)
    if isinstance(error, Denied):
        run = getattr(FlowRunContext.get(), "flow_run", None)
        audited.refused(str(error), str(getattr(run, "id", "")), audited.requester(run), target=error.target)
    return Cancelled(message=str(error)) if isinstance(error, DispatchCancelled) else Failed(message=str(error))


def _sentence(receipt: Receipt) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in receipt.counts.items() if count)
    rest = [receipt.error] if receipt.error else []
    rest += [f"hook {receipt.hook}"] if receipt.hook == "failed" else []
    return f"{receipt.target} {receipt.state}: " + ", ".join([counts or "nothing", *rest])
