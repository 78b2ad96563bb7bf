"""The series of a study that announces more than a peer gave: asked for by modality and by number.

A peer may stop at a number of answers without a word. It may also announce series that it has no more. So whatever
parts of the same query bring decides: keys that every peer matches (PS3.4 table C.6-3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from transfer.errors import Busy, Misconfigured

Answer = dict[str, Any]
Ask = Callable[[dict[str, str]], list[Answer]]

MOST_NUMBERS = 1000  # queries for one study
BEYOND = 10  # numbers behind the last one that are asked for
SAMPLE = 2  # numbers, between those that series had and behind them, that show whether there is more


@dataclass
class SeriesInParts:
    """What a peer has of one study.

    Args:
        ask: returns the answers to further keys.
        first: what it answered without any.
        announced: how many series it says that the study has.

    Attributes:
        heeded: whether the peer looks at one of the keys, so that there is no more than it gave.
    """

    ask: Ask
    first: list[Answer]
    announced: int
    heeded: bool = False
    found: dict[str, Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._add(self.first)

    @property
    def whole(self) -> bool:
        return len(self.found) >= self.announced

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
        """Ask for some numbers that no series had; if they bring something, for all of them, and for those known."""
        known = self._numbers()
        if not known:
            return
        last = max(known)
        gaps = [number for number in range(min(known), last) if number not in known]
        sample = [*gaps[:SAMPLE], *range(last + 1, last + 1 + SAMPLE)]
        if not all(self._by(number) for number in sample):
            return
        self.heeded = self.heeded or len(known) > 1  # else all that it gave may be part of one number
        every = (*range(1, max(self.announced, last) + BEYOND + 1), 0)
        rest = [number for number in every if number not in known and number not in sample]
        for number in (*rest[:MOST_NUMBERS], *sorted(known)):
            if not self.cut or self.whole or not self._by(number):
                return

    def _by(self, number: int) -> bool:
        return self._part("SeriesNumber", str(number)) >= 0

    def _part(self, key: str, value: str) -> int:
        """Add the answers for one value; return how many there were, or -1 if the peer doesn't look at the key."""
        try:
            answers = self.ask({key: value})
        except (Busy, Misconfigured):
            return -1
        if any(str(one.get(key) or value).strip() != value for one in answers):
            return -1
        self._add(answers)
        return len(answers)

    def _add(self, answers: list[Answer]) -> None:
        for one in answers:
            self.found.setdefault(str(one["SeriesInstanceUID"]), one)

    def _numbers(self) -> set[int]:
        texts = {str(one.get("SeriesNumber") or "").strip() for one in self.found.values()}
        return {int(text) for text in texts if text.isdecimal() and text.isascii() and len(text) < 9}
