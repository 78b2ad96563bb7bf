"""Following a job: bars on a terminal, lines elsewhere, and Ctrl-C, which cancels."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from talaria.console import say

if TYPE_CHECKING:
    from talaria.cli.access import Access

UNITS = ("B", "kB", "MB", "GB", "TB")


def follow(access: Access, run_id: str, *, all_items: bool = False) -> dict[str, Any]:
    """Follow a job until it has ended, or waits for long, and return its result.

    Ctrl-C cancels it, and waits until it has stopped; a second one leaves at once.
    """
    link = access.link(run_id)
    say(f"run {run_id}" + (f": {link}" if link else ""))
    try:
        return _followed(access, run_id, all_items)
    except KeyboardInterrupt:
        say("cancelling; once more to leave at once")
        _cancel(access, run_id)
        return _followed(access, run_id, all_items)


def _cancel(access: Access, run_id: str) -> None:
    from talaria.errors import Refused
    from transfer.errors import Misconfigured

    with suppress(Refused, Misconfigured):  # it has just ended
        access.call("cancel_job", job=run_id)


def _followed(access: Access, run_id: str, all_items: bool) -> dict[str, Any]:
    result, message = dict[str, Any](), ""
    with _Bars() if sys.stderr.isatty() else _Lines() as shown:
        for kind, event in access.stream("follow_job", job=run_id, all_items=all_items):
            if kind == "progress":
                shown.show(event["targets"])
            elif kind == "state":
                message = event.get("message") or ""
            elif kind == "result":
                result = event
    if message and result.get("state") == "waiting" and not result.get("error"):
        say(message)  # until when, and for what
    return result


def words_of(part: dict[str, Any]) -> str:
    """Return how far a part is: items, bytes, rate and time left, as far as they are known."""
    words = [str(part.get("words", ""))]
    if part.get("bytes"):
        words.append(f"{size(part['moved'])} of {size(part['bytes'])}")
        if part.get("rate"):
            words.append(f"{size(part['rate'])}/s")
        if part.get("seconds_left"):
            words.append(f"{clock(part['seconds_left'])} left")
    return ", ".join(words)


def size(count: float) -> str:
    """Return a number of bytes for people."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.1f} {UNITS[unit]}"


def clock(seconds: float) -> str:
    """Return a time for people."""
    whole = max(1, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{rest} s"


class _Lines:
    """A line for each attempt that failed."""

    def __init__(self) -> None:
        self.said: set[tuple[str, str]] = set()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is left on the screen."""

    def show(self, now: dict[str, dict[str, Any]]) -> None:
        for name, part in now.items():
            for line in part["failures"]:
                if (name, line) not in self.said:
                    self.said.add((name, line))
                    self.line(f"{name}: {line}")

    def line(self, text: str) -> None:
        say(text)


class _Bars(_Lines):
    """Progress bars on stderr, one per target, too."""

    def __enter__(self) -> _Bars:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("{task.fields[name]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, Any] = {}
        self.progress.start()
        return self

    def show(self, now: dict[str, dict[str, Any]]) -> None:
        super().show(now)
        for name, part in now.items():
            words = words_of(part)
            if name not in self.tasks:
                self.tasks[name] = self.progress.add_task(words, total=100, name=name)
            self.progress.update(self.tasks[name], completed=part["percent"], description=words)

    def line(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()
