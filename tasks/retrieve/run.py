"""One run of a retrieval: find studies, fetch them one after another, and send each on while the next is fetched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prefect import get_client
from prefect.client.schemas.objects import State as RunState
from prefect.client.schemas.objects import StateType
from prefect.exceptions import Abort, Pause
from prefect.logging import get_run_logger
from prefect.states import AwaitingRetry, Cancelled, Completed, Failed

from blocks.base import Target
from tasks.dispatch import audited, kept, rest, running
from tasks.dispatch.ends import unsaid_is_no_failure
from tasks.dispatch.leaving import is_left
from tasks.dispatch.looks import SLOT_S
from tasks.dispatch.patience import patiently
from tasks.dispatch.progress import live
from tasks.dispatch.report import updated
from tasks.dispatch.rest import Wait
from tasks.dispatch.slots import NoSlot
from tasks.dispatch.stoppable import LOOK_S, stoppable
from tasks.retrieve.dispatches import HELD, end_waiting, held_until, is_held
from tasks.retrieve.fetch import Fetcher
from tasks.retrieve.job import Job, Stage, Study, discard, folder_of, size_of
from tasks.retrieve.moving import SPOOL, is_moved, leave, move_into
from tasks.retrieve.report import RetrievalProgress, document, part_of, report, sentence, state_of
from tasks.retrieve.room import NO_ROOM, SHORT_S, Room, drop_one
from tasks.retrieve.turn import Turn
from tasks.retrieve.wish import Wish
from tasks.targets import origin_of
from transfer.errors import Cancelled as DispatchCancelled
from transfer.errors import DiskFull, DispatchError, LedgerAway
from transfer.home import Home
from transfer.layout import sanitised
from transfer.ledger import Ledger
from transfer.nearby import name_of, spool_in

R = TypeVar("R")
Send = Callable[..., Awaitable[RunState[Any]]]  # the flow of a dispatch

DISPATCHES = 2  # studies that are handed on at once
GRACE_S = 4.0  # for a driver to stop by itself when the run is cancelled
HELD_S = 600.0  # for which a run waits in its worker for the next study; longer, and it gives its place back
LATER_S = 60.0  # until a study is looked at again of which nobody knows what it waits for


class Retrieval:
    """A retrieval within a flow run; made by `tasks.retrieve.beginning.retrieving`."""

    def __init__(
        self, flow_run_id: str, wish: Wish, source: Target, home: Home, send: Send, at_once: int = DISPATCHES
    ) -> None:
        self.flow_run_id, self.wish, self.source, self.home, self._send = flow_run_id, wish, source, home, send
        self.who = ""  # who asked for it, for the audit trail
        self.cancelled, self.paused = running.flag(flow_run_id), running.pause(flow_run_id)
        self._numbers = wish.numbers()
        self.job = Job.load(home, flow_run_id, self._numbers)
        self.job.again(self._numbers)
        self.fetcher = Fetcher(source, wish.filters, self.job, self.cancelled, self.paused)
        self._waits: dict[str, Wait] = {}  # for what it waits itself; its studies may wait for more
        inside = spool_in(Path(wish.into), name_of(flow_run_id)) if wish.into else None
        self.job.spool = str(inside or self.job.spool)
        self._spool = inside or folder_of(home, flow_run_id)
        self._folders = self._spool / SPOOL  # holds one for each study that has been fetched and not handed on
        self._room_for = Room(self._folders, None if inside else home.root)
        self._senders = asyncio.Semaphore(at_once)
        self._handing_on: dict[str, asyncio.Task[None]] = {}  # by study
        self._turn = Turn(source, flow_run_id, self.job, home, wish.priority)
        self._no_slot = False  # whether others have the source's slots, and it rests until they have gone
        self._called = running.call(flow_run_id)
        self._in_vain: list[Study] = []  # were gone on with in this round, and still wait
        self._next_round = 0.0  # when those that wait are gone on with again, in seconds since the epoch
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
            await self._look_over()
            self._go_on(every=True)
            try:
                await self._fetch()
                while self._handing_on:
                    await self._one_is_handed_on()
            finally:
                await self._turn.give_back()

    async def _find(self) -> None:
        try:
            while self.job.pending and not self.paused.is_set():
                await self._in_a_slot(self.fetcher.find_pending)
            if self._to_search and not self.paused.is_set():
                await self._in_a_slot(self.fetcher.search)
                if not self.job.studies:
                    self.job.error = "nothing matches the query"
        except (DispatchCancelled, NoSlot):
            pass
        except DispatchError as exc:
            if not (exc.retryable and self.paused.is_set()):  # else it goes on with that when it is resumed
                self.job.error = exc.message
        self.job.save()

    @property
    def _to_search(self) -> bool:
        """Whether it is to search by other keys than accession numbers, and has not."""
        return not (self.job.searched or self.job.error or self._numbers)

    async def _look_over(self) -> None:
        """Compare what the job knows with what is here: a kill may have come between a step and the note of it."""
        with suppress(DispatchCancelled):
            there = await self._looked(lambda: {*self._folders.glob("*")})
            for folder in there - {*map(self._folder, self.job.studies.values())}:
                await self._looked(partial(discard, folder))  # of one that the source does not have any more
            for study in self.job.studies.values():
                folder = self._folder(study)
                if study.stage is Stage.WHOLE and not await self._looked(partial(_has_any, folder)):
                    # Moved, and not noted; else its files are gone, and it is fetched again.
                    moved = await self._looked(partial(is_moved, folder, study.instances))
                    study.stage, study.again = (Stage.DELIVERED if moved else Stage.FOUND), 0.0
                    self.job.save()
                if study.stage is Stage.DELIVERED and folder in there:
                    await self._looked(partial(discard, folder))

    async def _looked(self, look: Callable[[], R]) -> R:
        """Do what touches the folders of studies: in a share whose server is away, it does not end.

        Raises:
            DispatchCancelled: it was left, as the run is stopped.
        """
        return await self._stoppable(asyncio.to_thread(look), begun=False)

    async def _fetch(self) -> None:
        """Fetch study after study; send each on as soon as it is complete."""
        for study in self.fetcher.in_order():
            self._go_on()
            folder = self._folder(study)
            if study.stage is Stage.FOUND:
                if self._stopped() or self._held_up() or self._full or self.fetcher.passes_over(study):
                    continue
                paced = self.job.next_study
                try:
                    if not await self._room(study) or not await self._pace() or self._stopped() or self._held_up():
                        continue
                    await self._fetch_one(study, folder)
                except (DispatchCancelled, NoSlot):
                    self.job.next_study = paced  # it is still to come
                    continue
                self.job.note()
            if study.stage is Stage.WHOLE and not study.again:
                self._begin_to_hand_on(study)

    async def _fetch_one(self, study: Study, folder: Path) -> None:
        """Fetch a study; where spool or disk are full, go on as soon as others that are sent on have made room.

        A disk that nothing makes room on ends the fetching.

        Raises:
            DispatchCancelled: somebody asked for it.
        """
        while not self._full and not self._stopped():
            others = set(self._handing_on.values())
            try:
                await self._in_a_slot(partial(self.fetcher.fetch, study, folder, self._room_for.watch))
                if study.stage is not Stage.FOUND or not self.fetcher.halted:
                    break
                if not await self._room(study) or self._held_up():
                    break
            except DiskFull as exc:
                await self._turn.give_back()
                if others and others <= set(self._handing_on.values()):  # none of them has ended meanwhile
                    await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
                elif not others and not await self._looked(partial(drop_one, self.job, self._folder)):
                    self._full = exc.message

    def _stopped(self) -> bool:
        return self.cancelled.is_set() or self.paused.is_set()

    def _held_up(self) -> bool:
        """Return whether the source must not be asked now; if so, the run continues later."""
        if wait := self._turn.hours():
            self._waits[wait.what] = wait
        return wait is not None or self._no_slot

    async def _in_a_slot(self, work: Callable[[], R]) -> R:
        """Do blocking work while the slots of the source are held.

        Raises:
            NoSlot: there are none, and nothing else is under way for which it would stay.
        """
        while True:
            try:
                await self._stoppable(patiently(self._turn.take), begun=False)
                break
            except NoSlot:
                wait = await asyncio.to_thread(self._turn.wait)
                if not self._handing_on:
                    self._waits[wait.what] = wait
                    self._no_slot = True
                    raise
                await self._one_is_handed_on(SLOT_S)
        return await self._stoppable(asyncio.to_thread(work), begun=True)

    async def _stoppable(self, work: Awaitable[R], *, begun: bool) -> R:
        """Wait for work; when the run is cancelled, let the work stop by itself."""

        def stops() -> bool:
            return self.cancelled.is_set() or (self.paused.is_set() and not begun)

        try:
            return await stoppable(work, stops, lambda: GRACE_S if begun else 0.0)
        except asyncio.CancelledError as exc:
            if not self._stopped():
                raise
            raise DispatchCancelled("the retrieval was stopped") from exc

    # ---- between two studies

    async def _room(self, study: Study) -> bool:
        """Wait until there is room for a study, beside what is here of it: fetching waits for sending.

        Returns:
            False if what fills it waits for a target, or is not ours.

        Raises:
            DispatchCancelled: the run is stopped.
        """
        while True:
            others = bool(self._handing_on)  # what is handed on while it is looked has made room
            if not await self._looked(partial(self._room_for.is_full, self._folder(study))) or self._stopped():
                return True
            if others:
                await self._one_is_handed_on()
            elif await self._looked(partial(drop_one, self.job, self._folder)):
                pass
            elif self._room_for.is_short():
                self._wait_for(NO_ROOM, datetime.now(UTC) + timedelta(seconds=SHORT_S), soon=True)
                return False
            else:  # where no study waits for a target, an earlier run has left others, whose turn comes
                return not any(one.stage is Stage.WHOLE for one in self.job.studies.values())

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
                self._wait_for("the next study of this hour", later)
                return False
            await self._turn.give_back()
            await asyncio.sleep(min(left, LOOK_S))
            self._go_on()
        self.job.next_study = time.time() + each
        return True

    # ---- handing on

    def _begin_to_hand_on(self, study: Study) -> None:
        if study.study in self._handing_on or self._stopped():
            return
        task = asyncio.create_task(self._hand_on(study, self._folder(study)))
        self._handing_on[study.study] = task
        task.add_done_callback(lambda _: self._handing_on.pop(study.study))

    async def _one_is_handed_on(self, longest_s: float = LOOK_S) -> None:
        """Wait until one that is being handed on is, but no longer than that; go on with those that wait."""
        await self._turn.give_back()
        if under_way := list(self._handing_on.values()):  # it may have ended meanwhile
            await asyncio.wait(under_way, timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
        self._go_on()

    def _go_on(self, *, every: bool = False) -> None:
        """Go on with the dispatches whose time has come, the longest first; where a few wait on, the others do, too.

        Args:
            every: also with those whose time has not come: windows may have been changed, targets enabled.
        """
        if self._called.is_set():  # there is a place at a target, or it answers again
            self._called.clear()
            self._next_round = 0.0
            for one in self._waiting():
                one.again = 1.0 if one.reason.startswith((rest.TRIES_AGAIN, HELD)) else one.again
        now = time.time()
        due = [one for one in self._waiting() if every or one.again <= now] if now >= self._next_round else []
        if due and not self._stopped():
            self._in_vain.clear()
            for one in due:
                self._begin_to_hand_on(one)

    def _waiting(self) -> list[Study]:
        """Return the studies whose dispatches wait, in the order of their times."""
        found = [one for one in self.job.studies.values() if one.stage is Stage.WHOLE and one.again]
        return sorted(found, key=lambda one: one.again)

    def _first(self) -> Study | None:
        """Return the study to go on with first: none of those whose time has come, and that wait behind others."""
        now = time.time()
        return next((one for one in self._waiting() if one in self._in_vain or one.again > now), None)

    async def _hand_on(self, study: Study, folder: Path) -> None:
        async with self._senders:
            waited = study.again
            if self._stopped() or (waited and len(self._in_vain) >= DISPATCHES):  # nothing has changed for it
                return
            try:
                if self.wish.into:
                    name = study.accession or study.study
                    moving = asyncio.to_thread(move_into, folder, Path(self.wish.into), name)
                    _has(study, await self._stoppable(moving, begun=True))
                    study.stage = study.stage if study.missing else Stage.DELIVERED
                elif study.dispatch or _has(study, size_of(folder)[0]):
                    await self._dispatch(study, folder)
            except DispatchCancelled:  # left, as its share may be away
                return
            except LedgerAway as exc:
                wait = rest.for_the_ledger(exc)
                study.again, study.reason = wait.until.timestamp(), rest.message([wait], exc.message)
            except DispatchError as exc:
                study.stage, study.reason = Stage.FAILED, exc.message
                self._full = exc.message if isinstance(exc, DiskFull) else self._full
            except Exception as exc:  # what one study meets must not end the others
                get_run_logger().exception("study %s could not be sent on", study.study)
                study.stage, study.reason = Stage.FAILED, f"unexpected {type(exc).__name__}: see the run's log"
            self.job.note()
            if study.stage is Stage.DELIVERED:
                self._in_vain.clear()
                with suppress(DispatchCancelled):
                    await self._looked(partial(discard, folder))
            elif waited and study.again and not study.reason.startswith(HELD):
                self._in_vain.append(study)
                self._next_round = first.again if (first := self._first()) else 0.0

    async def _dispatch(self, study: Study, folder: Path) -> None:
        """Send a study in a dispatch of its own, with the queried node as its origin."""
        waited, study.again, origin = bool(study.again), 0.0, origin_of(self.source)

        def begins(run_id: str) -> None:
            study.dispatch = run_id
            self.job.note()

        try:
            with running.part_of(self.flow_run_id), audited.on_behalf_of(self.who):
                state = await self._send(
                    [str(folder)],
                    list(self.wish.targets),
                    whole=self.flow_run_id,
                    former=study.dispatch,
                    waited=waited,
                    begins=begins,
                    sender_aet=origin.sender_aet,
                    sender_host=origin.sender_host,
                )
        except (Pause, Abort) as exc:  # no Exceptions: they would end us with it
            study.stage, study.reason = Stage.FAILED, f"its dispatch was stopped by somebody else: {exc}"
            return
        study.targets = _targets(self.home, study.dispatch)
        arrived = bool(study.targets) and {*study.targets.values()} == {"delivered"}
        if state.type is StateType.COMPLETED or arrived:  # whatever somebody has made of its run since
            study.stage, study.reason = Stage.DELIVERED, ""
        elif is_held(state):
            study.again, study.reason = held_until(state), f"{HELD}: its dispatch is {state.name}"
        elif state.type is StateType.SCHEDULED:
            later = datetime.now(UTC) + timedelta(seconds=LATER_S)
            study.again = (state.state_details.scheduled_time or later).timestamp()
            study.reason = state.message or "waits for its target"
        elif not self.cancelled.is_set():
            study.stage, study.reason = Stage.FAILED, state.message or "the dispatch failed"

    def _folder(self, study: Study) -> Path:
        return self._folders / sanitised(study.study)

    # ---- the end

    def _wait_for(self, what: str, until: datetime, *, soon: bool = False) -> None:
        self._waits[what] = Wait(until, what, soon)

    @property
    def waits(self) -> list[Wait]:
        """For what it waits, if that is all that is left to do."""
        first = self._first() or next(iter(self._waiting()), None)
        if first is None:
            return [*self._waits.values()]
        soon = first.reason.startswith(rest.TRIES_AGAIN)
        what = "a dispatch to be resumed" if first.reason.startswith(HELD) else rest.awaited(first.reason)
        one = Wait(datetime.fromtimestamp(first.again, UTC), what or "its targets", soon)
        return [*self._waits.values(), one]

    async def conclude(self) -> RunState[Any]:
        """Save the result and return the state in which the flow run ends."""
        running.still_ours(self.flow_run_id)
        state, waits = state_of(self.job), self.waits
        left = any(one.stage in (Stage.FOUND, Stage.WHOLE) for one in self.job.studies.values())
        unfinished = left or self.job.pending or self._to_search
        taken_up = self.cancelled.is_set() and await is_left(self.flow_run_id)
        if taken_up:  # its process ends, and another one goes on with it
            state = "waiting"
        elif self.cancelled.is_set() and not self.job.whole:
            state = "cancelled"
        elif unfinished and self.paused.is_set():
            state = "paused"
        elif unfinished and waits:
            state = "waiting"
        elif unfinished and self._full:
            self.job.error = self._full
        self.job.ended = state not in ("paused", "waiting")
        self.job.save()
        await patiently(lambda: self._report(state))
        if self.wish.into:
            with suppress(DispatchCancelled):
                await self._stoppable(asyncio.to_thread(leave, self._spool), begun=True)
        if self.job.ended:
            if any(one.dispatch for one in self.job.studies.values()):
                async with get_client() as client:
                    await patiently(lambda: end_waiting(client, self.home, self.flow_run_id))
            await asyncio.to_thread(self._stand, state)
            brought = [one.study for one in self.job.studies.values() if one.stage is Stage.DELIVERED]
            what = self.source, state, brought, self.wish.into, self.flow_run_id, self.who
            await asyncio.to_thread(audited.retrieval_ends, *what)
        message = sentence(document(self.job, self.flow_run_id, self.source.name, state))
        if state == "paused":
            return running.paused(message)
        if state == "waiting" and not taken_up:
            first = min(wait.until for wait in waits)
            return AwaitingRetry(scheduled_time=first, message=rest.message(waits, message))
        if self.cancelled.is_set():  # also when all was there by then; the engine makes of it that it goes on, if so
            return Cancelled(message=message)
        return Completed(message=message) if state == "delivered" else Failed(message=message)

    async def _report(self, state: str) -> None:
        async with get_client() as client:
            await report(client, self.home, self.job, self.flow_run_id, self.source.name, state)

    def _stand(self, state: str) -> None:
        with unsaid_is_no_failure(self.flow_run_id), Ledger(self.home.ledger) as ledger:
            ledger.deliveries.stand(self.flow_run_id, state, ())


def _has_any(folder: Path) -> bool:
    return any(folder.glob("*.dcm"))


def _has(study: Study, count: int) -> bool:
    """Return whether so many instances are all that came of a study; if not, it is partial, and `study` says why."""
    study.missing = max(0, study.instances - count)
    if study.missing:
        study.stage = Stage.PARTIAL
        study.reason = f"{study.missing} of {study.instances} instances that had come are gone: somebody removed them"
    return not study.missing


def _targets(home: Home, dispatch: str) -> dict[str, str]:
    receipts = (kept.here(home, dispatch) or {}).get("targets", {})
    return {name: str(one["state"]) for name, one in receipts.items()}
