"""The ports that DICOM sources listen on: opened, changed and closed as the sources are, without Prefect.

One port has one listener, whose sources differ in their AE titles. What changes while it runs holds for the next
association; those that are under way are never broken for it, but one of a source that is gone, or paused, is told to
come again later (A700).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blocks.dicom_source import DicomSource, DicomUnit
from protocols.dimse.committing import Reports
from protocols.dimse.intake import ListenerDesk, Reception
from protocols.dimse.keeping import Terms
from protocols.dimse.receivers import Receivers
from protocols.dimse.scp import StorageScp
from protocols.dimse.senders import KnownSender
from protocols.net.tls import Tls, is_pem
from tasks.sources.dicom import security
from tasks.sources.ports import clashes
from transfer import silent
from transfer.errors import Misconfigured
from transfer.home import Home
from transfer.listening import ListenerStatus
from transfer.oserrors import words_of
from transfer.plan import Origin
from transfer.spool import FOLDER, ReceivedUnit, Spool

logger = logging.getLogger(__name__)

LOOK_S = 0.1  # between two looks at associations that are to end
Delivered = Callable[[DicomSource, Origin, Collection[str]], set[str]]


@dataclass
class _Port:
    """One listener and its sources."""

    desk: ListenerDesk
    scp: StorageScp
    security: tuple[str, ...]
    files: tuple[object, ...] = ()  # what the files of its certificate, key and authorities were when they were read
    receptions: list[Reception] = field(default_factory=list)


class Listeners:
    """All listeners of this process.

    Args:
        delivered: returns those of some SOP Instance UIDs, of a sender, that all whom a source sends them to have
            confirmed.
        receivers: who serves associations where several are open; closed with the listeners.

    Attributes:
        troubles: why a source does not listen, in a sentence, by its name.
    """

    def __init__(
        self,
        home: Home,
        delivered: Delivered = lambda source, origin, uids: set(),
        receivers: Receivers | None = None,
    ) -> None:
        self.troubles: dict[str, str] = {}
        self._home, self._delivered, self._receivers = home, delivered, receivers
        self._sources: dict[str, DicomSource] = {}
        self._receptions: dict[str, Reception] = {}
        self._ports: dict[tuple[str, int], _Port] = {}
        self._ending: list[StorageScp] = []
        self._reports = Reports(self._security_of)

    def apply(self, sources: Iterable[DicomSource]) -> None:
        """Listen for these sources, and for no others."""
        wanted = sorted(sources, key=lambda one: one.name)
        # Who listens already keeps its port and AE title against one that was added.
        wanted.sort(key=lambda one: one.name not in self._sources or one.name in self.troubles)
        troubles = clashes(wanted)
        by_place: dict[tuple[str, int], list[DicomSource]] = {}
        for one in wanted:
            if one.name not in troubles:
                try:
                    self._receptions[one.name] = self._reception(one)
                    by_place.setdefault(one.place, []).append(one)
                except OSError as exc:
                    troubles[one.name] = f"nothing can be kept: {words_of(exc)}"
        self._sources = {one.name: one for one in wanted}
        for place in set(self._ports) - set(by_place):
            self._end(place)
        for place, here in by_place.items():
            if why := self._listen(place, here):
                troubles |= dict.fromkeys((one.name for one in here), why)
        for name in set(self._receptions) - set(self._sources):
            # Nobody would dispatch what still came on its associations.
            self._receptions[name].terms = replace(self._receptions[name].terms, open=False)
            if not self._receptions[name].associations:
                del self._receptions[name]
        if self._receivers is not None:
            for reception in self._receptions.values():
                self._receivers.inform(reception)
        for name, why in troubles.items():
            if self.troubles.get(name) != why:
                logger.error("source %s does not listen: %s", name, why)
        self.troubles = troubles

    def renew(self) -> dict[str, str]:
        """Show the certificates whose files were renewed, from the next association on.

        Not to be called in a thread that runs an event loop.

        Returns:
            Why a renewed one can't be used, by the names of its sources; the former one is shown until it can, or its
            file system answers.
        """
        troubles: dict[str, str] = {}
        paths = [path for port in self._ports.values() for path in _paths(port.security)]
        marks = asyncio.run(silent.looked(_mark, paths))
        for place, port in self._ports.items():
            here = [one for one in self._sources.values() if one.place == place and one.security == port.security]
            if not here or not marks.keys() >= set(_paths(port.security)):
                continue
            files = tuple(marks[one] for one in _paths(port.security))
            if files == port.files:
                continue
            try:
                port.scp.tls, port.files = security(here[0]).server(), files
            except Misconfigured as exc:  # perhaps half of it is written
                troubles |= dict.fromkeys((one.name for one in here), exc.message)
            else:
                logger.info("port %d shows its renewed certificate", place[1])
        return troubles

    def settled(self) -> dict[str, list[ReceivedUnit]]:
        """Return the units that have become complete since the last call, by the names of their sources."""
        found = {name: one.settled() for name, one in list(self._receptions.items())}
        self._ending = [scp for scp in self._ending if scp.connections]
        if self._receivers is not None:
            self._receivers.tidy()
        return {name: units for name, units in found.items() if units}

    def status(self) -> dict[str, Any]:
        """Return what metrics and people want to know of each source; totals count since the process began."""
        return {name: self._status_of(one) for name, one in self._sources.items()}

    def counts(self) -> list[ListenerStatus]:
        """Return what each port, at all its addresses, has seen since the process began; for metrics."""
        found = []
        for number in sorted({number for _, number in self._ports}):
            ports = [port for (_, one), port in self._ports.items() if one == number]
            receptions = [one for port in ports for one in port.receptions]
            counts = [one.counts for one in receptions]
            found.append(
                ListenerStatus(
                    port=number,
                    associations=sum(one.associations for one in receptions),
                    accepted=sum(one.associations for one in counts),
                    refused=sum(one.refused.total() for one in counts) + sum(port.desk.unknown for port in ports),
                    instances=sum(one.instances for one in counts),
                    bytes=sum(one.bytes for one in counts),
                    time=time.time(),
                    unsecured=sum(port.scp.unsecured for port in ports),
                )
            )
        return found

    def close(self, wait_s: float, hurried: Callable[[], bool] = lambda: False) -> None:
        """Stop listening; associations have some seconds to end by themselves.

        Args:
            hurried: whether somebody wants it at once.
        """
        for place in list(self._ports):
            self._end(place)
        end = time.monotonic() + wait_s
        while any(scp.connections for scp in self._ending) and time.monotonic() < end and not hurried():
            time.sleep(LOOK_S)
        for scp in self._ending:
            scp.close()
        if self._receivers is not None:
            self._receivers.close()
        self._reports.close()

    def _reception(self, source: DicomSource) -> Reception:
        """Return what receives for a source, made if it is new; its terms are the source's from now on.

        Raises:
            OSError: its folder can't be made.
        """
        known = self._receptions.get(source.name)
        if known is not None:
            known.terms = terms(source)
            return known
        spool = Spool(self._home.root / FOLDER / source.name)
        name = source.name

        def delivered(origin: Origin, uids: Collection[str]) -> set[str]:
            there = self._sources.get(name)
            return self._delivered(there, origin, uids) if there and uids else set()

        versions = self._receivers.versions if self._receivers is not None else None
        made = Reception(terms(source), spool, delivered, self._reports, versions)
        made.prepare()
        return made

    def _listen(self, place: tuple[str, int], sources: list[DicomSource]) -> str:
        """Listen at a place for its sources; return why that is not possible, "" if it is."""
        port, wanted = self._ports.get(place), sources[0].security
        files = _files(wanted)  # before they are read: what is renewed meanwhile is seen then
        receptions = [self._receptions[one.name] for one in sources]
        idle_timeout_s = max(one.idle_timeout_s for one in sources)
        try:
            if port is None:
                desk = ListenerDesk()
                desk.seat(receptions)
                tls = security(sources[0]).server() if wanted else None
                lend = self._receivers.lend if self._receivers is not None else None
                scp = StorageScp(*place, "", desk, tls, idle_timeout_s, tls_only=bool(wanted), lend=lend)
                self._ports[place] = port = _Port(desk, scp, wanted, files, receptions)
                logger.info("listening on port %d for %s", place[1], ", ".join(one.aet for one in sources))
            elif port.security != wanted:
                tls = security(sources[0]).server() if wanted else None
                port.scp.tls, port.scp.tls_only, port.security, port.files = tls, bool(wanted), wanted, files
        except Misconfigured as exc:
            if port is not None:  # with the former certificate, nobody would know that the new one is of no use
                self._end(place)
            return exc.message
        except OSError as exc:
            return f"can't listen on {place[0] or 'all addresses'}, port {place[1]}: {_words(exc)}"
        port.scp.idle_timeout_s = idle_timeout_s
        port.receptions = receptions
        port.desk.seat(receptions)
        return ""

    def _end(self, place: tuple[str, int]) -> None:
        """Stop listening at a place; its associations go on."""
        port = self._ports.pop(place)
        port.desk.seat(())
        port.scp.deafen()
        self._ending.append(port.scp)
        logger.info("no longer listening on port %d", place[1])

    def _security_of(self, name: str) -> Tls | None:
        """Return the settings of TLS for reports that a source sends."""
        source = self._sources.get(name)
        return security(source) if source is not None and source.security else None

    def _status_of(self, source: DicomSource) -> dict[str, Any]:
        found: dict[str, Any] = {"port": source.port, "aet": source.aet}
        trouble, one = self.troubles.get(source.name, ""), self._receptions.get(source.name)
        found["state"] = "failed" if trouble else "listening" if source.enabled else "paused"
        found["error"] = trouble
        if one is not None:
            counts = one.counts
            found |= {
                "associations": one.associations,
                "receiving": one.receiving,
                "full": not one.has_room(),
                "totals": {
                    "associations": counts.associations,
                    "instances": counts.instances,
                    "bytes": counts.bytes,
                    "duplicates": counts.duplicates,
                    "versions": counts.versions,
                    "failed": counts.failed,
                    "refused": dict(counts.refused),
                },
            }
        return found


def _files(security: tuple[str, ...]) -> tuple[object, ...]:
    """Return marks of the files that settings of TLS name: others if one of them is replaced, or written to."""
    return tuple(map(_mark, _paths(security)))


def _paths(security: tuple[str, ...]) -> tuple[str, ...]:
    """Return those settings of TLS that are paths; not the password, or PEM text: of one that is slow the log tells."""
    cert, key, _, ca, _ = security or ("",) * 5
    return tuple(one for one in (cert, key, ca) if one and not is_pem(one))


def _mark(path: str) -> object:
    try:
        info = Path(path).stat()
    except (OSError, ValueError):  # it is gone
        return None
    return info.st_dev, info.st_ino, info.st_mtime_ns, info.st_size


def _words(exc: OSError) -> str:
    """Return why a port can't be had; Python's own words repeat the address."""
    if exc.errno in (errno.EACCES, errno.EPERM):
        return "not allowed to this user: ports below 1024 need CAP_NET_BIND_SERVICE"
    return os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc)


def terms(source: DicomSource) -> Terms:
    """Return how a source receives."""
    return Terms(
        name=source.name,
        aet=source.aet,
        senders=tuple(KnownSender(one.aet, one.host, one.port) for one in source.peers),
        by_series=source.unit is DicomUnit.SERIES,
        settle_s=source.settle_s,
        most=source.max_associations,
        keep_free=source.keep_free,
        open=source.enabled,
    )
