"""Slots of targets whose holder was killed, or whose lease the server has lost: as many are counted as are held."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import PrefectClient

from talaria.engine.registry import workers
from talaria.engine.slots import LOOKS, LOST_S, Slots
from talaria.testing import studies
from tests.engine.material import files, folder, go_on
from tests.servers.up import Talaria
from transfer.home import Home
from transfer.ledger import Ledger

pytestmark = pytest.mark.timeout(600)
SLOW = {"bandwidth_limit": 2000, "concurrency": 1}  # bytes per second: it lasts until it is cancelled


def counted(up: Talaria, target: str) -> int:
    """As how many slots the server counts."""
    return int(up.api("GET", f"/v2/concurrency_limits/talaria-{target}")["active_slots"])


def leases(up: Talaria, target: str) -> set[str]:
    """The leases that the server has for slots of a target."""
    limit, found = up.api("GET", f"/v2/concurrency_limits/talaria-{target}")["id"], set()
    for path in (up.home / "prefect" / "concurrency_leases").glob("*-*.json"):
        try:
            one = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        found |= {one["id"]} if limit in one["resource_ids"] else set()
    return found


def begun(up: Talaria, study: Path, target: str) -> str:
    """Send a study; return its run when that holds a slot."""
    before = leases(up, target)
    run = str(up.told("send", str(study), "--to", target, "--no-wait")["flow_run_id"])
    up.until(lambda: leases(up, target) - before)
    return run


def cancelled(up: Talaria, *runs: str) -> None:
    for run in runs:
        up.here("jobs", "cancel", run)
    up.until(lambda: all(up.run(run)["state_type"] == "CANCELLED" for run in runs))


def test_a_killed_worker_s_slot_is_given_back_with_its_lease(up: Talaria, tmp_path: Path) -> None:
    """Seen: the count was set to nothing, the lease ended a minute later, and two were at a target that takes one."""
    studies.ct(tmp_path / "study", 40)
    up.apply(one_at_once=folder(tmp_path / "one-at-once", max_dispatches=1, **SLOW))
    run = begun(up, tmp_path / "study", "one-at-once")
    before = leases(up, "one-at-once")
    up.child("talaria.engine.worker").kill()
    up.until(lambda: leases(up, "one-at-once") - before)  # it was taken up, and has a slot again
    assert len(leases(up, "one-at-once")) == counted(up, "one-at-once") == 1
    cancelled(up, run)
    up.until(lambda: not leases(up, "one-at-once"))
    assert counted(up, "one-at-once") == 0


def test_slots_whose_lease_the_server_has_lost_are_free_again(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 40)
    studies.ct(tmp_path / "other", 2)
    up.apply(two_at_once=folder(tmp_path / "two-at-once", max_dispatches=2, **SLOW))
    run = begun(up, tmp_path / "study", "two-at-once")
    # What is left of one that was held when a server began anew that keeps leases in its memory.
    up.as_worker("POST", "/v2/concurrency_limits/increment", {"names": ["talaria-two-at-once"], "slots": 1})
    waits = str(up.told("send", str(tmp_path / "other"), "--to", "two-at-once", "--no-wait")["flow_run_id"])
    up.until(lambda: "a slot at two-at-once" in (up.run(waits)["state"]["message"] or ""))
    home, now = Home(up.home), 0.0

    async def looked(ledger: Ledger) -> None:
        nonlocal now
        user = (up.home / "worker.auth").read_text().strip()
        async with PrefectClient(up.url, auth_string=user) as client:
            looks = Slots(client, home, ledger, home.alive, lambda: now)
            for _ in range(LOOKS + 1):
                await looks.look()
            assert counted(up, "two-at-once") == 2  # it might be a lease that has yet to end
            now += LOST_S
            foreign: dict[str, Any] = {"name": "other-host-1", "heartbeat_interval_seconds": 30}
            await client.request("POST", "/work_pools/talaria/workers/heartbeat", json=foreign)
            await looks.look()
            assert counted(up, "two-at-once") == 2  # another host's, which has a ledger of its own
            for one in await workers(client):  # those of ours that were killed by a test, too
                if one.name not in home.owners():
                    await client.request("DELETE", f"/work_pools/talaria/workers/{one.name}")
            await looks.look()
            assert counted(up, "two-at-once") == 1  # what is held stays so
            now += 2 * LOST_S
            for _ in range(LOOKS + 1):
                await looks.look()
            assert counted(up, "two-at-once") == 1

    with Ledger(home.ledger) as ledger:
        asyncio.run(looked(ledger))
    if up.run(waits)["state_type"] == "SCHEDULED":
        go_on(up, waits)
    up.until(lambda: files(tmp_path / "two-at-once"))
    up.until(lambda: counted(up, "two-at-once") == 2)
    cancelled(up, run)
    up.until(lambda: up.run(waits)["state_type"] == "COMPLETED")
