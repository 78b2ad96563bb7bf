"""Which runs are to begin now, and in which order.

The server lists what is due by queue, an urgent one first, and then by time. Here they are put in the order in which
they would get a slot at a target: by the time since which they wait, `urgent` as if they had come ten minutes earlier,
`offpeak` ten minutes later. So those in the lower queues have their turn, for which the server's answer has no room.

A Prefect server elsewhere makes runs of its schedules and automations in the queue of their deployment, whatever their
priority, and lets nobody put one into another queue. Where many are due, they are all looked through now and then; and
it lets anybody remove a queue, whose runs it lists no more.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import WorkerFlowRunResponse

from talaria.engine import hosts
from talaria.engine.registry import CHECKS, queues
from talaria.engine.unqueued import Unqueued
from tasks.dispatch import line
from transfer.ledger import Ledger

PASSED_S = 15.0  # between two looks for runs in lower queues that were passed over
QUEUES_S = 60.0  # for how long it is known which queues there are
APART_S = 1.0  # by which clocks may differ without meaning it
MOST = 200  # runs that Prefect returns at once
LOWER = ("normal", "offpeak")  # queues, below "urgent"
SHARE = 0.05  # of the time, at most, in which all runs that are due are looked through


class Due:
    """The runs of a work pool that are to begin now, as many as a worker of `limit` places may want."""

    def __init__(self, client: PrefectClient, pool: str, limit: int, ledger: Ledger) -> None:
        self.client, self.pool, self.limit, self.ledger = client, pool, limit, ledger
        self.elsewhere = 0  # how many runs stand in ordinary queues whose files are on other hosts
        self.aside = 0  # how many are about to rest, and need no place
        self.unqueued = Unqueued(client)
        self._queues: dict[UUID, str] = {}  # of all hosts and of this one, where there are several; asked each while
        self._asked = 0.0
        self._look_again = 0.0  # for runs that were passed over, in monotonic seconds
        self._look_beyond = 0.0  # and for those behind the runs of other hosts
        self._look_through = 0.0  # and for those whose turn comes before that of their queue
        self._full = False  # whether more may be due than the server has just listed
        self._ahead: list[UUID] = []  # due when all were looked through, in order, where the server has another one

    async def found(self, *, checks: bool, others: bool) -> list[FlowRun]:
        """Return the runs that are due, the first one first.

        Args:
            checks: whether a check may be among them that dispatches leave no room for.
            others: whether there is a place for anything else.
        """
        now, found = come(self.ledger), list[FlowRun]()
        if others:
            found += await self.scheduled(before=now)
            self._full = len(found) >= self.limit
            if self._full:
                found += await self._passed_over(now)
            found += await self._still_due(now)
        if checks and (not others or len(found) >= self.limit):
            found += await self.scheduled(before=now, queue=CHECKS)
        return sorted({one.id: one for one in found}.values(), key=turn)

    async def _passed_over(self, now: datetime) -> list[FlowRun]:
        """Return runs of lower queues that have waited so long that a fresh urgent one does not overtake them."""
        if time.monotonic() < self._look_again:
            return []
        found = []
        others = [hosts.own(queue) for queue in ("urgent", *LOWER)] if hosts.several() else []
        for queue in (*LOWER, *others):
            ahead = line.turn(0.0, queue.partition(hosts.AT)[0]) - line.turn(0.0, "urgent")
            found += await self.scheduled(before=now - timedelta(seconds=ahead), queue=queue)
        self._look_again = 0.0 if found else time.monotonic() + PASSED_S
        return found

    async def look_through(self) -> None:
        """Find out who of all that are due comes first, if some stand in no queue, or not in that of their priority."""
        if getattr(self.client, "saved", ""):  # the embedded server, which lets them stand in the right one
            return
        await self.unqueued.look()
        began = time.monotonic()
        if not self._full or began < self._look_through:
            return
        now, due, astray = come(self.ledger), dict[UUID, tuple[float, UUID]](), False
        for queue in self._ordinary():
            async for page in self._pages(queue, now):
                due |= {one.id: (turn(one), one.id) for one in page}
                astray = astray or any(_is_astray(one, queue) for one in page)
        self._ahead = [run_id for _, run_id in sorted(due.values())[:MOST]] if astray else []
        took = time.monotonic() - began
        self._look_through = time.monotonic() + took / SHARE

    async def _still_due(self, now: datetime) -> list[FlowRun]:
        """Return those of the first runs of all, as they were looked through, that are still due, and of no queue."""
        first = self._ahead[: self.limit + self.elsewhere + self.aside] if self._full else []
        first += self.unqueued.ids[:MOST]
        if not first:
            return []
        scheduled = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=first), state=scheduled)
        found = await self.client.read_flow_runs(flow_run_filter=wanted)
        due = {one.id: one for one in found if one.next_scheduled_start_time and one.next_scheduled_start_time <= now}
        self._ahead = [one for one in self._ahead if one in due or one not in first]
        return [*due.values()]

    def _ordinary(self) -> list[str]:
        """Return the queues that dispatches for this host stand in."""
        ours = ("urgent", *LOWER)
        return [*ours, *map(hosts.own, ours)] if hosts.several() else [*ours]

    async def _pages(self, queue: str, before: datetime) -> AsyncIterator[list[FlowRun]]:
        """Yield all runs of a queue that are to begin within a time, some of them twice.

        Of more than MOST that are to begin at the same moment, some are passed over.
        """
        after, page = None, list[FlowRun]()
        while not page or len(page) >= MOST:
            page = await self.scheduled(before=before, after=after, queue=queue, limit=MOST)
            yield page
            last = page[-1].next_scheduled_start_time if page else None
            if last is None:
                return
            after = last if after != last else last + timedelta(microseconds=1)

    async def beyond(self, here: Callable[[list[FlowRun]], Awaitable[list[FlowRun]]]) -> list[FlowRun]:
        """Return runs for this host behind so many for others that one answer of the server holds none of ours.

        Args:
            here: returns those of some runs that may begin on this host.
        """
        if time.monotonic() < self._look_beyond:
            return []
        now, found = come(self.ledger), dict[UUID, FlowRun]()
        for queue in ("urgent", *LOWER):
            if len(found) < self.limit:
                async for page in self._pages(queue, now):
                    found |= {one.id: one for one in await here(page)}
                    if len(found) >= self.limit:
                        break
        self._look_beyond = 0.0 if found else time.monotonic() + PASSED_S
        return sorted(found.values(), key=turn)

    async def scheduled(
        self, *, before: datetime, after: datetime | None = None, queue: str = "", limit: int | None = None
    ) -> list[FlowRun]:
        """Return runs that are to begin within a time; none if somebody has removed the pool or the queue."""
        most = limit or min(MOST, self.limit + self.elsewhere + self.aside)
        body: dict[str, Any] = {"limit": most, "scheduled_before": before.isoformat()}
        body |= {"scheduled_after": after.isoformat()} if after else {}
        if queue or hosts.several():
            body |= {"work_queue_names": [queue] if queue else [*(await self._of_this_host()).values()]}
        try:
            answer = await self.client.request(
                "POST", "/work_pools/{name}/get_scheduled_flow_runs", path_params={"name": self.pool}, json=body
            )
        except httpx.HTTPStatusError as exc:
            if exc.response.status_code == 404:
                self._queues = {}
                return []
            raise
        found = [WorkerFlowRunResponse.model_validate(one) for one in answer.json()]
        for one in found:  # the answer has ids alone
            one.flow_run.work_queue_name = self._queues.get(one.work_queue_id)
        return [one.flow_run for one in found]

    async def _of_this_host(self) -> dict[UUID, str]:
        if self._asked < time.monotonic() - QUEUES_S or not self._queues:
            self._queues, self._asked = await queues(self.client), time.monotonic()
        return self._queues


def come(ledger: Ledger) -> datetime:
    """Return the time, or that of the ledger's database if this host's clock is ahead of it.

    Else the host would begin runs too early, and the server would let them wait, with their places.
    """
    now, theirs = time.time(), ledger.now()
    return datetime.fromtimestamp(theirs if now - theirs > APART_S else now, UTC)


def turn(flow_run: FlowRun) -> float:
    """Return a run's turn among those that are due; the lowest comes first."""
    since = flow_run.next_scheduled_start_time
    return line.turn(since.timestamp() if since else 0.0, str(flow_run.parameters.get("priority", "")))


def _is_astray(flow_run: FlowRun, queue: str) -> bool:
    """Return True if a run stands in the queue of another priority than its own."""
    priority = flow_run.parameters.get("priority")
    return priority in ("urgent", *LOWER) and priority != queue.partition(hosts.AT)[0]


def is_check(flow_run: FlowRun) -> bool:
    """Return True for the check of a target."""
    return "target" in flow_run.parameters
