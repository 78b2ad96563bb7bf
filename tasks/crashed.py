"""Whether a run is over: one that has crashed goes on as soon as a process takes it up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from prefect.client.schemas.objects import State, StateType

TAKEN_UP_WITHIN = timedelta(minutes=5)  # in which a process that lives does so: a lease and a look make two minutes


def is_over(state: State[Any] | None) -> bool:
    """Return True if a state is a run's last one, as that of one which stays crashed since somebody has set it so."""
    if state is None or not state.is_final():
        return False
    return state.type is not StateType.CRASHED or datetime.now(UTC) - state.timestamp > TAKEN_UP_WITHIN
