"""The worker: runs flows in threads of one process, in which everything is imported already.

Prefect's own process worker starts an interpreter for each run, which costs 3-6 s before the first line of a flow;
in threads it is 0.3-1 s. What is lost with processes is made up for here: a run is cancelled through its flag, and the
runs of a killed worker are taken up by the next one (`talaria.engine.recovery`).
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import anyio
import anyio.abc
import httpx
from prefect import Flow, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import PrefectException
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Failed
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from talaria.engine.recovery import settle
from talaria.engine.table import flow_at
from talaria.settings import POOL
from tasks.dispatch import running
from transfer.home import Home
from transfer.ledger import Ledger

WATCH_S = 1.0  # between two looks for runs that somebody cancels


class TalariaResult(BaseWorkerResult):
    """The result of a run for the worker; the flow engine sets the run's state."""


class TalariaWorker(BaseWorker[BaseJobConfiguration, BaseVariables, TalariaResult]):
    """Runs deployments of Talaria's flows in threads of this process."""

    type = "talaria"
    job_configuration = BaseJobConfiguration
    job_configuration_variables = BaseVariables
    _description = "Runs Talaria's flows in threads of a long-lived process."

    def serve_from(self, home: Home, ledger: Ledger, owner: str, limit: int) -> TalariaWorker:
        """Set the worker's state directory and the name under which its runs are in the ledger."""
        self.home, self.ledger, self.owner = home, ledger, owner
        self.threads = ThreadPoolExecutor(limit, thread_name_prefix="run")
        self.draining = False
        self.active: set[str] = set()
        self.ended = asyncio.Event()  # nothing runs any more, and nothing new is taken
        return self

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        return [] if self.draining else await super().get_and_submit_flow_runs()

    async def run(
        self,
        flow_run: FlowRun,
        configuration: BaseJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> TalariaResult:
        """Run one flow run in a thread, to its end."""
        run_id = str(flow_run.id)
        identifier = f"{socket.gethostname()}:{os.getpid()}:{run_id}"
        self.ledger.run_begins(run_id, self.owner)
        self.active.add(run_id)
        running.flag(run_id)
        try:
            flow = await self._flow_of(flow_run)
            if task_status:
                task_status.started(identifier)
            if flow is None:
                return TalariaResult(status_code=1, identifier=identifier)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.threads, contextvars.Context().run, _run, flow, flow_run)
        except Exception:
            # The engine has set the state where it could; what it could not set is settled below.
            self._logger.exception("run %s ended with an error of the engine", run_id)
            if task_status and not task_status._future.done():  # type: ignore[attr-defined]
                raise
        finally:
            self.active.discard(run_id)
            if self.draining and not self.active:
                self.ended.set()
            running.forget(run_id)
            if not self.draining or not running.stopping():
                await settle(run_id)
                self.ledger.run_ends(run_id)
        return TalariaResult(status_code=0, identifier=identifier)

    async def idle(self) -> None:
        """Wait until nothing runs."""
        if self.active:
            await self.ended.wait()

    async def _flow_of(self, flow_run: FlowRun) -> Flow[..., Any] | None:
        """Return the flow to run; if its deployment names none of ours, fail the run and return None."""
        if flow_run.deployment_id is None:
            raise RuntimeError("a run without a deployment")
        deployment = await self.client.read_deployment(flow_run.deployment_id)
        flow = flow_at(str(deployment.entrypoint))
        if flow is None:
            # Whoever may make a deployment may not thereby run code of his own on this machine.
            why = f"its deployment's entry point, {deployment.entrypoint}, is not one of Talaria's flows"
            await self.client.set_flow_run_state(flow_run.id, Failed(message=f"Not run: {why}."), force=True)
        return flow

    async def watch(self) -> None:
        """Stop the runs that somebody cancels or pauses."""
        while True:
            with suppress(httpx.HTTPError, PrefectException):
                await self._cancel_asked()
            await anyio.sleep(WATCH_S)

    async def _cancel_asked(self) -> None:
        async with get_client() as client:
            asked = await client.read_flow_runs(
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING]))
                ),
                work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self._work_pool_name])),
            )
            owners = self.ledger.unfinished()
            for flow_run in asked:
                run_id = str(flow_run.id)
                if run_id in self.active:
                    running.flag(run_id).set()
                elif not (run_id in owners and self.home.alive(owners[run_id])):
                    # Cancelled while it waited for its next attempt: nobody runs it.
                    await client.set_flow_run_state(flow_run.id, Cancelled(), force=True)
                    self.ledger.run_ends(run_id)
            pausing = await client.read_flow_runs(
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(name=FlowRunFilterStateName(any_=[running.PAUSING]))
                ),
                work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self._work_pool_name])),
            )
            for flow_run in pausing:
                if str(flow_run.id) in self.active:
                    running.pause(str(flow_run.id)).set()


def _run(flow: Flow[..., Any], flow_run: FlowRun) -> None:
    """Run a flow in a thread of its own, with an event loop of its own."""
    result = run_flow(flow, flow_run=flow_run, return_type="state")
    if asyncio.iscoroutine(result):
        asyncio.run(result)


async def work(pool: str, limit: int) -> None:
    """Work until SIGTERM (what runs is finished first) or a second one (what runs is stopped and left to recovery)."""
    home = Home.current()
    with home.owner() as owner, Ledger(home.ledger) as ledger:
        worker = TalariaWorker(work_pool_name=pool, name=f"{socket.gethostname()}-{os.getpid()}", limit=limit)
        worker.serve_from(home, ledger, owner, limit)
        stop = asyncio.Event()

        def asked_to_stop() -> None:
            if worker.draining:
                running.stop_all()
            worker.draining = True
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked_to_stop)
        async with anyio.create_task_group() as group:
            group.start_soon(worker.start)
            group.start_soon(worker.watch)
            await stop.wait()
            await worker.idle()
            group.cancel_scope.cancel()


def main() -> None:
    """Entry point of a worker process."""
    anyio.run(work, POOL, int(os.environ.get("TALARIA_LIMIT", "8")))
