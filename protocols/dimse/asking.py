"""Decides what to request when an association is opened, and requests less if the peer refuses it.

Some peers reject a request over one SOP class or transfer syntax in it, or over the number of contexts; others abort,
close, or say nothing. A peer that refuses us, or any association now, also refuses a request for C-ECHO. If it grants
that, the contexts are the reason, and less is requested:

    fewer contexts at once, each SOP class alone, each of its transfer syntaxes alone, uncompressed instead
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from imaging.transcode import fallbacks
from protocols.dimse import contexts
from protocols.dimse.association import MAX_CONTEXTS, Association, negotiate
from protocols.dimse.contexts import UNCOMPRESSED, Pair
from protocols.dimse.message import VERIFICATION
from protocols.dimse.transport import Peer, connect
from transfer.errors import Cancelled, DispatchError, TimedOut

WINDOW = 16  # operations outstanding, if the peer grants it: hides 16 round trips, and repeats at most 16 instances
ROOMS = (MAX_CONTEXTS - 1, 31, 7)  # contexts to ask for at once, one after another
# Of the idle timeout, for an answer to a request after one that got none; more where the peer was seen to take long.
SHARE, LEAST_S, TIMES_SLOWEST = 0.1, 0.5, 4


@dataclass(frozen=True)
class ContextGroup:
    """The contexts of one association.

    Attributes:
        serves: SOP class and transfer syntax of the instances that go over it.
        asked: what is asked for: these, and what they may be converted to.
        alone: whether it is the least that can be requested.
    """

    serves: tuple[Pair, ...]
    asked: tuple[Pair, ...]
    alone: bool = False

    @property
    def classes(self) -> set[str]:
        return {sop_class for sop_class, _ in self.serves}


class Asking:
    """How to request associations from one peer; learns from the answers.

    Args:
        policy: what may be converted, as in `imaging.transcode`.
        silent: whether the peer left a request unanswered before.

    Attributes:
        granted: the most storage contexts that the peer has answered.
        alive: whether it has answered any request.
        connected: whether the last request came so far that the peer has seen its contexts.
        apart: whether each SOP class is asked for alone.
        hopeless: why no association is granted for instances of these pairs.
    """

    def __init__(self, peer: Peer, policy: str, *, silent: bool = False) -> None:
        self.peer, self.policy = peer, policy
        self.granted = 0
        self.alive = self.connected = self.apart = False
        self.hopeless: dict[Pair, DispatchError] = {}
        self._room = 0
        self._slowest = 0.0  # seconds that an answer took
        self._silent = silent

    @property
    def patience(self) -> float:
        """Seconds to wait for an answer: after a silence, a few of them are to cost no more than one."""
        longest = self.peer.idle_timeout_s
        if not self._silent:
            return longest
        return min(longest, max(SHARE * longest, TIMES_SLOWEST * self._slowest, LEAST_S))

    def associate(self, wanted: Sequence[tuple[str, Sequence[str]]], check: Callable[[], None]) -> Association:
        """Request an association with these contexts.

        Raises:
            As `association.associate`.
        """
        begun = time.monotonic()
        self.connected = False
        sock = connect(self.peer, check)
        self.connected = True
        try:
            made = negotiate(sock, self.peer, wanted, check, window=WINDOW, patience=self.patience)
        except TimedOut:
            self._silent = True
            raise
        self._slowest = max(self._slowest, time.monotonic() - begun)
        self.alive = True
        return made

    def answers(self, check: Callable[[], None]) -> bool:
        """Return True if the peer grants an association for C-ECHO alone."""
        if not self.alive:
            try:
                self.associate([(VERIFICATION, UNCOMPRESSED[1:])], check).release()
            except Cancelled:
                raise
            except DispatchError:
                return False
        return True

    def groups(self, pairs: Iterable[Pair]) -> list[ContextGroup]:
        """Distribute the pairs of instances over as few associations as the peer lets us."""
        pairs = list(dict.fromkeys(pairs))
        found = []
        for asked in contexts.groups(pairs, self.policy, ROOMS[self._room], apart=self.apart):
            classes = {sop_class for sop_class, _ in asked}
            found.append(ContextGroup(tuple(pair for pair in pairs if pair[0] in classes), tuple(asked)))
        return found

    def fewer(self, group: ContextGroup, later: Iterable[ContextGroup]) -> list[ContextGroup] | None:
        """Return what to request instead of a group and those after it: fewer contexts; None if they are few."""
        while len(group.asked) > self.granted and self._room + 1 < len(ROOMS):
            self._room += 1
            if len(group.asked) > ROOMS[self._room]:
                return self._again(group, later)
        return None

    def smaller(self, group: ContextGroup, later: Iterable[ContextGroup]) -> list[ContextGroup] | None:
        """Return what to request instead of a group and those after it: parts of it; None if it has none."""
        if len(group.classes) > 1:
            self.apart = True
            return self._again(group, later)
        if not group.alone:
            alone = [self._alone(pair) for pair in group.serves]
            # The same again makes sure, where the peer is known to answer others.
            return [*alone, *later] if self.alive or len(alone[0].asked) < len(group.asked) else None
        syntax = group.serves[0][1]
        plain = tuple(pair for pair in group.asked if pair[1] != syntax)
        converts = syntax not in UNCOMPRESSED and UNCOMPRESSED[0] in fallbacks(syntax, self.policy)
        if not converts or len(plain) == len(group.asked):
            return None
        return [ContextGroup(group.serves, plain, alone=True), *later]

    def _again(self, group: ContextGroup, later: Iterable[ContextGroup]) -> list[ContextGroup]:
        later = list(later)
        rest = [pair for each in (group, *later) if not each.alone for pair in each.serves]
        return [*(each for each in later if each.alone), *self.groups(rest)]

    def _alone(self, pair: Pair) -> ContextGroup:
        asked = dict.fromkeys((pair, *((pair[0], syntax) for syntax in UNCOMPRESSED)))
        return ContextGroup((pair,), tuple(asked), alone=True)
