"""The worker: runs flows in threads of one process, in which everything is imported already.

Prefect's own process worker starts an interpreter for each run, which costs 3-6 s before the first line of a flow.
What is lost with processes is made up for here: a run is stopped through its flag, and the runs of a killed worker are
taken up by the next one (`talaria.engine.recovery`).

An event of the server wakes it when a run is to be begun or stopped. As a net below that, for events that get lost, it
looks at the server every NET_S seconds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sqlite3
import time
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from talaria import logs
from talaria.audit.forward import forwarding
from talaria.ending import run_to_its_end
from talaria.engine import ahead, called, cancelled, hosts, lanes, logged, slots, stray
from talaria.engine.aside import Aside
from talaria.engine.bound import Bound
from talaria.engine.due import MOST, Due, come, is_check
from talaria.engine.heeding import HEED_S, heed, is_stop
from talaria.engine.lost import LOST, going_on
from talaria.engine.parts import RetrievalParts
from talaria.engine.recovery import abandoned, settle, taken_over
from talaria.engine.registry import CHECKS
from talaria.engine.setback import SetBack
from talaria.engine.stray import LATE_S
from talaria.engine.sweeping import keep_sweeping
from talaria.engine.table import Flows
from talaria.engine.watch import StateChange, cancelling, resuming, watch
from talaria.settings import POOL
from tasks.dispatch import line, progress, rest, running
from transfer.errors import LedgerAway
from transfer.home import Home, host_name
from transfer.lease import Lease, living
from transfer.ledger import Ledger

NET_S = 20.0  # between two looks at the server when no event comes
BLIND_S = 2.0  # the same while there is no subscription
SOON_S = NET_S + 10  # a run that is to begin by then gets an alarm of its own
# Of one call, after 2 and 4 s; the worker looks again by itself, and may not sleep through a server's return.
RETRIES = 2
HEARTBEAT_S = 30.0  # Prefect takes a worker for offline after three of them
CALM_S = 0.05  # after a look that found nothing: what woke us need not be ours
BUSY_S = 0.1  # between two looks while something is under way: what comes meanwhile is found at once
READY_LANES = 2
CHECKS_AT_ONCE = 2  # beside the dispatches: who tests a target does not wait for their places
logger = logging.getLogger("prefect.worker")


class Worker:
    """Takes runs out of a work pool's queues and runs them, `limit` at once, and a few checks besides."""

    def __init__(self, client: PrefectClient, pool: str, home: Home, ledger: Ledger, lease: Lease, limit: int) -> None:
        self.client, self.pool, self.home, self.ledger, self.lease = client, pool, home, ledger, lease
        self.alive = living(home, ledger)
        self.limit, self.due = limit, Due(client, pool, limit, ledger)
        self.name = lanes.name()
        self.draining = False
        self.active: dict[UUID, asyncio.Task[None]] = {}
        # Those that are free; some are there before the first run comes.
        self._lanes = [lanes.Lane(f"run-{number}") for number in range(min(limit, READY_LANES))]
        self._claimed: set[UUID] = set()  # those of them that are ours by their state at the server, too
        self._wake = asyncio.Event()
        self._more = False  # runs may wait for a place to be free
        self._unended: dict[UUID, str] = {}  # runs whose end the ledger has not taken yet, with their owner
        self._resumed: set[UUID] = set()  # runs of ours that somebody has let go on before they had come to rest
        self._pausing: set[UUID] = set()  # and that somebody has asked to pause
        self._checks: set[UUID] = set()  # those of ours that are checks
        self._check_waits = False
        self._awaited: dict[UUID, float] = {}  # runs that events have named and no look has found, and until when
        self._alarms = False  # whether their time may not have come yet
        self._flows = Flows(client)
        self._jobs: set[asyncio.Task[None]] = set()
        self._looking_back, self._slots = cancelled.LookingBack(), slots.Slots(client, home, ledger, self.alive)
        self._set_back, self._bound = SetBack(), Bound()
        self._aside = Aside(client, home, ledger)
        self._parts = RetrievalParts(client, ledger, self.alive, self._called_back, self._do)

    async def serve(self) -> None:
        """Work until it is cancelled."""
        self._wake.set()
        loop = asyncio.get_running_loop()

        def call_back(run_id: str) -> None:
            loop.call_soon_threadsafe(self._called_back, UUID(run_id))

        line.serve(call_back)
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: RETRIES}):  # lanes have contexts of their own
                async with asyncio.TaskGroup() as group:
                    group.create_task(watch(self.client, self._resources, self._changed, self._connected))
                    group.create_task(self._take_runs())
                    group.create_task(self._beat())
                    group.create_task(self._look_again())
        finally:
            line.serve(None)

    async def idle(self) -> None:
        """Take nothing new, and wait until nothing runs."""
        self.draining = True
        while self.active:
            await asyncio.wait(list(self.active.values()))

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()

    # ---- what is to be run

    async def _take_runs(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self.draining:
                return
            places = self.limit - len(self.active) + len(self._checks) + len(self._aside.runs)
            self.due.aside = len(self._aside.runs)
            if places <= 0 and not (self._check_waits and len(self._checks) < CHECKS_AT_ONCE):
                self._more = True
                continue
            asked = time.monotonic()
            try:
                found = await self.due.found(checks=self._check_waits, others=places > 0)
            except LOST as exc:
                logger.debug("no runs: %s", exc)
                await asyncio.sleep(1)
                self._wake.set()
                continue
            if self.draining:
                return
            here = await self._here(found)
            missed = places > 0 and len(found) >= self.due.limit + self.due.elsewhere
            if len(found) >= MOST and not here:
                with suppress(*LOST):
                    here = await self.due.beyond(self._here)
            self.due.elsewhere, found = max(0, len(found) - len(here)), here
            if missed and self.due.elsewhere and not found:
                self._wake.set()  # behind those that are for others, there may be some for us
            begun = await self._begin([one for one in found if one.id not in self.active], places, asked)
            self._check_waits = any(is_check(one) and one.id not in self.active for one in found)
            if places > 0:
                self._more = len(found) > begun or len(found) >= self.limit
                if len(found) < self.limit:
                    self._not_found()
            await asyncio.sleep(BUSY_S if len(self.active) > begun else 0.0 if begun else CALM_S)

    async def _here(self, found: list[FlowRun]) -> list[FlowRun]:
        ids = {one.id for one in await hosts.here(one for one in found if one.id not in self.active)}
        return [one for one in found if one.id in ids or one.id in self.active]

    async def _begin(self, found: list[FlowRun], places: int, asked: float) -> int:
        """Begin as many runs as there are places for, and those that need none; return how many."""
        aside = set[UUID]()
        with going_on("it can't be told which runs need no place: all take one"):
            aside = await self._aside.chosen(found)
        room, before = CHECKS_AT_ONCE - len(self._checks), len(self.active)
        for flow_run in found:
            self._awaited.pop(flow_run.id, None)
            if flow_run.id in aside:
                self._aside.runs.add(flow_run.id)
                self._wake.set()  # there may be others behind it
            elif is_check(flow_run):
                if room <= 0:
                    continue
                room -= 1
                self._checks.add(flow_run.id)
            elif places <= 0:
                continue
            else:
                places -= 1
            self.active[flow_run.id] = asyncio.create_task(self._run(flow_run, asked))
        return len(self.active) - before

    def _not_found(self) -> None:
        """Set alarms for what events have named and a look did not find: its time has not come."""
        if self._alarms and self._awaited:
            self._do(self._set_alarms())
        self._alarms, now = False, time.monotonic()
        self._awaited = {run_id: until for run_id, until in self._awaited.items() if until > now}

    async def _set_alarms(self) -> None:
        """Set alarms for the runs that wait for their time."""
        now = come(self.ledger)
        soon = await self.due.scheduled(after=now, before=now + timedelta(seconds=SOON_S), limit=200)
        for begin in {flow_run.next_scheduled_start_time for flow_run in soon}:
            self._set_alarm(begin)

    def _set_alarm(self, begin: datetime | None) -> None:
        if begin is None or (seconds := (begin - come(self.ledger)).total_seconds()) <= 0:
            self._wake.set()
        elif seconds < SOON_S:
            asyncio.get_running_loop().call_later(seconds + 0.001, self._wake.set)

    # ---- one run

    async def _run(self, flow_run: FlowRun, asked: float | None = None) -> None:
        """Run one flow run in a thread, to its end; `asked`: since when it may have been ended elsewhere."""
        run_id, settled, more, rests, owner = str(flow_run.id), False, True, False, self.lease.owner
        running.regained(run_id)  # before it is claimed: it may be lost at any time from then on
        running.flag(run_id)
        try:
            settled, more = True, False  # where it still runs, and its next time has come, an event says when it may
            rest_at_once = await self._aside.look(flow_run) if flow_run.id in self._aside.runs else None
            if flow_run.id in self._aside.runs and rest_at_once is None:
                self._wake.set()  # it needs a place
                return
            if not self.ledger.runs.claimed(run_id, owner, self.alive, asked) or owner != self.lease.owner:
                if self.ledger.runs.is_over(run_id):  # since we looked; if it has more to do, the next look finds it
                    self._do(self._wake_late(flow_run.id))
                return
            settled, more = False, True
            self._unended.pop(flow_run.id, None)
            flow = await self._flows.of(flow_run)
            if flow is None or not await lanes.claim(self.client, flow_run.id, self.name):
                settled = True
            else:
                self._claimed.add(flow_run.id)
                with suppress(*LOST):
                    self.ledger.waits.heard(run_id)  # if it is called from now on, that is for when it rests
                logged.begins(flow_run)
                if await hosts.must_stay(flow_run):
                    await self.client.update_flow_run_labels(flow_run.id, {hosts.HOST: host_name()})
                if rest_at_once:
                    state: State[Any] | None = await self._aside.rest(flow_run, rest_at_once)
                else:
                    state = await self._in_lane(flow, flow_run)
                logged.ends(flow_run, state, self.ledger)
                settled = state is not None and (state.is_final() or state.is_scheduled() or state.is_paused())
                if state is not None and state.is_scheduled():
                    rests = True
                    self._set_alarm(state.state_details.scheduled_time)
            if settled:
                self._ends(flow_run.id, owner)
        except Exception:
            # The engine has set the state where it could; what it could not set is settled below.
            logger.exception("run %s ended with an error of the engine", run_id)
        finally:
            try:
                left = running.lost(run_id) or (self.draining and running.stopping())
                if not settled and not left and await settle(run_id):
                    self._ends(flow_run.id, owner)
            finally:  # whatever happens, its place is free
                self._leaves(flow_run.id, rests)
                if (self._more or self._check_waits) and more:
                    self._wake.set()

    def _ends(self, run_id: UUID, owner: str) -> None:
        """Note in the ledger that a run of ours has ended, or here that this is still to be done."""
        self._unended[run_id] = owner
        try:
            self.ledger.runs.ends(str(run_id), owner, goes_on=rest.rests(self.ledger, str(run_id)))
        except (LedgerAway, sqlite3.Error) as exc:  # if we die: whoever takes it up finds that it has ended
            logger.warning("the end of run %s can't be noted yet: %s", run_id, exc)
        else:
            del self._unended[run_id]

    def _end_late(self) -> None:
        for run_id in [one for one in self._unended if one not in self.active]:
            self._ends(run_id, self._unended[run_id])

    def _leaves(self, run_id: UUID, rests: bool) -> None:
        """Free the place of a run, which may be for us again at once."""
        running.forget(str(run_id))
        self._claimed.discard(run_id)
        del self.active[run_id]
        self._checks.discard(run_id)
        self._aside.leaves(run_id, rests)
        if run_id in self._resumed:
            self._resumed.discard(run_id)
            self._do(self._go_on(run_id))
        if run_id in self._pausing:
            self._pausing.discard(run_id)
            self._do(stray.pause(self.client, self.ledger, self.alive, run_id))
        with suppress(*LOST):
            if rests and str(run_id) in self.ledger.waits.unheard(0.0):  # called while it was on its way to rest
                self._do(self._bring_forward(run_id))

    async def _in_lane(self, flow: Flow[..., Any], flow_run: FlowRun) -> State[Any] | None:
        lane = self._lanes.pop() if self._lanes else lanes.Lane("run")
        try:
            return await lane.run(flow, flow_run)
        finally:
            if not lane.broken:
                self._lanes.append(lane)

    # ---- what others make of runs

    async def _resources(self) -> tuple[str, str]:
        return f"prefect.work-pool.{(await self.client.read_work_pool(self.pool)).id}", await self._parts.resource()

    def _connected(self, now: bool) -> None:
        (running.WATCHED.set if now else running.WATCHED.clear)()
        if now:
            self._looking_back.soon()
            self._wake.set()
            self._do(self._look())

    def _changed(self, change: StateChange) -> None:
        if change.is_part:
            self._parts.changed(change)
        elif change.run_id in self.active:
            if change.is_resumption:
                self._resumed.add(change.run_id)
            elif change.type == "PAUSED":
                self._resumed.discard(change.run_id)
            if change.name == running.PAUSING:
                self._pausing.add(change.run_id)
            if is_stop(change.type, change.name):
                self._do(self._heed_soon(change))
        elif change.type == "SCHEDULED" and not self._aside.knows(change):
            self._alarms = True
            self._check_waits = self._check_waits or change.queue == CHECKS
            self._wake.set()
            self._do(self._wake_late(change.run_id))
        elif change.name == running.PAUSING:
            self._do(stray.pause(self.client, self.ledger, self.alive, change.run_id))
        elif change.type == "CANCELLING" or change.is_resumption:
            self._do(stray.look_after(self.client, self.ledger, self.alive, change))
        elif change.is_end:
            self._do(self._looking_back.heard(self.client, self.ledger, change.run_id))

    def _do(self, work: Any) -> None:
        async def guarded() -> None:
            with going_on():
                await work

        task = asyncio.create_task(guarded())
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _wake_late(self, run_id: UUID) -> None:
        """Look again for a run if it was not among those that are due."""
        self._awaited[run_id] = time.monotonic() + sum(LATE_S) + 1
        for seconds in LATE_S:
            await asyncio.sleep(seconds)
            if run_id in self._awaited:
                self._wake.set()

    async def _heed_soon(self, change: StateChange) -> None:
        for seconds in (HEED_S, *LATE_S):
            await asyncio.sleep(seconds)
            await self._heed([change.run_id])
        if change.is_end:  # it may have been taken here, and have ended so before it began
            if run := self.active.get(change.run_id):
                await asyncio.wait([run])
            await self._looking_back.heard(self.client, self.ledger, change.run_id)

    async def _heed(self, run_ids: list[UUID]) -> None:
        """Stop those of our runs to which somebody has given a state that a running one must not have."""
        ours = {run_id: self.active[run_id] for run_id in run_ids if run_id in self._claimed}
        if not ours:
            return
        found = await self.client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[*ours])))
        states = {flow_run.id: flow_run.state for flow_run in found}
        for run_id, task in ours.items():
            if self.active.get(run_id) is task:  # else it has ended, and may have begun anew: that is not its state
                heed(str(run_id), states.get(run_id))

    async def _go_on(self, run_id: UUID) -> None:
        """Start a run again that was resumed before it had come to rest."""
        state = (await self.client.read_flow_run(run_id)).state
        if state is not None and (state.is_running() or state.is_paused() or state.name == running.PAUSED):
            await self.client.set_flow_run_state(run_id, resuming(self.ledger), force=True)
        else:
            self._wake.set()  # it may be due already

    def _called_back(self, run_id: UUID) -> None:
        """Let a run that rests come back before its time: what it waits for is there."""
        if run_id in self.active:
            running.call(str(run_id)).set()  # it also looks, when it has come to rest, whether it was called
        else:
            self._do(called.call(self.client, self.ledger, run_id, self._has_begun))

    async def _bring_forward(self, run_id: UUID) -> None:
        await called.bring_forward(self.client, self.ledger, run_id, self._has_begun)

    def _has_begun(self, run_id: UUID) -> bool:
        """Return True if another process, of any host, has just taken a run."""
        # Ours is not active then, but its end could not be noted.
        owner = self.ledger.runs.owner_of(str(run_id))
        return bool(owner and owner != self.lease.owner and self.alive(owner))

    # ---- the net

    async def _look_again(self) -> None:
        while True:
            self._do(self._take_over())
            seconds = NET_S if running.WATCHED.is_set() else BLIND_S
            await asyncio.sleep(seconds * random.uniform(0.9, 1.1))  # noqa: S311 - spreads load
            self._check_waits = True  # an event may have been lost
            self._end_late()
            self._wake.set()
            for look in (self._look, partial(self._looking_back.look, self.client, self.ledger, self.pool)):
                with going_on():
                    await look()
            progress.clear(self.home, lambda run_id: run_id in map(str, self.active))

    async def _look(self) -> None:
        """Ask the server for what events should have reported."""
        await self._set_alarms()
        await called.look(self.client, self.ledger, self.active, self._has_begun)
        await self._set_back.look(self.client, self.ledger, self.pool, self.active, self._has_begun)
        await self._heed(list(self.active))
        await self._parts.look()
        if hosts.several():
            await self._bound.look(self.client, self.ledger, await self.due.scheduled(before=come(self.ledger)))
        states = [StateType.CANCELLING, StateType.PENDING, StateType.RUNNING]
        found = await self.client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self.pool])),
        )
        found = [flow_run for flow_run in found if flow_run.id not in self.active]
        for flow_run in found:
            if flow_run.state and flow_run.state.is_cancelling():
                await stray.look_after(self.client, self.ledger, self.alive, cancelling(flow_run.id))
        begun = [one for one in found if one.state and (one.state.is_pending() or one.state.is_running())]
        await abandoned(self.client, self.home, self.ledger, begun)
        await self.due.look_through()

    async def _take_over(self) -> None:
        await taken_over(self.client, self.ledger, self.lease.owner, self.alive, self._at_work)
        await self._slots.look()

    def _at_work(self, run_id: str) -> bool:  # a part of a retrieval has a flag of its own
        return run_id in running.running() or UUID(run_id) in self.active or UUID(run_id) in self._unended

    async def _beat(self) -> None:
        """Send the server a heartbeat."""
        while True:
            with suppress(*LOST):
                await self.client.send_worker_heartbeat(self.pool, self.name, HEARTBEAT_S)
            await asyncio.sleep(HEARTBEAT_S)


async def work(pool: str, limit: int) -> None:
    """Work until SIGTERM (what runs is finished first) or a second one (what runs is stopped and left to recovery)."""
    home, stop = Home.current(), asyncio.Event()
    lease = Lease(home, lanes.name(), running.hold_until, running.lose_all)
    with lease, Ledger(home.ledger) as ledger, forwarding(home):
        async with lanes.client() as client:
            worker = Worker(client, pool, home, ledger, lease, limit)

            def asked_to_stop() -> None:
                if worker.draining:
                    running.stop_all()
                worker.draining = True
                stop.set()

            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, asked_to_stop)
            serving = asyncio.create_task(worker.serve())
            sweeping = asyncio.create_task(keep_sweeping(client, home, ledger))
            loading = asyncio.create_task(ahead.load_ahead(client, lambda: bool(worker.active)))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            sweeping.cancel()
            loading.cancel()
            try:
                if serving.done():
                    serving.result()
                await worker.idle()
            finally:
                tasks = (serving, stopping, sweeping, loading)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                worker.close()


def main() -> None:
    """Entry point of a worker process."""
    logs.set_up()
    run_to_its_end(work(POOL, int(os.environ.get("TALARIA_LIMIT", "8"))))
