"""Finds the studies of many accession numbers, with fewer queries than numbers where a peer allows that.

The standard has lists for UIDs only. Some peers accept them for accession numbers too, some refuse them, and DCMTK's
answers "success, nothing". So a list is believed only if it holds a number that is known to be there, and a number that
no list or wild card brings gets a query of its own before it counts as missing.

A peer may stop at a number of answers, whatever that is, without a word. It gives as many at least as it has ever
given to one query: so fewer are all that there are. As many may be its limit: it is asked for something of which there
is more, and where that brings no more either, for the same in parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from transfer.errors import Busy, Misconfigured

T = TypeVar("T")
R = TypeVar("R")
Answer = dict[str, Any]
Answers = list[tuple[Mapping[str, str], Answer]]  # with the keys that were sent
Ask = Callable[[Mapping[str, str], int], Iterator[tuple[Mapping[str, str], Answer]]]

FEW = 3  # numbers that are asked for one by one
LIST = 90  # values in one query; where each brings a study, no usual limit of answers is met
WILD = 2  # characters at the end for which a wild card stands
GROUP = 4  # numbers that make a wild card worth while
MOST = 2000  # answers to a wild card; more are no help
LEAST = 5  # answers at which a peer may stop without a word
ALONE = re.compile(r"[*?\\]|[^\x00-\x7f]")  # what makes a number one that is asked for alone
TRIALS = 2  # wild cards that may bring nothing before no more are tried
AT_ONCE = 32  # numbers that are asked for at once, until one of them is there


class AskEach(Protocol):
    """Asks for each of some values, and returns the answers in their order; may ask for several at once.

    What is called gets a function that queries the peer for studies, and stops after a number of answers if that is
    not 0.
    """

    def __call__(self, work: Callable[[Ask, T], R], values: Sequence[T]) -> list[R]: ...


@dataclass(frozen=True, eq=False)
class _Brought:
    """What a list, or a wild card, has brought.

    Attributes:
        numbers: those that it is for.
        prefix: what the numbers begin with, of a wild card.
        cut: whether the peer says that it has more.
    """

    numbers: list[str]
    answers: Answers = field(repr=False)
    prefix: str = ""
    cut: bool = False

    @property
    def uids(self) -> set[str]:
        return {str(one.get("StudyInstanceUID", "")) for _, one in self.answers}

    def wanted(self) -> Answers:
        """Return the answers to what it is for: not the number that is known, nor what a wild card brings besides."""
        numbers = {_plain(number) for number in self.numbers}
        return [(sent, one) for sent, one in self.answers if _number(one) in numbers]


class Accessions:
    """One search for accession numbers."""

    def __init__(self, each: AskEach) -> None:
        self._each = each
        self._hit = ""  # a number that is there
        self._found: set[str] = set()
        self._given = 0  # the most answers that the peer has given to one query
        self._limit = 0  # number of answers at which it was seen to stop

    def find(self, numbers: list[str]) -> Iterator[tuple[Mapping[str, str], Answer]]:
        """Yield the studies, each with the keys that were sent."""
        left = list(numbers)
        if len(left) > FEW:
            size = 1
            while left and not self._hit:
                some, left = left[:size], left[size:]
                for number, answers in zip(some, self._each(_alone, some), strict=True):
                    there = not ALONE.search(number) and any(_number(one) == _plain(number) for _, one in answers)
                    self._hit = self._hit or (number if there else "")
                    self._given = max(self._given, len(answers))
                    yield from answers
                size = min(2 * size, AT_ONCE)
            plain = [number for number in left if not ALONE.search(number)]
            if self._hit and len(plain) > FEW:
                yield from self._by_list_or_wild_card(plain)
            left = [number for number in left if _plain(number) not in self._found]
        for answers in self._each(_alone, left):
            yield from answers

    def _by_list_or_wild_card(self, numbers: list[str]) -> Iterator[tuple[Mapping[str, str], Answer]]:
        """Yield what lists bring, and wild cards for the numbers of lists that the peer doesn't take."""
        some = [numbers[start : start + LIST - 1] for start in range(0, len(numbers), LIST - 1)]
        brought = self._each(self._list, some[:1])
        if brought[0] is not None:
            brought += self._each(self._list, some[1:])
            yield from self._whole([one for one in brought if one is not None], self._in_halves, self._longer_list)
        refused = [
            number
            for at, one in enumerate(some)
            if at >= len(brought) or brought[at] is None
            for number in one
        ]  # fmt: skip
        if refused:
            yield from self._by_wild_card(refused)

    def _whole(
        self,
        brought: list[_Brought],
        parted: Callable[[list[_Brought]], list[_Brought]],
        more: Callable[[list[_Brought], int], Iterable[str]],
    ) -> Iterator[tuple[Mapping[str, str], Answer]]:
        """Yield what is whole, also what is so in parts.

        Args:
            parted: returns the parts of what may be cut short, those of which they show that it isn't in its place.
            more: returns a value of the key to which there are more answers than so many, as far as is known.
        """
        while brought:
            self._given = max(self._given, *(len(one.answers) for one in brought))
            doubtful = [one for one in brought if self._may_be_cut(one)]
            if doubtful and not self._limit and not any(one.cut for one in doubtful):
                doubtful = [] if self._gives_more(more(brought, self._given)) else doubtful
            for one in brought:
                if one not in doubtful:
                    yield from self._taken(one)
            brought = parted(doubtful) if doubtful else []

    def _may_be_cut(self, one: _Brought) -> bool:
        """Return True if a number of answers may be all that the peer gives at once, which it need not say."""
        return one.cut or len(one.answers) >= max(self._limit or self._given, LEAST)

    def _gives_more(self, values: Iterable[str]) -> bool:
        """Return True if the peer gives more answers to one of some values than it has given to any query."""
        before = self._given
        for value in values:
            (count,) = self._each(_counted, [(value, before + 1)])
            self._given = max(self._given, count)
        return self._given > before

    def _taken(self, one: _Brought) -> Iterator[tuple[Mapping[str, str], Answer]]:
        answers = one.wanted()
        self._found |= {_number(answer) for _, answer in answers}
        yield from answers

    # ---- lists

    def _list(self, ask: Ask, numbers: list[str]) -> _Brought | None:
        """Return the answers to a list of numbers; None if the peer doesn't understand it."""
        # Some peers look at the first value only, or at the last.
        values = [*numbers[: len(numbers) // 2], self._hit, *numbers[len(numbers) // 2 :]]
        answers: Answers = []
        try:
            answers.extend(ask({"AccessionNumber": "\\".join(values)}, 0))
        except Busy:
            return _Brought(numbers, answers, cut=True)
        except Misconfigured:
            return None
        came = {_number(one) for _, one in answers}
        if _plain(self._hit) not in came or not came <= {_plain(value) for value in values}:
            return None
        return _Brought(numbers, answers)

    def _longer_list(self, brought: list[_Brought], count: int) -> Iterator[str]:
        """Yield a list of numbers that are there, with more answers than `count`, if there are as many."""
        numbers: dict[str, str] = {}
        came = 0
        for one in sorted(brought, key=lambda one: -len(one.answers)):
            for _, answer in one.answers:
                numbers.setdefault(_number(answer), str(answer["AccessionNumber"]).strip())
                came += _number(answer) != _plain(self._hit)
                if came > count:
                    yield "\\".join(numbers.values())
                    return

    def _in_halves(self, doubtful: list[_Brought]) -> list[_Brought]:
        halves: list[list[str]] = []
        for one in doubtful:
            middle = len(one.numbers) // 2
            halves += [one.numbers[:middle], one.numbers[middle:]] if middle else []
        brought = iter(self._each(self._list, halves))
        parts: list[_Brought] = []
        for one in doubtful:
            if len(one.numbers) == 1:
                continue  # it is asked for alone
            first, second = next(brought), next(brought)
            if first is None or second is None or not one.uids <= first.uids | second.uids:
                continue  # what the peer answers to a list is not to be relied on
            if one.cut or one.uids < first.uids | second.uids:
                self._limit = min(self._limit or len(one.answers), len(one.answers)) or self._limit
            parts += [first, second]
        return parts

    # ---- wild cards

    def _by_wild_card(self, numbers: list[str]) -> Iterator[tuple[Mapping[str, str], Answer]]:
        groups = _groups(numbers)
        brought = self._each(_wild, groups[:TRIALS])
        if not any(one and one.wanted() for one in brought):
            return  # it takes them for letters, or finds nothing by them
        brought += self._each(_wild, groups[TRIALS:])
        yield from self._whole([one for one in brought if one is not None], self._longer, _shorter_prefix)

    def _longer(self, doubtful: list[_Brought]) -> list[_Brought]:
        groups = [group for one in doubtful for group in _groups(one.numbers, len(one.prefix) + 1)]
        return [one for one in self._each(_wild, groups) if one is not None]


def _alone(ask: Ask, number: str) -> Answers:
    return list(ask({"AccessionNumber": number}, 0))


def _wild(ask: Ask, group: tuple[str, list[str]]) -> _Brought | None:
    """Return the answers to a wild card; None if the peer doesn't take it, or there are too many."""
    prefix, numbers = group
    answers: Answers = []
    try:
        answers.extend(ask({"AccessionNumber": f"{prefix}*"}, MOST))
    except Busy:
        return _Brought(numbers, answers, prefix, cut=True)
    except Misconfigured:
        return None
    return _Brought(numbers, answers, prefix) if len(answers) < MOST else None


def _counted(ask: Ask, wanted: tuple[str, int]) -> int:
    value, most = wanted
    answers: Answers = []
    with suppress(Busy, Misconfigured):
        answers.extend(ask({"AccessionNumber": value}, most))
    return len(answers)


def _groups(numbers: list[str], length: int = 0) -> list[tuple[str, list[str]]]:
    """Return numbers by what they begin with, where enough of them begin alike.

    Args:
        length: of the beginnings; 0 for all but the last characters.
    """
    groups: dict[str, list[str]] = {}
    for number in numbers:
        prefix = number[:length] if length else number[:-WILD]
        if 1 < len(prefix) < len(number):
            groups.setdefault(prefix, []).append(number)
    return [group for group in groups.items() if len(group[1]) >= GROUP]


def _shorter_prefix(brought: list[_Brought], count: int) -> Iterator[str]:
    """Yield a wild card that finds all that the one with the most answers does, and probably more."""
    prefix = max(brought, key=lambda one: len(one.answers)).prefix
    if len(prefix) > 1:
        yield f"{prefix[:-1]}*"


def _plain(number: str) -> str:
    return number.strip().casefold()


def _number(answer: Answer) -> str:
    return _plain(str(answer.get("AccessionNumber", "")))
