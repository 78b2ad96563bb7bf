"""Windows of time in which a target may be sent to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_FORM = re.compile(r"(\d{1,2}:\d{2})-(\d{1,2}:\d{2})(?:\s+([A-Za-z,\-]+?))?(?:\s+(\S+))?")


@dataclass(frozen=True)
class DispatchWindow:
    """From `begin` to `end` of day (past midnight if `end` is not later), on days counted from Monday as 0.

    A window past midnight belongs to the day on which it begins.
    """

    begin: time
    end: time
    days: frozenset[int]
    zone: ZoneInfo

    @classmethod
    def parse(cls, text: str) -> DispatchWindow:
        """Parse `HH:MM-HH:MM [days] [time zone]`; days as in `Mon-Fri` or `Sat,Sun`, zone UTC if none is given.

        Raises:
            ValueError: with the form that is expected.
        """
        form = _FORM.fullmatch(text.strip())
        if not form:
            raise ValueError(f"window {text!r}: expected HH:MM-HH:MM [Mon-Fri] [Europe/Berlin]")
        begin, end, days, zone = form.groups()
        if days and zone is None and not _is_days(days):
            days, zone = None, days
        try:
            return cls(_clock(begin), _clock(end), _days(days or "Mon-Sun"), ZoneInfo(zone or "UTC"))
        except (ZoneInfoNotFoundError, OSError) as exc:
            # Where no days stand before it, it may be meant for them.
            days_too = "" if days else "is not days, as in Mon-Fri, and "
            raise ValueError(f"window {text!r}: {zone!r} {days_too}is not a time zone, as in Europe/Berlin") from exc

    def opens(self, now: datetime) -> datetime | None:
        """Return when the window opens next, or None if it is open at `now` (an aware datetime).

        Times are compared in UTC: two datetimes of one zone compare by their clocks, which lie when summer time ends.
        """
        now = now.astimezone(UTC)
        for begin, end in self._times(now):
            if begin <= now < end:
                return None
            if now < begin < end:
                return begin.astimezone(self.zone)
        raise AssertionError("a window has at least one day")

    def meets(self, other: DispatchWindow, now: datetime) -> bool:
        """Return whether both are open at some time of the next two weeks."""
        here, there = (tuple(one._times(now)) for one in (self, other))
        return any(begin < last and first < end for begin, end in here for first, last in there)

    def _times(self, now: datetime) -> Iterator[tuple[datetime, datetime]]:
        today = now.astimezone(self.zone).date()
        for ahead in range(-1, 16):  # of a week's one day, the hour may be the one that summer time leaves out
            day = today + timedelta(days=ahead)
            if day.weekday() in self.days:
                yield self._open(day), self._close(day)

    def _open(self, day: date) -> datetime:
        return datetime.combine(day, self.begin, self.zone).astimezone(UTC)

    def _close(self, day: date) -> datetime:
        last = day if self.end > self.begin else day + timedelta(days=1)
        return datetime.combine(last, self.end, self.zone).astimezone(UTC)


def _clock(text: str) -> time:
    hours, minutes = text.split(":")
    if text == "24:00":
        return time(0, 0)
    try:
        return time(int(hours), int(minutes))
    except ValueError as exc:
        raise ValueError(f"{text!r} is not a time of day") from exc


def _is_days(text: str) -> bool:
    return all(part.capitalize() in DAYS for part in re.split("[,-]", text))


def _days(text: str) -> frozenset[int]:
    days: set[int] = set()
    for part in text.split(","):
        ends = [end.capitalize() for end in part.split("-")]
        if len(ends) > 2 or any(end not in DAYS for end in ends):
            raise ValueError(f"{text!r}: days are {', '.join(DAYS)}, as in Mon-Fri or Sat,Sun")
        first, last = DAYS.index(ends[0]), DAYS.index(ends[-1])
        days.update((first + step) % 7 for step in range((last - first) % 7 + 1))
    return frozenset(days)
