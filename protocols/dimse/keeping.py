"""Gives what modalities send its name on disk: one association's part of receiving for a source, in any process.

An instance is answered 0000 when its data and its name are on disk. What several processes must know of each other for
that lies on disk too; the rest, what has come and when, is gathered by whoever admits associations
(`protocols.dimse.intake`), from `news`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from imaging.header import Header
from protocols.dimse.command import CommandSet
from protocols.dimse.receive import OUT_OF_RESOURCES, SUCCESS, Depot
from protocols.dimse.served import Caller, ServedAssociation
from protocols.files import durable
from transfer.content import same_content
from transfer.errors import Busy
from transfer.spool import ReceivedUnit, Spool, sync

if TYPE_CHECKING:
    from protocols.dimse.senders import KnownSender

# Of one association, between two looks at the room that is left: a look takes as long as a tenth of a small instance.
LOOK_BYTES, LOOK_S = 1 << 20, 0.1
TOUCH_S = 1.0  # between two marks that a unit is still being received
SLOT = 8  # bytes of one process in the memory of `Versions`


@dataclass(frozen=True)
class Terms:
    """How one source receives.

    Attributes:
        name: of the source.
        aet: by which it is called.
        senders: who may send; () for everybody.
        by_series: whether a unit is a series, not a study.
        settle_s: seconds of silence after which a unit is complete.
        most: associations at once.
        keep_free: bytes that must stay free on the disk.
        open: whether anything is accepted now; if not, that holds for associations that are open as well.
    """

    name: str
    aet: str
    senders: tuple[KnownSender, ...] = ()
    by_series: bool = False
    settle_s: float = 60.0
    most: int = 64
    keep_free: int = 1 << 30
    open: bool = True


@dataclass
class Counts:
    """What a source has received since its process began; for metrics.

    Attributes:
        refused: associations that were refused, by reason.
        failed: instances that were answered with another status than 0000.
    """

    associations: int = 0
    instances: int = 0
    bytes: int = 0
    duplicates: int = 0
    versions: int = 0
    failed: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class Versions:
    """Shows a process when another one has begun a later version of a unit.

    Args:
        memory: shared by all of them.
        slot: of this process, in which nobody else writes.
    """

    def __init__(self, memory: mmap, slot: int) -> None:
        self._memory, self._slot = memory, slice(slot * SLOT, (slot + 1) * SLOT)
        self._lock = threading.Lock()

    def begun(self) -> None:
        """Note that this process has begun one."""
        with self._lock:
            count = int.from_bytes(self._memory[self._slot], "little") + 1
            self._memory[self._slot] = count.to_bytes(SLOT, "little")

    @property
    def seen(self) -> bytes:
        """What changes with each that is begun."""
        return self._memory[:]


@dataclass(frozen=True)
class News:
    """What has come since it was asked for last.

    Attributes:
        heard: when something last came for a unit (`time.monotonic`, which all processes share).
    """

    heard: list[tuple[ReceivedUnit, float]]
    instances: int = 0
    bytes: int = 0
    duplicates: int = 0
    versions: int = 0
    failed: int = 0


class Receiving:
    """Receives for one source in this process; safe to use from several threads.

    Args:
        versions: where other processes receive for it as well.
    """

    def __init__(self, terms: Terms, spool: Spool, versions: Versions | None = None) -> None:
        self.terms, self.spool = terms, spool
        self.counts = Counts()
        self.way: type[durable.DurableFile] = durable.DurableFile
        self.full = False  # whether the disk was, when somebody looked last
        self._lock = threading.Lock()
        self._visits: set[SpoolVisit] = set()
        self._heard: dict[ReceivedUnit, float] = {}
        self._touched: dict[ReceivedUnit, float] = {}  # as still being received, within the last TOUCH_S
        self._shared, self._seen = versions, b""
        self._device = -1  # that the folder was on when it was found
        self._versions: dict[ReceivedUnit, int] = {}  # the highest, by the first; of the few that have any

    def begin(self) -> None:
        """Find out how files become durable in the folder, which is there.

        Raises:
            OSError: it can't be written to.
        """
        self.way = durable.way_of(self.spool.folder)
        self._device = self.spool.folder.stat().st_dev

    def visit(self, caller: Caller) -> SpoolVisit:
        """Return what an association that was admitted belongs to."""
        made = SpoolVisit(self, caller)
        with self._lock:
            self._visits.add(made)
        return made

    def has_room(self) -> bool:
        """Return True if the disk has more room than is to be kept free."""
        try:
            disk = self._disk()
        except OSError:
            self.full = True
            return False
        self.full = disk.f_bavail * disk.f_frsize < max(self.terms.keep_free, 1) or (disk.f_files > 0 == disk.f_favail)
        return not self.full

    @property
    def isbusy(self) -> bool:
        """Whether this process serves more than one association for the source."""
        return len(self._visits) > 1

    def _disk(self) -> os.statvfs_result:
        """Return how full the folder's disk is; make the folder if somebody has removed it.

        Raises:
            OSError: it can't be looked at, or made, or its file system is not mounted any more.
        """
        folder = self.spool.folder
        try:
            return os.statvfs(folder)
        except FileNotFoundError:
            if folder.parent.parent.stat().st_dev != self._device:
                raise
            self.spool.prepare()
            return os.statvfs(folder)

    def left(self, visit: SpoolVisit) -> None:
        """Note that an association is over."""
        with self._lock:
            self._visits.discard(visit)

    def failed(self) -> None:
        """Count an instance that was answered with another status than 0000."""
        with self._lock:
            self.counts.failed += 1

    def received(self, size: int) -> None:
        """Count an instance of so many bytes."""
        with self._lock:
            self.counts.instances += 1
            self.counts.bytes += size

    def kept(self, unit: ReceivedUnit, *, isnew: bool) -> None:
        """Note that an instance of a unit is on disk."""
        with self._lock:
            self._heard[unit] = time.monotonic()
            self.counts.duplicates += not isnew
            self.counts.versions += isnew and unit.version > 1
            self._count_version(unit)
            if unit.version > 1 and isnew and self._shared is not None:
                self._shared.begun()

    def _count_version(self, unit: ReceivedUnit) -> None:
        if unit.version > 1:
            first = replace(unit, version=1)
            self._versions[first] = max(unit.version, self._versions.get(first, 1))

    def last_with(self, uid: str, first: ReceivedUnit) -> ReceivedUnit:
        """Return the last version of a unit that has an instance, behind which another content belongs.

        Args:
            first: the unit's first version, which is returned if none has it.
        """
        if self._shared is not None and (seen := self._shared.seen) != self._seen:
            self._look_for_versions()
            self._seen = seen
        highest = self._versions.get(first, 1)
        if highest == 1:
            return first
        later = [replace(first, version=version) for version in range(highest, 1, -1)]
        if not any((self.spool.folder / unit.name).exists() for unit in later):  # all of them were delivered
            with self._lock:
                if self._versions.get(first) == highest:
                    del self._versions[first]
        return next((unit for unit in later if (self.spool.folder / unit.name / f"{uid}.dcm").exists()), first)

    def _look_for_versions(self) -> None:
        there = [unit for unit, _, _ in self.spool.units() if unit.version > 1]
        with self._lock:
            for unit in there:
                self._count_version(unit)

    def _hear_busy(self, now: float) -> None:
        """Note, under the lock, that the units of which an instance is on its way go on."""
        for unit in {visit.unit for visit in self._visits if visit.receiving and visit.unit is not None}:
            self._heard[unit] = now
            if now - self._touched.get(unit, 0.0) >= TOUCH_S:
                self._touched[unit] = now
                with suppress(OSError):  # it is a mark for whoever looks at the folder, no more
                    self.spool.touch(unit)
        self._touched = {unit: at for unit, at in self._touched.items() if now - at < TOUCH_S}

    def news(self) -> News | None:
        """Return what has come since the last call, for whoever gathers it; None if nothing has."""
        with self._lock:
            self._hear_busy(time.monotonic())
            counts, heard = self.counts, list(self._heard.items())
            if not heard and counts == Counts():
                return None
            self.counts, self._heard = Counts(), {}
        return News(heard, counts.instances, counts.bytes, counts.duplicates, counts.versions, counts.failed)


class SpoolVisit:
    """One association on which a modality sends.

    Attributes:
        unit: what the instance before belongs to.
        receiving: whether an instance is on its way.
    """

    services: frozenset[str] = frozenset()

    def __init__(self, receiving: Receiving, caller: Caller) -> None:
        self.reception, self.caller = receiving, caller
        self.unit: ReceivedUnit | None = None
        self.receiving = False
        self.instances = self.bytes = 0
        self._depot = SpoolDepot(self)

    def depot(self, request: CommandSet) -> tuple[Depot | None, int]:
        """Return the folder for an instance, or None and the status to refuse it with."""
        if not (self.reception.terms.open and self._depot.has_room()):
            self.reception.failed()
            return None, OUT_OF_RESOURCES
        self.receiving = True
        return self._depot, SUCCESS

    def serve(self, association: ServedAssociation, request: CommandSet) -> bool:
        """Serve nothing but storage."""
        return False

    def ended(self) -> None:
        """Note that the association is over."""
        self.receiving = False
        self._depot.close()
        self.reception.left(self)


class SpoolDepot(Depot):
    """Gives instances of one association their names, each in the folder of its unit."""

    def __init__(self, visit: SpoolVisit) -> None:
        super().__init__(visit.reception.spool.folder)
        self._visit, self._reception = visit, visit.reception
        self._found_way = visit.reception.way
        self._group = ""  # UID of the study or series of the instance before
        self._unit = ReceivedUnit(visit.caller.calling, visit.caller.called, visit.caller.host, "")
        self._unlooked = 0  # bytes
        self._look_at = 0.0  # `time.monotonic` from which on what was seen last no longer holds
        self._terms: Terms | None = None  # under which that was

    def blank(self) -> durable.DurableFile:
        """Return a file for an instance."""
        part = super().blank()
        part.ahead_bytes = durable.SHARED_BYTES if self._reception.isbusy else durable.AHEAD_BYTES
        return part

    def has_room(self) -> bool:
        """Return True if the disk has room for one more, as far as was seen a moment ago."""
        now = time.monotonic()
        if self._unlooked < LOOK_BYTES and now < self._look_at and self._terms is self._reception.terms:
            return True
        self._terms = self._reception.terms
        has = self._reception.has_room()
        self._unlooked, self._look_at = 0, now + LOOK_S if has else 0.0
        return has

    def wrote(self, count: int) -> None:
        """Look for room now and then: nobody knows how long a data set is before it has ended."""
        self._unlooked += count
        if self._unlooked >= LOOK_BYTES and not self.has_room():
            self.failure = Busy(f"{self.folder} has too little room")

    def keep(self, part: durable.DurableFile, size: int, uid: str, seen: Header | None) -> tuple[int, Header | None]:
        """Give a whole file its name, unless the same content has it; one with another content gets it elsewhere."""
        status, header = self.identified(part, size, uid, seen)
        if header is None:
            return status, None
        group = header.SeriesInstanceUID if self._reception.terms.by_series else header.StudyInstanceUID
        if group != self._group:
            self._group, self._unit = group, self._unit.of(group)
        unit, isnew = self._reception.last_with(uid, self._unit), True
        part.written()
        while True:
            try:
                part.keep(f"{unit.name}/{uid}.dcm", replace=False)
            except FileNotFoundError:
                self._reception.spool.make(unit)
                continue
            except FileExistsError:
                same = self._same(part, size, self.folder / unit.name / f"{uid}.dcm")
                if same is None:
                    continue  # it was delivered and removed meanwhile
                if not same:
                    unit = unit.later
                    continue
                isnew = False
            break
        with suppress(FileNotFoundError):  # it was delivered and removed already
            if isnew:
                part.named(f"{self.path}/{unit.name}")
            else:
                sync(f"{self.path}/{unit.name}")  # who sent it first may still be waiting for that
        self._reception.kept(unit, isnew=isnew)
        self._visit.unit = unit
        return SUCCESS, header if isnew else None

    def answering(self, status: int) -> None:
        """Note that an instance is all there, or dropped."""
        self._visit.receiving = False
        if status != SUCCESS:
            self._reception.failed()

    @staticmethod
    def _same(part: durable.DurableFile, size: int, other: Path) -> bool | None:
        """Return whether another file has the same content; None if it is not there any more."""
        try:
            fd = os.open(other, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            return os.fstat(fd).st_size == size and same_content(part.fd, fd)
        finally:
            os.close(fd)

    def note(self, part: durable.DurableFile, size: int, header: Header) -> None:
        """Count an instance that has got its name."""
        self._visit.instances += 1
        self._visit.bytes += size
        self._reception.received(size)
