"""Brings series from a DICOM node into a folder: by C-GET where it is granted, else by C-MOVE to our Storage SCP."""

from __future__ import annotations

from functools import partial

from protocols.dimse.ends import NoAssociation, associating
from protocols.dimse.get import Retriever, failure, getter
from protocols.dimse.moves import cannot_come
from protocols.dimse.offers import USUAL_CLASSES, pairs_for, usual_pairs
from protocols.dimse.pull_move import LOOK_S, PullByMove
from protocols.dimse.series import PulledSeries
from transfer.errors import DispatchError, Interrupted, Misconfigured, TimedOut
from transfer.fanout import gravest, in_threads
from transfer.plan import Plan

HOPELESS = 3  # refusals, one after the other, before C-GET has brought anything
HOPELESS_SERIES = 2  # series that C-GET brought nothing of


class Pull(PullByMove):
    """One retrieval, by C-GET where it is granted."""

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
                    if not self._lacks(one) or (self._no_rest and self._is_rest(one)):
                        continue
                    moving = bool(self._moves or one.moves)
                    (self._by_move if moving else self._by_get)(one)
                except NoAssociation as exc:
                    taken, alone = self._taken(), not self._established
                    if moving and alone and self._is_rest(taken):
                        self._give_up(taken, exc.error)
                        continue
                    self._put_back(taken)
                    if not alone:
                        return  # others are at work
                    raise exc.error from exc
                except (Interrupted, TimedOut) as exc:
                    # Who brings something before it breaks is asked again for the rest.
                    taken = self._taken()
                    if moving and len(self._here) == before and self._is_rest(taken):
                        self._give_up(taken, exc)  # what C-GET brings of it is here
                        continue
                    taken.doubtful = bool(self._counts[taken.uid])
                    self._put_back(taken)
                    if len(self._here) == before and (moving or not self._goes_another_way(exc)):
                        raise
        finally:
            if leads:
                self._open.set()

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
        pairs = pairs_for(one.classes(self._missing(one) or None) or dict.fromkeys(USUAL_CLASSES, ()), one.asked)
        with associating():
            retriever = getter(self.peer, pairs, self.report.check, self._throttle, self.report.moved)
        one.was_asked(retriever)
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
        if not for_all and one.untried(self._missing(one)):
            self._put_back(one)  # or their syntaxes
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

    def _fits(self, retriever: Retriever, one: PulledSeries) -> bool:
        """Return True if an association has the contexts of a series."""
        if self._moves or one.moves or self.wants_list(one) or retriever.pairs <= one.asked:
            return False
        classes = one.classes()
        return bool(classes) and retriever.pairs.issuperset(usual_pairs(classes))

    def _get(self, retriever: Retriever, one: PulledSeries) -> bool:
        """Request a series; return False if it must be requested in another way."""
        refusals, last = 0, None
        one.was_asked(retriever)
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
