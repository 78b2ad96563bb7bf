"""Brings series from a DICOM node into a folder: by C-GET where it is granted, else by C-MOVE to our Storage SCP."""

from __future__ import annotations

import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from imaging.header import Header
from protocols.dimse import moves
from protocols.dimse.ends import BrokenGet, NoAssociation, associating
from protocols.dimse.get import (
    DESTINATION_UNKNOWN,
    PATIENT_ROOT_GET,
    PATIENT_ROOT_MOVE,
    FinalResponse,
    Retriever,
    failure,
    getter,
    mover,
    next_message_id,
)
from protocols.dimse.moves import DESK, Expected, MoveDestination, Strangers, addresses, cannot_come, listening
from protocols.dimse.offers import USUAL_CLASSES, pairs_for
from protocols.dimse.receive import Depot
from protocols.dimse.series import PulledSeries
from protocols.dimse.transport import Peer
from protocols.files import partial as files
from protocols.files.copies import Copies
from protocols.files.durable import VolatileFile, settle, way_of
from protocols.files.instances import here
from transfer.errors import DispatchError, Interrupted, Misconfigured, TimedOut
from transfer.fanout import gravest, in_threads
from transfer.outcome import ALREADY, DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

UID_LIST = 50  # instances in one request
HOPELESS = 3  # refusals, one after the other, before C-GET has brought anything
HOPELESS_SERIES = 2  # series that C-GET brought nothing of
PART = 25  # instances that are worth an association of their own
UNNAMED = "C-GET does not bring all of it, and the peer does not name its SOP classes"
LATE_S = 3.0  # for what is still on its way when a source says that a move is done
LOOK_S = 0.05


class Pull:
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
        wanted = {one.uid for one in self.series}
        for uid, series, item in here(self.folder, wanted, self.report.check):
            self._here[uid] = item
            self._copies.uids.add(uid)
            self._counts[series] += 1
            self.report(item, ALREADY)
        settle(self.folder, [item.path for item in self._here.values()], self.report.check)  # a kill kept it from that
        for one in self.series:
            begun = bool(self._counts[one.uid]) or (self._far and self._parts(one.announced or 0) > 1)
            one.doubtful = begun and self._lacks(one)

    def wants_list(self, one: PulledSeries) -> bool:
        """Return whether the peer is to be asked what a series has before it is asked for the series."""
        unknown = one.announced is None or not (self._moves or one.moves or one.classes())
        return not one.listed and (one.doubtful or (unknown and self._lacks(one)))

    def run(self) -> Plan:
        """Fetch what is missing; return what should be here as a plan, whose outcomes have been reported.

        Raises:
            DispatchError: not all could be asked for; what came is in the folder, and has been reported.
        """
        self._at_first = len(self._here)
        for one in self.series:
            if self._lacks(one):
                self._jobs.extend(self._divided(one))
        if self._jobs:
            in_threads(self._work, max(1, min(self._associations, len(self._jobs))), "pull")
        if self._given_up and not self._here:
            raise gravest(self._given_up)
        self._copies.uids.clear()
        items = self._here  # no copy: there may be many
        for one in self.series:
            self._conclude(one, items)
        if self._moves:
            self.notes.append(f"retrieved by C-MOVE to {self._destination.aet}: {self._moves}{self.strangers}")
        elif any(one.answers and not one.moves for one in self.series):
            self.notes.append("retrieved by C-GET, which the peer grants")
        return Plan("", self.folder, tuple(sorted(items.values(), key=lambda item: item.path)))

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
        if one.moves and not self._moves:
            self.notes.append(f"series {one.uid}: retrieved by C-MOVE to {self._destination.aet}: {one.moves}")

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
            depot.settle(self.report.check)

    # ---- associations

    def _work(self) -> None:
        """Retrieve series after series, on one association as long as it fits.

        The first thread associates alone, so that a peer which allows one association doesn't choose which.
        """
        with self._lock:
            leads, self._led = not self._led, True
        try:
            while not leads and not self._open.wait(LOOK_S):
                self.report.check()
            while (one := self._next()) is not None:
                before, moving = len(self._here), False
                try:
                    if self.wants_list(one):
                        with associating():
                            self._lister(one)
                    if not self._lacks(one):
                        continue
                    moving = bool(self._moves or one.moves)
                    (self._by_move if moving else self._by_get)(one)
                except NoAssociation as exc:
                    self._put_back(self._taken())
                    if self._established:
                        return  # others are at work
                    raise exc.error from exc
                except (Interrupted, TimedOut) as exc:
                    # Who brings something before it breaks is asked again for the rest.
                    taken = self._taken()
                    if moving and len(self._here) == before and taken.moves == UNNAMED:
                        self._give_up(taken, exc)  # what C-GET brings of it is here
                        continue
                    taken.doubtful = bool(self._counts[taken.uid])
                    self._put_back(taken)
                    if len(self._here) == before and (moving or not self._goes_another_way(exc)):
                        raise
        finally:
            if leads:
                self._open.set()

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
        elif by_get and not all(one.has_class(uid, one.asked) for uid in missing):
            self._put_back(one)  # for an association with contexts for the others
        elif by_get and one.may_be_of_other_classes and not cannot_come(self.peer, self._destination):
            one.moves = UNNAMED
            self._put_back(one, behind=True)

    # ---- C-GET

    def _goes_another_way(self, exc: DispatchError) -> bool:
        """Return True if what is left is asked for once more although nothing has come, the second time by C-MOVE."""
        brought = len(self._here) > self._at_first
        if brought or isinstance(exc, TimedOut) or cannot_come(self.peer, self._destination):
            return False
        with self._lock:
            self._moves = self._moves or self._broken.noted(exc)
        return True

    def _by_get(self, one: PulledSeries) -> None:
        """Retrieve series on one association by C-GET, beginning with this one."""
        pairs = pairs_for(one.classes(self._missing(one) or None) or dict.fromkeys(USUAL_CLASSES, ()))
        one.asked.update(sop_class for sop_class, _ in pairs)
        with associating():
            retriever = getter(self.peer, pairs, self.report.check, self._throttle, self.report.moved)
        if not (retriever.root and retriever.stores):
            retriever.association.release()
            none = "the peer accepts C-GET, but sends none of the SOP classes that were asked for"
            self._no_get(one, none if retriever.root else "the peer does not accept C-GET", for_all=not retriever.root)
            return
        with self._counted(), retriever:
            following: PulledSeries | None = one
            while following is not None and self._get(retriever, following):
                following = self._next(partial(self._fits, retriever))

    def _no_get(self, one: PulledSeries, why: str, *, for_all: bool = False) -> None:
        """Schedule C-MOVE for a series, or for all that are left, once its content is known.

        Raises:
            Misconfigured: there is nowhere to move it to, and all are to be moved.
        """
        if not (one.listed or for_all):
            one.doubtful = True  # SOP classes other than the usual ones may be to blame
            self._put_back(one)
            return
        if obstacle := cannot_come(self.peer, self._destination):
            error = Misconfigured(f"{self.peer.where}: {why}, and {obstacle}")
            if for_all:
                raise error
            self._give_up(one, error)
            return
        with self._lock:
            one.moves = why
            self._refusals += 1
            if for_all or (self._refusals >= HOPELESS_SERIES and not self._got):
                self._moves = self._moves or why
        self._put_back(one)

    def _give_up(self, one: PulledSeries, error: DispatchError) -> None:
        """Give up a series that can't be requested in any way."""
        with self._lock:
            self._given_up.append(error)
            self.notes.append(f"series {one.uid}: {error.message}")

    def _fits(self, retriever: Retriever, one: PulledSeries) -> bool:
        """Return True if an association has the contexts of a series."""
        if self._moves or one.moves or self.wants_list(one):
            return False
        classes = one.classes()
        held = {sop_class for sop_class, _ in retriever.pairs}
        named = {(each, syntax) for each, syntaxes in classes.items() for syntax in syntaxes}
        return bool(classes) and classes.keys() <= held and named <= retriever.pairs

    def _get(self, retriever: Retriever, one: PulledSeries) -> bool:
        """Request a series; return False if it must be requested in another way."""
        refusals, last = 0, None
        with self._depot(one, durable=False) as depot:
            for keys in self._requests(one, retriever):
                last = self._quoted(retriever.get(keys, depot, one.charset))
                one.answers.append(last)
                self._got = self._got or bool(self._counts[one.uid])
                error = failure(self.peer, last)
                if error:
                    raise error
                refusals = refusals + 1 if last.refused else 0
                if last.unsupported or refusals >= HOPELESS or not one.listed:
                    break
        if last is not None and last.refused and not self._got:
            one.answers.clear()
            self._no_get(one, f"the peer answers C-GET with {last}", for_all=last.unsupported)
            return False
        self._weigh(one)
        return True

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

    # ---- C-MOVE

    def _by_move(self, one: PulledSeries) -> None:
        """Retrieve series on one association by C-MOVE, beginning with this one, once what it sends can come here."""

        def check() -> None:
            self.report.check()
            if self.report.pausing.is_set():
                raise moves.Later

        hosts = addresses(self.peer.host, self.peer.port)
        try:
            with DESK.turns.taken(hosts, self.peer.tls, check), listening(self._destination, self.peer, check) as tls:
                self._request_moves(one, tls)
        except moves.Later:
            self._put_back(one)
        except Misconfigured as exc:  # the port, or the TLS settings, can't be used
            if (error := self._broken.of_move(exc)) is exc:
                raise
            raise error from exc

    def _request_moves(self, one: PulledSeries, tls: ssl.SSLContext | None) -> None:
        with associating():
            retriever = mover(self.peer, self.report.check)
        if not retriever.root:
            retriever.association.release()
            why = self._moves or one.moves
            error = Misconfigured(f"{self.peer.where}: {why}; nor does it accept C-MOVE: it can't be pulled from")
            if self._moves:
                raise self._broken.of_move(error)
            self._give_up(one, error)
            return
        with self._counted(), retriever:
            following: PulledSeries | None = one
            while following is not None:
                self._move(retriever, following, tls)
                following = self._next(lambda each: bool(self._moves or each.moves) and not self.wants_list(each))

    def _move(self, retriever: Retriever, one: PulledSeries, tls: ssl.SSLContext | None) -> None:
        whose, hosts = frozenset((self.peer.calling, self.peer.called)), addresses(self.peer.host, self.peer.port)
        at = self._destination.aet
        instances = frozenset(one.images) if one.images and one.all_listed else None
        with self._depot(one, durable=self._durable) as depot:
            depot.throttle, depot.moved = self._throttle, self.report.moved
            begun = depot.heard
            for keys in self._requests(one, retriever):
                number = next_message_id()
                expected = Expected(whose, number, hosts, instances, depot, self.strangers, tls)
                with DESK.expecting(expected):
                    answer = self._quoted(retriever.move(keys, at, number, expected.last_heard, one.charset))
                    one.answers.append(answer)
                    error = failure(self.peer, answer, at)
                    # A peer that has moved something knows where to; some call any failure so.
                    known = any(each.status != DESTINATION_UNKNOWN for each in one.answers)
                    if error and not (known and answer.status == DESTINATION_UNKNOWN):
                        if self._moves:
                            raise self._broken.of_move(error)
                        self._give_up(one, error)
                        return
                    self._await_late(one, answer, expected, begun)
                if depot.failure is not None:
                    raise depot.failure
                if not one.listed or (answer.whole and depot.heard == begun and not expected.unclear):
                    break  # what is said to be sent, and doesn't come, wouldn't come in pieces either
        self._weigh(one)

    def _await_late(self, one: PulledSeries, answer: FinalResponse, expected: Expected, begun: float) -> None:
        """Wait for what is on its way, as some peers answer before they send; `begun` is the depot's `heard` before."""
        if answer.refused:
            return
        ended, depot, early = time.monotonic(), expected.depot, answer.says_nothing
        while self._lacks(one) and depot.failure is None:
            nothing = (early or answer.whole) and depot.heard == begun and not expected.unclear
            patience = self.peer.idle_timeout_s if early or nothing else min(LATE_S, self.peer.idle_timeout_s)
            if time.monotonic() - max(ended, expected.last_heard()) >= patience:
                if nothing and not self._counts[one.uid]:
                    raise moves.nothing_came(self.peer, self._destination, str(answer), patience, self.strangers)
                return
            time.sleep(LOOK_S)
            self.report.check()
