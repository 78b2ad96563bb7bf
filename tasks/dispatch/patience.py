"""Waits for a Prefect server that is away for a moment, which may cost a run some time but never its result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.exceptions import PrefectHTTPStatusError

R = TypeVar("R")
PATIENCE_S = 300  # a restarted server is back in 10 to 60 seconds
PAUSE_S = 2


def is_outage(exc: BaseException) -> bool:
    """Return True if an error says that the Prefect server is away, rather than that it refuses."""
    if isinstance(exc, ConcurrencySlotAcquisitionError):
        return exc.__cause__ is None or is_outage(exc.__cause__)
    if isinstance(exc, PrefectHTTPStatusError | httpx.HTTPStatusError):
        return exc.response.status_code >= 500
    return isinstance(exc, httpx.TransportError)


async def patiently(call: Callable[[], Awaitable[R]], given_up: Callable[[], bool] = lambda: False) -> R:
    """Await what `call` returns; repeat while the server is away.

    Args:
        given_up: called before another try; True raises the error.
    """
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await call()
        except Exception as exc:
            if not is_outage(exc) or given_up() or time.monotonic() > end:
                raise
        await asyncio.sleep(PAUSE_S)
