"""Files that were on their way when the connection to an SFTP server broke: any of them may be the reason.

They are sent once more, alone, after all others. What breaks the connection then, or was alone on its way at the first
break, is left to the next attempt, in which it comes last again; the third time it is rejected, if others arrive.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from protocols.ssh.sftp import WINDOW_BYTES
from transfer.errors import Retryable
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport

MOST_IN_A_ROW = 3  # breaks with no file between them, before the server is left in peace
MOST_IN_A_ROW_ALONE = 6  # the same, where each file is sent alone
MOST_TIMES = 3  # that a file breaks the connection while it is sent alone, before it is rejected
RESUMED_BYTES = 2 * WINDOW_BYTES  # larger files go on where they were: each attempt may bring them further
REMEMBERED = 200  # dispatches

# How often the connection broke while a file was on its way, and while it was so alone; by target and dispatch. As long
# as this process lives; another one finds out by itself.
_broke: OrderedDict[tuple[str, str], tuple[Counter[str], Counter[str]]] = OrderedDict()


class Suspects:
    """The suspects of one push.

    Attributes:
        alone: files to send alone.
        twice: of them, those that have been sent in this attempt.
        error: why files are left to the next attempt; None if none are.
    """

    def __init__(self, target: str, plan: Plan, report: PushReport, hide: Callable[[str], str]) -> None:
        self._plan, self._report, self._hide = plan, report, hide
        self._times, self._times_alone = _broke.setdefault((target, plan.dispatch_id), (Counter(), Counter()))
        _broke.move_to_end((target, plan.dispatch_id))
        while len(_broke) > REMEMBERED:
            _broke.popitem(last=False)
        self.alone = [item for item in plan.pending if self._times[item.path]]
        self.twice: set[Item] = set()
        self.error: Retryable | None = None
        self._in_a_row = 0

    def __contains__(self, item: Item) -> bool:
        return self._times[item.path] > 0

    def in_order(self) -> list[Item]:
        """Return the files to send alone, the least suspected first."""
        return sorted(self.alone, key=lambda item: self._times[item.path])

    def add(self, items: Iterable[Item], error: Retryable) -> None:
        """Note a break of the connection over which these files were on their way."""
        items = list(items)
        if len(items) == 1:
            self.put_off(items[0], error)
            return
        self._in_a_row += 1
        for item in items:
            self._times[item.path] += 1
        self.alone += items
        self.twice.update(items)

    def put_off(self, item: Item, error: Retryable, when: str = ", while this file was sent alone") -> None:
        """Leave a file, at which the connection broke while it was sent alone, to the next attempt, or reject it."""
        self._in_a_row += 1
        self._times[item.path] += 1
        self._times_alone[item.path] += 1
        words = f"{error.message}{when}"
        if self._is_bad(item):
            self._report(item, Outcome(Kind.REJECTED, self._hide(f"{words}, {self._times_alone[item.path]} times")))
            return
        if self.error is None or self.error.item is None:
            self.error = type(error)(words, error.target, item.shown)
        self._report.put_off[item.path] = self._hide(words)

    def _is_bad(self, item: Item) -> bool:
        """Return True if a file is the reason, as far as can be known: others pass, and it doesn't."""
        if item.size > RESUMED_BYTES or self._times_alone[item.path] < MOST_TIMES:
            return False
        return bool(self._plan.done) or any(outcome.arrived for outcome in self._report.outcomes.values())

    def progress(self) -> None:
        """Note that a file has its outcome."""
        self._in_a_row = 0

    def has_enough(self, *, alone: bool = False) -> bool:
        """Return True if the connection broke so often that the server, or the way there, must be the reason."""
        return self._in_a_row > (MOST_IN_A_ROW_ALONE if alone else MOST_IN_A_ROW)
