"""The process that listens for modalities: waits until there is a DICOM source, then receives for all of them.

As long as there is none, it imports nothing and looks at the server now and then. Sources that are added, changed,
paused or removed are taken up while it runs. What it has received since it began stands in files
(`transfer.listening`), for metrics.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import resource
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from talaria import logs

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import BlockDocument

    from blocks import Target
    from blocks.dicom_source import DicomSource
    from talaria.engine.listeners import Listeners
    from transfer.home import Home
    from transfer.plan import Origin

logger = logging.getLogger("talaria.listening")

SLUG = "dicom-source"
LOOK_S = 2.0  # between two looks at the server's sources
RENEW_S = 60.0  # between two looks at the files of certificates
TICK_S = 0.25  # between two looks at what has become complete
STATUS_S = 2.0  # between two writings of the status
DRAIN_S = 15.0  # for associations to end when somebody wants us to stop
ASK_S = 20.0  # for the server to say which targets there are
SWEEP_S = 2.0  # between two sweeps of one source
LIES_S = 60.0  # between two looks at what lies there that no source of this host has received
DESCRIPTORS = 1 << 16  # more than all associations of all sources take; some systems grant a billion
OURS = ("127.0.0.1", "::1", "localhost")  # where the embedded server is


class _Asked:
    """Counts how often somebody asked us to stop."""

    def __init__(self) -> None:
        self.times = 0
        self.event = threading.Event()
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        self.event.set()


def main() -> None:
    """Listen until SIGTERM: no new associations then, the second time open ones are broken."""
    asked = _Asked()
    logs.set_up()
    allow_many_files()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each look at the server
    while not _is_wanted():
        if asked.event.wait(LOOK_S):
            return
    _listen(asked)


def allow_many_files() -> None:
    """Let this process open as many files as it may: most systems give 1024 at first, and an association takes two."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if most == resource.RLIM_INFINITY else min(most, DESCRIPTORS)
    if now != resource.RLIM_INFINITY and now < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _is_wanted() -> bool:
    """Return True if there is a DICOM source, or only Prefect's own client can find out: the server is elsewhere."""
    url = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    if urlsplit(url).hostname not in OURS:
        return True
    body = {"block_types": {"slug": {"any_": [SLUG]}}, "block_documents": {"is_anonymous": {"eq_": False}}, "limit": 1}
    headers = {"Content-Type": "application/json"}
    if login := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    asking = urllib.request.Request(f"{url}/block_documents/filter", json.dumps(body).encode(), headers)  # noqa: S310
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asking, timeout=10) as answer:
            return bool(json.load(answer))
    except urllib.error.HTTPError as exc:
        return exc.code in (401, 403)
    except (OSError, ValueError):
        return False


def _listen(asked: _Asked) -> None:
    from talaria.imports import staying

    with staying():
        from protocols.dimse.receivers import Receivers
        from talaria.engine.listeners import Listeners
        from tasks.sources.dicom import confirmed
        from transfer import listening
        from transfer.home import Home
        from transfer.ledger import Ledger

    home = Home.current()
    listening.clear(home)  # of one that was killed

    def delivered(source: DicomSource, origin: Origin, uids: Collection[str]) -> set[str]:
        targets = watch.targets()
        with Ledger(home.ledger) as ledger:
            return confirmed(source, origin, uids, targets, ledger)

    listeners = Listeners(home, delivered, Receivers())
    watch = _Watch(listeners, home, asked)
    try:
        asyncio.run(watch.run())
    finally:
        logger.info("no longer listening: open associations may end by themselves")
        listeners.close(DRAIN_S, lambda: asked.times >= 2)
        listening.clear(home)


class _Watch:
    """Keeps the listeners as the sources are, and starts a sweep where something has become complete."""

    def __init__(self, listeners: Listeners, home: Home, asked: _Asked) -> None:
        self._listeners, self._home, self._asked = listeners, home, asked
        self._known: Any = None  # the documents that the listeners were made of
        self._due: dict[str, float] = {}  # sources with something to dispatch; `time.monotonic` of the next try
        self._unfit: dict[str, tuple[str, bool]] = {}  # renewed certificates: why not, and whether it was seen before
        self._renew_next = 0.0
        self._status = ""
        self._ports: set[int] = set()
        self._full: set[str] = set()
        self._orphans: set[str] = set()
        self._looked = self._written = self._lies_next = 0.0
        self._client: PrefectClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def targets(self) -> dict[str, Target]:
        """Return the targets as they are saved now, by name. For other threads.

        Raises:
            Busy: the server is away.
        """
        from blocks import Target
        from tasks.targets import TARGETS
        from transfer.errors import Busy

        if self._client is None or self._loop is None:
            raise Busy("the Prefect server has not been asked yet")
        try:
            asking = asyncio.run_coroutine_threadsafe(TARGETS.all(self._client), self._loop)
            return {one.name: one for one in asking.result(ASK_S) if isinstance(one, Target)}
        except Exception as exc:
            logger.exception("the targets can't be read")
            raise Busy("the Prefect server does not say which targets there are") from exc

    async def run(self) -> None:
        from prefect import get_client

        async with get_client() as client:
            self._client, self._loop = client, asyncio.get_running_loop()
            while not self._asked.event.is_set():
                now = time.monotonic()
                if now - self._looked >= LOOK_S:
                    await self._guarded(self._look(client), "the sources can't be read")
                    self._looked = time.monotonic()
                await self._guarded(self._settle(now), "what is complete can't be seen")
                for name in [name for name, at in self._due.items() if at <= now]:
                    self._due[name] = now + SWEEP_S
                    await self._guarded(self._sweep(client, name), f"source {name} can't be swept now")
                if now - self._written >= STATUS_S:
                    self._written = now
                    await self._guarded(self._tell(), "the status can't be written")
                await asyncio.sleep(TICK_S)

    async def _guarded(self, call: Any, words: str) -> None:
        """Await what may fail (the server is away, a disk is full) and is tried again; whoever sends goes on."""
        import httpx
        from prefect.exceptions import PrefectException

        try:
            await asyncio.wait_for(call, 60)
        except (httpx.HTTPError, PrefectException, TimeoutError) as exc:
            logger.warning("%s: %s", words, type(exc).__name__)
        except Exception:  # whatever it is, it must not end the associations that are open
            logger.exception("%s", words)

    async def _settle(self, now: float) -> None:
        for name in self._listeners.settled():
            self._due.setdefault(name, now)

    async def _tell(self) -> None:
        self._write()
        await asyncio.to_thread(self._say_who_is_full)

    async def _look(self, client: PrefectClient) -> None:
        from tasks.sources import belonging
        from tasks.sources.saved import KEPT

        documents = [
            one for one in await KEPT.documents(client, secrets=True) if one.block_type and one.block_type.slug == SLUG
        ]
        elsewhere = await belonging.elsewhere(client) if documents else {}
        # Whoever applies a source on another host moves it there, and changes nothing else.
        known = [(one.id, one.name, one.data, elsewhere.get(str(one.name))) for one in documents]
        is_new = known != self._known
        if is_new or self._listeners.troubles:
            await self._apply([one for one in documents if str(one.name) not in elsewhere], is_new)
        self._known = known
        await self._renew()
        if is_new or time.monotonic() >= self._lies_next:
            self._lies_next = time.monotonic() + LIES_S
            await asyncio.to_thread(self._say_what_lies, {str(one.name) for one in documents}, elsewhere)

    async def _renew(self) -> None:
        """Show renewed certificates; say once of one that can't be used that it can't, if it stays so."""
        if time.monotonic() < self._renew_next:
            return
        self._renew_next = time.monotonic() + RENEW_S
        troubles = await asyncio.to_thread(self._listeners.renew)
        for name, why in troubles.items():
            if self._unfit.get(name) == (why, False):
                words = f"its renewed certificate can't be used, the former one is shown: {why}"
                await asyncio.to_thread(self._stuck, name, words)
        self._unfit = {name: (why, name in self._unfit) for name, why in troubles.items()}

    async def _apply(self, documents: Iterable[BlockDocument], is_new: bool) -> None:
        """Listen for the sources of these documents, and for no others.

        Args:
            is_new: whether one of them has changed since the last time.
        """
        from blocks.dicom_source import DicomSource
        from tasks.sources.saved import KEPT
        from transfer.errors import Misconfigured

        sources = []
        for document in documents:
            try:
                made = KEPT.made_of(document)
            except Misconfigured as exc:
                if is_new:
                    logger.warning("source %s does not listen: %s", document.name, exc.message)
                continue
            if isinstance(made, DicomSource):
                sources.append(made)
        before = dict(self._listeners.troubles)
        await asyncio.to_thread(self._listeners.apply, sources)
        for name, why in self._listeners.troubles.items():
            if before.get(name) != why:
                await asyncio.to_thread(self._stuck, name, f"does not listen: {why}")
        if is_new:
            for one in sources:  # of one that was paused, or just changed its routes, something may wait
                self._due.setdefault(one.name, time.monotonic())

    async def _sweep(self, client: PrefectClient, name: str) -> None:
        """Start the run that dispatches what is complete."""
        from talaria.engine import batches
        from transfer.errors import DispatchError

        try:
            await batches.start(client, name)
        except DispatchError as exc:  # it was removed, or is broken
            logger.warning("source %s can't be swept: %s", name, exc.message)
        self._due.pop(name, None)

    def _say_what_lies(self, names: Collection[str], elsewhere: Mapping[str, str]) -> None:
        """Say once of what was received for a source that is gone, or another host's, that nobody dispatches it.

        Args:
            names: of all DICOM sources.
            elsewhere: the hosts of those that are not this one's.
        """
        from tasks.sources.dicom import orphans
        from transfer.home import host_name

        there = orphans(self._home, {one for one in names if one not in elsewhere})
        for name, count in there.items():
            if name not in self._orphans:
                lie = f"{count} units that it received lie in {self._home.root / 'received' / name}"
                if name in names:
                    self._stuck(
                        name,
                        f"{lie} on the host {host_name()}, and the source was moved to {elsewhere[name]}: apply it on"
                        f" {host_name()} to have them dispatched, and then where it is to be",
                    )
                else:
                    self._stuck(
                        name,
                        f"{lie}, and there is no such DICOM source: apply one of that name to have them dispatched, or"
                        " remove the folder",
                    )
        self._orphans = set(there)

    def _say_who_is_full(self) -> None:
        """Say once of each source that its disk has no room, until it has some again."""
        from transfer.listening import FULL

        full = {name for name, one in self._listeners.status().items() if one.get("full")}
        for name in full - self._full:
            self._stuck(name, FULL)
        self._full = full

    def _stuck(self, name: str, words: str) -> None:
        """Say that a source needs a person."""
        from tasks.happened import happened
        from transfer.ledger import Ledger

        try:
            with Ledger(self._home.ledger) as ledger:
                happened(ledger, "source.stuck", {"source": name}, "", words)
        except Exception:  # the disk may be full, or the database away: the listener goes on
            logger.exception("source %s: %s", name, words)

    def _write(self) -> None:
        """Write the counts, and what is known of the sources if it has changed."""
        from transfer import listening

        counts = self._listeners.counts()
        for one in counts:
            listening.write(self._home, one)
        ports = {one.port for one in counts}
        for port in self._ports - ports:
            listening.forget(self._home, port)
        self._ports = ports
        status = json.dumps(self._listeners.status(), sort_keys=True)
        if status != self._status:
            listening.write_sources(self._home, os.getpid(), json.loads(status))
            self._status = status
