"""Since when a dispatch is late: since somebody has asked for it, the last time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect.client.schemas.objects import State
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed, Pending, Running, Scheduled

from talaria.notify.lookout import asked_for
from tasks.dispatch.running import PAUSED

T = datetime(2026, 11, 29, 8, tzinfo=UTC)
NINE = T + timedelta(hours=9)


def history(*states: State[Any]) -> list[State[Any]]:
    """States that came an hour after each other, in any order."""
    for number, one in enumerate(states):
        one.timestamp = T + timedelta(hours=number)
        if one.state_details.scheduled_time != NINE:
            one.state_details.scheduled_time = None
    return [*states[1:], states[0]]


@pytest.mark.parametrize(
    ("states", "hours"),
    [
        ([Scheduled(), Pending(), Running()], None),
        ([Scheduled(), Running(), AwaitingRetry(), Running()], None),
        ([Scheduled(), Running(), Failed(), AwaitingRetry(), Running(), AwaitingRetry()], 3),
        ([Scheduled(), Running(), Failed(), AwaitingRetry(), Running(), Failed(), AwaitingRetry()], 6),
        ([Scheduled(), Cancelled(), AwaitingRetry()], 2),
        ([Scheduled(), Running(), Crashed(), AwaitingRetry(), Running()], None),
        ([Scheduled(), Running(), Scheduled(name=PAUSED), AwaitingRetry(), Running()], 3),
        ([Scheduled(), Running(), Failed(), AwaitingRetry(scheduled_time=NINE)], 9),
    ],
    ids=["first", "rests", "retried", "again", "cancelled", "crashed", "resumed", "later"],
)
def test_late_counts_from_when_it_was_asked_for(states: list[State[Any]], hours: int | None) -> None:
    assert asked_for(history(*states)) == (None if hours is None else T + timedelta(hours=hours))
