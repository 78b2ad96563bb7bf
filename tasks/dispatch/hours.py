"""When a target may be sent to: its window, the off-peak hours, and whether it is enabled."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta

from blocks.base import Target
from transfer.errors import Misconfigured
from transfer.window import DispatchWindow

OFF_PEAK = "22:00-06:00"  # UTC, unless TALARIA_OFF_PEAK says otherwise
DISABLED_S = 60  # what waits for a disabled target, and stands in no line for it, looks again after this


def opens(target: Target, priority: str, now: datetime | None = None) -> datetime | None:
    """Return the time from which a target may be sent to; None for now."""
    now = now or datetime.now(UTC)
    if not target.enabled:
        return now + timedelta(seconds=DISABLED_S)
    windows = []
    if target.window and priority != "urgent":
        windows.append(DispatchWindow.parse(target.window))
    if priority == "offpeak":
        windows.append(off_peak())
    openings = [opening for window in windows if (opening := window.opens(now))]
    return max(openings) if openings else None


def is_open(target: Target) -> bool:
    """Return True if a target is within its own hours, whether it is enabled or not."""
    return not target.window or DispatchWindow.parse(target.window).opens(datetime.now(UTC)) is None


def check_hours(target: Target, priority: str) -> None:
    """Raise if what waits for the off-peak hours would wait for a target for ever.

    Raises:
        Misconfigured: it would.
    """
    if priority != "offpeak" or not target.window:
        return
    if not DispatchWindow.parse(target.window).meets(off_peak(), datetime.now(UTC)):
        raise Misconfigured(
            f"has the window {target.window}, which has no time in common with the off-peak hours, {off_peak_words()}: "
            "nothing would ever be done there with priority offpeak",
            target.name,
        )


def off_peak() -> DispatchWindow:
    """Return the off-peak hours."""
    return DispatchWindow.parse(_set())


def off_peak_words() -> str:
    """Return the off-peak hours for people, always with their time zone."""
    zone = off_peak().zone.key
    return _set() if _set().endswith(zone) else f"{_set()} {zone}"


def _set() -> str:
    return os.environ.get("TALARIA_OFF_PEAK") or OFF_PEAK
