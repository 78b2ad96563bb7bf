"""Reports changes of runs from the server's events: one subscription for a worker and all that it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State
from prefect.events import Event
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventAnyResourceFilter, EventFilter, EventNameFilter
from prefect.states import Scheduled

from talaria.engine import lanes
from talaria.engine.due import come
from transfer.ledger import Ledger

RUN = "prefect.flow-run."
# Roles of a run's queue and pool, and of what the run calls it by that it is a part of, in its events.
QUEUE, POOL, CALLER = "work-queue", "work-pool", "task-run"
RESUMING = "Resuming"  # name that Prefect gives a run which is put back into the queue after a pause
# What runs do by themselves, all the time.
ORDINARY = [f"{RUN}{name}" for name in ("Pending", "heartbeat")]
LATELY = timedelta(minutes=1)  # before a subscription; what has happened since comes as well
PAUSE_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # before the subscription is tried again, the last for ever
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateChange:
    """A run's new state.

    Attributes:
        before: type of the state before, "" if there was none.
        queue: name of the queue that it stands in.
        state: the state's id.
        is_part: whether it is in no pool, but a part of another run.
    """

    run_id: UUID
    type: str
    name: str
    before: str
    queue: str = ""
    state: UUID | None = None
    is_part: bool = False

    @property
    def is_resumption(self) -> bool:
        """Whether somebody has let a paused run go on."""
        return self.before == "PAUSED" and (self.type == "RUNNING" or self.name == RESUMING)

    @property
    def is_end(self) -> bool:
        """Whether a run has ended that may not have come to that by itself: it was cancelled, or it waited."""
        waited = self.before in ("SCHEDULED", "PAUSED")
        return self.type == "CANCELLED" or (waited and self.type in ("COMPLETED", "FAILED", "CRASHED"))


def cancelling(run_id: UUID) -> StateChange:
    """Return the change of a run that was found to be cancelled."""
    return StateChange(run_id, "CANCELLING", "Cancelling", "")


def resuming(ledger: Ledger) -> State[Any]:
    """Return the state that lets a paused run go on."""
    return Scheduled(scheduled_time=come(ledger), name=RESUMING)


async def watch(
    client: PrefectClient,
    resources: Callable[[], Awaitable[tuple[str, str]]],
    changed: Callable[[StateChange], None],
    connected: Callable[[bool], None],
) -> None:
    """Report each change of the state of a run of a work pool, or of a part of a run, for ever.

    Events are lost while there is no connection, or come twice: `changed` must look at the server.

    Args:
        client: of the server, which has just answered `resources`.
        resources: returns what events name as the pool, and as the flow of such parts.
        changed: called for each change.
        connected: called with True when the subscription has begun, with False when it has ended.
    """
    failures = 0
    while True:
        try:
            pool, flow = await resources()
            about = EventFilter(
                event=EventNameFilter(prefix=[RUN], exclude_name=ORDINARY),
                any_resource=EventAnyResourceFilter(id=[pool, flow]),
            )
            subscriber: Any = get_events_subscriber(about, reconnection_attempts=0)
            # Else it is a minute ago by this host's clock: the server sends nothing older, also of what is yet to come.
            subscriber._backfill_since = lanes.servers_time(client) - LATELY
            async with subscriber as events:
                failures = 0
                connected(True)
                async for event in events:
                    change = _change(event)
                    if change.is_part or any(one.id == pool for one in event.related):
                        changed(change)
        except Exception as exc:  # whatever it is: the server is away, or refuses the subscription
            logger.debug("the subscription ended: %s", exc)
        connected(False)
        await asyncio.sleep(PAUSE_S[min(failures, len(PAUSE_S) - 1)])
        failures += 1


def _change(event: Event) -> StateChange:
    before = event.payload.get("initial_state") or {}
    names = {one.role: one.get("prefect.resource.name") or "" for one in event.related}
    return StateChange(
        UUID(event.resource.id.removeprefix(RUN)),
        event.resource.get("prefect.state-type") or "",
        event.resource.get("prefect.state-name") or "",
        str(before.get("type") or ""),
        names.get(QUEUE, ""),
        event.id,
        CALLER in names and POOL not in names,
    )
