"""How often Prefect's server was asked to change a saved target, or a run: what was read before is read again."""

from __future__ import annotations

import re
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

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
    """A Prefect server whose changes of saved blocks are counted, and those of runs."""

    def __init__(self, upstream: Upstream, changes: ChangeCount, runs: ChangeCount | None = None) -> None:
        self._upstream, self._changes, self._runs = upstream, changes, runs or ChangeCount()
        self.credential, self.client = upstream.credential, upstream.client

    @property
    def state(self) -> str:
        return self._upstream.state

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._upstream.running()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer with Prefect's server; a change counts when it has been made, or tried."""
        try:
            await self._upstream(scope, receive, send)
        finally:
            if scope["type"] == "http" and scope["method"] != "GET" and not _READS.search(scope["path"].rstrip("/")):
                if "/block_" in scope["path"]:
                    self._changes.note()
                elif _RUNS.search(scope["path"]):
                    self._runs.note()
