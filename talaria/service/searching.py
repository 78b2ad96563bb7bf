"""Searches that somebody waits for: a few at once of each user, and stopped when nobody waits for them any more.

A search may take hours: of a peer that is silent, or of an archive of millions with keys that narrow nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from transfer import stopping
from transfer.errors import Busy, Cancelled

MOST = 16  # at once, of all users: each has a thread, which mostly waits for its peer
MOST_OF_ONE = 8  # at once, of one user, so that the others find room beside them
PATIENCE_S = 30.0  # how long one more waits for its turn; a search of a list takes some seconds
LONGEST_S = 3600.0  # of one search; clients wait for 900 s
LOOK_S = 0.1  # between two looks whether it is one's turn

Found = TypeVar("Found")


class TooManySearches(Busy):
    """As many searches run as may: it is this server that has no room, and not the peer."""


class Searching:
    """Runs searches, in threads of their own: a peer that accepts and is silent would keep those that others need."""

    def __init__(self, most: int = MOST, most_of_one: int = MOST_OF_ONE) -> None:
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="search")
        self._most, self._most_of_one = most, most_of_one
        self._running: Counter[str] = Counter()  # by user; one that is to stop counts until it has stopped
        self._turn = threading.Lock()

    async def run(
        self, user: str, search: Callable[[], Found], gone: Callable[[], Awaitable[None]] | None = None
    ) -> Found:
        """Return what a search returns.

        In it `stopping.check` raises Cancelled when this is cancelled, `gone` has returned, or LONGEST_S are over.

        Args:
            gone: returns when nobody waits for the answer any more; None where that is not known.

        Raises:
            TooManySearches: others kept it waiting for PATIENCE_S. Cancelled: see above. Others: as `search`.
        """
        searching = asyncio.ensure_future(self._run(user, search))
        if gone is None:
            return await searching
        leaving = asyncio.ensure_future(gone())
        try:
            await asyncio.wait([searching, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not searching.done():
                raise Cancelled("nobody waits for this search any more")
            return searching.result()
        finally:
            searching.cancel()
            leaving.cancel()

    async def _run(self, user: str, search: Callable[[], Found]) -> Found:
        end = time.monotonic() + PATIENCE_S
        while not self._enters(user):
            if time.monotonic() > end:
                raise TooManySearches(self._why(user))
            await asyncio.sleep(LOOK_S)
        ended, latest = threading.Event(), time.monotonic() + LONGEST_S

        def check() -> None:
            if ended.is_set():
                raise Cancelled("nobody waits for this search any more")
            if time.monotonic() > latest:
                raise Cancelled(f"this search took {LONGEST_S:g} s, which is the longest: narrow it down")

        def stoppable() -> Found:
            with stopping.stoppable(check):
                check()
                return search()

        try:
            future = self._threads.submit(contextvars.copy_context().run, stoppable)
        except RuntimeError:  # this process ends
            self._leaves(user)
            raise
        future.add_done_callback(functools.partial(self._over, user))
        try:
            return await asyncio.wrap_future(future)
        finally:
            ended.set()

    def _over(self, user: str, future: Future[Any]) -> None:
        self._leaves(user)

    def _enters(self, user: str) -> bool:
        with self._turn:
            free = self._running.total() < self._most and self._running[user] < self._most_of_one
            if free:
                self._running[user] += 1
            return free

    def _leaves(self, user: str) -> None:
        with self._turn:
            self._running[user] -= 1
            if not self._running[user]:
                del self._running[user]

    def _why(self, user: str) -> str:
        with self._turn:
            all_of_them, own = self._running.total(), self._running[user]
        of_whom = f"{own} searches of yours" if own >= self._most_of_one else f"{all_of_them} searches"
        return f"{of_whom} are running here, which is the most at once: search again when one has ended"


SEARCHES = Searching()
