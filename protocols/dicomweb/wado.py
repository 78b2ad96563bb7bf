"""Retrieves instances by WADO-RS (PS3.18 section 10.4): each is written while it arrives, and named when it is whole.

A series is requested as a whole. What doesn't arrive so (a server or proxy gives up on large answers, a connection
breaks) is listed and requested one by one, and in other forms; an instance that fails affects no other.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from imaging.header import UID, Header
from protocols.dicomweb import qido, wado_uri
from protocols.dicomweb import service as dicomweb
from protocols.dicomweb.service import Service
from protocols.dicomweb.wado_request import ACCEPTS, NoService, Unable, fetch, spooled
from protocols.files import partial
from protocols.files.copies import Copies
from protocols.files.durable import settle
from protocols.net.connection import SLICE_S
from transfer.errors import (
    Busy,
    Cancelled,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    NotFound,
    Rejected,
    TimedOut,
)
from transfer.fanout import gravest, in_threads
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

HOPELESS = 3  # failures, one after the other, until a server counts as broken
MOST_BUSY = 10  # likewise, if it has given something before
MANY_DENIED = 50  # after so many more it is asked again whether it lets us in at all
TRIES = 3  # of one instance over links that break
# What a server says of a series or an instance may hold for that alone; these for good.
LASTING = (NotFound, Misconfigured, Denied)
PASSING = (Busy, Interrupted, TimedOut)


@dataclass(frozen=True)
class WadoSeries:
    """A series to retrieve, and how many instances the server says it has (None if it doesn't say)."""

    study: str
    uid: str
    announced: int | None = None


@dataclass(frozen=True)
class _Job:
    series: WadoSeries
    instance: str = ""  # "" for all of the series at once
    tries: int = 0
    apart: bool = False  # whether the series was asked for at once, in vain


class WadoRetrieval:
    """Brings the instances of some series into a folder, as `<SOP instance UID>.dcm`.

    Instances that are there already are not requested again, so the same retrieval, begun again, fetches what is
    missing. The instances of a series are listed only if the count is not the announced one, because servers take
    longer to list a series than to send it; missing ones are fetched before the next series is listed, so that each try
    adds something however often the connection breaks.

    Args:
        listed: returns the UIDs of a series' instances, None if the server lists none; and whether these are all.

    Attributes:
        notes: what differs from what was announced, for people.
        blind: series of which the server says neither how many instances there are nor which.
        ended_well: series that the server has sent as a whole, as far as its answer shows.
    """

    def __init__(
        self,
        service: Service,
        series: list[WadoSeries],
        folder: Path,
        report: PushReport,
        listed: Callable[[WadoSeries], tuple[set[str] | None, bool]],
        *,
        concurrency: int,
        bandwidth_limit: int | None = None,
    ) -> None:
        self.service, self.series, self.folder, self.report = service, series, folder, report
        self.notes: list[str] = []
        self.blind: set[str] = set()
        self.ended_well: set[str] = set()
        self._listed = listed
        self._throttle = Throttle(bandwidth_limit)
        self._lock = threading.Condition()
        self._here: dict[str, Item] = {}  # by SOP instance UID
        self._counts: Counter[str] = Counter()  # of what is here, by series
        self._copies = Copies(folder, self._here, self._count, report.check)
        self._missing: dict[tuple[str, str], WadoSeries] = {}  # what a server listed that was not here, by series
        self._short: set[str] = set()  # series that lack instances of UIDs that stand for other ones in the plan
        self._refused: dict[tuple[str, str], str] = {}  # why an instance of a series did not come
        self._untaken: Counter[tuple[str, str]] = Counter()  # what came with a whole series, by it and the reason
        self._lost: list[DispatchError] = []  # what broke off each time, or could not be listed
        self._vain = 0  # series that were refused as a whole
        self._denied = 0  # instances, one after the other
        self._unlisted = 0  # series, one after the other, that could not be listed
        self._jobs: deque[_Job] = deque()
        self._busy = 0  # workers that may bring more jobs
        self._failed = False
        self._came = 0
        self._unable = 0  # failures since anything came
        self._whole = True  # whether series are asked for at once
        self._forms = list(ACCEPTS)
        self._uri = ""  # where WADO-URI is, once WADO-RS turned out not to be there
        self._sought = 0  # instances for which that was looked for
        self._concurrency = concurrency

    def run(self) -> Plan:
        """Fetch what is missing; return what should be here as a plan, whose outcomes have been reported.

        Raises:
            DispatchError: not all could be asked for; what came is in the folder, and has been reported.
        """
        with partial.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        partial.sweep(self.folder)
        self._copies.look({one.uid for one in self.series}, self._counts, self.report)
        self._jobs += [_Job(one) for one in self.series if not self._is_whole(one)]
        if self._jobs:
            in_threads(self._work, self._concurrency, "wado")
        if self._lost:
            raise gravest(self._lost)
        for left in self._jobs:  # by a pause: whatever else is known of the series, it is not whole
            self.blind.add(left.series.uid)
            self.ended_well.discard(left.series.uid)
        settle(self.folder, [item.path for item in self._here.values()], self.report.check)
        items = dict(self._here)
        if not self.report.pausing.is_set():
            self._conclude(items)
        return Plan("", self.folder, tuple(sorted(items.values(), key=lambda item: item.path)))

    def _conclude(self, items: dict[str, Item]) -> None:
        """Report what was listed and did not come, and what came once though several series have it."""
        others: Counter[tuple[str, str]] = Counter()  # by series and reason: what is here is another one of that UID
        for (series, uid), one in sorted(self._missing.items()):
            if self._copies.has(series, uid):
                continue
            text = self._refused.get((series, uid), "listed by the server, but not given")
            if uid in self._here:
                others[series, text] += 1
            if uid in items:
                self._short.add(series)
                continue
            items[uid] = Item(f"{uid}.dcm", 0, 0, Header.of("", uid, "", one.study, one.uid, 0))
            self.report(items[uid], Outcome(Kind.REJECTED, text))
        for (series, why), count in {**self._untaken, **others}.items():
            self.notes.append(f"series {series}: {count} instances were not taken: {why}")
        for series, count in self.elsewhere.items():
            self.notes.append(f"series {series}: {count} instances are in another series as well, and come once")

    @property
    def elsewhere(self) -> dict[str, int]:
        """How many instances of a series are here once only, in another series, which has them as well."""
        return {series: len(uids) for series, uids in self._copies.elsewhere.items()}

    @property
    def announced(self) -> list[WadoSeries]:
        """The series, with the number of those listed for one that lacks some and of which the server says none."""
        return [
            replace(one, announced=len(self._known(one.uid)))
            if one.uid in self._short and one.announced is None
            else one
            for one in self.series
        ]

    def _known(self, series: str) -> set[str]:
        """Return the UIDs of all instances that are listed for a series, or here of it."""
        return {uid for one, uid in self._missing if one == series} | {
            uid for uid in self._here if self._copies.has(series, uid)
        }

    def _is_whole(self, series: WadoSeries) -> bool:
        return self._counts[series.uid] > 0 and self._counts[series.uid] == series.announced

    def _count(self, series: str) -> None:
        with self._lock:
            self._counts[series] += 1
            self._came, self._unable, self._denied = self._came + 1, 0, 0

    # ---- workers

    def _work(self) -> None:
        while (job := self._next()) is not None:
            again: list[_Job] = []
            try:
                self.report.check()
                again = self._do(job)
            except BaseException:
                self._failed = True
                raise
            finally:
                with self._lock:
                    self._busy -= 1
                    self._jobs.extendleft(reversed([one for one in again if not (one.tries or one.apart)]))
                    self._jobs.extend(one for one in again if one.tries or one.apart)
                    self._lock.notify_all()

    def _next(self) -> _Job | None:
        """Wait for a job; None if none is left, or another thread has failed."""
        with self._lock:
            while not (self._failed or self.report.pausing.is_set()):
                if self._jobs:
                    self._busy += 1
                    return self._jobs.popleft()
                if not self._busy:
                    break
                self._lock.wait(SLICE_S)
        return None

    def _do(self, job: _Job) -> list[_Job]:
        """Do a job; return the jobs that follow from it."""
        if job.instance:
            return self._do_instance(job)
        if self._whole and not job.apart and not self._counts[job.series.uid]:
            before = self._came
            refusal = self._fetch_whole(job)
            if refusal is not None and before == self._came:
                if isinstance(refusal, Unable | TimedOut):
                    self._whole = False  # each series would take its time to fail
                with self._lock:
                    self._vain += 1
                    if self._vain < HOPELESS or self._came:
                        return [replace(job, apart=True)]  # others first
        if self._is_whole(job.series):
            return []
        begun = self._counts[job.series.uid] > 0
        again = self._one_by_one(job.series)
        if job.series.uid in self.blind - self.ended_well and self._whole and begun:
            self._fetch_whole(job)  # only its own word can show that nothing is missing
        return [one for one in again if not self._copies.has(one.series.uid, one.instance)]

    def _fetch_whole(self, job: _Job) -> DispatchError | None:
        refusal = self._fetch(job)
        if refusal is None:
            self.ended_well.add(job.series.uid)
        return refusal

    def _do_instance(self, job: _Job) -> list[_Job]:
        by_uri = bool(self._uri)
        refusal = self._fetch(job)
        if isinstance(refusal, NotFound | NoService) and not by_uri and self._finds_uri(job):
            refusal = self._fetch(job)
        if isinstance(refusal, LASTING):
            self._refused[job.series.uid, job.instance] = refusal.message
            if isinstance(refusal, Denied) and self._is_shut_out():
                raise refusal
        elif refusal is not None:
            with self._lock:
                self._unable += not isinstance(refusal, Interrupted)
                ends = not self._came or isinstance(refusal, TimedOut) or _wants_peace(refusal)
                if self._unable >= HOPELESS and ends:
                    raise refusal
                if self._unable >= MOST_BUSY and not isinstance(refusal, Unable):
                    raise refusal
            if job.tries + 1 < TRIES:
                return [replace(job, tries=job.tries + 1)]
            if isinstance(refusal, Unable) and self._came:
                self._refused[job.series.uid, job.instance] = refusal.message
            else:
                self._lost.append(refusal)
        return []

    def _is_shut_out(self) -> bool:
        """Return whether the server lets us in no more, after another instance that is denied."""
        with self._lock:
            self._denied += 1
            denied, came = self._denied, self._came
        if denied < HOPELESS or not came:
            return denied >= HOPELESS
        if denied % MANY_DENIED != HOPELESS:
            return False
        try:
            qido.probe(self.service)
        except Denied:
            return True
        except Cancelled:
            raise
        except DispatchError:
            pass
        return False

    def _finds_uri(self, job: _Job) -> bool:
        """Return whether an instance that WADO-RS doesn't give is given by WADO-URI, if that can be."""
        with self._lock:
            if self._uri or self._came or self._sought >= HOPELESS:
                return bool(self._uri)
            self._sought += 1
            self._uri = wado_uri.found(self.service, (job.series.study, job.series.uid, job.instance))
            if self._uri:
                self._whole = False
                self.notes.append(f"retrieved by WADO-URI at {self._uri}: the server has no WADO-RS")
            return bool(self._uri)

    def _contents(self, job: _Job) -> Generator[Iterator[memoryview], None, None]:
        uids = (job.series.study, job.series.uid) + ((job.instance,) if job.instance else ())
        if self._uri and job.instance:
            return wado_uri.fetch(self.service, self._uri, uids, self._pace)
        return fetch(self.service, uids, self._pace, self._forms)

    def _one_by_one(self, series: WadoSeries) -> list[_Job]:
        """List the instances of a series that the server has and that are not here.

        A series that can't be listed now is left for the next retrieval; several, one after the other, end this one.
        """
        try:
            uids, all_listed = self._listed(series)
        except (*PASSING, Denied) as exc:
            with self._lock:
                self._unlisted += 1
                if self._unlisted >= HOPELESS or len(self.series) == 1:
                    raise
                self._lost.append(exc)
            return []
        self._unlisted = 0
        if series.announced is None and not all_listed:
            self.blind.add(series.uid)
            lists = f"does not count it, and lists only {len(uids)}" if uids else "neither counts nor lists it"
            note = f"series {series.uid}: can't be compared, the server {lists}"
            if note not in self.notes:
                self.notes.append(note)
        if uids is None:
            return []
        if not all(UID.fullmatch(uid) for uid in uids):
            why = f"{self.service.where}: lists an instance of series {series.uid} whose UID is not valid"
            self._lost.append(Misconfigured(why))
        missing = sorted(uid for uid in uids if not self._copies.has(series.uid, uid) and UID.fullmatch(uid))
        with self._lock:
            self._missing.update({(series.uid, uid): series for uid in missing})
        return [_Job(series, uid) for uid in missing]

    def _fetch(self, job: _Job) -> DispatchError | None:
        """Fetch what a job asks for; return why not all of it arrived, None if it did.

        Raises:
            DispatchError: nothing else would come either, or could be written.
        """
        with closing(self._contents(job)) as contents:
            while True:
                try:
                    content = next(contents, None)
                except (*LASTING, *PASSING) as exc:
                    return exc
                if content is None:
                    return None
                try:
                    with spooled(content, self.folder) as (file, header):
                        self._keep(job, file, header)
                except Rejected as exc:
                    if job.instance:
                        self._refused[job.series.uid, job.instance] = exc.message
                    else:
                        with self._lock:
                            self._untaken[job.series.uid, exc.message] += 1
                except (Interrupted, TimedOut) as exc:
                    return exc

    def _keep(self, job: _Job, file: Path, header: Header) -> None:
        """Give a whole file its name, if it is what was requested and isn't there yet.

        Raises:
            Rejected: it is something else, or another instance of the same UID is there.
        """
        uid = header.SOPInstanceUID
        wanted = uid == job.instance if job.instance else header.SeriesInstanceUID == job.series.uid
        if not wanted or not UID.fullmatch(uid):
            raise Rejected("the server sent another instance than the requested one")
        with self._copies.lock:
            second = uid in self._copies.uids
            self._copies.uids.add(uid)
        if second:
            with file.open("rb") as copy:
                why = self._copies.second(job.series.uid, copy.fileno(), header)
            if why:
                raise Rejected(why)
            return
        try:
            with partial.writing(self.folder):
                final = file.replace(self.folder / f"{uid}.dcm")
                info = final.stat()
        except BaseException:
            with self._copies.lock:
                self._copies.uids.discard(uid)
            raise
        item = Item(final.name, info.st_size, info.st_mtime_ns, header)
        self._here[uid] = item
        self._count(header.SeriesInstanceUID)
        if header.SeriesInstanceUID != job.series.uid:
            with self._copies.lock:
                self._copies.elsewhere[job.series.uid].add(uid)
            self._count(job.series.uid)
        self.report(item, DELIVERED)

    def _pace(self, count: int) -> None:
        self.report.moved(count)
        dicomweb.pause(self._throttle.delay(count), self.report.check)


def _wants_peace(refusal: DispatchError) -> bool:
    return isinstance(refusal, Busy) and refusal.retry_after is not None
