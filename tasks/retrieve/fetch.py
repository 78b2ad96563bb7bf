"""The blocking parts of a retrieval: searches and the fetching of one study, with the source's own retry policy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from prefect.logging import get_run_logger

from blocks.base import Target
from imaging.query import Match, Query, listed
from tasks import DRIVERS
from tasks.dispatch.delivery import MAX_ATTEMPTS
from tasks.dispatch.push import delay_before
from tasks.quiet import Quiet
from tasks.retrieve.job import Job, Stage, Study, size_of
from tasks.retrieve.turn import slots_of
from transfer import granted, stopping
from transfer.errors import (
    Cancelled,
    DiskFull,
    DispatchError,
    NotFound,
    NothingCame,
    NotTrusted,
    Retryable,
    Unauthorized,
    Unreachable,
    Unread,
)
from transfer.outcome import Kind
from transfer.query import series_tests
from transfer.receipt import PushReport, Receipt, State

R = TypeVar("R")
Watch = Callable[[Path, Callable[[], None]], Callable[[int], None]]
BATCH = 500  # accession numbers in one search
PARTIAL_TRIES = 2  # a source that gave less than it announced twice will do so again
SLICE_S = 0.25
FOR_ALL = (NothingCame, Unauthorized, NotTrusted)  # what hinders one study hinders the others, most likely
PASSED_OVER = "not asked for, as nothing came of other studies"


class _Either(threading.Event):
    """Set where it, or another event, is."""

    def __init__(self, other: threading.Event) -> None:
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        return self.by_itself or self._other.is_set()

    @property
    def by_itself(self) -> bool:
        return super().is_set()


class Fetcher:
    """Asks one source. Its methods block, and are called in a thread.

    Args:
        filters: the query without its accession numbers.
        cancelled, paused: set to stop it at once, or after the current series.
    """

    def __init__(
        self, source: Target, filters: Query, job: Job, cancelled: threading.Event, paused: threading.Event
    ) -> None:
        self.source, self.filters, self.job = source, filters, job
        self.cancelled, self.paused = cancelled, paused
        self._halt = _Either(paused)
        self._moved: Callable[[int], None] = lambda count: None
        self.driver = DRIVERS.of(source)
        self.quiet = Quiet(source)
        self._in_vain = ""  # why nothing came of the last study that was asked for as often as allowed
        self._seen = 0  # studies since the first of which nothing came
        self.unread = ""  # why what the last search did not find may be there all the same
        self.unread_about = frozenset[str]()  # what of it is known to be there, in lower case; empty if anything may be

    def report(self) -> PushReport:
        return PushReport(cancelled=self.cancelled, pausing=self._halt, moved=self._moved)

    @property
    def halted(self) -> bool:
        """Whether the last study that was fetched is to be gone on with when there is room for it."""
        return self._halt.by_itself

    def patiently(self, work: Callable[[], R], came: Callable[[], int] = lambda: 0) -> R:
        """Do some work, with as many attempts in vain as the source's settings allow.

        Args:
            came: returns how much of what it brings is here; what brings more is not in vain.

        Raises:
            DispatchError: that of the last attempt.
        """
        attempt, futile, here = 0, 0, came()
        while True:
            attempt += 1
            try:
                with self.quiet.errors():
                    return work()
            except DiskFull:
                raise  # trying again makes no room
            except Retryable as exc:
                before, here = here, came()
                futile = 0 if here > before else futile + 1
                lost = isinstance(exc, NothingCame)  # which takes the source's idle timeout each time
                most = 1 if lost and self._in_vain else self.source.max_attempts
                if futile >= most or attempt >= MAX_ATTEMPTS or self._halt.is_set():
                    raise
                self._wait(delay_before(max(futile, 1) + 1, self.source, exc))

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._halt.is_set():
            self.report().check()
            time.sleep(min(left, SLICE_S))

    # ---- find

    def find(self, **keys: Any) -> list[Match]:
        """Return the studies that the filters find, with these keys besides, or in place of theirs."""
        query = replace(self.filters, **keys)
        find = self.driver.find
        assert find is not None  # noqa: S101 - `check_source` has seen it
        found: list[Match] = []
        self.unread, self.unread_about = "", frozenset()
        try:
            with stopping.stoppable(self._check_search), granted.granting(slots_of(self.source)):
                for match in find(self.source, query):
                    self._check_search()
                    found.append(match)
        except Unread as exc:
            self.quiet.error(exc)
            self.unread, self.unread_about = exc.message, exc.about
        return found

    def _check_search(self) -> None:
        """Raise Cancelled if a search is to stop, also by a pause: no series runs, and it is made anew after that."""
        self.report().check()
        if self.paused.is_set():
            raise Cancelled("the retrieval is paused")

    def _may_be_there(self, number: str) -> bool:
        """Return True if what the last search did not find may be there all the same."""
        return bool(self.unread) and (not self.unread_about or number.strip().casefold() in self.unread_about)

    def _find_at_once(self, keys: dict[str, Any]) -> list[Match]:
        """Search as `find`, with one attempt."""
        with self.quiet.errors():
            return self.find(**keys)

    def find_pending(self) -> None:
        """Search for the accession numbers that have not been searched for; the job keeps each result."""
        self._find(self.job.pending[:BATCH])
        self.job.save()

    def _find(self, batch: list[str], *, at_once: bool = False) -> None:
        """Search for some numbers.

        Args:
            at_once: with one attempt, as the source has answered for others.
        """
        keys = {"AccessionNumber": tuple(batch)}
        try:
            found = self._find_at_once(keys) if at_once else self.patiently(lambda: self.find(**keys))
        except Cancelled:
            raise
        except DispatchError as exc:
            if exc.retryable and self.paused.is_set():
                raise Cancelled("the retrieval is paused") from exc  # and goes on with them when it is resumed
            each = [{"AccessionNumber": (number,)} for number in batch]
            if len(batch) == 1 or self._fails_whole(each, exc):
                if at_once and exc.retryable and len(batch) > 1:
                    self._find(batch)  # it has nothing to do with the numbers: it may pass
                    return
                self.job.failed |= dict.fromkeys(self.job.without_studies(batch), exc.message)
                self._done(batch)
                return
            # One of them is to blame: it must not take the others with it.
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                self._find(half, at_once=True)
            return
        places = {number.strip().casefold(): place for place, number in reversed([*enumerate(batch)])}
        if not self.unread:
            self.job.forget(batch, {match.StudyInstanceUID for match in found})
        self._take(sorted(found, key=lambda match: _place(match, places)))  # fetched in the order of the list
        seen = {number.strip().casefold() for match in found for number in _numbers(match)}
        unseen = [number for number in batch if number.strip().casefold() not in seen]
        self._note_others(batch, found)
        self.job.failed |= dict.fromkeys(filter(self._may_be_there, self.job.without_studies(unseen)), self.unread)
        self.job.missing += [number for number in unseen if not self._may_be_there(number)]
        self._done(batch)

    def _note_others(self, batch: list[str], found: Iterable[Match]) -> None:
        """Note which numbers stand for a study that is known by another one, as of two orders for one examination."""
        uids: dict[str, str] = {}
        for match in found:
            uids |= dict.fromkeys((number.strip().casefold() for number in _numbers(match)), match.StudyInstanceUID)
        for number in self.job.without_studies(batch):
            if (uid := uids.get(number.strip().casefold(), "")) in self.job.studies:
                self.job.also[number] = uid

    def _done(self, batch: list[str]) -> None:
        known = set(batch)
        self.job.pending = [number for number in self.job.pending if number not in known]

    def _fails_whole(self, each: list[dict[str, Any]], exc: DispatchError) -> bool:
        """Return True if it is not some of these searches, but the source that fails."""
        if isinstance(exc, (*FOR_ALL, Unreachable)):
            return True
        some = sorted({0, len(each) // 2, len(each) - 1})
        return all(self._fails_alike(each[at], exc) for at in some)

    def _fails_alike(self, keys: dict[str, Any], exc: DispatchError) -> bool:
        try:
            self._find_at_once(keys)
        except Cancelled:
            raise
        except DispatchError as other:
            return (exc.retryable and other.retryable) or other.message == exc.message
        return False

    def search(self) -> None:
        """Find studies by the other keys than accession numbers."""
        uids, failed = list(dict.fromkeys(listed(self.filters.StudyInstanceUID))), dict[str, str]()
        try:
            found = self.patiently(self.find)
        except Cancelled:
            raise
        except DispatchError as exc:
            if len(uids) < 2 or self._fails_whole([{"StudyInstanceUID": uid} for uid in uids], exc):
                raise
            found, failed = self._each(uids)
        self._take(found)
        self.job.studies |= {
            uid: Study(uid, stage=Stage.FAILED, reason=why)
            for uid, why in failed.items()
            if uid not in self.job.studies
        }
        seen = {match.StudyInstanceUID for match in found} | set(failed)
        unseen = [uid for uid in uids if uid not in seen]
        self.job.unknown = [uid for uid in unseen if not self._may_be_there(uid)]
        if self.unread:  # it is not known what there is
            self.job.error = self.unread
            return
        self.job.searched = True  # also where it failed for some: only a retry looks for these again
        self.job.save()

    def _each(self, uids: list[str]) -> tuple[list[Match], dict[str, str]]:
        """Return the studies that are found, and why the search for others failed: it must not take all with it."""
        found, failed, unread = list[Match](), dict[str, str](), ("", frozenset[str]())
        for uid in uids:
            try:
                found += self._find_at_once({"StudyInstanceUID": uid})
            except Cancelled:
                raise
            except DispatchError as exc:
                if isinstance(exc, (*FOR_ALL, Unreachable)):
                    raise
                failed[uid] = exc.message
            unread = (self.unread, self.unread_about) if self.unread else unread
        self.unread, self.unread_about = unread
        return found, failed

    def _take(self, found: list[Match]) -> None:
        whole = not series_tests(self.filters)
        for match in found:
            uid = match.StudyInstanceUID
            number = next(iter(_numbers(match)), "")
            known = self.job.studies.get(uid)
            if uid and (known is None or (number and known.stage is Stage.FOUND and not known.accession)):
                self.job.studies[uid] = Study(uid, number, announced=(match.instances or 0) if whole else 0)

    # ---- fetch

    def in_order(self) -> Iterator[Study]:
        """Yield all studies, and then those that were passed over and are to be fetched after all."""
        left = [*self.job.studies.values()]
        while left:
            passed = list[Study]()
            for one in left:
                yield one
                passed += [one] if one.reason.startswith(PASSED_OVER) else []
            left = [one for one in passed if one.stage is Stage.FOUND]

    def passes_over(self, study: Study) -> bool:
        """Return True if a study is not asked for, as nothing came of others for what hinders all; `study` keeps why.

        Where what the source says it has sent never comes, each takes its idle timeout; where our credentials are
        refused, an account may be locked after some attempts. The second one is asked for, the fourth, the eighth, and
        so on: if something comes of one, nothing is passed over any more, and what was is to be fetched after all.
        """
        if not self._in_vain:
            return False
        self._seen += 1
        if self._seen & (self._seen - 1) == 0:
            return False
        study.stage, study.reason = Stage.FAILED, f"{PASSED_OVER}: {self._in_vain}"
        return True

    def fetch(self, study: Study, folder: Path, watch: Watch = lambda folder, halt: lambda count: None) -> None:
        """Fetch a study into a folder; `study` keeps the result. A pause leaves it as it is, and so does a halt.

        Args:
            watch: returns what is called with each count of bytes that come, and may call for a halt after the series.

        Raises:
            Cancelled: somebody asked for it. DiskFull: there is no room; what came is kept.
        """
        self._halt.clear()
        self._moved = watch(folder, self._halt.set)
        before, _ = size_of(folder)
        try:
            self._fetch_all(study, folder)
        finally:
            if size_of(folder)[0] > before:
                self._came()

    def _came(self) -> None:
        """Note that what the source sends comes."""
        self._in_vain, self._seen = "", 0
        for one in self.job.studies.values():
            if one.stage is Stage.FAILED and one.reason.startswith(PASSED_OVER):
                one.stage, one.reason = Stage.FOUND, ""

    def _fetch_all(self, study: Study, folder: Path) -> None:
        for attempt in range(1, PARTIAL_TRIES + 1):
            try:
                receipt = self.patiently(lambda: self._fetch(study, folder), lambda: size_of(folder)[0])
            except (Cancelled, DiskFull):
                raise
            except DispatchError as exc:
                if self._halt.is_set() and exc.retryable:
                    return
                here, _ = size_of(folder)
                study.stage, study.reason = (Stage.PARTIAL if here else Stage.FAILED), exc.message
                study.instances, study.missing = here, max(0, study.announced - here)
                if isinstance(exc, FOR_ALL) and not here:
                    self._in_vain, self._seen = exc.message, max(1, self._seen)
                return
            except Exception as exc:  # what one study meets must not end the others
                get_run_logger().exception("study %s could not be fetched", study.study)
                study.stage, study.reason = Stage.FAILED, f"unexpected {type(exc).__name__}: see the run's log"
                return
            if receipt.state is State.DELIVERED or self._halt.is_set() or attempt == PARTIAL_TRIES:
                break
            self._wait(delay_before(attempt + 1, self.source, None))
        self._judge(study, folder, receipt)

    def _fetch(self, study: Study, folder: Path) -> Receipt:
        retrieve = self.driver.retrieve
        assert retrieve is not None  # noqa: S101 - `check_source` has seen it
        query = Query(
            StudyInstanceUID=study.study,
            SeriesInstanceUID=self.filters.SeriesInstanceUID,
            Modality=self.filters.Modality,
            SeriesDescription=self.filters.SeriesDescription,
        )
        try:
            return retrieve(self.source, query, folder, self.report())
        except NotFound as exc:
            # It was there a moment ago.
            raise DispatchError(f"no longer found at the source: {exc.message}", self.source.name) from exc

    def _judge(self, study: Study, folder: Path, receipt: Receipt) -> None:
        study.notes, study.doubt = list(receipt.notes), receipt.doubt
        study.instances, study.bytes = size_of(folder)
        study.missing = receipt.unsent + receipt.counts[Kind.REJECTED]
        if receipt.state is State.DELIVERED:
            study.stage, study.reason = Stage.WHOLE, ""
        elif not self._halt.is_set():
            study.stage = Stage.PARTIAL if study.instances else Stage.FAILED
            words = f"{study.instances} of {study.instances + study.missing} instances came, {study.missing} missing"
            study.reason = "; ".join([words, *receipt.notes])


def _place(match: Match, places: dict[str, int]) -> int:
    """Return where in a list a study's number stands; behind all others if it is shown as another one."""
    return min((places.get(number.strip().casefold(), len(places)) for number in _numbers(match)), default=len(places))


def _numbers(match: Match) -> list[str]:
    value = match.attributes.get("AccessionNumber", "")
    return [str(one).strip() for one in (value if isinstance(value, list) else [value]) if str(one).strip()]
