"""One run of the flow `batch`: the sweep of a source, with a row for what it made, and a reason if it could not."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import httpx
from prefect import get_client
from prefect.artifacts import acreate_table_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.objects import State as RunState
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.states import Cancelled as RunCancelled
from prefect.states import Completed, Failed

from blocks import Source, Target
from tasks.dispatch import running
from tasks.dispatch.asked import name_run
from tasks.dispatch.stoppable import stoppable
from tasks.happened import happened
from tasks.sources import belonging, checks
from tasks.sources.runs import PrefectDispatching
from tasks.sources.saved import KEPT
from tasks.sources.sweep import Sweep
from tasks.sources.swept import Swept
from tasks.targets import TARGETS
from transfer import live, silent, unitlist
from transfer.errors import Cancelled, DispatchError, Misconfigured, NotFound, SourceAway
from transfer.home import Home, locked
from transfer.ledger import Ledger
from transfer.shared import AT, of_queue
from transfer.sourcebook import SweepRow

R = TypeVar("R")
LOOK_S = 0.5  # between two looks whether a source was changed on this machine
ELSEWHERE_S = 60.0  # and whether it was from another one
SETTLING = b"settling"  # in the file of the lock, while a sweep has it that does nothing else
# What a sweep must not go on without, by how people are told that it was changed; it would take minutes to its end.
HEEDED: Mapping[str, Callable[[Source], object]] = {
    "what becomes of files that were delivered was": lambda source: source.leaving,
    "its targets were": lambda source: (source.reaches, getattr(source, "routes", ())),
    "its folder was": lambda source: (source.folders, getattr(source, "file", "")),
    "what is left out was": lambda source: source.globs,
}
LATE_S = 60.0  # of a sweep, after which others of its source may be due as well: nobody was there to begin them


async def sweep(name: str) -> RunState[Any]:
    """Look through a source; return the state in which the run ends."""
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    if flow_run is None:
        raise RuntimeError("a sweep runs inside a flow run")
    await name_run(f"sweep of {name}")
    home = Home.current()
    try:
        with Ledger(home.ledger) as ledger:
            ends = (running.flag(str(flow_run.id)), running.pause(str(flow_run.id)))
            return await _swept(name, home, ledger, flow_run, _Wish(*ends))
    except Cancelled as error:
        return RunCancelled(message=error.message)
    except DispatchError as error:
        return Failed(message=str(error))
    finally:
        running.forget(str(flow_run.id))


class _Wish:
    """Whether a sweep is still wanted, as it began: nobody has stopped it, nor paused or removed its source.

    Args:
        stopped: any of them is set when somebody stops the run, or pauses it: then it begins anew when it is resumed.
    """

    def __init__(self, *stopped: threading.Event) -> None:
        self._stopped, self._over = stopped, ""
        self._away: SourceAway | None = None  # a share of the source does not answer any more

    @property
    def is_over(self) -> bool:
        """Whether it is not; for any thread."""
        return any(one.is_set() for one in self._stopped) or bool(self._over or self._away)

    def check(self) -> None:
        """Raise Cancelled if it is not, SourceAway if it can't go on; for any thread."""
        if any(one.is_set() for one in self._stopped):
            raise Cancelled("the sweep was stopped")
        if self._over:
            raise Cancelled(self._over)
        if self._away:
            raise self._away

    async def end_if_away(self, source: Source) -> None:
        """End the sweep where a share does not answer any more: it would hold its place until that does."""
        self._away = await silent.away(checks.places_of(source))

    async def follow(self, client: PrefectClient, home: Home, source: Source) -> None:
        """See, until it is cancelled, whether the source is still what the sweep has begun with."""
        seen, asked = _changed(home), time.monotonic()
        while not self._over:
            await asyncio.sleep(LOOK_S)
            now = _changed(home)
            if now == seen and time.monotonic() - asked < ELSEWHERE_S:
                continue
            try:
                self._over = await _why_over(client, source)
            except (httpx.HTTPError, PrefectException):  # the server is away
                continue
            seen, asked = now, time.monotonic()


def _changed(home: Home) -> int:
    try:
        return unitlist.changed(home).stat().st_mtime_ns
    except OSError:
        return 0


async def _why_over(client: PrefectClient, source: Source) -> str:
    """Return why a sweep that has begun with a source must not go on; "" if it may."""
    try:
        (now,) = await KEPT.load(client, [source.name], secrets=False)
    except NotFound:
        return "the source was removed"
    except DispatchError as exc:
        return f"the source was changed: {exc.message}"
    if not now.enabled:
        return "the source was paused"
    what = next((words for words, of in HEEDED.items() if of(now) != of(source)), "")
    return f"{what} changed: the next sweep goes on" if what else ""


async def _swept(name: str, home: Home, ledger: Ledger, flow_run: FlowRun, wish: _Wish) -> RunState[Any]:
    async with get_client() as client:
        source, sources, targets = await everything(client, name)
        if not source.enabled:
            return Completed(message="the source is paused: nothing was done")
        looks = not flow_run.labels.get(live.SETTLES)
        async with _turn(home, source.name, wish, looks=looks) as is_ours:
            if not is_ours:
                return Completed(message="another sweep of it is running: nothing was done")
            host = of_queue(flow_run.work_queue_name)
            dispatching = PrefectDispatching(client, home, source.name, f"{AT}{host}" if host else "")
            if looks:
                await _end_others(client, flow_run)
            before = ledger.sources.sweep(source.name)
            beside = [asyncio.create_task(wish.follow(client, home, source))]
            try:
                await _answers(source)
                beside.append(asyncio.create_task(wish.end_if_away(source)))
                others = await belonging.elsewhere(client)
                mute = await silent.mute(checks.places_beside(source, sources, targets), 0.0)
                await _while(wish, asyncio.to_thread(_check, source, sources, targets, before, others, mute))
                by_name = {one.name: one for one in targets}
                sweeping = Sweep(source, by_name, home, ledger, dispatching, wish.check)
                done = await _while(wish, sweeping.run(looks=looks))
            except Cancelled:
                raise
            except Exception as error:
                unexpected = f"unexpected {type(error).__name__}: see the log of its sweep"
                _stuck(ledger, source, before, error.message if isinstance(error, DispatchError) else unexpected)
                raise
            finally:
                for one in beside:
                    one.cancel()
            mount = await _while(wish, asyncio.to_thread(_mount, source))
            row = SweepRow(mount, 0.0, done.next, done.waiting, "")
            ledger.sources.swept(source.name, row if looks else replace(before, mount=mount, detail=""))
    if done.runs:
        await _link(source, done)
    return Completed(message=done.words)


async def _answers(source: Source) -> None:
    """Check that the server of each share that a source lies in answers: else the sweep would hold its place for good.

    Raises:
        SourceAway: one does not.
    """
    await silent.check(checks.places_of(source), silent.ANSWER_S)


async def _while(wish: _Wish, work: Awaitable[R]) -> R:
    """Wait for a part of a sweep; leave it where the sweep is stopped and a share keeps it from ending.

    Raises:
        Cancelled, SourceAway: as `_Wish.check`. Others: as the work does.
    """
    try:
        return await stoppable(work, lambda: wish.is_over)
    except asyncio.CancelledError:
        wish.check()
        raise


@asynccontextmanager
async def _turn(home: Home, name: str, wish: _Wish, *, looks: bool) -> AsyncIterator[bool]:
    """Hold the lock of a source's sweeps; yield False if another one has it, and looks for what is ready itself.

    One that just settles what has ended is waited for: a sweep each night would be missed for it.

    Raises:
        Cancelled: the sweep is stopped meanwhile.
    """
    while True:
        with locked(unitlist.sweeping(home, name), fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
            if mine is not None:
                with suppress(OSError):  # a full disk
                    os.ftruncate(mine.fileno(), 0)
                    os.write(mine.fileno(), b"" if looks else SETTLING)
            elif looks and unitlist.sweeping(home, name).read_bytes() == SETTLING:
                wish.check()
                await asyncio.sleep(LOOK_S)
                continue
            yield mine is not None
            return


async def _end_others(client: PrefectClient, flow_run: FlowRun) -> None:
    """End the other sweeps of a source that are due when a late one begins, which looks for them all.

    A schedule goes on while workers are away: each of some hundred sweeps would look, one after another.
    """
    begun, planned = flow_run.state.timestamp if flow_run.state else None, flow_run.expected_start_time
    if not begun or not planned or not flow_run.deployment_id or (begun - planned).total_seconds() < LATE_S:
        return
    due = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[flow_run.deployment_id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": begun}),
    )
    ended = {"type": "COMPLETED", "message": f"the sweep {flow_run.id}, which began later, has looked instead"}
    path: Any = "/flow_runs/bulk_set_state"  # which Prefect's client does not know
    asked = {"flow_runs": due.model_dump(mode="json", exclude_none=True), "state": ended}
    with suppress(httpx.HTTPError, PrefectException):  # an older server can't: then each looks
        await client.request("POST", path, json=asked)


def _check(
    source: Source,
    sources: list[Source],
    targets: list[Target],
    before: SweepRow,
    elsewhere: Mapping[str, str],
    mute: list[str],
) -> None:
    """Raise Misconfigured, with all reasons, if a source can't be swept."""
    if wrong := checks.problems(source, sources, targets, before.mount, elsewhere, mute):
        raise Misconfigured("; ".join(wrong), source.name)


def _mount(source: Source) -> str:
    return checks.mounted_at(source.folders[0]) if source.folders else ""


def _stuck(ledger: Ledger, source: Source, before: SweepRow, words: str) -> None:
    """Keep why a source can't be looked through, and say it once."""
    ledger.sources.swept(source.name, SweepRow(before.mount, 0.0, 0.0, before.waiting, words))
    if words != before.detail:
        happened(ledger, "source.stuck", {"source": source.name}, "", words)


async def _link(source: Source, done: Swept) -> None:
    rows = [{"dispatch": f"[{run}](/runs/flow-run/{run})", "units": count} for run, count in done.runs.items()]
    await acreate_table_artifact(rows, f"dispatches-of-{source.name}", f"{source.name}: {done.words}")


async def everything(client: Any, name: str) -> tuple[Source, list[Source], list[Target]]:
    """Return a source, all sources, and all targets; those that are broken take no part."""
    (source,) = await KEPT.load(client, [name], secrets=False)
    sources = [one for one in await KEPT.all(client) if isinstance(one, Source)]
    targets = [one for one in await TARGETS.all(client, used=source.reaches) if isinstance(one, Target)]
    return source, sources, targets
