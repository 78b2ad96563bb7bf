"""Threads that run flows, each with an event loop and a client of its own that are kept for one run after another.

Prefect makes a client for nearly every call that has none at hand, each with a TLS context of its own (25 ms of CPU),
and for each run of a deployment a thread with one more, and a websocket, that watches for its suspension. A lane makes
its client before a run begins, and the worker watches all of its runs (`talaria.engine.watch`).

Nor is the server asked for what is known: a run as it is when it has just been set to Running.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import certifi
import httpx
from prefect import Flow, results
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus, StateRejectDetails
from prefect.context import AsyncClientContext
from prefect.exceptions import Abort, ObjectNotFound, Pause
from prefect.flow_engine import run_flow
from prefect.settings import get_current_settings
from prefect.states import AwaitingRetry, Pending

from talaria.engine.called import RESTS
from talaria.engine.recovery import TAKEN_BY, TAKEN_UP
from tasks.dispatch import running
from tasks.dispatch.lately import Hearing
from transfer.home import host_name
from transfer.live import SAVED

READY_S = 60
KEEP_S = 4  # a connection that was idle for longer is not used again: the server closes it after 5
# States in which a run is the engine's that runs it. In any other, somebody has set that state on purpose.
OURS = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)


class Client(Hearing):
    """Prefect's client, with this process's TLS context.

    Attributes:
        dated: the server's time as its last answer said, and ours then, in monotonic seconds.
    """

    dated = "", 0.0

    def __init__(self) -> None:
        api = get_current_settings().api

        async def heard(response: httpx.Response) -> None:
            self.saved = response.headers.get(SAVED, "")
            self.dated = response.headers.get("Date", ""), time.monotonic()

        super().__init__(
            str(api.url),
            auth_string=api.auth_string.get_secret_value() if api.auth_string else None,
            api_key=api.key.get_secret_value() if api.key else None,
            httpx_settings={
                "verify": _tls(),
                "event_hooks": {"response": [heard]},
                # To compress for one's own machine takes longer than to carry it.
                **({"headers": {"Accept-Encoding": "identity"}} if _is_here(str(api.url)) else {}),
                "limits": httpx.Limits(max_connections=16, max_keepalive_connections=8, keepalive_expiry=KEEP_S),
            },
        )


class RunClient(Client):
    """The client of runs: reports how a run ended here, unless somebody else has set its state meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: FlowRun | None = None  # the run that is begun here, before its engine has read it

    def begins(self, flow_run: FlowRun) -> None:
        """Note a run, as the server has it, that is set to Running next."""
        self._begun = flow_run

    async def read_flow_run(self, flow_run_id: UUID) -> FlowRun:
        """Return a run; its engine asks for it once more when it has just set it to Running, and gets what is known."""
        known = self._begun
        if known is None or known.id != flow_run_id or known.state is None or not known.state.is_running():
            return await super().read_flow_run(flow_run_id)
        self._begun = None
        return known

    async def set_flow_run_state(
        self, flow_run_id: UUID | str, state: State[Any], force: bool = False
    ) -> OrchestrationResult[Any]:
        """Set a run's state, unless somebody else has set one that ends or stops it: then return that.

        Raises:
            Abort: the run has been deleted.
        """
        run_id, begun = UUID(str(flow_run_id)), self._begun
        self._begun = None  # what is read from here on is what the server has
        if running.lost(str(run_id)):
            raise Abort(f"run {run_id} is another process's now")
        if state.type is StateType.PENDING:  # a part of a run that goes on: its whole is asked, not this one
            return await super().set_flow_run_state(run_id, state, force)
        if state.type is not StateType.RUNNING or running.asked(str(run_id)) or not running.WATCHED.is_set():
            now = await self._state_of(run_id)
            if now is not None and now.type not in OURS:
                return _refused(now)
            pausing, left = now is not None and now.name == running.PAUSING, running.stopping() and state.is_cancelled()
            if pausing and (state.name == RESTS or left):
                state = running.paused(state.message or "")  # it came to rest, or its process ends, before that
            elif left and now is not None and not now.is_cancelling():
                # Nobody wants it cancelled: its process ends, and another one goes on with it.
                state = AwaitingRetry(scheduled_time=min(datetime.now(UTC), now.timestamp), message=TAKEN_UP)
        result: OrchestrationResult[Any] = await super().set_flow_run_state(run_id, state, force)
        if result.status is SetStateStatus.WAIT:  # put off just before it began: its engine would sleep until then
            return _refused(await self._state_of(run_id))
        if begun is not None and begun.id == run_id:
            self._begun = _running(begun, result)
        return result

    async def _state_of(self, run_id: UUID) -> State[Any] | None:
        """Return a run's state at the server.

        Raises:
            Abort: the run has been deleted.
        """
        try:
            return (await self.read_flow_run(run_id)).state
        except ObjectNotFound as exc:
            raise Abort(f"run {run_id} has been deleted") from exc

    async def update_flow_run(self, flow_run_id: UUID, *args: Any, **kwargs: Any) -> httpx.Response:
        """Update a run, without retries and version, which its engine sends each time and our flows don't have."""
        if not args and set(kwargs) == {"flow_version", "empirical_policy"}:
            return httpx.Response(204)
        return await super().update_flow_run(flow_run_id, *args, **kwargs)


def _refused(now: State[Any] | None) -> OrchestrationResult[Any]:
    """Return what keeps a run in the state that somebody else has given it."""
    why = StateRejectDetails(reason=f"somebody has set it {now.name if now else 'anew'} meanwhile")
    return OrchestrationResult(state=now, status=SetStateStatus.REJECT, details=why)


@functools.cache
def _know_storage() -> None:
    """Let folders of results be what they are without a client, and its TLS context, that would only read blocks."""
    # A private matter of Prefect's: tests/engine/test_leaner.py fails when it changes.
    theirs: Any = results.resolve_result_storage

    @functools.cache
    def folder(path: Path) -> Any:
        return theirs(path, _sync=True)

    def resolve(storage: Any, **options: Any) -> Any:
        return folder(storage) if isinstance(storage, Path) else theirs(storage, **options)

    results.resolve_result_storage = resolve  # type: ignore[assignment]


def _is_here(url: str) -> bool:
    """Return True if a URL leads to this machine."""
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _running(flow_run: FlowRun, result: OrchestrationResult[Any]) -> FlowRun | None:
    """Return a run as the server has it since it took the state Running; None if it took none."""
    state = result.state
    if result.status is not SetStateStatus.ACCEPT or state is None or not state.is_running():
        return None
    known = {"state": state, "state_id": state.id, "state_type": state.type, "state_name": state.name}
    first = {} if flow_run.start_time else {"start_time": state.timestamp}
    counted = {"run_count": flow_run.run_count + 1, "next_scheduled_start_time": None}
    return flow_run.model_copy(update=known | first | counted)


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return this process's TLS context for Prefect's API, as its settings say."""
    api = get_current_settings().api
    context = ssl.create_default_context(cafile=api.ssl_cert_file or certifi.where())
    if api.tls_insecure_skip_verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@asynccontextmanager
async def client(made: Callable[[], Client] = Client) -> AsyncIterator[PrefectClient]:
    """Use one client for everything that needs one within the block, in this event loop."""
    # Its constructor would make a client of Prefect's choice.
    async with AsyncClientContext.model_construct(client=made()) as context:
        yield context.client


def servers_time(client: PrefectClient) -> datetime:
    """Return the time by the server's clock, as far as a client of ours knows; else by this host's."""
    date, heard = getattr(client, "dated", ("", 0.0))
    try:
        return parsedate_to_datetime(date) + timedelta(seconds=time.monotonic() - heard)
    except ValueError:
        return datetime.now(UTC)


def name() -> str:
    """Return the name of this process, by which its runs and, of a worker, its heartbeats are known."""
    return f"{host_name()}-{os.getpid()}"


async def claim(client: PrefectClient, run_id: UUID, by: str) -> bool:
    """Set a run to Pending, which makes it ours; return False if it is another's, or its state has changed.

    A request that was on its way when this host was cut off may come when another one has completed the run, and is
    accepted then: `recovery.abandoned` puts that right.

    Args:
        by: name of this process, which the state's message says.
    """
    if running.lost(str(run_id)):  # this process was paused since it has it in the ledger
        return False
    ours: State[Any] = Pending(message=f"{TAKEN_BY}{by}")
    try:
        result: OrchestrationResult[Any] = await client.set_flow_run_state(run_id, ours)
        if result.status is SetStateStatus.ACCEPT:
            return result.state is not None and result.state.is_pending()
        # The client asks again where an answer is lost, and is refused then what it has got.
        now = (await client.read_flow_run(run_id)).state
    except ObjectNotFound:
        return False
    return now is not None and now.is_pending() and now.message == ours.message


async def run_here(flow: Flow[..., Any], flow_run: FlowRun) -> State[Any] | None:
    """Run a flow run to its end, in this event loop; return as `run` does."""
    async with client(RunClient):
        return await run(flow, flow_run)


async def run(flow: Flow[..., Any], flow_run: FlowRun) -> State[Any] | None:
    """Run a flow run to its end, within the block of `client`; return the state that it has at the server then.

    None: the run was dropped, because its engine stops, for a pause, or because it was deleted.
    """
    # With its deployment, the engine would begin to look out for its suspension; the server's copy keeps it.
    engines = flow_run.model_copy(update={"deployment_id": None})
    # Else each run asks the server for a default; our flows leave no results.
    flow.result_storage = get_current_settings().results.local_storage_path
    _know_storage()
    context = AsyncClientContext.get()
    if context is not None and isinstance(context.client, RunClient):
        context.client.begins(flow_run)
    try:
        ended: Any = run_flow(flow, flow_run=engines, return_type="state")
        state: State[Any] | None = await ended if asyncio.iscoroutine(ended) else ended
        return state
    except (Pause, Abort) as exc:  # no Exceptions: they would end whoever waits for the run
        let_go = getattr(exc, "state", None)
        return let_go if isinstance(let_go, State) else None


class Lane:
    """One thread that runs one flow run after another."""

    def __init__(self, name: str) -> None:
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    async def run(self, flow: Flow[..., Any], flow_run: FlowRun) -> State[Any] | None:
        """Run a flow run in the thread, as `run` does; called from another event loop."""
        if not self._ready.is_set():
            await asyncio.to_thread(self._ready.wait, READY_S)
        if self._failed:
            raise RuntimeError("a thread for runs did not start") from self._failed
        ours = asyncio.run_coroutine_threadsafe(self._one(flow, flow_run), self._loop)
        return await asyncio.wrap_future(ours)

    @property
    def broken(self) -> bool:
        """Whether it did not start, or has ended."""
        return self._failed is not None or not self._thread.is_alive()

    def close(self) -> None:
        """Close its client; nothing may run there afterwards."""
        if self._ready.wait(READY_S) and not self._failed:
            self._loop.call_soon_threadsafe(self._end.set)

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:
            self._failed = exc
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with client(RunClient):
            self._context = contextvars.copy_context()
            self._server = asyncio.current_task()
            self._ready.set()
            await self._end.wait()

    async def _one(self, flow: Flow[..., Any], flow_run: FlowRun) -> State[Any] | None:
        """Run it in a context of its own, and leave none of its tasks behind."""
        task = self._loop.create_task(run(flow, flow_run), context=self._context.copy())
        try:
            return await task
        finally:
            left = asyncio.all_tasks() - {asyncio.current_task(), self._server}
            for other in left:
                other.cancel()
            await asyncio.gather(*left, return_exceptions=True)
