"""Retrieves series by C-MOVE to our Storage SCP: those that C-GET does not bring, or not all of."""

from __future__ import annotations

import ssl
import time

from protocols.dimse import moves
from protocols.dimse.ends import associating
from protocols.dimse.get import DESTINATION_UNKNOWN, FinalResponse, Retriever, failure, mover, next_message_id
from protocols.dimse.moves import DESK, Expected, addresses, listening
from protocols.dimse.pulling import Pulling
from protocols.dimse.series import PulledSeries
from transfer.errors import Misconfigured

LATE_S = 3.0  # for what is still on its way when a source says that a move is done
LOOK_S = 0.05


class PullByMove(Pulling):
    """The half of a retrieval that C-MOVE does."""

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
            if self._is_rest(one):
                self._give_up(one, exc)
                return
            if (error := self._broken.of_move(exc)) is exc:
                raise
            raise error from exc

    def _request_moves(self, one: PulledSeries, tls: ssl.SSLContext | None) -> None:
        with associating():
            retriever = mover(self.peer, self.report.check)
        if not retriever.root:
            retriever.association.release()
            said = "the peer does not" if self._is_rest(one) else f"{self._moves or one.moves}; nor does it"
            error = Misconfigured(f"{self.peer.where}: {said} accept C-MOVE: it can't be pulled from")
            if self._moves:
                raise self._broken.of_move(error)
            self._give_up(one, error)
            return
        with self._counted(), retriever:
            following: PulledSeries | None = one
            while following is not None:
                self._move(retriever, following, tls)
                following = self._next(self._is_to_be_moved)

    def _is_to_be_moved(self, one: PulledSeries) -> bool:
        if self.wants_list(one) or (self._no_rest and self._is_rest(one)):
            return False
        return bool(self._moves or one.moves)

    def _move(self, retriever: Retriever, one: PulledSeries, tls: ssl.SSLContext | None) -> None:
        whose, hosts = frozenset((self.peer.calling, self.peer.called)), addresses(self.peer.host, self.peer.port)
        at = self._destination.aet
        instances = frozenset(one.images) if one.images and one.all_listed else None
        before = self._counts[one.uid]
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
                    self._knows_us = self._knows_us or answer.status != DESTINATION_UNKNOWN
                    if error and not (self._knows_us and answer.status == DESTINATION_UNKNOWN):
                        if self._moves:
                            raise self._broken.of_move(error)
                        self._give_up(one, error)
                        return
                    self._await_late(one, answer, expected, begun)
                if depot.failure is not None:
                    raise depot.failure
                if not one.listed or (answer.whole and depot.heard == begun and not expected.unclear):
                    break  # what is said to be sent, and doesn't come, wouldn't come in pieces either
        if self._counts[one.uid] > before:
            self._moved[one.uid] = one.moves
        self._weigh(one)

    def _await_late(self, one: PulledSeries, answer: FinalResponse, expected: Expected, begun: float) -> None:
        """Wait for what is on its way, as some peers answer before they send; `begun` is the depot's `heard` before."""
        if answer.refused or answer.failed_all:
            return
        ended, depot, early = time.monotonic(), expected.depot, answer.says_nothing
        while self._lacks(one) and depot.failure is None:
            if one.all_listed and depot.unwanted.issuperset(self._missing(one)):
                return  # all that lacks came, and was not taken
            nothing = (early or answer.whole) and depot.heard == begun and not expected.unclear
            patience = self.peer.idle_timeout_s if early or nothing else min(LATE_S, self.peer.idle_timeout_s)
            if time.monotonic() - max(ended, expected.last_heard()) >= patience:
                if nothing and (self._is_rest(one) or not self._counts[one.uid]):
                    raise moves.nothing_came(self.peer, self._destination, str(answer), patience, self.strangers)
                return
            time.sleep(LOOK_S)
            self.report.check()
