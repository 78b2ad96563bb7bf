"""What a listener for modalities decides: who may send, where instances go, when a unit is complete, when it is full.

An instance is answered 0000 when its data and its name are on disk. A unit, all that one sender has sent of a study or
a series, is settled when nothing has come for it for a while.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from imaging.header import Header
from protocols.dimse import scp
from protocols.dimse.committing import PUSH_MODEL, Commitments, Reports, ReportTo
from protocols.dimse.receive import OUT_OF_RESOURCES, SUCCESS, Depot
from protocols.dimse.scp import Caller, Refusal, ServedAssociation
from protocols.dimse.stream import CommandSet
from protocols.files import durable, partial
from transfer.content import same_content
from transfer.errors import Busy
from transfer.plan import Origin
from transfer.spool import ReceivedUnit, Spool, sync

logger = logging.getLogger(__name__)

# Of one association, between two looks at the room that is left: a look takes as long as a tenth of a small instance.
LOOK_BYTES, LOOK_S = 1 << 20, 0.1
FRESH_S, AGAIN_S, GOOD_S = 30.0, 5.0, 600.0  # for which a name counts as found, as not found, as found before
TOUCH_S = 1.0  # between two marks that a unit is still being received


@dataclass(frozen=True)
class KnownSender:
    """Who may send: a pattern of AE titles, and an address, a network or a name; "" for any.

    Attributes:
        port: on which it listens for reports of storage commitment; 0 for the association that asked.
    """

    aet: str = ""
    host: str = ""
    port: int = 0

    def matches(self, caller: Caller) -> bool | None:
        """Return True if a caller is meant; None if nobody can tell now whose address it has."""
        if self.aet and not fnmatchcase(caller.calling, self.aet):
            return False
        if not self.host:
            return True
        try:
            there = ipaddress.ip_address(caller.host.partition("%")[0])
        except ValueError:
            return False
        try:
            return there in ipaddress.ip_network(self.host, strict=False)
        except ValueError:
            known = _addresses(self.host)
            return None if known is None else there in known


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


class Reception:
    """Receives for one source, over all its associations; safe to use from several threads.

    Args:
        delivered: returns those of some SOP instance UIDs that all have confirmed whom the source sends to what comes
            from a sender.
        reports: sends reports of storage commitment to senders that await them on an association of ours.
    """

    def __init__(
        self, terms: Terms, spool: Spool, delivered: Callable[[Origin, Collection[str]], set[str]], reports: Reports
    ) -> None:
        self.terms, self.spool, self.reports = terms, spool, reports
        self.counts = Counts()
        self.durably: durable.DurableWay = durable.AnyFileSystem
        self.full = False  # whether the disk was, when somebody looked last
        self._delivered = delivered
        self._lock = threading.Lock()
        self._visits: set[SpoolVisit] = set()
        self._heard: dict[ReceivedUnit, float] = {}
        self._versions: dict[ReceivedUnit, int] = {}  # the highest, by the first; of the few that have any

    def prepare(self) -> None:
        """Make the folder, and take up what was received before.

        Raises:
            OSError: it can't be written to.
        """
        self.spool.prepare()
        partial.sweep(self.spool.folder)
        self.durably = durable.way_of(self.spool.folder)
        now, clock = time.monotonic(), time.time()
        with self._lock:
            for unit, _, changed in self.spool.units():
                self._heard.setdefault(unit, now - max(0.0, clock - changed))
                self._count_version(unit)
        self.reports.take_up(self.spool.reports)

    @property
    def associations(self) -> int:
        """How many are open."""
        return len(self._visits)

    @property
    def receiving(self) -> int:
        """How many units are not complete yet."""
        return len(self._heard)

    def admit(self, caller: Caller) -> SpoolVisit | Refusal:
        """Admit a caller's association, or refuse it, for ever or for now."""
        terms = self.terms
        found = [(one.matches(caller), one) for one in terms.senders]
        sender = next((one for meant, one in found if meant), None)
        if sender is None and any(meant is None for meant, _ in found):
            return self._refused(caller, "name", scp.CONGESTED)  # many senders give up for good where it is for good
        if sender is None and terms.senders:
            return self._refused(caller, "sender", scp.CALLING_UNKNOWN)
        if not terms.open:
            return self._refused(caller, "paused", scp.CONGESTED)
        if not self.has_room():
            return self._refused(caller, "disk", scp.CONGESTED)
        with self._lock:
            if len(self._visits) < terms.most:
                visit = SpoolVisit(self, caller, sender.port if sender else 0)
                self._visits.add(visit)
                self.counts.associations += 1
                return visit
        return self._refused(caller, "limit", scp.TOO_MANY)

    def _refused(self, caller: Caller, why: str, refusal: Refusal) -> Refusal:
        with self._lock:
            self.counts.refused[why] += 1
        logger.warning("%s: association of %s at %s refused: %s", self.terms.name, caller.calling, caller.host, why)
        return refusal

    def has_room(self) -> bool:
        """Return True if the disk has more room than is to be kept free."""
        try:
            disk = os.statvfs(self.spool.folder)
        except OSError:
            self.full = True
            return False
        self.full = disk.f_bavail * disk.f_frsize < max(self.terms.keep_free, 1) or (disk.f_files > 0 == disk.f_favail)
        return not self.full

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

    def _count_version(self, unit: ReceivedUnit) -> None:
        if unit.version > 1:
            first = replace(unit, version=1)
            self._versions[first] = max(unit.version, self._versions.get(first, 1))

    def last_with(self, uid: str, first: ReceivedUnit) -> ReceivedUnit:
        """Return the last version of a unit that has an instance, behind which another content belongs.

        Args:
            first: the unit's first version, which is returned if none has it.
        """
        highest = self._versions.get(first, 1)
        if highest == 1:
            return first
        later = [replace(first, version=version) for version in range(highest, 1, -1)]
        if not any((self.spool.folder / unit.name).exists() for unit in later):  # all of them were delivered
            with self._lock:
                if self._versions.get(first) == highest:
                    del self._versions[first]
        return next((unit for unit in later if (self.spool.folder / unit.name / f"{uid}.dcm").exists()), first)

    def settled(self) -> list[ReceivedUnit]:
        """Return the units that have become complete since the last call; those that are being received are not."""
        now = time.monotonic()
        with self._lock:
            busy = {visit.unit for visit in self._visits if visit.receiving and visit.unit is not None}
            for unit in busy:
                if now - self._heard.get(unit, 0.0) >= TOUCH_S:
                    self.spool.touch(unit)
                    self._heard[unit] = now
            done = [unit for unit, heard in self._heard.items() if now - heard >= self.terms.settle_s]
            for unit in done:
                del self._heard[unit]
        return done

    def holds(self, origin: Origin, instances: Mapping[str, str]) -> set[str]:
        """Return the UIDs of instances that lie here on disk, or that everybody has confirmed."""
        wanted = {f"{uid}.dcm": uid for uid in instances}
        found: set[str] = set()
        for _, folder, _ in self.spool.units():
            with suppress(FileNotFoundError):
                with os.scandir(folder) as entries:
                    here = {wanted[entry.name] for entry in entries if entry.name in wanted}
                if here:
                    sync(folder)  # one may have just got its name
                    found |= here
            if len(found) == len(wanted):
                return found
        return found | self._delivered(origin, instances.keys() - found)


class SpoolVisit:
    """One association on which a modality sends.

    Attributes:
        unit: what the instance before belongs to.
        receiving: whether an instance is on its way.
    """

    services = frozenset((PUSH_MODEL,))

    def __init__(self, reception: Reception, caller: Caller, report_port: int) -> None:
        self.reception, self.caller = reception, caller
        self.unit: ReceivedUnit | None = None
        self.receiving = False
        self.instances = self.bytes = 0
        self._begun = time.monotonic()
        self._depot = SpoolDepot(self)
        to = ReportTo(reception.terms.aet, caller.calling, caller.host, report_port)
        origin = Origin(caller.calling, caller.called, caller.host)
        self._commitments = Commitments(
            lambda asked: reception.holds(origin, asked),
            to,
            reception.reports,
            reception.spool.reports,
            reception.has_room,
        )

    def depot(self, request: CommandSet) -> tuple[Depot | None, int]:
        """Return the folder for an instance, or None and the status to refuse it with."""
        if not (self.reception.terms.open and self._depot.has_room()):
            self.reception.failed()
            return None, OUT_OF_RESOURCES
        self.receiving = True
        return self._depot, SUCCESS

    def serve(self, association: ServedAssociation, request: CommandSet) -> bool:
        """Serve requests for storage commitment."""
        return self._commitments.serve(association, request)

    def ended(self) -> None:
        """Note that the association is over."""
        self.receiving = False
        self._depot.close()
        self.reception.left(self)
        self._commitments.ended()
        logger.info(
            "%s: association of %s at %s ended: %d instances, %d bytes, %.1f s",
            self.reception.terms.name,
            self.caller.calling,
            self.caller.host,
            self.instances,
            self.bytes,
            time.monotonic() - self._begun,
        )


class SpoolDepot(Depot):
    """Gives instances of one association their names, each in the folder of its unit."""

    def __init__(self, visit: SpoolVisit) -> None:
        super().__init__(visit.reception.spool.folder)
        self._visit, self._reception = visit, visit.reception
        self._durably = visit.reception.durably
        self._unit = ReceivedUnit(visit.caller.calling, visit.caller.called, visit.caller.host, "")
        self._unlooked = 0  # bytes
        self._look_at = 0.0  # `time.monotonic` from which on what was seen last no longer holds
        self._terms: Terms | None = None  # under which that was

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

    def keep(self, part: partial.PartialFile, size: int, uid: str, seen: Header | None) -> tuple[int, Header | None]:
        """Give a whole file its name, unless the same content has it; one with another content gets it elsewhere."""
        status, header = self.identified(part, size, uid, seen)
        if header is None:
            return status, None
        group = header.SeriesInstanceUID if self._reception.terms.by_series else header.StudyInstanceUID
        if group != self._unit.uid:
            self._unit = replace(self._unit, uid=group)
        unit, isnew = self._reception.last_with(uid, self._unit), True
        durably = self._durably(part)
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
                durably.named(f"{self.path}/{unit.name}")
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
    def _same(part: partial.PartialFile, size: int, other: Path) -> bool | None:
        """Return whether another file has the same content; None if it is not there any more."""
        try:
            fd = os.open(other, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            return os.fstat(fd).st_size == size and same_content(part.fd, fd)
        finally:
            os.close(fd)

    def note(self, part: partial.PartialFile, size: int, header: Header) -> None:
        """Count an instance that has got its name."""
        self._visit.instances += 1
        self._visit.bytes += size
        self._reception.received(size)


class ListenerDesk:
    """Decides by the AE title that is called which source an association is for."""

    def __init__(self) -> None:
        self._by_aet: dict[str, Reception] = {}
        self.unknown = 0  # associations that called an AE title that nobody has

    def seat(self, receptions: Iterable[Reception]) -> None:
        """Let these receive from now on, and nobody else; open associations go on."""
        self._by_aet = {one.terms.aet: one for one in receptions}

    def admit(self, caller: Caller) -> SpoolVisit | Refusal:
        """Admit an association to the source that it calls."""
        reception = self._by_aet.get(caller.called)
        if reception is None:
            self.unknown += 1
            logger.warning("association of %s at %s refused: it calls an unknown AE title", caller.calling, caller.host)
            return scp.CALLED_UNKNOWN
        return reception.admit(caller)


@dataclass(frozen=True)
class _Looked:
    """What the name of a host was last found to mean.

    Attributes:
        addresses: as known last; None if they never were.
        until: `time.monotonic` until which nobody asks again.
        good_until: until which the addresses count, though nobody can tell now.
    """

    addresses: frozenset[ipaddress.IPv4Address | ipaddress.IPv6Address] | None
    until: float
    good_until: float


_looked: dict[str, _Looked] = {}  # by name; a resolver that hangs costs each association seconds


def _addresses(host: str) -> frozenset[ipaddress.IPv4Address | ipaddress.IPv6Address] | None:
    """Return the addresses of a host; None if its name means nothing now, nor did some minutes ago."""
    now, before = time.monotonic(), _looked.get(host)
    if before is None or now >= before.until:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError:
            good_until = before.good_until if before else 0.0
            before = _Looked(before.addresses if before and now < good_until else None, now + AGAIN_S, good_until)
        else:
            there = frozenset(ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found)
            before = _Looked(there, now + FRESH_S, now + GOOD_S)
        _looked[host] = before
    return before.addresses
