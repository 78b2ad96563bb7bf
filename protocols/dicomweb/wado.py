"""Retrieves instances by WADO-RS (PS3.18 section 10.4): each goes to disk as it comes, and gets its name when whole."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from imaging.header import Damaged, Header, NotDicom, read_header
from protocols.dicomweb import service as dicomweb
from protocols.dicomweb.service import Service
from protocols.files import partial
from protocols.http.answer import Answer
from protocols.http.multipart import Parts, parameters
from transfer.errors import DispatchError, Misconfigured, NotFound, Rejected
from transfer.fanout import gravest
from transfer.outcome import ALREADY, DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

DICOM = "application/dicom"
# As it is stored; and for servers that don't know the star, in whatever syntax they like.
ACCEPTS = (f'multipart/related; type="{DICOM}"; transfer-syntax=*', f'multipart/related; type="{DICOM}"')
UID = re.compile(r"[0-9.]{1,64}")  # PS3.5 section 9.1; becomes a file name


def path(service: Service, uids: tuple[str, ...]) -> str:
    """The path of a study, a series or an instance, by its UID and those above it."""
    names = ("studies", "series", "instances")
    return service.path(service.wado, *(part for pair in zip(names, uids, strict=False) for part in pair))


def fetch(
    service: Service, uids: tuple[str, ...], pace: Callable[[int], None]
) -> Generator[Iterator[memoryview], None, None]:
    """Yield the content of each instance of a study, a series or an instance, as it comes.

    Each content must be read to its end, or left, before the next.

    Args:
        uids: of the study, the series and the instance; fewer for all that is below.
        pace: called with the bytes that came; may wait, or raise to stop.

    Raises:
        NotFound: there is no such resource. Misconfigured: the answer is something else.
        Interrupted: it was cut short; what came whole before has been yielded.
    """
    where = path(service, uids)
    for last, accept in ((False, ACCEPTS[0]), (True, ACCEPTS[1])):
        with service.session.request("GET", where, {"Accept": accept}) as answer:
            if answer.status in (200, 206):
                yield from _contents(service, answer, where, pace)
                return
            body = answer.read()
            if last or answer.status not in (400, 406, 415):
                raise service.error(answer, body, where)


def _contents(
    service: Service, answer: Answer, where: str, pace: Callable[[int], None]
) -> Iterator[Iterator[memoryview]]:
    kind, options = parameters(answer.headers.get("Content-Type", ""))
    pieces = _paced(answer.chunks(), pace)
    if kind == DICOM:  # one instance without an envelope
        yield pieces
    elif kind.startswith("multipart/") and options.get("boundary"):
        parts = Parts(pieces, options["boundary"], service.where)
        for head in parts:
            if head.media_type not in (DICOM, "", "text/plain", "application/octet-stream"):
                raise Misconfigured(f"{service.where}{where}: the answer holds {head.media_type} instead of {DICOM}")
            yield parts.content()
    else:
        raise dicomweb.unexpected(service, answer, answer.read(), where)


def _paced(pieces: Iterator[memoryview], pace: Callable[[int], None]) -> Iterator[memoryview]:
    for piece in pieces:
        pace(len(piece))
        yield piece


@contextmanager
def spooled(content: Iterator[memoryview], folder: Path) -> Iterator[tuple[Path, Header]]:
    """Write the content of an instance to a temporary file of a folder; what is still there at the end is removed.

    Raises:
        Rejected: what came is no whole DICOM file. Busy: there is no room. Misconfigured: nothing can be written there.
    """
    with partial.writing(folder):
        file, fd = partial.create(folder)
    try:
        try:
            for piece in content:
                rest = piece
                with partial.writing(folder):
                    while rest:
                        rest = rest[os.write(fd, rest) :]
            header = read_header(fd, os.fstat(fd).st_size)
        except (NotDicom, Damaged) as exc:
            raise Rejected(f"the server gave a file that is damaged: {exc}") from exc
        yield file, header
    finally:
        with suppress(OSError):  # it has its name by now; or the next retrieval sweeps it away
            file.unlink()
        os.close(fd)


@dataclass(frozen=True)
class Series:
    """A series to retrieve, and how many instances the server says it has (None if it doesn't say)."""

    study: str
    uid: str
    announced: int | None = None


@dataclass(frozen=True)
class _Job:
    series: Series
    instance: str = ""  # "" for all of the series at once


class Retrieval:
    """Brings the instances of some series into a folder, as `<SOP instance UID>.dcm`.

    What is there already is not asked for again, so that the same retrieval, begun again, fetches what is missing.
    A series comes in one answer. Which instances it should have is asked only where the count is not what was
    announced: servers take longer to list a series than to give it.

    Args:
        listed: returns the UIDs of a series' instances, None if the server lists none.

    Attributes:
        notes: what went otherwise than announced, for people.
    """

    def __init__(
        self,
        service: Service,
        series: list[Series],
        folder: Path,
        report: PushReport,
        listed: Callable[[Series], set[str] | None],
        *,
        concurrency: int,
        bandwidth_limit: int | None = None,
    ) -> None:
        self.service, self.series, self.folder, self.report = service, series, folder, report
        self.notes: list[str] = []
        self._listed = listed
        self._throttle = Throttle(bandwidth_limit)
        self._lock = threading.Lock()
        self._here: dict[str, Item] = {}  # by SOP instance UID
        self._counts: Counter[str] = Counter()  # of what is here, by series
        self._refused: dict[str, str] = {}  # why an instance did not come
        self._errors: list[BaseException] = []
        self._jobs: deque[_Job] = deque()
        self._concurrency = concurrency

    def run(self) -> Plan:
        """Fetch what is missing; returns what should be here as a plan, whose outcomes have been told.

        Raises:
            DispatchError: not all could be asked for; what came is in the folder, and has been told.
        """
        with partial.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        partial.sweep(self.folder)
        self._look()
        missing: dict[str, Series] = {}
        for one in self.series:
            if not self._counts[one.uid]:
                self._jobs.append(_Job(one))
            elif self._counts[one.uid] != one.announced:
                missing |= self._missing(one)
        self._jobs += [_Job(one, uid) for uid, one in sorted(missing.items())]
        self._work_off()
        # What did not come with its series may still come alone.
        missing = {
            uid: missing
            for one in self.series
            if self._counts[one.uid] != one.announced
            for uid, missing in self._missing(one).items()
        }
        self._jobs += [_Job(one, uid) for uid, one in sorted(missing.items()) if uid not in self._refused]
        self._work_off()
        items = dict(self._here)
        for uid, one in sorted(missing.items()):
            if uid not in items:
                items[uid] = Item(f"{uid}.dcm", 0, 0, Header("", uid, "", one.study, one.uid, 0))
                text = self._refused.get(uid, "listed by the server, but not given")
                self.report(items[uid], Outcome(Kind.REJECTED, text))
        return Plan("", self.folder, tuple(sorted(items.values(), key=lambda item: item.path)))

    def _look(self) -> None:
        """Find what is in the folder already."""
        wanted = {one.uid for one in self.series}
        for path in self.folder.glob("*.dcm"):
            self.report.check()
            with suppress(OSError, NotDicom, Damaged), path.open("rb") as file:
                info = os.fstat(file.fileno())
                header = read_header(file.fileno(), info.st_size)
                if header.SOPInstanceUID == path.stem and header.SeriesInstanceUID in wanted:
                    self._here[path.stem] = Item(path.name, info.st_size, info.st_mtime_ns, header)
                    self._counts[header.SeriesInstanceUID] += 1
                    self.report(self._here[path.stem], ALREADY)

    def _missing(self, series: Series) -> dict[str, Series]:
        """What the server lists of a series and is not here."""
        uids = self._listed(series)
        if uids is None:
            note = f"series {series.uid}: can't be compared, the server neither counts nor lists it"
            if series.announced is None and note not in self.notes:
                self.notes.append(note)
            return {}
        if not all(UID.fullmatch(uid) for uid in uids):
            raise Misconfigured(f"{self.service.where}: lists an instance whose UID is none")
        return {uid: series for uid in uids if uid not in self._here}

    def _work_off(self) -> None:
        threads = [
            threading.Thread(target=self._work, name="wado", daemon=True)
            for _ in range(min(self._concurrency, len(self._jobs)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise gravest(self._errors)

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._errors or not self._jobs or self.report.pausing.is_set():
                    return
                job = self._jobs.popleft()
            try:
                self.report.check()
                self._do(job)
            except BaseException as exc:
                with self._lock:
                    self._errors.append(exc)

    def _do(self, job: _Job) -> None:
        uids = (job.series.study, job.series.uid) + ((job.instance,) if job.instance else ())
        contents = fetch(self.service, uids, self._pace)
        try:
            while (content := self._next(job, contents)) is not None:
                try:
                    with spooled(content, self.folder) as (file, header):
                        self._keep(job, file, header)
                except Rejected as exc:
                    self._refuse(job, exc)
        finally:
            contents.close()

    def _next(self, job: _Job, contents: Iterator[Iterator[memoryview]]) -> Iterator[memoryview] | None:
        """The next content; None if there is none left, or the server refuses."""
        try:
            return next(contents, None)
        except (NotFound, Misconfigured) as exc:
            self._refuse(job, exc)
            return None

    def _refuse(self, job: _Job, exc: DispatchError) -> None:
        """Note why an instance doesn't come; those of a series may still be had one by one."""
        if job.instance:
            with self._lock:
                self._refused[job.instance] = exc.message

    def _keep(self, job: _Job, file: Path, header: Header) -> None:
        """Give a whole file its name, if it is what was asked for and isn't there yet."""
        uid = header.SOPInstanceUID
        wanted = uid == job.instance if job.instance else header.SeriesInstanceUID == job.series.uid
        if not wanted or not UID.fullmatch(uid):
            raise Rejected("the server gave another instance than was asked for")
        with self._lock:
            if uid in self._here:
                return  # a second copy
            self._here[uid] = Item(f"{uid}.dcm", 0, 0, header)
        with partial.writing(self.folder):
            final = file.replace(self.folder / f"{uid}.dcm")
            info = final.stat()
        item = Item(final.name, info.st_size, info.st_mtime_ns, header)
        with self._lock:
            self._here[uid] = item
            self._counts[job.series.uid] += 1
        self.report(item, DELIVERED)

    def _pace(self, count: int) -> None:
        self.report.moved(count)
        dicomweb.pause(self._throttle.delay(count), self.report.check)
