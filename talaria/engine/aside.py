"""Runs that can't do anything now: they rest at once, one after another, without a place, a thread or their files.

Else a flood of dispatches to a target that does not answer takes the time of those to others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID
from weakref import WeakValueDictionary

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.logging.loggers import flow_run_logger
from prefect.states import AwaitingRetry

from talaria.engine import called, hosts
from talaria.engine.due import come
from talaria.engine.watch import StateChange
from tasks.dispatch import asked, breaker, running, tested, waiting
from tasks.dispatch.stoppable import stoppable
from tasks.dispatch.waiting import UnreadRest
from transfer import silent
from transfer.home import Home
from transfer.ledger import Ledger

STATES = 500  # that are remembered: their events come within a second or two


class Aside:
    """Those of a worker's runs that need no place.

    Attributes:
        runs: their ids.
        states: ids of the last states of runs that need no look: in which they were found, or let rest.
    """

    def __init__(self, client: PrefectClient, home: Home, ledger: Ledger) -> None:
        self.client, self.home, self.ledger = client, home, ledger
        self.runs: set[UUID] = set()
        self._begin: set[UUID] = set()  # those that looked so, and have to begin all the same
        self._turns = WeakValueDictionary[frozenset[str], asyncio.Lock]()  # by where files lie
        self.states = deque[UUID | None](maxlen=STATES)

    async def chosen(self, found: list[FlowRun]) -> set[UUID]:
        """Return the ids of those of some runs that may have to wait, as far as the ledger alone says that."""
        self.states.extend(one.state_id for one in found)
        self._begin &= {one.id for one in found}
        new = [one for one in found if one.id not in self._begin]
        stay = await hosts.must_stay(*new)
        new = [one for one in new if one.id not in stay]
        return {one.id for one in waiting.may_wait(self.ledger, new)}

    async def look(self, flow_run: FlowRun) -> UnreadRest | None:
        """Return what lets a run rest; None if it has to begin, and needs a place for that.

        Those whose files lie in one place are looked at one after another; a share that is silent holds up its own.
        A target that has failed lately is tested first, without a place, too.
        """
        where = frozenset(silent.place(str(path)) for path in flow_run.parameters["paths"])
        run_id, what = str(flow_run.id), (self.client, self.home, self.ledger, flow_run.parameters)
        async with self._turns.setdefault(where, asyncio.Lock()):
            rests = await waiting.ahead(*what, run_id, tests=True)
        if rests is None or not rests.tests:
            return rests
        stops, logger = partial(running.asked, run_id), flow_run_logger(flow_run)
        testing = tested.fails(self.home, self.ledger, rests, run_id, stops, logger)
        if not await stoppable(testing, stops, lambda: 0.0):  # as in a run that has begun
            return None
        return replace(rests, breakers=await asyncio.to_thread(breaker.every, self.ledger, [*rests.targets]))

    async def rest(self, flow_run: FlowRun, rests: UnreadRest) -> State[Any]:
        """Let a run of ours rest; return the state that it has then, which somebody else may have set."""
        if name := asked.name_for(flow_run.name, asked.unplanned([str(one) for one in flow_run.parameters["targets"]])):
            await self.client.update_flow_run(flow_run.id, name=name)
        run_id = str(flow_run.id)
        state = await asyncio.to_thread(rests.state, self.ledger, run_id)
        if await asyncio.to_thread(rests.is_over, self.ledger, run_id):  # since it was looked at
            state = AwaitingRetry(scheduled_time=come(self.ledger), message=state.message)
        result = await self.client.set_flow_run_state(flow_run.id, state)
        if result.state and result.status is SetStateStatus.ACCEPT:
            self.states.append(result.state.id)
        return result.state or state

    def knows(self, change: StateChange) -> bool:
        """Return True if an event says nothing new: of a state that was seen here, or of a run that began resting.

        When that is due is found in time by looks that no event causes (`talaria.engine.resting`).
        """
        return change.state in self.states or (not change.before and change.name == called.RESTS)

    def leaves(self, run_id: UUID, rests: bool) -> None:
        """Forget a run that has gone from the worker; one that did not come to rest needs a place the next time.

        So does one that could not be looked at, or could not be claimed: else it would be tried again without a pause.
        """
        if run_id not in self.runs:
            self._begin.discard(run_id)
        elif not rests:
            self._begin.add(run_id)
        self.runs.discard(run_id)
