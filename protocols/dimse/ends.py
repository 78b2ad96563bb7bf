"""What the end of an association, or that there is none, means for a retrieval from a DICOM node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transfer.errors import Busy, DispatchError, Interrupted, Misconfigured, TimedOut, Unreachable

TIMES = 2  # associations, one after the other, that end as soon as something is asked for by C-GET


class NoAssociation(Exception):
    """No association can be had now."""

    def __init__(self, error: DispatchError) -> None:
        super().__init__(error.message)
        self.error = error


@contextmanager
def associating() -> Iterator[None]:
    """Raise NoAssociation where an association can't be had."""
    try:
        yield
    except (Busy, Interrupted, Misconfigured, TimedOut, Unreachable) as exc:
        raise NoAssociation(exc) from exc


class BrokenGet:
    """A peer that accepts C-GET, and ends the association when it is asked for something: some forbid it so (Orthanc).

    It may also be a link that breaks. So C-MOVE is used then, and what it meets counts as no more than that.
    """

    def __init__(self) -> None:
        self._times = 0
        self._error: DispatchError | None = None

    def noted(self, error: DispatchError) -> str:
        """Note that an association has ended before anything came; return why C-MOVE is used, "" if it isn't yet."""
        self._times, self._error = self._times + 1, error
        return "the peer accepts C-GET, and ends the association when it is asked so" if self._times >= TIMES else ""

    def of_move(self, error: DispatchError) -> DispatchError:
        """Return the error for one of C-MOVE: worth another attempt if C-GET may only have met a broken link."""
        if self._error is None or self._times < TIMES:
            return error
        return Interrupted(f"{self._error.message}; {error.message}")
