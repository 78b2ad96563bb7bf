"""How often Prefect's server was asked to change a saved target, or a run: what was read before is read again.

Our workers hear of it with answers that they get anyway (`tasks.dispatch.lately`), so that they need not ask for
targets that are as they were.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import cache
from typing import TYPE_CHECKING

from talaria.front.access import SCOPE_KEY, Role
from transfer.live import SAVED

if TYPE_CHECKING:
    from talaria.front.gate import Message, Receive, Send
    from talaria.front.upstream import Upstream

_READS = re.compile(r"/(filter|count|paginate|history|lateness)$")
_RUNS = re.compile(r"/(flow_runs|create_flow_run)(/|$)")


class ChangeCount:
    """A count that grows with each change that goes through this process."""

    def __init__(self) -> None:
        self.count = 0

    def note(self) -> None:
        """Count a change."""
        self.count += 1


class WatchedUpstream:
    """A Prefect server whose changes of saved blocks are counted, and those of runs.

    Args:
        alone: returns, when the server has been loaded, whether nobody changes them but through here; only then are
            workers told how often that was.
    """

    def __init__(
        self,
        upstream: Upstream,
        changes: ChangeCount,
        runs: ChangeCount | None = None,
        alone: Callable[[], bool] = lambda: False,
    ) -> None:
        self._mark, self._alone = secrets.token_hex(8), cache(alone)  # another process counts anew
        self._upstream, self._changes, self._runs = upstream, changes, runs or ChangeCount()
        self.credential, self.client = upstream.credential, upstream.client

    @property
    def state(self) -> str:
        return self._upstream.state

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._upstream.running()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer with Prefect's server; a change counts when it was made, or tried, and before its sender knows."""
        if scope["type"] != "http":
            await self._upstream(scope, receive, send)
            return
        who, count = scope.get(SCOPE_KEY), self._counted(scope["method"], scope["path"])
        told, noted = who is not None and who.role is Role.WORKER, False

        def note() -> None:
            nonlocal noted
            if count and not noted:
                count.note()
                noted = True

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                note()
                if told and self._alone():
                    known = (SAVED.lower().encode(), f"{self._mark}-{self._changes.count}".encode())
                    message = {**message, "headers": [*message.get("headers", ()), known]}
            await send(message)

        try:
            await self._upstream(scope, receive, sent if count or told else send)
        finally:
            note()

    def _counted(self, method: str, path: str) -> ChangeCount | None:
        if method == "GET" or _READS.search(path.rstrip("/")):
            return None
        return self._changes if "/block_" in path else self._runs if _RUNS.search(path) else None
