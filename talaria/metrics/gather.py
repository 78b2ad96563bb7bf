"""Gathers the figures: totals from the ledger, counts from Prefect, states and sizes from this machine.

What it costs does not depend on how many dispatches there were: no run, receipt or row of an item is read.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks import Source, Target
from talaria.engine.registry import waiting, workers
from talaria.metrics import certificates, disks, peers
from talaria.metrics.certificates import KnownCertificate
from talaria.metrics.disks import DiskSpace
from talaria.settings import POOL
from tasks.checking import last_checks
from tasks.dispatch import breaker
from tasks.documents import Broken
from tasks.paging import every
from tasks.sources.saved import KEPT
from tasks.targets import all_targets
from transfer import deadletters, listening
from transfer.database import LOST
from transfer.happenings import Total
from transfer.home import Home, host_name
from transfer.ledger import Ledger
from transfer.listening import ListenerStatus
from transfer.waits import Breaker

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

EACH_S = 10.0  # at least between two times that it is gathered
PREFECT_S = 5.0  # for Prefect's answers: a scrape must not fail because it is busy


@dataclass(frozen=True)
class QueueLook:
    """A queue: how many runs wait in it, and for how many seconds the first of those that are due."""

    name: str
    waiting: int
    oldest_s: float


@dataclass(frozen=True)
class TargetLook:
    """A target, as this machine sees it; `healthy` is None if it was never checked."""

    name: str
    enabled: bool
    broken: bool
    open: bool
    failures: int
    healthy: bool | None


@dataclass
class Figures:
    """All figures of one moment.

    Attributes:
        ledger, prefect: whether they answered; what is theirs is missing if not.
        sizes: bytes, by what.
        messages: numbers, by rule and state.
        received: what is said of DICOM sources (`transfer.listening`), by name.
    """

    ledger: bool = False
    prefect: bool = False
    totals: list[Total] = field(default_factory=list)
    messages: dict[tuple[str, str], int] = field(default_factory=dict)
    queues: list[QueueLook] = field(default_factory=list)
    running: int = 0
    workers: int = 0
    targets: list[TargetLook] = field(default_factory=list)
    certificates: list[KnownCertificate] = field(default_factory=list)
    disks: list[DiskSpace] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    staged: int = 0
    listeners: list[ListenerStatus] = field(default_factory=list)
    received: dict[str, dict[str, Any]] = field(default_factory=dict)


class Gatherer:
    """Gathers, at most once in EACH_S; who asks meanwhile gets what was gathered last.

    Args:
        certificate: file of the front door's certificate, "" for none.
    """

    def __init__(self, client: Callable[[], Awaitable[PrefectClient]], home: Home, certificate: str = "") -> None:
        self._client, self._home, self._certificate = client, home, certificate
        self._turn, self._last, self._at = asyncio.Lock(), Figures(), -EACH_S

    async def figures(self) -> Figures:
        """Return the figures, which are at most a few seconds old."""
        async with self._turn:
            if time.monotonic() - self._at >= EACH_S:
                self._last, self._at = await self._gather(), time.monotonic()
            return self._last

    async def _gather(self) -> Figures:
        found = Figures()
        saved: list[Target | Broken] = []
        sources: list[Source] = []
        checks: dict[str, dict[str, Any]] = {}
        with suppress(TimeoutError):  # and whatever else a client of Prefect raises, below
            async with asyncio.timeout(PREFECT_S):
                try:
                    client = await self._client()
                    saved = await all_targets(client)
                    checks = await last_checks(client, saved)
                    sources = [one for one in await KEPT.all(client) if isinstance(one, Source)]
                    await _from_prefect(client, found)
                    found.prefect = True
                except Exception:  # noqa: S110 - it is away or starts: `prefect` says so
                    pass
        await asyncio.to_thread(self._from_here, found, saved, checks, sources)
        return found

    def _from_here(
        self,
        found: Figures,
        saved: Iterable[Target | Broken],
        checks: dict[str, dict[str, Any]],
        sources: Iterable[Source],
    ) -> None:
        home, targets = self._home, [one for one in saved if isinstance(one, Target)]
        breakers: dict[str, Breaker] = {}
        with suppress(*LOST), Ledger(home.ledger) as ledger:
            found.totals = ledger.happenings.totals(host_name() if ledger.shared else "")
            found.messages = ledger.messages.counts()
            breakers = breaker.every(ledger, targets)
            found.certificates = certificates.known(self._certificate, targets, checks, sources, ledger)
            found.ledger = True
        for one in saved:
            known = breakers.get(one.name)
            healthy = bool(checks[one.name]["ok"]) if one.name in checks else None
            found.targets.append(
                TargetLook(
                    one.name,
                    isinstance(one, Target) and one.enabled,
                    not isinstance(one, Target),
                    bool(known and known.opened),
                    known.failures if known else 0,
                    healthy,
                )
            )
        if not found.ledger:
            found.certificates = certificates.known(self._certificate, targets, checks, sources)
        peers.ask_again(home, targets)
        found.disks = disks.spaces(home, targets)
        found.listeners, found.received = listening.listeners(home), listening.sources(home) or {}
        found.staged, staged = _staged(home.staging)
        found.sizes = {"staging": staged, "failed": deadletters.used(home)}
        for name, path in (("ledger", home.root / "ledger.sqlite"), ("prefect", home.root / "prefect" / "prefect.db")):
            if path.exists():
                found.sizes[name] = sum(_size(Path(f"{path}{end}")) for end in ("", "-wal"))


async def _from_prefect(client: PrefectClient, found: Figures) -> None:
    for queue in await every(client.read_work_queues, work_pool_name=POOL):
        now = datetime.now(UTC)
        body = waiting(now, any_=[queue.name])
        count = int((await client.request("POST", "/flow_runs/count", json=body)).json())
        oldest = 0.0
        if count:
            body["flow_runs"]["next_scheduled_start_time"] = {"before_": now.isoformat()}
            first = {**body, "sort": "NEXT_SCHEDULED_START_TIME_ASC", "limit": 1}
            for one in (await client.request("POST", "/flow_runs/filter", json=first)).json():
                oldest = max(0.0, (now - datetime.fromisoformat(one["next_scheduled_start_time"])).total_seconds())
        found.queues.append(QueueLook(queue.name, count, oldest))
    running = {
        "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}},
        "work_pools": {"name": {"any_": [POOL]}},
    }
    found.running = int((await client.request("POST", "/flow_runs/count", json=running)).json())
    found.workers = len(await workers(client))


def _staged(folder: Path) -> tuple[int, int]:
    """Return how many runs have staged files, and the bytes that are there alone: links take no room."""
    runs, size = 0, 0
    with suppress(OSError):
        runs = sum(1 for _ in os.scandir(folder))
    for above, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                info = os.lstat(f"{above}/{name}")
                size += info.st_size if info.st_nlink == 1 else 0
    return runs, size


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
