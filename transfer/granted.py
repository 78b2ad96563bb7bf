"""How many connections at once a search may open to its source: calls to a driver's `find` have no report that says so.

One, unless its caller holds more of the source's slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_connections: ContextVar[int] = ContextVar("connections", default=1)


def connections() -> int:
    """Return how many connections this context's search may have open at once, all together."""
    return _connections.get()


@contextmanager
def granting(count: int) -> Iterator[None]:
    """Let searches in this context open so many connections at once, until the block ends."""
    token = _connections.set(count)
    try:
        yield
    finally:
        _connections.reset(token)
