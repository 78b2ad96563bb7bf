"""What the ways of retrieving series from a DICOM node share: what is here, what is still to come, whose turn it is."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from imaging.header import Header
from protocols.dimse.ends import BrokenGet
from protocols.dimse.get import PATIENT_ROOT_GET, PATIENT_ROOT_MOVE, FinalResponse, Retriever
from protocols.dimse.moves import MoveDestination, Strangers, cannot_come
from protocols.dimse.receive import Depot
from protocols.dimse.series import PulledSeries
from protocols.dimse.transport import Peer
from protocols.files import partial as files
from protocols.files.copies import Copies
from protocols.files.durable import VolatileFile, settle, way_of
from transfer.errors import DispatchError
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import Item
from transfer.receipt import PushReport
from transfer.throttle import Throttle

UID_LIST = 50  # instances in one request
PART = 25  # instances that are worth an association of their own
REST = "C-GET does not bring all of it, which may be for its SOP classes or transfer syntaxes"


class Pulling:
    """One retrieval. Instances that are in the folder already are not requested again.

    A series is asked for as a whole, and what the peer has of it is listed only where that doesn't bring what was
    announced: listing takes some peers longer than giving.

    Args:
        lister: asks the peer what a series has, on an association of its own, and notes it there.
        associations: how many at most at once.
        quote: returns what may be said of a peer's own words.
        far: whether the way to the peer is long, so that a series is worth several associations.

    Attributes:
        notes: what went otherwise than announced, and how it was retrieved, for people.
        strangers: whose associations were refused while moves were awaited.
        elsewhere: how many instances of a series are here once only, in another series, which has them as well.
        unproven: series of which nobody says how many instances they have, and the peer doesn't say that all came.
    """

    def __init__(
        self,
        peer: Peer,
        series: Sequence[PulledSeries],
        folder: Path,
        report: PushReport,
        lister: Callable[[PulledSeries], None],
        *,
        associations: int,
        throttle: Throttle,
        destination: MoveDestination,
        far: bool = False,
        quote: Callable[[str], str] = str,
    ) -> None:
        self.peer, self.series, self.folder, self.report = peer, list(series), folder, report
        self.notes, self.unproven = list[str](), list[str]()
        self.strangers = Strangers(peer.host)
        self.elsewhere: Counter[str] = Counter()
        self._lister, self._associations, self._far = lister, associations, far
        self._throttle, self._destination, self._quote = throttle, destination, quote
        self._lock = threading.Lock()
        self._here: dict[str, Item] = {}
        self._counts: Counter[str] = Counter()
        self._jobs: deque[PulledSeries] = deque()
        self._moves = ""  # why C-MOVE is used for all, "" as long as C-GET may do
        self._refusals = 0  # series that C-GET brought nothing of
        self._given_up: list[DispatchError] = []
        self._got = False  # whether C-GET has ever brought something
        self._established = 0
        self._no_rest = False  # whether C-MOVE brings nothing of what C-GET leaves
        self._knows_us = False  # whether the peer has moved something
        self._moved: dict[str, str] = {}  # series of which something came by C-MOVE, and why so
        self._led = False
        self._broken, self._at_first = BrokenGet(), 0
        self._open = threading.Event()  # the first association is there, or will never be
        self._current: dict[int, PulledSeries] = {}  # by thread
        self._copies = Copies(folder, self._here, self._count, report.check)

    def look(self) -> None:
        """Find the instances that are in the folder already."""
        with files.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        files.sweep(self.folder)
        self._copies.look({one.uid for one in self.series}, self._counts, self.report)
        settle(self.folder, [item.path for item in self._here.values()], self.report.check)  # a kill kept it from that
        for one in self.series:
            begun = bool(self._counts[one.uid]) or (self._far and self._parts(one.announced or 0) > 1)
            one.doubtful = begun and self._lacks(one)

    def wants_list(self, one: PulledSeries) -> bool:
        """Return whether the peer is to be asked what a series has before it is asked for the series."""
        unknown = one.announced is None or not (self._moves or one.moves or one.classes())
        return not one.listed and (one.doubtful or (unknown and self._lacks(one)))

    def _conclude(self, one: PulledSeries, items: dict[str, Item]) -> None:
        """Report what a series lacks, and the peer's words about it."""
        last = one.answers[-1] if one.answers else None
        missing = self._missing(one)
        for uid in missing:
            if uid in items:  # one that is not the same: what of the series is here says how many are missing
                one.announced = one.announced or len(one.images or ())
                continue
            items[uid] = Item(f"{uid}.dcm", 0, 0, Header.of("", uid, "", one.study, one.uid, 0))
            text = "listed by the peer, but not given" + (f" ({last})" if last else "")
            self.report(items[uid], Outcome(Kind.REJECTED, text))
        for why, count in one.refused.items():
            self.notes.append(f"series {one.uid}: {count} instances were not taken: {why}")
        if count := len(self._copies.elsewhere[one.uid]):
            self.elsewhere[one.uid] = count
            self.notes.append(f"series {one.uid}: {count} instances are in another series as well, and come once")
        if not one.all_listed and one.announced is None and not (last and last.whole):
            self.unproven.append(one.uid)
            came = last or "it was not asked for any more"  # a pause, or nothing that could be asked
            self.notes.append(f"series {one.uid}: the peer does not say what it has, nor that all came: {came}")
        elif last and (last.failed or last.status):
            self.notes.append(f"series {one.uid}: the peer answered {last}")
        why = self._moved.get(one.uid) or ("" if one.moves == REST else one.moves)
        if why and not self._moves:
            self.notes.append(f"series {one.uid}: retrieved by C-MOVE to {self._destination.aet}: {why}")

    def _parts(self, count: int) -> int:
        """Return how many associations pay for a number of instances of one series."""
        return max(1, min(self._associations // max(1, len(self.series)), count // PART))

    def _divided(self, one: PulledSeries) -> list[PulledSeries]:
        missing = self._missing(one)
        parts = self._parts(len(missing)) if self._far and one.all_listed else 1
        return [one] if parts == 1 else one.divided(missing, parts)

    def _missing(self, one: PulledSeries) -> list[str]:
        """Return the instances that the peer lists and that are not here."""
        return sorted(uid for uid in one.images or () if not self._copies.has(one.uid, uid))

    def _lacks(self, one: PulledSeries) -> bool:
        """Return True if something of a series is not here, as far as is known."""
        lacks = any(not self._copies.has(one.uid, uid) for uid in one.images or ())
        if lacks or one.all_listed:
            return lacks
        if one.announced is not None:
            return self._counts[one.uid] < one.announced
        return not (one.answers and one.answers[-1].whole)

    def _keep(self, item: Item) -> None:
        assert item.shared is not None  # noqa: S101 - a Depot keeps instances only
        self._here[item.sop_instance_uid] = item
        self._count(item.shared.SeriesInstanceUID)
        self.report(item, DELIVERED)

    def _count(self, series: str) -> None:
        with self._lock:
            self._counts[series] += 1

    @cached_property
    def _durable(self) -> bool:
        """Whether C-MOVE is answered when an instance is on disk: in memory there is nothing to answer later for."""
        return way_of(self.folder) is not VolatileFile

    @contextmanager
    def _depot(self, one: PulledSeries, *, durable: bool) -> Iterator[Depot]:
        depot = Depot(self.folder, one.refuses, self._keep, durable, here=self._copies.uids, lock=self._copies.lock)
        depot.second = lambda part, header: self._copies.second(one.uid, part.fd, header)
        try:
            yield depot
        finally:
            depot.close()
            one.refused.update(depot.refused)
            one.unwanted |= depot.unwanted
            depot.settle(self.report.check)

    def _next(self, fits: Callable[[PulledSeries], bool] = lambda one: True) -> PulledSeries | None:
        """Return the next series; None if there is none, it doesn't fit, or the retrieval is to pause."""
        self.report.check()
        with self._lock:
            if not self._jobs or self.report.pausing.is_set() or not fits(self._jobs[0]):
                return None
            one = self._current[threading.get_ident()] = self._jobs.popleft()
            return one

    def _taken(self) -> PulledSeries:
        """Return the series that this thread took last: on one association, several may follow the first."""
        return self._current[threading.get_ident()]

    def _put_back(self, one: PulledSeries, *, behind: bool = False) -> None:
        with self._lock:
            (self._jobs.append if behind else self._jobs.appendleft)(one)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._established += 1
        self._open.set()
        try:
            yield
        finally:
            with self._lock:
                self._established -= 1

    def _weigh(self, one: PulledSeries) -> None:
        """Schedule what may bring the rest of a series: its listing, other contexts, or C-MOVE."""
        last = one.answers[-1] if one.answers else None
        claimed = (last.completed or 0) + (last.warning or 0) if last else 0
        one.doubtful = self._lacks(one) or bool(
            last and (last.status or last.failed or claimed > self._counts[one.uid])
        )
        if one.doubtful and one.announced is None and not one.proven:
            one.listed = False  # the list may end at a limit, too
        missing, by_get = self._missing(one), not (self._moves or one.moves) and self._lacks(one)
        if one.doubtful and not one.listed:
            self._put_back(one, behind=True)
        elif by_get and one.untried(missing):
            self._put_back(one)  # for an association with other contexts
        elif by_get and one.may_come_otherwise(missing) and not self._no_rest:
            self._leave_rest(one)

    def _leave_rest(self, one: PulledSeries) -> None:
        """Schedule C-MOVE for what C-GET does not bring of a series, behind all others."""
        if obstacle := cannot_come(self.peer, self._destination):
            self._note_rest(one, obstacle)
            return
        one.moves = REST
        self._put_back(one, behind=True)

    def _is_rest(self, one: PulledSeries) -> bool:
        """Return True if C-MOVE is used for what C-GET has left of a series, and not for all."""
        return one.moves == REST and not self._moves

    def _note_rest(self, one: PulledSeries, obstacle: str) -> None:
        """Note why C-MOVE does not bring what C-GET leaves, and don't try it with other series."""
        self._no_rest = True
        self.notes.append(f"series {one.uid}: {REST}; nor does C-MOVE: {obstacle}")

    def _give_up(self, one: PulledSeries, error: DispatchError) -> None:
        """Give up a series that can't be requested in any way, or what is left of it."""
        with self._lock:
            self._given_up.append(error)
            if self._is_rest(one):
                self._note_rest(one, error.message)
            else:
                self.notes.append(f"series {one.uid}: {error.message}")

    def _quoted(self, answer: FinalResponse) -> FinalResponse:
        return replace(answer, comment=self._quote(answer.comment)) if answer.comment else answer

    def _requests(self, one: PulledSeries, retriever: Retriever) -> Iterator[dict[str, str]]:
        """Yield the keys of requests: for the series, then for what is still missing, in lists and one by one."""
        above = {"StudyInstanceUID": one.study, "SeriesInstanceUID": one.uid}
        if retriever.root in (PATIENT_ROOT_GET, PATIENT_ROOT_MOVE):
            above["PatientID"] = one.patient
        whole, image = above | {"QueryRetrieveLevel": "SERIES"}, above | {"QueryRetrieveLevel": "IMAGE"}
        if not one.all_listed or not (self._counts[one.uid] or one.is_part):
            yield whole
            if not one.all_listed and self._lacks(one):
                yield whole
        held = {sop_class for sop_class, _ in retriever.pairs}
        for step in (UID_LIST, 1):
            missing = [uid for uid in self._missing(one) if not held or one.has_class(uid, held)]
            if step == 1 and len(missing) > UID_LIST:
                return  # what is missing of lists is missing
            for start in range(0, len(missing), step):
                self.report.check()
                yield image | {"SOPInstanceUID": "\\".join(missing[start : start + step])}
