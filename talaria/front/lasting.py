"""Answers that go on: they end when whoever hears them may hear no more, and there are only so many at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar

from starlette.requests import Request

LOOK_S = 2.0  # between two looks whether somebody is still let in: a token that is revoked is not heard of otherwise
MOST_OF_ONE = 32  # streams of one user or token: each has a subscription at Prefect's server
MOST = 256  # of all

# Whether the one who asks would still be let in; set by the gate.
STILL: ContextVar[Callable[[], bool]] = ContextVar("talaria.still", default=lambda: True)


class TooMany(Exception):
    """There are as many streams as there may be.

    Attributes:
        status: of the answer: 429 if they are the client's own, 503 if they are everybody's.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class OpenStreams:
    """Counts the streams that are open in this process, by who hears them."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def enter(self, who: str) -> None:
        """Count one more.

        Raises:
            TooMany: it would be one too many.
        """
        if self._open[who] >= MOST_OF_ONE:
            raise TooMany(f"{who} has {MOST_OF_ONE} streams open, which is the most: close one", 429)
        if self._open.total() >= MOST:
            raise TooMany(f"{MOST} streams are open, which is the most: come again later", 503)
        self._open[who] += 1

    def leave(self, who: str) -> None:
        """Count one less."""
        self._open[who] -= 1
        if not self._open[who]:
            del self._open[who]


STREAMS = OpenStreams()


async def gone(request: Request) -> None:
    """Return when the client of a request, whose body has been read, is no longer there."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def run_while(application: Awaitable[None], still: Callable[[], bool]) -> bool:
    """Run something until it ends, or its client may hear no more; return False if that ended it."""
    task = asyncio.ensure_future(application)
    try:
        while not (await asyncio.wait([task], timeout=LOOK_S))[0]:
            if not still():
                return False
        await task
        return True
    finally:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
