"""Shows whether a peer has more studies than it gave without saying so: halves of the same are asked for again.

A peer that stops at a number of answers has given as many at least. So each half that brings fewer is whole, and both
together show whether that was all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from imaging.query import text
from protocols.dimse.parts import LAST_S, clock, closed, date_text, day_of, outside, seconds, shortest
from transfer.errors import Busy, Misconfigured

Answer = dict[str, Any]
Keys = dict[str, str]

MOST_PROBED = 50_000  # answers; whether more than these are all is not looked into, as it takes as long once more


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

    def show_more(self) -> bool | None:
        """Return whether the peer has more than it gave; None if neither date nor time of day show it."""
        if not 2 <= len(self.found) <= MOST_PROBED:
            return False
        dates, times = self.values("StudyDate"), self.values("StudyTime")
        # One that is no date (00000000, 20241301) is in any period, or in none: the others show it.
        days = [date for date in dates if (day := day_of(date)) and 1 < day.year < 9999]
        if not days:
            return None
        first, dash, last = self.keys.get("StudyDate", "-").partition("-")
        if dash and not first == last != "":
            if len(days) > 1:
                middle = day_of(self._middle("StudyDate", days))
                assert middle is not None  # noqa: S101 - one of the days
                return self._by_date(f"{first}-{date_text(middle)}", f"{date_text(middle + timedelta(1))}-{last}")
            day = day_of(days[0])
            if len(dates) > 1 or day is None:
                return None
            before, behind = date_text(day - timedelta(1)), date_text(day + timedelta(1))
            sides = [f"{first}-{before}"] if not first or first <= before else []
            sides += [f"{behind}-{last}"] if not last or behind <= last else []
            if self._by_date(*sides):
                return True
        if len(times) < 2 or not all(re.fullmatch(r"\d{2,6}(\.\d+)?", time) for time in times):
            return None
        low_s, _, high_s = self.keys.get("StudyTime", "-").partition("-")
        at = min(seconds(self._middle("StudyTime", times)), LAST_S - 1)
        halves = f"{low_s}-{clock(at)}.999999", f"{shortest(at + 1)}-{high_s}"
        return self._in_parts([{"StudyDate": dates[0], "StudyTime": half} for half in halves])

    def _middle(self, key: str, values: Sequence[str]) -> str:
        """Return the value at which the answers are halved as evenly as they can be."""
        every = sorted(value for one in self.found if (value := text(one.get(key))) in values)
        middle = every[(len(every) - 1) // 2]
        return middle if middle != values[-1] else values[-2]

    def _by_date(self, *periods: str) -> bool | None:
        parts = [{"StudyDate": period} for period in periods]
        more = self._in_parts(parts)
        if more is None and any(one.startswith("-") or one.endswith("-") for one in periods):
            more = self._in_parts([{"StudyDate": closed(one)} for one in periods])  # some refuse open ones
        return more

    def _in_parts(self, parts: Sequence[Keys]) -> bool | None:
        """Return whether parts of the query bring what it didn't; None if the peer doesn't look at their keys."""
        known = {text(one.get("StudyInstanceUID")) for one in self.found}
        for part in parts:
            count, answers = 0, self.ask(self.keys | part)
            try:
                for one in answers:
                    count += 1
                    if text(one.get("StudyInstanceUID")) not in known:
                        return None if outside(self.keys | part, self.keys, [one]) else True
                    if outside(self.keys | part, self.keys, [one]):
                        return None
            except (Busy, Misconfigured):
                return None
            finally:
                for _ in answers:  # the association is in use until the last has come
                    pass
            if count >= len(self.found):
                return None
        return False
