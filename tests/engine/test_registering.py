"""What is registered at a Prefect server by several hosts at once is there afterwards, and none of them fails."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import ObjectAlreadyExists

from talaria.engine import registry


def test_what_another_host_has_made_meanwhile_is_found_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: of two hosts that were started at once at a new server, one ended."""
    others = iter(["a type", "a queue"])

    async def step(client: PrefectClient) -> None:
        if another := next(others, None):
            raise ObjectAlreadyExists(Exception(another))

    monkeypatch.setattr(registry, "_register", step)
    asyncio.run(registry.register(cast(PrefectClient, None)))
    assert next(others, None) is None


def test_what_is_there_each_time_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(client: PrefectClient) -> None:
        raise ObjectAlreadyExists(Exception("for ever"))

    monkeypatch.setattr(registry, "_register", step)
    with pytest.raises(ObjectAlreadyExists):
        asyncio.run(registry.register(cast(PrefectClient, None)))
