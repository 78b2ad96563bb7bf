"""The sweep of a source: what is ready is dispatched, and what was delivered is moved or deleted."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.sources.run import sweep


@flow(name="batch", persist_result=False)
async def batch(source: str) -> State[Any]:
    """Look through a source once, and dispatch what is ready.

    Args:
        source: name of the source.
    """
    return await sweep(source)
