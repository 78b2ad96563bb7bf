"""Sets a run's state in the place of the one that it was found in, and of no other: Prefect itself compares nothing.

Between a look at a run and what is made of it, somebody may cancel it, or let it wait: what is set then by force would
take that back. Prefect keeps all states of a run, in their order, so that it is seen afterwards.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State, StateType

AT_WORK = (StateType.PENDING, StateType.RUNNING)


async def around(
    client: PrefectClient, run_id: UUID, ours: State[Any] | None
) -> tuple[State[Any] | None, State[Any] | None]:
    """Return the states that a run had before and after one that was set; None where there was none."""
    before: State[Any] | None = None
    states = iter(await client.read_flow_run_states(run_id))
    for one in states:
        if ours is not None and one.id == ours.id:
            break
        before = one
    return before, next(states, None)


async def replaced(client: PrefectClient, run_id: UUID, found: State[Any], state: State[Any]) -> bool:
    """Give a run a state; if it was not in the one any more in which it was found, give it that back again.

    Returns:
        False if somebody has set another one meanwhile, which it has again.
    """
    ours = (await client.set_flow_run_state(run_id, state, force=True)).state
    before, after = await around(client, run_id, ours)
    if before is None or before.id == found.id:
        return True
    if after is None or before.type not in AT_WORK:  # else whoever had just taken it has gone on already
        await client.set_flow_run_state(run_id, before, force=True)
    return False
