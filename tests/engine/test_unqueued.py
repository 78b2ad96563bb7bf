"""A queue that somebody removes at a Prefect server elsewhere is made again, and what stood in it is begun."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Scheduled

from talaria.engine.due import Due
from talaria.engine.registry import queues
from talaria.settings import POOL
from tests.servers.up import Talaria
from transfer.ledger import Ledger

HOST = "of-unqueued"
QUEUE = f"normal@{HOST}"


def test_it_is_made_again_and_its_runs_begin(up: Talaria, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: what waited in it was never begun; nor was what came from a deployment that had been in it."""
    monkeypatch.setenv("TALARIA_LEDGER", "postgresql://somewhere/ledger")  # so that hosts have queues of their own
    monkeypatch.setenv("TALARIA_HOST_NAME", HOST)
    due_at = cast(Ledger, SimpleNamespace(now=time.time))

    async def look() -> None:
        async with get_client() as client:
            await client.create_work_queue(name=QUEUE, work_pool_name=POOL)
            await client.update_work_queue((await found_queue(client))["id"], is_paused=True)  # the server's own worker
            dispatch = await client.read_deployment_by_name("dispatch/talaria")
            deployed = await client.create_deployment(
                flow_id=dispatch.flow_id,
                name=HOST,
                entrypoint=dispatch.entrypoint,
                work_pool_name=POOL,
                work_queue_name=QUEUE,
            )
            run = await client.create_flow_run_from_deployment(
                deployed, parameters={"paths": [], "targets": []}, state=Scheduled(scheduled_time=datetime.now(UTC))
            )
            # Another team's, whose pool had a queue of this name: it is none of ours to begin, or to fail.
            await client.create_work_pool(WorkPoolCreate(name=HOST, type="process"))
            await client.create_work_queue(name=QUEUE, work_pool_name=HOST)
            theirs = await client.create_deployment(
                flow_id=await client.create_flow_from_name(HOST),
                name=HOST,
                entrypoint="theirs.py:flow",
                work_pool_name=HOST,
                work_queue_name=QUEUE,
            )
            their_run = await client.create_flow_run_from_deployment(
                theirs, state=Scheduled(scheduled_time=datetime.now(UTC))
            )
            await client.request("DELETE", f"/work_pools/{HOST}/queues/{QUEUE}")
            await client.request("DELETE", f"/work_pools/{POOL}/queues/{QUEUE}")
            due = Due(client, POOL, 4, due_at)
            assert await due.found(checks=False, others=True) == []
            await due.look_through()
            assert QUEUE in (await queues(client)).values()
            assert {one.id for one in await due.found(checks=False, others=True)} & {run.id, their_run.id} == {run.id}
            there = await client.read_deployment(deployed)
            assert (there.work_pool_name, there.work_queue_name) == (POOL, QUEUE)
            await client.set_flow_run_state(run.id, Cancelled(), force=True)
            await client.delete_flow_run(their_run.id)
            await client.delete_deployment(theirs)
            await client.delete_work_pool(HOST)
            assert await due.found(checks=False, others=True) == []
            await client.delete_deployment(deployed)
            for name in (await queues(client)).values():
                if name.endswith(HOST):
                    await client.request("DELETE", f"/work_pools/{POOL}/queues/{name}")

    async def found_queue(client: PrefectClient) -> Any:
        answer: httpx.Response = await client.request("GET", f"/work_pools/{POOL}/queues/{QUEUE}")
        return json.loads(answer.content)

    secret = (up.home / "worker.auth").read_text().strip()
    with temporary_settings({PREFECT_API_URL: up.url, PREFECT_API_AUTH_STRING: secret}):
        asyncio.run(look())
