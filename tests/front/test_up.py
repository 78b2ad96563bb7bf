"""The supervisor: what it does while the server that it is to start again is away."""

from __future__ import annotations

import asyncio

import pytest

from talaria import up
from talaria.errors import ServerError


def test_a_call_ends_with_the_server_that_would_answer_it() -> None:
    """Seen: both died together, the socket took the recovery's call, and nobody started the server again."""
    cancelled: list[bool] = []

    async def for_ever() -> list[str]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return []

    async def at_once() -> list[str]:
        return ["run"]

    lives = iter([True, True, False])
    with pytest.raises(ServerError, match="ended"):
        asyncio.run(up._while(lambda: next(lives), for_ever()))
    assert cancelled == [True]
    assert asyncio.run(up._while(lambda: False, at_once())) == ["run"]
