"""Finds the studies of many accession numbers, with fewer queries than numbers where a peer allows that.

The standard has lists for UIDs only. Some peers accept them for accession numbers too, some refuse them, and DCMTK's
answers "success, nothing". So a list is believed only if it holds a number that is known to be there, and a number that
no list or wild card brings gets a query of its own before it counts as missing.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from protocols.dimse.below import CAPS
from transfer.errors import Busy, Misconfigured

Answer = dict[str, Any]
Ask = Callable[[Mapping[str, str], int], Iterator[tuple[Mapping[str, str], Answer]]]

FEW = 3  # numbers that are asked for one by one
LIST = 90  # values in one query; where each brings a study, no usual limit of answers is met
WILD = 2  # characters at the end for which a wild card stands
GROUP = 4  # numbers that make a wild card worth while
MOST = 2000  # answers to a wild card; more are no help
SMALL = 20  # answers to a wild card that no peer takes for too many
ALONE = re.compile(r"[*?\\]|[^\x00-\x7f]")  # what makes a number one that is asked for alone
TRIALS = 2  # wild cards that may bring nothing before no more are tried


class Accessions:
    """One search for accession numbers.

    Args:
        ask: queries the peer for studies; stops after a number of answers if that is not 0.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._found: set[str] = set()
        self._given = 0  # the most answers that the peer has given to one query

    def find(self, numbers: list[str]) -> Iterator[tuple[Mapping[str, str], Answer]]:
        """Yield the studies, each with the keys that were sent."""
        left = list(numbers)
        if len(left) > FEW:
            hit = ""
            while left and not hit:
                number = left.pop(0)
                for sent, one in self._alone(number):
                    hit = hit or (number if _number(one) == number else "")
                    yield sent, one
            plain = [number for number in left if not ALONE.search(number)]
            if hit and len(plain) > FEW and not ALONE.search(hit):
                yield from self._by_list_or_wild_card(plain, hit)
            left = [number for number in left if number not in self._found]
        for number in left:
            yield from self._alone(number)

    def _alone(self, number: str) -> Iterator[tuple[Mapping[str, str], Answer]]:
        yield from self._ask({"AccessionNumber": number}, 0)

    def _by_list_or_wild_card(self, numbers: list[str], hit: str) -> Iterator[tuple[Mapping[str, str], Answer]]:
        for start in range(0, len(numbers), LIST - 1):
            some = numbers[start : start + LIST - 1]
            answers = self._list(some, hit)
            if answers is None:
                yield from self._by_wild_card(numbers[start:])
                return
            yield from answers

    def _list(self, numbers: list[str], hit: str) -> list[tuple[Mapping[str, str], Answer]] | None:
        """Return the answers to a list of numbers; None if the peer doesn't understand it."""
        # Some peers look at the first value only, or at the last.
        values = [*numbers[: len(numbers) // 2], hit, *numbers[len(numbers) // 2 :]]
        try:
            answers = list(self._ask({"AccessionNumber": "\\".join(values)}, 0))
        except (Misconfigured, Busy):
            return None
        came = {_number(one) for _, one in answers}
        if hit not in came or not came <= set(values):
            return None
        if self._may_be_cut(len(answers)):
            if len(numbers) == 1:
                return []  # it is asked for alone
            half = len(numbers) // 2
            parts = [self._list(some, hit) for some in (numbers[:half], numbers[half:])]
            return [one for part in parts for one in part or ()]  # what a part does not bring is asked for alone
        self._found |= came
        return [(sent, one) for sent, one in answers if _number(one) != hit]

    def _by_wild_card(self, numbers: list[str]) -> Iterator[tuple[Mapping[str, str], Answer]]:
        groups: dict[str, list[str]] = {}
        for number in numbers:
            if len(number) > WILD + 1:
                groups.setdefault(number[:-WILD], []).append(number)
        failed, left = 0, deque(groups.items())
        while left:
            prefix, members = left.popleft()
            if len(members) < GROUP or failed >= TRIALS:
                continue
            wanted = set(members)
            try:
                every = list(self._ask({"AccessionNumber": f"{prefix}*"}, MOST))
            except (Misconfigured, Busy):
                return
            answers = [(sent, one) for sent, one in every if _number(one) in wanted]
            failed = 0 if answers else failed + 1
            if len(every) >= MOST:
                continue  # of some numbers, not all studies may have come
            if len(every) > SMALL and self._may_be_cut(len(every)) and not self._gives_more(prefix[:-1], len(every)):
                longer: dict[str, list[str]] = {}
                for number in members:
                    if len(number) > len(prefix) + 1:
                        longer.setdefault(number[: len(prefix) + 1], []).append(number)
                left += longer.items()
                continue
            self._found |= {_number(one) for _, one in answers}
            yield from answers

    def _may_be_cut(self, count: int) -> bool:
        """Return True if a number of answers may be all that the peer gives at once, which it need not say."""
        before, self._given = self._given, max(self._given, count)
        return count in CAPS and count >= before

    def _gives_more(self, prefix: str, count: int) -> bool:
        try:
            more = sum(1 for _ in self._ask({"AccessionNumber": f"{prefix}*"}, count + 1)) if prefix else 0
        except (Misconfigured, Busy):
            return False
        self._given = max(self._given, more)
        return more > count


def _number(answer: Answer) -> str:
    return str(answer.get("AccessionNumber", "")).strip()
