"""A subscription of events: what waits for its reader has a bound."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from talaria.front import subscription
from talaria.front.subscription import Ended, Events


def event(number: int, size: int = 0) -> dict[str, Any]:
    return {"type": "websocket.send", "text": json.dumps({"type": "event", "event": {"n": number, "x": "x" * size}})}


async def numbers(events: Events) -> list[int]:
    found = []
    with pytest.raises(Ended):
        async for one in events:
            found.append(one["n"])
    return found


@pytest.mark.parametrize(("size", "more"), [(0, 10**6), (2 << 20, 10)])
def test_a_reader_that_stands_still_costs_no_more_than_a_bound(size: int, more: int) -> None:
    """As a laptop that was closed: it has the last event's id, and asks again."""

    async def case() -> None:
        events = Events()
        assert (await events.receive())["type"] == "websocket.connect"
        for number in range(min(more, subscription.BACKLOG + 10)):
            await events.send(event(number, size))
        assert (await events.receive())["type"] == "websocket.disconnect"
        assert events._in.qsize() == 1, "nothing is kept"
        with pytest.raises(Ended, match="too much waits"):
            await events.heard()

    asyncio.run(case())


def test_what_has_come_before_the_end_is_heard_and_nothing_after_one_has_left() -> None:
    async def case() -> None:
        events = Events()
        for number in range(3):
            await events.send(event(number))
        await events.send({"type": "websocket.close", "code": 1000})
        await events.send(event(3))
        assert await numbers(events) == [0, 1, 2]
        left = Events()
        await left.send(event(0))
        left.leave()
        await left.send(event(1))
        assert await numbers(left) == []

    asyncio.run(case())
