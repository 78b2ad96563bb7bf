"""Whose turn it is at a source. A retrieval holds its slots over several studies, then lets those go first who wait."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime

from prefect import get_client

from blocks.base import Target
from tasks.dispatch import line
from tasks.dispatch.looks import SLOT_S
from tasks.dispatch.rest import Wait
from tasks.dispatch.slots import NoSlot, slots
from tasks.dispatch.waiting import TURN_S, TURNS_S, InLine, by_itself, for_its_hours, heed_hours
from transfer.database import LOST
from transfer.home import Home
from transfer.ledger import Ledger

HOLD_S = 60.0  # each change costs a part of a run, a second or so


def slots_of(source: Target) -> int:
    """Return how many slots a retrieval holds: as many as it may have connections to its source."""
    return min(source.concurrency, source.max_dispatches)


class Turn:
    """The slots of one source that a run holds, or stands in line for.

    Args:
        job: since when the run waits.
        count: of slots; None for as many as a retrieval holds.
    """

    def __init__(
        self, source: Target, flow_run_id: str, job: InLine, home: Home, priority: str, count: int | None = None
    ) -> None:
        self.source, self.flow_run_id, self.job, self.home, self.priority = source, flow_run_id, job, home, priority
        self._count = slots_of(source) if count is None else count
        self._held: AsyncExitStack | None = None
        self._ends = 0.0
        self._heeded: bool | None = (
            None  # whether it stands in the line for the source's hours; None before it has looked
        )
        self._disabled: Wait | None = None  # as its settings are read once for each part of a run

    def hours(self) -> Wait | None:
        """Return why the source must not be asked now, and until when: its hours, or that it is disabled."""
        found = self._disabled or by_itself(self.source, self.priority)
        if self._disabled or (found and self._heeded):
            return found
        if not found and self.source.enabled and not self.job.since:
            return None
        with suppress(*LOST), Ledger(self.home.ledger) as ledger:
            found = for_its_hours(ledger, self.source, self.flow_run_id, self.priority, self.job, rested=True)
            heed_hours(ledger, self.source, self.flow_run_id, found)
            if found:
                self.job.since = self.job.since or ledger.now()  # so that its next part leaves the line
            self._heeded = bool(found)
        self._disabled = None if self.source.enabled else found
        return found

    async def take(self) -> None:
        """Hold the slots: at once or soon where the run can rest, else as soon as there are some.

        Raises:
            NoSlot: others have them, or wait for them.
        """
        if self._held and time.monotonic() < self._ends:
            return
        await self.give_back()
        count = self._count
        async with AsyncExitStack() as stack:
            ledger, wait_s = None, None
            with suppress(*LOST):  # then who waits for the slots comes by himself
                ledger = stack.enter_context(Ledger(self.home.ledger))
                if line.may_rest():
                    if ledger.waits.before(self.source.name, self.flow_run_id, self._turn(ledger)):
                        raise NoSlot(self.source.name)
                    wait_s = 0.0 if self.job.since else SLOT_S
            client = await stack.enter_async_context(get_client())
            await stack.enter_async_context(slots(client, self.source, count, wait_s, ledger, self.flow_run_id))
            if ledger and self.job.since:
                with suppress(*LOST):
                    ledger.waits.leave(self.source.name, self.flow_run_id)
            self.job.since, self._ends = 0.0, time.monotonic() + HOLD_S
            self._held = stack.pop_all()

    async def give_back(self) -> None:
        """Give the slots to whoever is the first in line."""
        held, self._held = self._held, None
        if held:
            await held.aclose()

    def stand_in_line(self) -> float:
        """Wait for the slots; return when to look again, in seconds since the epoch."""
        with suppress(*LOST), Ledger(self.home.ledger) as ledger:
            self.job.since = self.job.since or ledger.now()
            turn = self._turn(ledger)
            before = ledger.waits.before(self.source.name, self.flow_run_id, turn)
            until = ledger.now() + min(TURNS_S, TURN_S * (before + 1))
            ledger.waits.join(self.source.name, self.flow_run_id, turn, until)
            return until
        return time.time() + TURN_S

    def wait(self) -> Wait:
        """Stand in line; return what the run waits for."""
        return Wait(datetime.fromtimestamp(self.stand_in_line(), UTC), f"a slot at {self.source.name}")

    def _turn(self, ledger: Ledger) -> float:
        return line.turn(self.job.since or ledger.now(), self.priority)
