"""Shows whether a peer has more studies than it gave without saying so: parts of the same are asked for again.

A peer that stops at a number of answers gives the first ones that it has. So others come where the query is narrowed to
one end of the dates that it gave, or to what is beyond; to the times of day, if all are of one day.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from imaging.query import text
from protocols.dimse.parts import LAST_S, clock, date_text, day_of, outside, seconds, shortest
from transfer.errors import Busy, Misconfigured

Answer = dict[str, Any]
Keys = dict[str, str]

MOST_PROBED = 5000  # answers; whether more than these are all is not looked into
# Numbers at which peers stop without a word.
CAPS = frozenset((5, 10, 20, 25, 30, 50, 100, 150, 200, 250, 300, 400, 500, 1000, 1500, 2000, 2500, 3000, 5000))


@dataclass(frozen=True)
class Probes:
    """The queries that show it.

    Args:
        ask: returns the answers to keys at study level.
        keys: what was asked.
        found: what the peer answered.
    """

    ask: Callable[[Keys], Iterator[Answer]]
    keys: Keys
    found: list[Answer]

    def values(self, keyword: str) -> list[str]:
        """Return the values that answers have, in order; those without one aside."""
        return sorted({text(one.get(keyword)) for one in self.found} - {""})

    def show_more(self) -> bool:
        """Return True if the peer has more than it gave."""
        if not 2 <= len(self.found) <= MOST_PROBED:
            return False
        dates, times = self.values("StudyDate"), self.values("StudyTime")
        if not dates or not all(re.fullmatch(r"\d{8}", date) for date in dates):
            return False
        first, dash, last = self.keys.get("StudyDate", "-").partition("-")
        if dash and not first == last != "":
            begin, end = day_of(dates[0]), day_of(dates[-1])
            before, behind = (
                date_text(day + timedelta(days)) if day and 1 < day.year < 9999 else ""
                for day, days in ((begin, -1), (end, 1))
            )
            if self._more_of("StudyDate", dates, before, behind):
                return True
        if len(dates) > 1 or not times or not all(re.fullmatch(r"\d{2,6}(\.\d+)?", time) for time in times):
            return False
        low, high = seconds(times[0]), seconds(times[-1])
        before, behind = f"{clock(low - 1)}.999999" if low else "", shortest(high + 1) if high < LAST_S else ""
        return self._more_of("StudyTime", times, before, behind)

    def _more_of(self, key: str, values: list[str], before: str, behind: str) -> bool:
        """Ask for both ends of the values; where that brings as many as the whole, beyond them, too."""
        low, _, high = self.keys.get(key, "-").partition("-")
        if before and low > before:
            before = ""
        if behind and high and high < behind:
            behind = ""
        probes = [
            (f"{low}-{values[0]}", before and f"{low}-{before}"),
            (f"{values[-1]}-{high}", behind and f"{behind}-{high}"),
        ]
        if len(self.found) in CAPS:
            probes.append((f"{low}-{values[len(values) // 2]}", ""))
        for period, beyond in probes:
            for one in filter(None, (period, beyond)):
                count, other = self._part(key, one)
                if other:
                    return True
                if count < 0:
                    return False
                if count < len(self.found):
                    break
        return False

    def _part(self, key: str, period: str) -> tuple[int, bool]:
        """Return how many answers a part of the query has, -1 if the peer ignores the key; and whether one is new."""
        known = {text(one.get("StudyInstanceUID")) for one in self.found}
        part = self.keys | {key: period}
        answers = self.ask(part)
        count = 0
        try:
            for one in answers:
                count += 1
                if text(one.get("StudyInstanceUID")) not in known:
                    return count, True
                if outside(part, self.keys, [one]):
                    return -1, False
        except (Busy, Misconfigured):
            return -1, False
        finally:
            for _ in answers:  # the association is in use until the last has come
                pass
        return count, False
