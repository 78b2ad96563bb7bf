"""What it means for a run that this process executes that somebody has given it another state."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Event
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.sorting import FlowRunSort

from talaria.engine.called import RESTS
from tasks.dispatch import running
from tasks.paging import every

HEED_S = 0.1  # before a run is asked after whose state has changed: it ends, most often, and is gone by then
BEGINS, GOES_ON = StateType.PENDING, StateType.RUNNING


def heed(run_id: str, state: State[Any] | None) -> None:
    """Stop a run, or let it pause, if somebody has given it a state that a running one must not have.

    Args:
        state: None if the run has been deleted.
    """
    if state is not None and (state.is_paused() or state.name == running.PAUSING):
        running.pause(run_id).set()
    elif state is not None and state.name == RESTS:
        pass  # called when it had begun by itself: it goes on, and is looked after once more when it has ended
    elif state is None or state.type not in (BEGINS, GOES_ON):
        running.flag(run_id).set()


def is_stop(kind: str, name: str) -> bool:
    """Return True if a state of this type and name is not one of a run that goes on."""
    return kind not in (BEGINS.value, GOES_ON.value) or name == running.PAUSING


async def heed_all(client: PrefectClient, flags: Mapping[str, Event]) -> None:
    """Ask the server for the states of runs that are under way here, and heed those that others have set.

    Args:
        flags: of these runs; one that has ended meanwhile, and may have begun again, is left alone.
    """
    if not flags:
        return
    found = await every(
        client.read_flow_runs,
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[*map(UUID, flags)])),
        sort=FlowRunSort.ID_DESC,
    )
    states = {str(one.id): one.state for one in found}
    for run_id, flag in flags.items():
        if running.flags().get(run_id) is flag:
            heed(run_id, states.get(run_id))
