"""The series of a study, or instances of a series, of which a peer may have more than it gave: asked for in parts.

A peer may stop at a number of answers without a word. It may also announce what it has no more. So whatever parts of
the same query bring decides, by modality and by number: keys that every peer matches (PS3.4 tables C.6-3 and C.6-4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from imaging.query import text
from transfer.errors import Busy, Misconfigured

Answer = dict[str, Any]
Ask = Callable[[dict[str, str]], list[Answer]]

# Numbers at which peers stop without a word.
CAPS = frozenset((5, 10, 20, 25, 30, 50, 100, 150, 200, 250, 300, 400, 500, 1000, 1500, 2000, 2500, 3000, 5000))
MOST_NUMBERS = 1000  # queries for one study or series
BEYOND = 10  # numbers behind the last one that are asked for
SAMPLE = 2  # numbers before, between and behind those that are known, which show whether there is more


@dataclass
class InParts:
    """What a peer has of one study or series.

    Args:
        ask: returns the answers to further keys.
        first: what it answered without any.
        announced: how many there are, as the peer says; None if it doesn't say.
        unique, number: keywords of the UID and the number of one of them.

    Attributes:
        heeded: whether the peer looks at one of the keys, so that there is no more than it gave.
        exhausted: whether every number was asked for, and none brought as many as the peer may give at most.
    """

    ask: Ask
    first: list[Answer]
    announced: int | None
    unique: str = "SeriesInstanceUID"
    number: str = "SeriesNumber"
    heeded: bool = False
    exhausted: bool = False
    found: dict[str, Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = -1  # the highest number
        self._full = False  # whether a part brought so many that it may be cut short
        self._add(self.first)

    @property
    def whole(self) -> bool:
        return self.announced is not None and len(self.found) >= self.announced

    @property
    def cut(self) -> bool:
        """Whether parts brought more than the whole query did: the peer has a limit."""
        return len(self.found) > len(self.first)

    def by_modality(self, named: Iterable[str]) -> None:
        """Ask for each modality that the peer named, in the study or in a series."""
        modalities = {*named, *(str(one.get("Modality") or "") for one in self.first)} - {""}
        if len(modalities) > 1:
            counts = [self._part("Modality", one) for one in sorted(modalities)]
            self.heeded = all(0 <= number < len(self.first) for number in counts)

    def by_number(self) -> None:
        """Ask for some numbers that none had; if they bring something, for all of them, and for those known."""
        known = self._numbers()
        if not known:
            return
        least = min(known)
        gaps = [number for number in range(least, self._last) if number not in known]
        before, behind = range(max(least - SAMPLE, 1), least), range(self._last + 1, self._last + 1 + SAMPLE)
        sample = (*gaps[:SAMPLE], *behind, *before)
        if not all(self._by(number) for number in sample):
            return
        self.heeded = self.heeded or len(known) > 1 or len(self.first) == 1  # else all may be part of one number
        if self.cut:
            self.exhausted = self._by_all(known | set(sample), sorted(known)) and not self._full

    def _by_all(self, done: set[int], known: list[int]) -> bool:
        """Ask for one number after the other until nothing is missing; return True if none is left."""
        asked, number = 0, 1
        while number <= max(self.announced or 0, self._last) + BEYOND:
            if number not in done:
                asked += 1
                if self.whole or asked > MOST_NUMBERS or not self._by(number):
                    return False
            number += 1
        return all(not self.whole and self._by(number) for number in (*({0} - done), *known))

    def _by(self, number: int) -> bool:
        return self._part(self.number, str(number)) >= 0

    def _part(self, key: str, value: str) -> int:
        """Add the answers for one value; return how many there were, or -1 if the peer doesn't look at the key."""
        try:
            answers = self.ask({key: value})
        except (Busy, Misconfigured):
            return -1
        if any((text(one.get(key)) or value).strip() != value for one in answers):
            return -1
        self._add(answers)
        self._full = self._full or len(answers) >= len(self.first)
        return len(answers)

    def _add(self, answers: list[Answer]) -> None:
        for one in answers:
            self.found.setdefault(str(one[self.unique]), one)
        self._last = max(self._last, *self._numbers(answers), -1)

    def _numbers(self, answers: Iterable[Answer] | None = None) -> set[int]:
        every = self.found.values() if answers is None else answers
        texts = {text(one.get(self.number)).strip() for one in every}
        return {int(one) for one in texts if one.isdecimal() and one.isascii() and len(one) < 9}
