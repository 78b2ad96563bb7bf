"""Brings series from a DICOM node into a folder: by C-GET where it is granted, else by C-MOVE to our Storage SCP."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from imaging.header import UID, Header
from protocols.dimse.get import (
    DESTINATION_UNKNOWN,
    PATIENT_ROOT_GET,
    PATIENT_ROOT_MOVE,
    USUAL_CLASSES,
    FinalResponse,
    Retriever,
    failure,
    getter,
    mover,
    next_message_id,
    pairs_for,
)
from protocols.dimse.moves import DESK, Expected, addresses
from protocols.dimse.ports import shared
from protocols.dimse.receive import Depot
from protocols.dimse.scp import StorageScp
from protocols.dimse.transport import Peer
from protocols.files import partial as files
from protocols.files.instances import here
from transfer.errors import Busy, DispatchError, Interrupted, Misconfigured, TimedOut, Unreachable
from transfer.fanout import in_threads
from transfer.outcome import ALREADY, DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

UID_LIST = 50  # instances in one request
LATE_S = 3.0  # for what is still on its way when a source says that a move is done
LOOK_S = 0.05
PORT_S = 30  # for another process to give up the Storage SCP's port


@dataclass(frozen=True)
class MoveDestination:
    """Where C-MOVE sends to: our Storage SCP, as the peer knows it. Port 0: none, C-MOVE can't be used."""

    aet: str = "TALARIA"
    port: int = 0
    host: str = ""  # address to listen on, "" for all


@dataclass(eq=False)
class PulledSeries:
    """A series to retrieve.

    Attributes:
        announced: how many instances the peer says that it has, None if it doesn't say.
        images: what the peer lists: SOP class and transfer syntaxes by SOP instance UID; None if it lists nothing.
        patient: Patient ID, for peers of Patient Root.
    """

    study: str
    uid: str
    announced: int | None = None
    images: dict[str, tuple[str, tuple[str, ...]]] | None = None
    patient: str = field(default="", repr=False)
    answers: list[FinalResponse] = field(default_factory=list)

    def classes(self) -> dict[str, tuple[str, ...]]:
        """Return the SOP classes of its instances, with the syntaxes that the peer names."""
        found: dict[str, dict[str, None]] = {}
        for sop_class, syntaxes in (self.images or {}).values():
            if UID.fullmatch(sop_class):
                found.setdefault(sop_class, {}).update(dict.fromkeys(syntaxes))
        return {sop_class: tuple(syntaxes) for sop_class, syntaxes in found.items()}


class _NoRoom(Exception):
    """There is no association to be had now."""

    def __init__(self, error: DispatchError) -> None:
        super().__init__(error.message)
        self.error = error


@contextmanager
def _association() -> Iterator[None]:
    try:
        yield
    except (Busy, Interrupted, Misconfigured, TimedOut, Unreachable) as exc:
        raise _NoRoom(exc) from exc


class Pull:
    """One retrieval. What is in the folder already is not asked for again.

    Args:
        associations: how many at most at once.

    Attributes:
        notes: what went otherwise than announced, and how it was retrieved, for people.
        unproven: series of which nobody says how many instances they have, and the peer doesn't say that all came.
    """

    def __init__(
        self,
        peer: Peer,
        series: Sequence[PulledSeries],
        folder: Path,
        report: PushReport,
        *,
        associations: int,
        throttle: Throttle,
        destination: MoveDestination,
    ) -> None:
        self.peer, self.series, self.folder, self.report = peer, list(series), folder, report
        self.notes: list[str] = []
        self.unproven: list[str] = []
        self._associations, self._throttle, self._destination = associations, throttle, destination
        self._lock = threading.Lock()
        self._here: dict[str, Item] = {}
        self._counts: Counter[str] = Counter()
        self._jobs: deque[PulledSeries] = deque()
        self._moves = ""  # why C-MOVE is used, "" as long as C-GET may do
        self._got = False  # whether C-GET has ever brought something
        self._established = 0
        self._led = False
        self._open = threading.Event()  # the first association is there, or will never be
        self._current: dict[int, PulledSeries] = {}  # by thread
        self._uids: dict[str, set[str]] = {one.uid: set() for one in self.series}

    def run(self) -> Plan:
        """Fetch what is missing; return what should be here as a plan, whose outcomes have been reported.

        Raises:
            DispatchError: not all could be asked for; what came is in the folder, and has been reported.
        """
        with files.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        files.sweep(self.folder)
        self._look()
        self._jobs.extend(one for one in self.series if self._lacks(one))
        if self._jobs:
            in_threads(self._work, max(1, min(self._associations, len(self._jobs))), "pull")
        items = dict(self._here)
        for one in self.series:
            last = one.answers[-1] if one.answers else None
            for uid in sorted((one.images or {}).keys() - self._here.keys()):
                items[uid] = Item(f"{uid}.dcm", 0, 0, Header("", uid, "", one.study, one.uid, 0))
                text = "listed by the peer, but not given" + (f" ({last})" if last else "")
                self.report(items[uid], Outcome(Kind.REJECTED, text))
            if one.images is None and one.announced is None and not (last is None or last.whole):
                self.unproven.append(one.uid)
                self.notes.append(f"series {one.uid}: the peer does not say what it has, nor that all came: {last}")
            elif last and (last.failed or last.status):
                self.notes.append(f"series {one.uid}: the peer answered {last}")
        if self._moves:
            self.notes.append(f"retrieved by C-MOVE to {self._destination.aet}: {self._moves}")
        elif any(one.answers for one in self.series):
            self.notes.append("retrieved by C-GET, which the peer grants")
        return Plan("", self.folder, tuple(sorted(items.values(), key=lambda item: item.path)))

    def count(self, series: str) -> int:
        """Return how many instances of a series are here."""
        return self._counts[series]

    def _look(self) -> None:
        """Find what is in the folder already."""
        wanted = {one.uid for one in self.series}
        for uid, series, item in here(self.folder, wanted, self.report.check):
            self._here[uid] = item
            self._uids[series].add(uid)
            self._counts[series] += 1
            self.report(item, ALREADY)

    def _lacks(self, one: PulledSeries) -> bool:
        """Return whether something of a series is not here, as far as is known."""
        if one.images is not None and one.images.keys() - self._here.keys():
            return True
        if one.announced is not None:
            return self._counts[one.uid] < one.announced and one.images is None
        return one.images is None and not (one.answers and one.answers[-1].whole)

    def _keep(self, item: Item) -> None:
        assert item.header is not None  # noqa: S101 - a Depot keeps instances only
        with self._lock:
            self._here[item.header.SOPInstanceUID] = item
            self._counts[item.header.SeriesInstanceUID] += 1
        self.report(item, DELIVERED)

    def _depot(self, one: PulledSeries, *, durable: bool) -> Depot:
        def refuse(header: Header) -> str:
            if header.StudyInstanceUID == one.study and header.SeriesInstanceUID == one.uid:
                return ""
            return "" if one.images and header.SOPInstanceUID in one.images else "of another series than was asked for"

        return Depot(self.folder, refuse, self._keep, durable=durable, here=self._uids[one.uid])

    # ---- associations

    def _work(self) -> None:
        """Take series after series, on one association as long as that serves.

        The first to come associates alone: a peer that takes one association only shall not choose which.
        """
        with self._lock:
            leads, self._led = not self._led, True
        try:
            while not leads and not self._open.wait(LOOK_S):
                self.report.check()
            while (one := self._next()) is not None:
                before = len(self._here)
                try:
                    if not (self._by_move(one) if self._moves else self._by_get(one)):
                        self._put_back(self._taken())  # C-GET is not to be had
                except _NoRoom as exc:
                    self._put_back(self._taken())
                    if self._established:
                        return  # others are at work
                    raise exc.error from exc
                except (Interrupted, TimedOut):
                    # Who brings something before it breaks is asked again for the rest.
                    self._put_back(self._taken())
                    if len(self._here) == before:
                        raise
        finally:
            if leads:
                self._open.set()

    def _next(self, fits: Callable[[PulledSeries], bool] = lambda one: True) -> PulledSeries | None:
        """Take the next series; None if there is none, it doesn't fit, or the retrieval shall pause."""
        self.report.check()
        with self._lock:
            if not self._jobs or self.report.pausing.is_set() or not fits(self._jobs[0]):
                return None
            one = self._current[threading.get_ident()] = self._jobs.popleft()
            return one

    def _taken(self) -> PulledSeries:
        """Return the series that this thread took last: on one association, several may follow the first."""
        return self._current[threading.get_ident()]

    def _put_back(self, one: PulledSeries) -> None:
        with self._lock:
            self._jobs.appendleft(one)

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

    def _by_get(self, one: PulledSeries) -> bool:
        """Retrieve series on one association by C-GET, beginning with this one; False if the peer doesn't grant it."""
        pairs = pairs_for(one.classes() or dict.fromkeys(USUAL_CLASSES, ()))
        with _association():
            retriever = getter(self.peer, pairs, self.report.check, self._throttle, self.report.moved)
        why = ""
        if not retriever.root:
            why = "the peer does not accept C-GET"
        elif not retriever.stores:
            why = "the peer accepts C-GET, but sends none of the SOP classes that were asked for"
        if why:
            retriever.association.release()
            self._no_get(why)
            return False
        with self._counted(), retriever:
            following: PulledSeries | None = one
            while following is not None:
                if not self._get(retriever, following):
                    return False
                following = self._next(partial(self._fits, retriever))
        return True

    def _no_get(self, why: str) -> None:
        if not self._destination.port:
            raise Misconfigured(
                f"{self.peer.where}: {why}, and no port is set for the Storage SCP that C-MOVE would send to: "
                "set scp_port"
            )
        with self._lock:
            self._moves = self._moves or why

    def _fits(self, retriever: Retriever, one: PulledSeries) -> bool:
        """Return True if an association has the contexts of a series."""
        classes = one.classes()
        held = {sop_class for sop_class, _ in retriever.pairs}
        named = {(each, syntax) for each, syntaxes in classes.items() for syntax in syntaxes}
        return not self._moves and bool(classes) and classes.keys() <= held and named <= retriever.pairs

    def _get(self, retriever: Retriever, one: PulledSeries) -> bool:
        depot = self._depot(one, durable=False)
        try:
            for keys in self._requests(one, retriever):
                answer = retriever.get(keys, depot)
                one.answers.append(answer)
                self._got = self._got or bool(self._counts[one.uid])
                error = failure(self.peer, answer)
                if error and not self._destination.port:
                    raise error
                if answer.refused and not self._got and self._destination.port:
                    self._no_get(f"the peer answers C-GET with {answer}")
                    one.answers.clear()
                    return False
                if error:
                    raise error
        finally:
            self._note(one, depot)
            depot.settle(self.report.check)
        return True

    def _note(self, one: PulledSeries, depot: Depot) -> None:
        for why, count in depot.refused.items():
            self.notes.append(f"series {one.uid}: {count} instances were not taken: {why}")

    def _requests(self, one: PulledSeries, retriever: Retriever) -> Iterator[dict[str, str]]:
        """Yield the keys to ask with: for the series, then for what is still missing, in lists and one by one."""
        above = {"StudyInstanceUID": one.study, "SeriesInstanceUID": one.uid}
        if retriever.root in (PATIENT_ROOT_GET, PATIENT_ROOT_MOVE):
            above["PatientID"] = one.patient
        whole, image = above | {"QueryRetrieveLevel": "SERIES"}, above | {"QueryRetrieveLevel": "IMAGE"}
        if not self._counts[one.uid] or one.images is None:
            yield whole
            if one.images is None and self._lacks(one):
                yield whole
        for step in (UID_LIST, 1):
            missing = sorted((one.images or {}).keys() - self._here.keys())
            if step == 1 and len(missing) > UID_LIST:
                return  # what is missing of lists is missing
            for start in range(0, len(missing), step):
                self.report.check()
                yield image | {"SOPInstanceUID": "\\".join(missing[start : start + step])}

    # ---- C-MOVE

    def _by_move(self, one: PulledSeries) -> bool:
        with _association():
            retriever = mover(self.peer, self.report.check)
        if not retriever.root:
            retriever.association.release()
            raise Misconfigured(f"{self.peer.where}: {self._moves}; nor does it accept C-MOVE: it can't be pulled from")
        with self._counted(), self._listening(), retriever:
            following: PulledSeries | None = one
            while following is not None:
                self._move(retriever, following)
                following = self._next()
        return True

    @contextmanager
    def _listening(self) -> Iterator[None]:
        at = self._destination
        context = self.peer.tls.server() if self.peer.tls and self.peer.tls.cert else None
        with shared(
            StorageScp,
            at.host,
            at.port,
            lambda: StorageScp(at.host, at.port, at.aet, DESK, None, self.peer.idle_timeout_s),
            context,
            PORT_S,
            self.report.check,
            remedy=" for what C-MOVE sends, set scp_port",
        ):
            yield

    def _move(self, retriever: Retriever, one: PulledSeries) -> None:
        depot = self._depot(one, durable=True)
        hosts = addresses(self.peer.host, self.peer.port)
        instances = None if one.images is None else frozenset(one.images)
        try:
            for keys in self._requests(one, retriever):
                number = next_message_id()
                expected = Expected(frozenset((self.peer.calling, self.peer.called)), number, hosts, instances, depot)
                with DESK.expecting(expected):
                    answer = retriever.move(keys, self._destination.aet, number, expected.last_heard)
                    one.answers.append(answer)
                    error = failure(self.peer, answer, self._destination.aet)
                    # A peer that has moved something knows where to; some call any failure so.
                    known = any(each.status != DESTINATION_UNKNOWN for each in one.answers)
                    if error and not (known and answer.status == DESTINATION_UNKNOWN):
                        raise error
                    self._await_late(one, answer, expected)
                if depot.failure is not None:
                    raise depot.failure
        finally:
            self._note(one, depot)

    def _await_late(self, one: PulledSeries, answer: FinalResponse, expected: Expected) -> None:
        """Wait for instances that are still on their way: some peers answer before they have sent anything."""
        if answer.refused:
            return
        ended = time.monotonic()
        early = answer.status == 0 and not (answer.completed or answer.failed or answer.warning)
        patience = self.peer.idle_timeout_s if early else min(LATE_S, self.peer.idle_timeout_s)
        while self._lacks(one) and expected.depot.failure is None:
            if time.monotonic() - max(ended, expected.heard) >= patience:
                if early and not self._counts[one.uid]:
                    raise TimedOut(
                        f"{self.peer.where}: the peer says that it has sent the series, and nothing came within "
                        f"{patience:g} s: is {self._destination.aet} registered there with this machine's address and "
                        f"port {self._destination.port}?"
                    )
                return
            time.sleep(LOOK_S)
            self.report.check()
