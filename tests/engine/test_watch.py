"""What a worker hears of runs: also where its host's clock is ahead of the server's."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import prefect.types._datetime as clock
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Scheduled

from talaria.engine import lanes
from talaria.engine.watch import StateChange, watch
from talaria.settings import POOL
from tests.servers.up import Talaria


def test_a_host_whose_clock_is_ahead_hears_of_changes(up: Talaria, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: by an hour, it heard of nothing for the 59 minutes after each connection, and took itself for connected.

    Prefect's client asks for what is younger than a minute by its own clock, and the server goes by that for all that
    comes.
    """
    own = clock.now
    monkeypatch.setattr(clock, "now", lambda tz: own(tz) + timedelta(hours=1))

    async def cancel() -> list[StateChange]:
        heard, begun, ended = list[StateChange](), asyncio.Event(), asyncio.Event()
        async with lanes.client() as client:

            async def resources() -> tuple[str, str]:
                return f"prefect.work-pool.{(await client.read_work_pool(POOL)).id}", "prefect.flow.none"

            def changed(change: StateChange) -> None:
                heard.append(change)
                if change.run_id == run.id and change.type == "CANCELLED":
                    ended.set()

            def connected(now: bool) -> None:
                begun.set() if now else None

            dispatch = await client.read_deployment_by_name("dispatch/talaria")
            later: Any = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(days=1))
            run = await client.create_flow_run_from_deployment(
                dispatch.id, parameters={"paths": [], "targets": []}, state=later
            )
            watching = asyncio.create_task(watch(client, resources, changed, connected))
            await asyncio.wait_for(begun.wait(), 60)
            await client.set_flow_run_state(run.id, Cancelled(), force=True)
            await asyncio.wait_for(ended.wait(), 30)
            watching.cancel()
            await client.delete_flow_run(run.id)
        return heard

    secret = (up.home / "worker.auth").read_text().strip()
    with temporary_settings({PREFECT_API_URL: up.url, PREFECT_API_AUTH_STRING: secret}):
        asyncio.run(cancel())
