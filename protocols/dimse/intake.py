"""What a listener for modalities decides: who may send, and when a unit is complete.

An instance is answered 0000 when its data and its name are on disk (`protocols.dimse.keeping`). A unit, all that one
sender has sent of a study or a series, is settled when nothing has come for it for a while.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress

from protocols.dimse import scp
from protocols.dimse.command import CommandSet
from protocols.dimse.committing import PUSH_MODEL, Commitments, Reports, ReportTo
from protocols.dimse.keeping import News, Receiving, SpoolVisit, Terms, Versions
from protocols.dimse.scp import Refusal
from protocols.dimse.served import Caller, ServedAssociation
from protocols.files import partial
from transfer.plan import Origin
from transfer.spool import ReceivedUnit, Spool, sync

logger = logging.getLogger(__name__)


class Reception(Receiving):
    """Receives for one source, over all its associations; safe to use from several threads.

    Args:
        delivered: returns those of some SOP instance UIDs that all have confirmed whom the source sends to what comes
            from a sender.
        reports: sends reports of storage commitment to senders that await them on an association of ours.
    """

    def __init__(
        self,
        terms: Terms,
        spool: Spool,
        delivered: Callable[[Origin, Collection[str]], set[str]],
        reports: Reports,
        versions: Versions | None = None,
    ) -> None:
        super().__init__(terms, spool, versions)
        self.reports = reports
        self._delivered = delivered

    def prepare(self) -> None:
        """Make the folder, and take up what was received before.

        Raises:
            OSError: it can't be written to.
        """
        self.spool.prepare()
        partial.sweep(self.spool.folder)
        self.begin()
        self.look()
        self.reports.take_up(self.spool.reports)

    def look(self) -> None:
        """Take up what lies on disk and was not told of by whoever received it."""
        now, clock = time.monotonic(), time.time()
        with self._lock:
            for unit, _, changed in self.spool.units():
                self._heard.setdefault(unit, now - max(0.0, clock - changed))
                self._count_version(unit)

    def add(self, news: News) -> None:
        """Count what another process has received."""
        with self._lock:
            counts = self.counts
            counts.instances += news.instances
            counts.bytes += news.bytes
            counts.duplicates += news.duplicates
            counts.versions += news.versions
            counts.failed += news.failed
            for unit, heard in news.heard:
                self._heard[unit] = max(heard, self._heard.get(unit, 0.0))
                self._count_version(unit)

    @property
    def associations(self) -> int:
        """How many are open."""
        return len(self._visits)

    @property
    def receiving(self) -> int:
        """How many units are not complete yet."""
        return len(self._heard)

    def admit(self, caller: Caller) -> ListenerVisit | Refusal:
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
                visit = ListenerVisit(self, caller, sender.port if sender else 0, isfirst=not self._visits)
                self._visits.add(visit)
                self.counts.associations += 1
                return visit
        return self._refused(caller, "limit", scp.TOO_MANY)

    def _refused(self, caller: Caller, why: str, refusal: Refusal) -> Refusal:
        with self._lock:
            self.counts.refused[why] += 1
        logger.warning("%s: association of %s at %s refused: %s", self.terms.name, caller.calling, caller.host, why)
        return refusal

    def settled(self) -> list[ReceivedUnit]:
        """Return the units that have become complete since the last call; those that are being received are not."""
        now = time.monotonic()
        with self._lock:
            self._hear_busy(now)
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


class ListenerVisit(SpoolVisit):
    """One association on which a modality sends, and asks for storage commitment.

    Attributes:
        isfirst: whether no other one was open when it was admitted.
        gathering: what it belongs to.
    """

    services = frozenset((PUSH_MODEL,))

    def __init__(self, reception: Reception, caller: Caller, report_port: int, *, isfirst: bool) -> None:
        super().__init__(reception, caller)
        self.isfirst, self.gathering = isfirst, reception
        self._begun = time.monotonic()
        to = ReportTo(reception.terms.aet, caller.calling, caller.host, report_port)
        origin = Origin(caller.calling, caller.called, caller.host)
        self._commitments = Commitments(
            lambda asked: reception.holds(origin, asked),
            to,
            reception.reports,
            reception.spool.reports,
            reception.has_room,
        )

    def serve(self, association: ServedAssociation, request: CommandSet) -> bool:
        """Serve requests for storage commitment."""
        return self._commitments.serve(association, request)

    def ended(self) -> None:
        """Note that the association is over."""
        super().ended()
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


class ListenerDesk:
    """Decides by the AE title that is called which source an association is for."""

    def __init__(self) -> None:
        self._by_aet: dict[str, Reception] = {}
        self.unknown = 0  # associations that called an AE title that nobody has

    def seat(self, receptions: Iterable[Reception]) -> None:
        """Let these receive from now on, and nobody else; open associations go on."""
        self._by_aet = {one.terms.aet: one for one in receptions}

    def admit(self, caller: Caller) -> ListenerVisit | Refusal:
        """Admit an association to the source that it calls."""
        reception = self._by_aet.get(caller.called)
        if reception is None:
            self.unknown += 1
            logger.warning("association of %s at %s refused: it calls an unknown AE title", caller.calling, caller.host)
            return scp.CALLED_UNKNOWN
        return reception.admit(caller)
