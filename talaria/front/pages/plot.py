"""Plots that are made on the server: bars of days as inline SVG, without script or style of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from talaria.service.overview import Day

WIDTH, HEIGHT = 24, 80  # of a day's bar with its gap, and of the highest bar, in units of the drawing
BAR, LINE = 16, 2


@dataclass(frozen=True)
class Bar:
    """One day: where its parts are drawn, from the top, in units of the drawing."""

    day: Day
    x: int
    good_y: int
    good_height: int
    bad_y: int
    bad_height: int
    sent_y: int
    sent_height: int


@dataclass(frozen=True)
class Plot:
    """Bars of days.

    Attributes:
        most: dispatches of the highest bar.
        most_bytes: of the day on which most was sent.
    """

    bars: list[Bar]
    width: int
    height: int
    most: int
    most_bytes: float


def plotted(days: Sequence[Day]) -> Plot:
    """Return the plot of some days; one that had anything at all has a bar that can be seen."""
    most = max((day.good + day.bad for day in days), default=0)
    most_bytes = max((day.bytes for day in days), default=0.0)

    def high(count: float, most: float = most) -> int:
        return max(LINE, round(HEIGHT * count / most)) if count else 0

    bars = []
    for number, day in enumerate(days):
        good, bad = high(day.good), high(day.bad)
        good = min(good, HEIGHT - bad)
        sent = high(day.bytes, most_bytes)
        bars.append(Bar(day, number * WIDTH, HEIGHT - good, good, HEIGHT - good - bad, bad, HEIGHT - sent, sent))
    return Plot(bars, len(days) * WIDTH, HEIGHT, most, most_bytes)
