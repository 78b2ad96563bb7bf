"""Commands without the API: where no `talaria up` runs, or where it serves no API.

Imports Prefect and everything else.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar, cast
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun

from talaria.console import say
from talaria.engine import runs
from talaria.engine.recovery import recover, taken_up
from talaria.engine.registry import register
from talaria.server import Address, healthy, reached, running, use
from talaria.service import Office
from talaria.service.operations import CALLS, STREAMS
from talaria.settings import POOL, Settings, client_environment, load_settings
from transfer.home import Home

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Local:
    """A Prefect server that answers, and the operations on it.

    Attributes:
        address: of the embedded server, None for one that PREFECT_API_URL names.
        own: whether this command, or another one, started it for its own duration; no worker runs beside it then.
        served: whether there is one at all.
    """

    settings: Settings
    home: Home
    address: Address | None
    own: bool
    served: bool = True
    _workers: dict[UUID, threading.Thread] = field(default_factory=dict, init=False)

    @classmethod
    def without_server(cls) -> Local:
        """Return access to the operations that need nothing of what a server keeps."""
        return cls(load_settings(), Home.current(), None, own=False, served=False)

    def run(self, call: Callable[Concatenate[PrefectClient, P], Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a coroutine function with a client as its first argument."""

        async def with_client() -> R:
            async with get_client() as client:
                return await call(client, *args, **kwargs)

        return asyncio.run(with_client())

    def call(self, operation: str, **given: Any) -> dict[str, Any]:
        """Do an operation and return its document."""
        if operation == "recover_jobs" and self.own:
            return self._recovered()

        async def done(client: PrefectClient) -> dict[str, Any]:
            return await CALLS[operation](self._service(client), **given)

        return self.run(done)

    def stream(self, operation: str, **given: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Do an operation and yield its events; a job that is followed is run here if no worker does."""
        if operation == "follow_job" and self.own:
            given["is_over"] = self._running(self.run(runs.find, given["job"]))
        with asyncio.Runner() as runner:
            client = get_client() if self.served else None
            if client is not None:
                runner.run(client.__aenter__())
            events = STREAMS[operation](self._service(client), **given)
            try:
                while (event := runner.run(_next(events))) is not None:
                    yield event
            finally:
                with suppress(RuntimeError):  # closed already: it was interrupted
                    runner.run(events.aclose())  # type: ignore[attr-defined]
                if client is not None:
                    runner.run(client.__aexit__(None, None, None))

    def link(self, run_id: str) -> str:
        """Return where the UI shows a run, "" if it doesn't."""
        return f"{self.address.ui}/runs/flow-run/{run_id}" if self.address and not self.own else ""

    def _service(self, client: PrefectClient | None) -> Office:
        return Office(cast(PrefectClient, client), self.home, alone=self.own, embedded=self.address is not None)

    def _running(self, flow_run: FlowRun) -> Callable[[FlowRun], bool]:
        """Run a job in this process in the place of a worker; return a function that returns whether it is over."""
        if flow_run.id not in self._workers:
            worker = threading.Thread(target=runs.run_here, args=(self, flow_run), daemon=True)
            self._workers[flow_run.id] = worker
            worker.start()
        worker = self._workers[flow_run.id]

        return lambda _: not worker.is_alive()

    def _recovered(self) -> dict[str, Any]:
        """Run what was put back into the queue when the server was started, by this or another command."""
        taken = self.run(taken_up, POOL)
        for run_id in taken:
            for _ in self.stream("follow_job", job=run_id):
                pass
        return {"recovered": taken}


async def _next(events: Any) -> Any:
    return await anext(events, None)


@contextmanager
def local() -> Iterator[Local]:
    """Reach the Prefect server; start the embedded one for the length of the block if there is none."""
    settings = load_settings()
    home = Home.current()
    if not os.environ.get("PREFECT_API_URL") and running(home) is None:
        say("no server runs: starting one for this command (`talaria up` keeps one running)")
    with reached(home) as (address, own):
        access = Local(settings, home, address, own)
        if own:
            access.run(_prepare, home)
        yield access


async def _prepare(client: PrefectClient, home: Home) -> None:
    """Register types and deployments at a server that has just been started; put the runs of killed processes back."""
    await register(client)
    await recover(client, home, POOL, alone=True)


def status_of_server() -> dict[str, Any]:
    """Return the JSON of `talaria status`; starts nothing."""
    settings, home = load_settings(), Home.current()
    url, address = os.environ.get("PREFECT_API_URL"), None
    if url:
        ok = healthy(url.rstrip("/"))
    else:
        address = running(home)
        ok = address is not None
        if address:
            url = address.url
            use(client_environment(home, address.url))
    if not ok:
        return {"server": {"ok": False, "url": url}, "workers": [], "queues": {}, "targets": []}
    return Local(settings, home, address, own=False).call("status", url=url or "")
