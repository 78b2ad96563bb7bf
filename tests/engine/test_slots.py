"""Places at a target: who gets one, who waits, and that none is lost."""

from __future__ import annotations

import asyncio
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import PrefectClient

from blocks import FolderTarget
from tasks.dispatch import slots as module
from tasks.dispatch.slots import slots


class Server:
    """As far as slots go: one limit, and its leases."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.leases, self.saved, self.renewed = limit, dict[UUID, int](), list[int](), 0
        self.slow = asyncio.Event()
        self.slow.set()
        self.asked, self.renewed_twice = asyncio.Event(), asyncio.Event()

    async def increment_concurrency_slots_with_lease(
        self, names: list[str], slots: int, mode: str, lease_duration: float
    ) -> httpx.Response:
        assert names == ["talaria-archive"] and mode == "concurrency" and lease_duration == module.LEASE_S
        self.asked.set()
        await self.slow.wait()
        lease = uuid4()
        if self.limit is None:
            return httpx.Response(200, json={"lease_id": str(lease), "limits": []})
        if sum(self.leases.values()) + slots > self.limit:
            answer = httpx.Response(423, request=httpx.Request("POST", "http://server"))
            raise httpx.HTTPStatusError("locked", request=answer.request, response=answer)
        self.leases[lease] = slots
        limits = [{"id": str(uuid4()), "name": names[0], "limit": self.limit}]
        return httpx.Response(200, json={"lease_id": str(lease), "limits": limits})

    async def release_concurrency_slots_with_lease(self, lease_id: UUID) -> None:
        self.leases.pop(lease_id, None)

    async def renew_concurrency_lease(self, lease_id: UUID, lease_duration: float) -> None:
        assert lease_id in self.leases
        self.renewed += 1
        if self.renewed == 2:
            self.renewed_twice.set()

    async def upsert_global_concurrency_limit_by_name(self, name: str, limit: int) -> None:
        self.saved.append(limit)
        self.limit = limit


def target(count: int) -> FolderTarget:
    one = FolderTarget(folder="/archive", max_dispatches=count)
    one._block_document_name = "archive"
    return one


def client(server: Server) -> PrefectClient:
    return cast(PrefectClient, server)


@pytest.mark.parametrize("known", [None, 1, 5, 2])
def test_the_limit_is_what_the_target_says(known: int | None) -> None:
    async def run() -> None:
        server = Server(known)
        async with slots(client(server), target(2)):
            assert sum(server.leases.values()) == 1
        assert not server.leases
        assert server.saved == ([] if known == 2 else [2])

    asyncio.run(run())


def test_who_waits_goes_on_as_soon_as_a_slot_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 3600)

    async def run() -> list[Any]:
        server, order = Server(1), list[Any]()

        async def second() -> None:
            async with slots(client(server), target(1)):
                order.append("second")

        async with slots(client(server), target(1)):
            server.asked.clear()
            waiting = asyncio.create_task(second())
            await server.asked.wait()
            order.append("first")
        await waiting
        assert not server.leases
        return order

    assert asyncio.run(run()) == ["first", "second"]


def test_a_slot_that_comes_too_late_is_given_back() -> None:
    async def run() -> None:
        server = Server(1)
        server.slow.clear()

        async def late() -> None:
            async with slots(client(server), target(1)):
                raise AssertionError("it was cancelled before")

        waiting = asyncio.create_task(late())
        await server.asked.wait()
        waiting.cancel()
        await asyncio.sleep(0)
        server.slow.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not server.leases

    asyncio.run(run())


def test_a_slot_is_renewed_while_it_is_held_and_given_back_when_its_run_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LEASE_S", 0.02)

    async def run() -> None:
        server = Server(1)

        async def hold() -> None:
            async with slots(client(server), target(1)):
                await asyncio.Event().wait()

        holding = asyncio.create_task(hold())
        await server.renewed_twice.wait()
        holding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await holding
        assert not server.leases

    asyncio.run(run())
