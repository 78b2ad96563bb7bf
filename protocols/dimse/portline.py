"""Several processes of one machine that listen on the same port, one at a time, in the order in which they came."""

from __future__ import annotations

import fcntl
from contextlib import ExitStack
from pathlib import Path

from transfer.home import locked

ALONE = fcntl.LOCK_EX | fcntl.LOCK_NB


class PortLine:
    """The place of this process in the line for a port; not safe to use from several threads at once.

    Who has the port holds one lock, the first of those who wait another one. The kernel releases both when a process
    ends. A process that has the port lets no more of its users in while others wait for it.

    Args:
        path: of the locks, without their suffix; None if there is no line.

    Attributes:
        is_ours: whether this process has the port.
        waiting: how many of its threads wait for it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._has, self._leads = ExitStack(), ExitStack()
        self.is_ours = self._is_first = False
        self.waiting = 0

    def take(self) -> bool:
        """Have the port for this process, if its turn has come; return whether it is ours."""
        if not self.is_ours:
            self._is_first = self._is_first or self._try(self._leads, ".next")
            self.is_ours = self._is_first and self._try(self._has, ".lock")
            if self.is_ours:
                self._step_back()
        return self.is_ours

    def is_wanted(self) -> bool:
        """Return True if another process waits for the port that this one has."""
        with ExitStack() as stack:
            return not self._try(stack, ".next")

    def leave(self) -> None:
        """Let the next process have the port."""
        self.is_ours = False
        self._has.close()
        self._step_back()

    def _step_back(self) -> None:
        self._is_first = False
        self._leads.close()

    def _try(self, stack: ExitStack, suffix: str) -> bool:
        if self._path is None:
            return True
        with ExitStack() as attempt:
            try:
                if attempt.enter_context(locked(self._path.with_name(self._path.name + suffix), ALONE)) is None:
                    return False
            except OSError:  # a state directory that can't be written to: then there is no line
                return True
            stack.push(attempt.pop_all())
        return True
