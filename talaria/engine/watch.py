"""Reports changes of runs from the server's events: one subscription for a worker and all that it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import State
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventAnyResourceFilter, EventFilter, EventNameFilter
from prefect.states import Scheduled

from talaria.engine.due import come
from transfer.ledger import Ledger

RUN = "prefect.flow-run."
QUEUE = "work-queue"  # role of the queue of a run, among the resources that are related to its events
RESUMING = "Resuming"  # name that Prefect gives a run which is put back into the queue after a pause
# What runs do by themselves, all the time.
ORDINARY = [f"{RUN}{name}" for name in ("Pending", "heartbeat")]
PAUSE_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # before the subscription is tried again, the last for ever
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateChange:
    """A run's new state.

    Attributes:
        before: type of the state before, "" if there was none.
        queue: name of the queue that it stands in.
        state: the state's id.
    """

    run_id: UUID
    type: str
    name: str
    before: str
    queue: str = ""
    state: UUID | None = None

    @property
    def is_resumption(self) -> bool:
        """Whether somebody has let a paused run go on."""
        return self.before == "PAUSED" and (self.type == "RUNNING" or self.name == RESUMING)


def resuming(ledger: Ledger) -> State[Any]:
    """Return the state that lets a paused run go on."""
    return Scheduled(scheduled_time=come(ledger), name=RESUMING)


async def watch(
    pool_id: Callable[[], Awaitable[UUID]], changed: Callable[[StateChange], None], connected: Callable[[bool], None]
) -> None:
    """Report each change of the state of a run of a work pool, for ever.

    Events are lost while there is no connection, or come twice: `changed` must look at the server.

    Args:
        pool_id: returns the pool's id.
        changed: called for each change.
        connected: called with True when the subscription has begun, with False when it has ended.
    """
    failures = 0
    while True:
        try:
            about = EventFilter(
                event=EventNameFilter(prefix=[RUN], exclude_name=ORDINARY),
                any_resource=EventAnyResourceFilter(id=[f"prefect.work-pool.{await pool_id()}"]),
            )
            async with get_events_subscriber(about, reconnection_attempts=0) as events:
                failures = 0
                connected(True)
                async for event in events:
                    payload = event.payload.get("initial_state") or {}
                    changed(
                        StateChange(
                            UUID(event.resource.id.removeprefix(RUN)),
                            event.resource.get("prefect.state-type") or "",
                            event.resource.get("prefect.state-name") or "",
                            str(payload.get("type") or ""),
                            next(
                                (one.get("prefect.resource.name") or "" for one in event.related if one.role == QUEUE),
                                "",
                            ),
                            event.id,
                        )
                    )
        except Exception as exc:  # whatever it is: the server is away, or refuses the subscription
            logger.debug("the subscription ended: %s", exc)
        connected(False)
        await asyncio.sleep(PAUSE_S[min(failures, len(PAUSE_S) - 1)])
        failures += 1
