"""Runs that rest until a time that was noted while the clock was ahead: once it is set right, they come at once.

Prefect knows the time for which a run rests, and nothing of how far off it was. A state that lies in the future itself
says that the clock has been set back since.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateName,
    WorkPoolFilter,
    WorkPoolFilterName,
)

from talaria.engine.called import RESTS, bring_forward
from talaria.engine.due import come
from tasks.paging import every
from transfer.lease import now
from transfer.ledger import Ledger

APART_S = 2.0  # by which a clock may be put right without having been wrong
HOSTS_S = 120.0  # by which those of several hosts may differ
EACH_S = 600.0  # between two looks where this host's clock has made no step: another one's may have


class SetBack:
    """Looks for such runs: at first, after a step of this host's clock, and now and then."""

    def __init__(self) -> None:
        self._ahead, self._next = time.time() - now(), 0.0

    async def look(
        self,
        client: PrefectClient,
        ledger: Ledger,
        pool: str,
        active: Container[UUID],
        has_begun: Callable[[UUID], bool],
    ) -> None:
        """Let them begin now, if it is time to look."""
        before, self._ahead = self._ahead, time.time() - now()
        if time.monotonic() < self._next and self._ahead > before - APART_S:
            return
        soon = come(ledger) + timedelta(seconds=HOSTS_S if ledger.shared else APART_S)
        found = await every(
            client.read_flow_runs,
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(name=FlowRunFilterStateName(any_=[RESTS])),
                next_scheduled_start_time=FlowRunFilterNextScheduledStartTime.model_validate({"after_": soon}),
            ),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        )
        for one in found:
            if one.state and one.state.timestamp > soon and one.id not in active:
                await bring_forward(client, ledger, one.id, has_begun)
        self._next = time.monotonic() + EACH_S
