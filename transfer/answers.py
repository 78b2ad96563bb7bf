"""Connections to PostgreSQL that are given up if the server is silent for too long.

The kernel gives one up whose other end takes nothing any more. A server that stands still, as its disk does, or a proxy
whose own connection is gone, takes what it is sent, and psycopg would wait for its answer for ever.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

ANSWER_S = 30.0  # for an answer, unless `limit` says otherwise


@functools.cache
def limited() -> Any:
    """Return psycopg's class of connections, with such a limit."""
    from psycopg import Connection, OperationalError

    class Limited(Connection[Any]):
        answer_s = ANSWER_S

        def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
            """Do what a generator of psycopg's asks for; close the connection if nothing comes meanwhile."""
            return super().wait(self._answered(gen), *args, **options)

        def _answered(self, gen: Any) -> Generator[Any, Any, Any]:
            end = time.monotonic() + self.answer_s
            try:
                wanted = next(gen)
                while True:
                    ready = yield wanted  # nothing, each tenth of a second, as long as nothing comes
                    if not ready and time.monotonic() > end:
                        self.pgconn.finish()  # what comes late would be taken for the answer to the next question
                        raise OperationalError(f"no answer for {self.answer_s:.0f} seconds")
                    wanted = gen.send(ready)
            except StopIteration as exc:
                return exc.value

    return Limited


def usual(driver: Any) -> None:
    """Let the usual limit be that of a connection that goes back to those of the process; None for one that broke."""
    if driver is not None:
        driver.answer_s = ANSWER_S


def limit(connection: Connection, seconds: float) -> None:
    """Set the longest time, in seconds, for which the server may be silent on a connection."""
    driver: Any = connection.connection.driver_connection
    driver.answer_s = seconds
