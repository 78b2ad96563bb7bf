"""Whether a run that stops is left to another process, since its own one ends, or somebody wants it to stop."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

import httpx
from prefect import get_client
from prefect.exceptions import PrefectException

from tasks.dispatch import running


async def is_left(flow_run_id: str) -> bool:
    """Return True if a run that was told to stop goes on in another process: nobody has cancelled it."""
    if not running.stopping():
        return False
    return not any([await is_cancelled(one) for one in {running.whole() or flow_run_id, flow_run_id}])


async def is_cancelled(flow_run_id: str) -> bool:
    """Return True if somebody has cancelled a run; False, too, if the server can't be asked."""
    with suppress(httpx.HTTPError, PrefectException):
        async with get_client() as client:
            state = (await client.read_flow_run(UUID(flow_run_id))).state
            return state is not None and (state.is_cancelling() or state.is_cancelled())
    return False
