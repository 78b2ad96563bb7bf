"""One run of a retrieval: find studies, fetch them one after another, and send each on while the next is fetched."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prefect import get_client
from prefect.client.schemas.objects import State as RunState
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.exceptions import Abort, Pause
from prefect.logging import get_run_logger
from prefect.states import AwaitingRetry, Cancelled, Completed, Failed, Scheduled

from blocks.base import Target
from blocks.dicom import DicomTarget
from imaging.query import Query
from tasks.dispatch import audited, running
from tasks.dispatch.breaker import LOST
from tasks.dispatch.ends import unsaid_is_no_failure
from tasks.dispatch.hours import opens
from tasks.dispatch.patience import patiently
from tasks.dispatch.progress import live
from tasks.dispatch.report import updated
from tasks.dispatch.run import LOOK_S
from tasks.dispatch.slots import slots
from tasks.retrieve.fetch import Fetcher
from tasks.retrieve.job import Job, Stage, Study, discard, folder_of, size_of
from tasks.retrieve.moving import check_into, is_moved, move_into, spool_in
from tasks.retrieve.report import RetrievalProgress, document, part_of, report, state_of
from tasks.targets import check_destination, check_source, load
from transfer.accessions import accessions
from transfer.errors import Cancelled as DispatchCancelled
from transfer.errors import DiskFull, DispatchError, Misconfigured
from transfer.home import Home
from transfer.layout import sanitised
from transfer.ledger import Ledger
from transfer.query import study_tests

R = TypeVar("R")
Send = Callable[..., Awaitable[RunState[Any]]]  # the flow of a dispatch

SPOOL_LIMIT = 20 << 30  # bytes, unless TALARIA_SPOOL_LIMIT says otherwise
DISPATCHES = 2  # studies that are handed on at once
GRACE_S = 4  # for a driver to stop by itself when the run is cancelled
HELD_S = 600.0  # for which a run waits in its worker for the next study; longer, and it gives its place back
LATER_S = 60.0  # until a dispatch is looked at again that waits for its target


@dataclass(frozen=True)
class Wish:
    """What a retrieval was asked for."""

    source: str
    targets: tuple[str, ...] = ()
    into: str = ""
    accessions: str = ""
    filters: Query = field(default_factory=Query)
    priority: str = "normal"
    studies_per_hour: int = 0

    def numbers(self) -> tuple[str, ...]:
        """Return the accession numbers of the list, each once.

        Raises:
            Misconfigured: there is nothing to look for, or no place to bring it to.
        """
        found = accessions(self.accessions)
        keys = ("StudyInstanceUID", "SeriesInstanceUID", "StudyDate", "PatientID", "PatientName", "StudyDescription")
        if not found and not any(getattr(self.filters, key) for key in keys):
            raise Misconfigured("nothing to look for: give accession numbers, study UIDs, dates or descriptions")
        if bool(self.targets) == bool(self.into):
            raise Misconfigured("give either targets or a folder to bring the studies to")
        if self.into and not Path(self.into).is_absolute():
            raise Misconfigured(f"{self.into}: give the folder's absolute path")
        study_tests(self.filters)
        return found


class Retrieval:
    """A retrieval within a flow run; made by `retrieving`."""

    def __init__(self, flow_run_id: str, wish: Wish, source: Target, home: Home, send: Send) -> None:
        self.flow_run_id, self.wish, self.source, self.home, self._send = flow_run_id, wish, source, home, send
        self.who = ""  # who asked for it, for the audit trail
        self.cancelled, self.paused = running.flag(flow_run_id), running.pause(flow_run_id)
        self.job = Job.load(home, flow_run_id, wish.numbers())
        self.job.again()
        self.fetcher = Fetcher(source, wish.filters, self.job, self.cancelled, self.paused)
        self.again: datetime | None = None  # when what waits may go on
        inside = spool_in(Path(wish.into), f".talaria-{flow_run_id[:8]}") if wish.into else None
        self._spool = inside or folder_of(home, flow_run_id)
        self._folders = self._spool / "spool"  # holds one for each study that has been fetched and not handed on
        self._limit = int(os.environ.get("TALARIA_SPOOL_LIMIT") or SPOOL_LIMIT)
        self._senders = asyncio.Semaphore(DISPATCHES)
        self._handing_on: set[asyncio.Task[None]] = set()
        self._waits = False  # whether a target can't be sent to now
        self._full = ""  # why nothing more can be fetched: the disk is full, and nothing under way will make room

    # ---- the whole

    async def run(self) -> None:
        """Find, fetch and send on, until all is done or something stops it for now."""
        progress = RetrievalProgress(self.source.name)
        async with live(self.home, self.flow_run_id) as shown, updated(lambda: progress.show(self.job)):
            shown.phase = "fetching"
            shown.parts = lambda: {self.source.name: part_of(self.job, self.source.name)}
            if not self._held_up():
                await self._find()
            await self._fetch()
            while self._handing_on:
                await asyncio.wait(self._handing_on)

    async def _find(self) -> None:
        try:
            while self.job.pending and not self.paused.is_set():
                await self._in_a_slot(self.fetcher.find_pending)
            if not self.job.searched and not self.wish.accessions.strip():
                await self._in_a_slot(self.fetcher.search)
                if not self.job.studies:
                    self.job.error = "nothing matches the query"
        except DispatchCancelled:
            pass
        except DispatchError as exc:
            self.job.error = exc.message
        self.job.save()

    async def _fetch(self) -> None:
        """Fetch study after study; send each on as soon as it is complete."""
        for study in list(self.job.studies.values()):
            folder = self._folder(study)
            if study.stage is Stage.WHOLE and not any(folder.glob("*.dcm")):
                # A kill between the last move and the note of it; else its files are gone, and it is fetched again.
                study.stage = Stage.DELIVERED if is_moved(folder) else Stage.FOUND
                self.job.save()
            if study.stage is Stage.DELIVERED and folder.is_dir():
                await asyncio.to_thread(discard, folder)
            if study.stage is Stage.FOUND:
                if self._stopped() or self._held_up() or self._full:
                    continue
                try:
                    if not await self._room(study) or not await self._pace() or self._stopped() or self._held_up():
                        continue
                    await self._fetch_one(study, folder)
                except DispatchCancelled:
                    continue
                self.job.save()
            if study.stage is Stage.WHOLE and not self.cancelled.is_set():
                task = asyncio.create_task(self._hand_on(study, folder))
                self._handing_on.add(task)
                task.add_done_callback(self._handing_on.discard)

    async def _fetch_one(self, study: Study, folder: Path) -> None:
        """Fetch a study; on a full disk, go on as soon as others that are sent on have made room, or end the fetching.

        Raises:
            DispatchCancelled: somebody asked for it.
        """
        while not self._full and not self._stopped():
            others = set(self._handing_on)
            try:
                await self._in_a_slot(partial(self.fetcher.fetch, study, folder))
                break
            except DiskFull as exc:
                if others and others <= self._handing_on:  # none of them has ended meanwhile
                    await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
                elif not others and not self._drop():
                    self._full = exc.message

    def _stopped(self) -> bool:
        return self.cancelled.is_set() or self.paused.is_set()

    def _held_up(self) -> bool:
        """Return whether the source must not be asked now; if so, the run continues later."""
        opening = opens(self.source, self.wish.priority)
        if opening:
            self.again = min(self.again or opening, opening)
        return opening is not None

    async def _in_a_slot(self, work: Callable[[], R]) -> R:
        """Do blocking work as soon as the source's concurrency limit has room."""
        count = min(self.source.concurrency, self.source.max_dispatches)

        async def run() -> R:
            with ExitStack() as stack:
                ledger = None
                with suppress(*LOST):  # then who waits for the slots comes by himself
                    ledger = stack.enter_context(Ledger(self.home.ledger))
                async with get_client() as client, slots(client, self.source, count, ledger=ledger):
                    begun.append(True)
                    return await asyncio.to_thread(work)

        begun: list[bool] = []
        return await self._stoppable(patiently(run, lambda: bool(begun)), begun)

    async def _stoppable(self, work: Awaitable[R], begun: list[bool]) -> R:
        """Wait for work; when the run is cancelled, let the work stop by itself."""
        task = asyncio.ensure_future(work)
        while not (await asyncio.wait([task], timeout=LOOK_S))[0]:
            if self.cancelled.is_set() or (self.paused.is_set() and not begun):
                if begun:
                    await asyncio.wait([task], timeout=GRACE_S)
                task.cancel()
                break
        try:
            return await task
        except asyncio.CancelledError as exc:
            if not self._stopped():
                raise
            raise DispatchCancelled("the retrieval was stopped") from exc

    # ---- between two studies

    async def _room(self, study: Study) -> bool:
        """Wait until there is room for a study, beside what is here of it: fetching waits for sending.

        Returns:
            False if what fills it waits for a target.
        """
        while self._held(study) >= self._limit and not self._stopped():
            if not self._handing_on:
                if not self._drop():
                    if not any(one.stage is Stage.WHOLE for one in self.job.studies.values()):
                        return True  # it is filled by what an earlier run left of others, whose turn comes
                    later = datetime.now(UTC) + timedelta(seconds=LATER_S)
                    self.again = self.again or later
                    return False
                continue
            await asyncio.wait(self._handing_on, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        return True

    def _held(self, study: Study) -> int:
        """Return how many bytes of other studies have been fetched and are still here."""
        own = self._folder(study)
        return sum(size_of(folder)[1] for folder in self._folders.glob("*") if folder != own)

    def _drop(self) -> bool:
        """Delete the files of one failed study, to make room; a retry then fetches them again."""
        for one in self.job.studies.values():
            folder = self._folder(one)
            if one.stage in (Stage.FAILED, Stage.PARTIAL) and size_of(folder)[0]:
                discard(folder)
                one.dispatch = ""
                return True
        return False

    async def _pace(self) -> bool:
        """Keep to the number of studies per hour.

        Returns:
            False if it is long until the next one: the run goes on then, and holds no worker's place until then.
        """
        if not self.wish.studies_per_hour:
            return True
        each = 3600 / self.wish.studies_per_hour
        while (left := min(self.job.next_study - time.time(), each)) > 0 and not self._stopped():
            if left > HELD_S and not self._handing_on:
                later = datetime.now(UTC) + timedelta(seconds=left)
                self.again = min(self.again or later, later)
                return False
            await asyncio.sleep(min(left, LOOK_S))
        self.job.next_study = time.time() + each
        return True

    # ---- handing on

    async def _hand_on(self, study: Study, folder: Path) -> None:
        async with self._senders:
            if self.cancelled.is_set() or (self._waits and study.dispatch):  # nothing has changed for it
                return
            try:
                if self.wish.into:
                    name = study.accession or study.study
                    await asyncio.to_thread(move_into, folder, Path(self.wish.into), name)
                    study.stage = Stage.DELIVERED
                else:
                    await self._dispatch(study, folder)
            except DispatchError as exc:
                study.stage, study.reason = Stage.FAILED, exc.message
                self._full = exc.message if isinstance(exc, DiskFull) else self._full
            except Exception as exc:  # what one study meets must not end the others
                get_run_logger().exception("study %s could not be sent on", study.study)
                study.stage, study.reason = Stage.FAILED, f"unexpected {type(exc).__name__}: see the run's log"
            self.job.save()
            if study.stage is Stage.DELIVERED:
                await asyncio.to_thread(discard, folder)

    async def _dispatch(self, study: Study, folder: Path) -> None:
        """Send a study in a dispatch of its own, with the queried node as its origin."""
        try:
            with running.part_of(self.flow_run_id), audited.on_behalf_of(self.who):
                state = await self._send(
                    [str(folder)],
                    list(self.wish.targets),
                    sender_aet=self.source.aet_target if isinstance(self.source, DicomTarget) else "",
                    sender_host=self.source.node,
                    return_state=True,
                )
        except (Pause, Abort) as exc:  # no Exceptions: they would end us with it
            study.stage, study.reason = Stage.FAILED, f"its dispatch was stopped by somebody else: {exc}"
            return
        study.dispatch = str(state.state_details.flow_run_id or "")
        study.targets = _targets(self.home, study.dispatch)
        if state.type is StateType.COMPLETED:
            study.stage, study.reason = Stage.DELIVERED, ""
        elif state.type is StateType.SCHEDULED:
            begin = state.state_details.scheduled_time or datetime.now(UTC) + timedelta(seconds=LATER_S)
            self.again = min(self.again or begin, begin)
            self._waits = True
            study.reason = state.message or "waits for its target"
        elif not self.cancelled.is_set():
            study.stage, study.reason = Stage.FAILED, state.message or "the dispatch failed"

    def _folder(self, study: Study) -> Path:
        return self._folders / sanitised(study.study)

    # ---- the end

    async def conclude(self) -> RunState[Any]:
        """Save the result and return the state in which the flow run ends."""
        running.still_ours(self.flow_run_id)
        state = state_of(self.job)
        unfinished = (
            any(one.stage in (Stage.FOUND, Stage.WHOLE) for one in self.job.studies.values()) or self.job.pending
        )
        if self.cancelled.is_set():
            state = "cancelled"
        elif unfinished and self.paused.is_set():
            state = "paused"
        elif unfinished and self.again:
            state = "waiting"
        elif unfinished and self._full:
            self.job.error = self._full
        self.job.ended = state not in ("paused", "waiting")
        self.job.save()
        await patiently(lambda: report(self.home, self.job, self.flow_run_id, self.source.name, state))
        if self.wish.into:
            with suppress(OSError):  # something is left in it for a retry
                self._folders.rmdir()
                self._spool.rmdir()
        if self.job.ended:
            await asyncio.to_thread(self._stand, state)
            brought = [one.study for one in self.job.studies.values() if one.stage is Stage.DELIVERED]
            await asyncio.to_thread(
                audited.retrieval_ends, self.source, state, brought, self.wish.into, self.flow_run_id, self.who
            )
        message = _sentence(document(self.job, self.flow_run_id, self.source.name, state))
        if state == "paused":
            return Scheduled(
                scheduled_time=datetime.now(UTC) + running.UNTIL_RESUMED, name=running.PAUSED, message=message
            )
        if state == "waiting" and self.again:
            return AwaitingRetry(scheduled_time=self.again, message=message)
        if state == "cancelled":
            return Cancelled(message=message)
        return Completed(message=message) if state == "delivered" else Failed(message=message)

    def _stand(self, state: str) -> None:
        with unsaid_is_no_failure(self.flow_run_id), Ledger(self.home.ledger) as ledger:
            ledger.deliveries.stand(self.flow_run_id, state, ())


@asynccontextmanager
async def retrieving(wish: Wish, send: Send) -> AsyncIterator[Retrieval]:
    """Load source and targets for the flow run that is running.

    Raises:
        NotFound, Misconfigured: one doesn't exist, may not be queried or sent to, or the request is contradictory.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("a retrieval runs inside a flow run")
    flow_run_id, home = str(context.flow_run.id), Home.current()
    wish.numbers()
    if wish.into:
        check_into(Path(wish.into))
    source, *targets = await patiently(lambda: _load([wish.source, *wish.targets]))
    check_source(source)
    for target in targets:
        if target.enabled:
            check_destination(target)
    executor = ThreadPoolExecutor(8, thread_name_prefix="retrieve")
    asyncio.get_running_loop().set_default_executor(executor)
    try:
        retrieval = Retrieval(flow_run_id, wish, source, home, send)
        retrieval.who = audited.requester(context.flow_run)
        yield retrieval
    finally:
        running.forget(flow_run_id)


async def _load(names: list[str]) -> list[Target]:
    async with get_client() as client:
        return [(await load(client, [name]))[0] for name in names]


def _targets(home: Home, dispatch: str) -> dict[str, str]:
    try:
        document = json.loads(home.receipt(dispatch).read_text(encoding="utf-8"))
    except OSError:
        return {}
    return {name: str(one["state"]) for name, one in document["targets"].items()}


def _sentence(document: dict[str, Any]) -> str:
    counts = [f"{document['found']} studies found, {document['delivered']} delivered"]
    counts += [f"{len(document[key])} {key}" for key in ("missing", "partial", "failed", "waiting") if document[key]]
    return "; ".join([", ".join(counts), *([document["error"]] if document["error"] else [])])
