"""Whether the running work is to stop, for calls without a PushReport: a search has no outcomes to report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_check: ContextVar[Callable[[], None]] = ContextVar("check", default=lambda: None)


def check() -> None:
    """Raise the error that ends this context's work, if somebody has asked for that."""
    _check.get()()


@contextmanager
def stoppable(by: Callable[[], None]) -> Iterator[None]:
    """Make `check` call this function, in this context, until the block ends."""
    token = _check.set(by)
    try:
        yield
    finally:
        _check.reset(token)
