"""All targets as lists show them; what lists show is read once for many views, and again as soon as it is changed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote

from talaria.front.changes import ChangeCount

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from blocks import Target
    from talaria.service import Office
    from tasks.checking import LastChecks
    from tasks.documents import Broken

T = TypeVar("T")
LIST = "/talaria/targets"
FRESH_S = 3.0  # what is younger is shown as it is: tests by others and breakers show after this
SAVED_S = 60.0  # the same of the settings of targets: changes go through this process, or through another host's door
QUIET_S = 10.0  # the same of runs while none is changed through this process: Prefect, or another host, may change some
RECENT = 10  # retrievals on the Query page
MOST_WAITING = 1000  # that are counted for each target
STALE_S = 60.0  # what is older is not shown at all; between the two, it is read again meanwhile


class Kept(Generic[T]):
    """What was read a moment ago, for many views."""

    def __init__(
        self,
        read: Callable[[Office], Awaitable[T]],
        changes: ChangeCount,
        fresh_s: float = FRESH_S,
        ages: ChangeCount | None = None,
    ) -> None:
        """`changes` says when it has to be read again, `fresh_s` after which time it is read again meanwhile.

        With `ages`, it is after this time only if something was noted there since, and else after QUIET_S.
        """
        self._read_anew, self._changes, self.fresh_s, self._ages = read, changes, fresh_s, ages
        self._value: T | None = None
        self._at, self._seen = float("-inf"), -1  # when they were read, and after which change
        self._aged = -1
        self._reading: asyncio.Task[None] | None = None

    async def get(self, office: Office) -> T:
        """Return it: no change that was noted before is missing."""
        while True:
            age = time.monotonic() - self._at
            if self._value is not None and self._seen == self._changes.count and age < STALE_S + self.fresh_s:
                if self._is_old(age) and self._reading is None:
                    self._begin(office)
                return self._value
            await asyncio.shield(self._reading or self._begin(office))

    def _is_old(self, age: float) -> bool:
        if self._ages is None or self._ages.count != self._aged:
            return age >= self.fresh_s
        return age >= QUIET_S

    async def soon(self, office: Office, wait_s: float) -> T | None:
        """Return it, or after some seconds what was known of it before; None if nothing was."""
        try:
            return await asyncio.wait_for(self.get(office), wait_s)
        except TimeoutError:  # the reading goes on
            return self._value

    def _begin(self, office: Office) -> asyncio.Task[None]:
        self._reading = task = asyncio.create_task(self._read(office))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waits for it hears of it
        return task

    async def _read(self, office: Office) -> None:
        seen, at, aged = self._changes.count, time.monotonic(), self._ages.count if self._ages else -1
        try:
            self._value = await self._read_anew(office)
            self._at, self._seen, self._aged = at, seen, aged
        finally:
            self._reading = None


async def read_targets(office: Office) -> list[Target | Broken]:
    """Return all saved targets."""
    from tasks.targets import all_targets

    return await all_targets(office.client)


async def shown_as_rows(office: Office, found: list[Target | Broken], known: LastChecks) -> list[dict[str, Any]]:
    """Return targets as the list shows them, as they are now; `known` are the checks that were read before."""
    from blocks import Target
    from talaria.service import overview, targets

    entries = await targets.entries(office, found, settings=False, known=known)
    names = Counter(one.name for one in found)
    shown = []
    for one, entry in zip(found, entries, strict=True):
        twice = names[one.name] > 1
        path = f"{LIST}/{quote(one.name, safe='')}" + (f"?type={quote(one.type_name, safe='')}" if twice else "")
        whole = one if isinstance(one, Target) else None
        shown.append(
            entry
            | {"state": _state(entry), "path": path, "target": whole}
            | {"leads_to": overview.leads_to(whole) if whole else "", "contact": whole.contact if whole else ""}
        )
    return shown


async def read_fetched(office: Office) -> list[dict[str, Any]]:
    """Return the newest retrievals, as lists show them."""
    from talaria.engine import runs
    from talaria.service import standings

    return await standings.lines(office, await runs.jobs(office.client, RECENT, flows=("retrieve",)))


async def read_waiting(office: Office) -> list[FlowRun]:
    """Return dispatches that have not ended, the newest of them."""
    from talaria.service import overview

    return await overview.not_ended(office, MOST_WAITING)


def _state(entry: dict[str, Any]) -> str:
    if entry["broken"]:
        return "broken"
    if not entry["enabled"]:
        return "off"
    if entry["breaker"]["state"] == "open":
        return "open"
    check = entry["last_check"]
    return "unchecked" if check is None else "ready" if check["ok"] else "failing"
