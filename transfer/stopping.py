"""Whether what runs now shall stop, for calls that take no PushReport: a search has no outcomes to report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_check: ContextVar[Callable[[], None]] = ContextVar("check", default=lambda: None)


def check() -> None:
    """Raise what ends the work of this context, if somebody has asked for its end."""
    _check.get()()


@contextmanager
def stoppable(by: Callable[[], None]) -> Iterator[None]:
    """Let `check` call this, in this context, until the block ends."""
    token = _check.set(by)
    try:
        yield
    finally:
        _check.reset(token)
