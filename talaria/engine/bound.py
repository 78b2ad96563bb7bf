"""Runs at rest that are bound to a host for what they have fetched there, and whose host is dead: others take them.

Those that were under way when it died are taken over (`talaria.engine.recovery`); nobody has one that rests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun

from talaria.engine import hosts
from transfer.ledger import Ledger
from transfer.shared import KEPT

DEAD_S = 60.0  # a host that is only started anew is back by then, and has what was fetched


class Bound:
    """Lets such runs begin anew wherever their files are."""

    def __init__(self) -> None:
        self._dead: dict[str, float] = {}  # hosts without a word: since when, in monotonic seconds

    async def look(self, client: PrefectClient, ledger: Ledger, due: Iterable[FlowRun]) -> None:
        """Look at runs that are due.

        Raises:
            httpx.HTTPError, PrefectException, LedgerAway: as the server and the ledger do.
        """
        waiting = [(one, hosts.where_it_waits(one)) for one in due if not one.labels.get(KEPT)]
        waiting = [(one, host) for one, host in waiting if host and not hosts.of_queue(one.work_queue_name)]
        alive = await asyncio.to_thread(ledger.runs.hosts) if waiting else set[str]()
        now = time.monotonic()
        self._dead = {host: self._dead.get(host, now) for _, host in waiting if host not in alive}
        for one, host in waiting:
            if now - self._dead.get(host, now) >= DEAD_S and await hosts.may_leave(one):
                await client.update_flow_run_labels(one.id, {hosts.HOST: ""})
