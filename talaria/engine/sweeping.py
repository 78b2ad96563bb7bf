"""Begins sweeps of sources: when something in a watched folder may be ready, and when a dispatch of a source has ended.

One worker of a host does so for all (a lock decides which). It looks at nothing itself: a sweep, a run of
`batch/<source>`, does. What it misses, a schedule finds, or its own look every NET_S.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound, PrefectException

from blocks import Source
from blocks.list_source import ListSource
from talaria.engine import batches
from talaria.engine.folderwatch import FolderWatch
from tasks.sources import belonging, checks
from tasks.sources.inbox import MARKER
from tasks.sources.runs import PrefectDispatching
from tasks.sources.saved import KEPT
from transfer import silent, unitlist
from transfer.database import LOST
from transfer.home import Home, locked
from transfer.ledger import Ledger

LOOK_S = 0.5  # between two looks at what has happened in the folders, and at the ledger
SAVED_S = 60.0  # between two looks at which sources there are, unless one was changed on this machine
TURN_S = 5.0  # between two attempts to be the one that does so
ENDED_S = 2.0  # between two looks at runs that are under way
NET_S = 600.0  # after which a watched source is swept whatever was noticed
BLIND_S = 60.0  # and where not all is noticed
BLIND = "%s: the system grants no more watches of folders (fs.inotify): it is looked through each %.0f s as well"
STALE_S = 5.0  # for a folder to say which one it is
CALM_S = 1.0  # between two sweeps of a source
AWAY = (*LOST, httpx.HTTPError, PrefectException)  # the server, the ledger or the disk
logger = logging.getLogger("talaria.sources")


@dataclass
class _Watched:
    """A source whose folder is watched.

    Attributes:
        due: when it is to be swept next, in monotonic seconds.
        run: its last sweep that was begun here.
        look: the last one whether its folders are those that are watched; it may take as long as a share hangs.
        is_here: whether it is this host's; of another one's, only a folder that both have is watched here.
        is_mute: whether a share of it does not answer, so that nothing is watched.
    """

    source: Source
    folders: list[FolderWatch] = field(default_factory=list)
    due: float = 0.0
    begun: float = 0.0
    run: UUID | None = None
    known_next: float = 0.0
    look: asyncio.Future[bool] | None = None
    is_here: bool = True
    is_mute: bool = False

    def soon(self, seconds: float) -> None:
        """Have it swept within some seconds, if it was to be later."""
        self.due = min(self.due, time.monotonic() + seconds)

    async def is_stale(self) -> bool:
        """Return True if a folder of it is not the one any more that is watched."""
        if self.look is None or self.look.done():  # a share that hangs has one thread of ours, not one at each look
            self.look = asyncio.ensure_future(asyncio.to_thread(lambda: any(one.is_stale for one in self.folders)))
        done, _ = await asyncio.wait([self.look], timeout=STALE_S)
        self.is_mute = not done
        return bool(done) and self.look.result()

    @property
    def settle_s(self) -> float:
        return float(getattr(self.source, "settle_s", 0.0))


async def keep_sweeping(client: PrefectClient, home: Home, ledger: Ledger) -> None:
    """Begin sweeps, for ever; one process of a state directory does."""
    folder = home.root / "locks"
    while True:
        with suppress(OSError):
            folder.mkdir(exist_ok=True, mode=0o700)
            with locked(folder / "sweeping", fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
                if mine is not None:
                    await _Sweeping(client, home, ledger).serve()
        await asyncio.sleep(TURN_S)


class _Sweeping:
    def __init__(self, client: PrefectClient, home: Home, ledger: Ledger) -> None:
        self.client, self.home, self.ledger = client, home, ledger
        self.watched: dict[str, _Watched] = {}
        self._saved = self._ended = 0.0
        self._changed = -1

    async def serve(self) -> None:
        while True:
            try:
                await self._look()
            except AWAY as exc:
                logger.debug("sources were not looked at: %s", exc)
            except Exception:  # whatever it is, the others go on
                logger.exception("sources were not looked at")
                await asyncio.sleep(TURN_S)
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        now = time.monotonic()
        stamp = self._stamp()
        if now - self._saved >= SAVED_S or stamp != self._changed:
            await self._read_sources()
            self._saved, self._changed = now, stamp
        if not self.watched:
            return
        for one in self.watched.values():
            self._listen(one)
        if now - self._ended >= ENDED_S:
            self._ended = now
            await self._see_ends()
        wrong: Exception | None = None
        for name, one in self.watched.items():
            if one.due <= time.monotonic() and one.begun + CALM_S <= time.monotonic():
                try:
                    await self._begin(name, one)
                except Exception as exc:  # it is due still, and would be the first again the next time
                    wrong = exc
        if wrong:
            raise wrong

    def _stamp(self) -> int:
        try:
            return unitlist.changed(self.home).stat().st_mtime_ns
        except OSError:
            return 0

    async def _read_sources(self) -> None:
        """See which sources there are; begin to watch those that are new or have changed."""
        found = {one.name: one for one in await KEPT.all(self.client) if isinstance(one, Source) and one.enabled}
        elsewhere = await belonging.elsewhere(self.client)
        for name in self.watched.keys() - found.keys():
            del self.watched[name]
        for name, source in found.items():
            old = self.watched.get(name)
            here = name not in elsewhere
            if old is None or old.source != source or old.is_here != here or old.is_mute or await old.is_stale():
                net = time.monotonic() if self._is_watched(source) else float("inf")
                # To watch a share whose server is away would take until it is back, and no other source were swept.
                mute = await silent.mute(checks.places_of(source), 0.0)
                watches = [] if mute else await asyncio.to_thread(self._watches, source, is_here=here)
                if any(watch.blind for watch in watches):
                    logger.warning(BLIND, name, BLIND_S)
                one = _Watched(source, watches, net, old.begun if old else 0.0, is_here=here, is_mute=bool(mute))
                if old is not None and old.is_mute and mute:
                    one.due, one.run = old.due, old.run
                self.watched[name] = one

    @staticmethod
    def _is_watched(source: Source) -> bool:
        return source.watched and bool(getattr(source, "watch", True))

    def _watches(self, source: Source, *, is_here: bool) -> list[FolderWatch]:
        if not self._is_watched(source):
            return []
        if isinstance(source, ListSource):
            folder, _, name = source.file.rpartition("/")
            names = [(folder or "/", name)]
        else:
            names = [(folder, "") for folder in source.folders]
        return [FolderWatch(*one) for one in names if is_here or not checks.is_own(one[0])]

    def _listen(self, one: _Watched) -> None:
        for folder in one.folders:
            names = folder.names()
            if MARKER in names:
                one.soon(CALM_S)
            elif names:
                one.soon(one.settle_s + CALM_S)
            if folder.blind:
                one.soon(BLIND_S)

    async def _see_ends(self) -> None:
        """Have sources swept of whose dispatches one has ended, or that had something that may be ready now."""
        sweeps = await asyncio.to_thread(self.ledger.sources.sweeps)
        for name, row in sweeps.items():
            one = self.watched.get(name)
            if one and self._is_watched(one.source) and row.next and row.next != one.known_next:
                one.known_next = row.next
                one.soon(max(0.0, row.next - time.time()) + CALM_S)
        for name, runs in (await asyncio.to_thread(self.ledger.sources.under_way)).items():
            one = self.watched.get(name)
            if one is None:
                continue
            if "" in runs:
                one.soon(ENDED_S)
            going = PrefectDispatching(self.client, self.home, name)
            if await going.any_ended([run for run in runs if run]):
                one.soon(0.0)
        for name, again in (await asyncio.to_thread(self.ledger.sources.run_again)).items():
            one = self.watched.get(name)
            # A part of a run may have ended that waits now, for hours: a sweep would see nothing new.
            if one and await PrefectDispatching(self.client, self.home, name).any_ended(again):
                one.soon(0.0)

    async def _begin(self, name: str, one: _Watched) -> None:
        if one.run is not None:
            with suppress(ObjectNotFound):
                state = (await self.client.read_flow_run(one.run)).state
                if state and not state.is_final() and state.type is not StateType.SCHEDULED:
                    one.due = time.monotonic() + CALM_S  # it may have looked before the last thing happened
                    return
                if state and state.type is StateType.FAILED and one.begun + BLIND_S > time.monotonic():
                    one.due = one.begun + BLIND_S  # it would fail again, for the same reason
                    return
        one.begun = time.monotonic()
        # What is not watched is looked through when its schedule says so, and not before.
        one.run = (await batches.start(self.client, name, settles=not self._is_watched(one.source))).id
        one.due = one.begun + NET_S if self._is_watched(one.source) else float("inf")  # until then it is due still
