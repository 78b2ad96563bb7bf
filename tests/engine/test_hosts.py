"""Several hosts: two Prefect servers on PostgreSQL, four workers on two hosts, one ledger."""

from __future__ import annotations

import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from talaria.testing import studies
from talaria.testing.process import as_loaded
from tests.servers.prefect_servers import Servers, prefect_servers
from tests.servers.scp import scp

DISPATCHES = int(os.environ.get("TALARIA_TEST_DISPATCHES", "1000"))
LEASE_S = 20
LIMIT = 4  # dispatches at once in a worker
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def deployment(servers: Servers, number: int) -> str:
    found = servers.api("GET", "/deployments/name/dispatch/talaria", number)
    return str(found["id"])


def states(servers: Servers, number: int) -> Counter[str]:
    """How many runs are in which state."""
    found = Counter[str]()
    for kind in ("SCHEDULED", "PENDING", "RUNNING", "COMPLETED", "FAILED", "CRASHED", "CANCELLED", "CANCELLING"):
        count = servers.api(
            "POST",
            "/flow_runs/count",
            number,
            {"flow_runs": {"state": {"type": {"any_": [kind]}}}, "flows": {"name": {"any_": ["dispatch"]}}},
        )
        found[kind] = int(count)
    return found


def until_all(servers: Servers, number: int, count: int, seconds: float) -> None:
    """Wait until so many runs are Completed."""
    end = time.monotonic() + as_loaded(seconds)
    while (now := states(servers, number))["COMPLETED"] < count:
        assert time.monotonic() < end, f"waited in vain: {now}"
        time.sleep(1)


def unfinished(servers: Servers) -> list[Any]:
    with psycopg.connect(servers.ledger, options="-c search_path=talaria") as ledger:
        return ledger.execute("SELECT flow_run_id, owner FROM runs WHERE ended IS NULL").fetchall()


def known(servers: Servers) -> set[str]:
    with psycopg.connect(servers.ledger, options="-c search_path=talaria") as ledger:
        return {str(uid) for (uid,) in ledger.execute("SELECT sop_instance_uid FROM items").fetchall()}


def test_a_server_and_a_host_die_and_nothing_is_lost_or_sent_twice(tmp_path: Path) -> None:
    """Two workers and their server are killed in the middle; the other host's clock is a minute ahead."""
    sources = tmp_path / "sources"
    for number in range(DISPATCHES):
        studies.ct(sources / f"{number:04}", 1)
    settings = {
        "TALARIA_SHARED_SOURCES": str(sources),
        "TALARIA_LEASE": str(LEASE_S),
        "TALARIA_LIMIT": str(LIMIT),
    }
    with (
        scp(keep_data=False) as sink,
        prefect_servers(tmp_path) as servers,
        servers.host("first", 0, "--workers", "2", **settings) as first,
        servers.host("second", 1, "--workers", "2", ahead_s=60, **settings) as second,
    ):
        target = {"type": "dicom", "host": "127.0.0.1", "port": sink.port, "aet_target": sink.aet}
        second.apply(pacs=target | {"max_attempts": 8, "idle_timeout_s": 60, "max_dispatches": 64})
        dispatch = deployment(servers, 1)

        def create(number: int) -> None:
            parameters = {"paths": [str(sources / f"{number:04}")], "targets": ["pacs"]}
            body = {"parameters": parameters, "name": f"to pacs {number}"}
            servers.api("POST", f"/deployments/{dispatch}/create_flow_run", 1, body)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(create, range(DISPATCHES)))
        end = time.monotonic() + as_loaded(600)
        while len(sink.kept) < DISPATCHES // 3:
            assert time.monotonic() < end, (len(sink.kept), states(servers, 1))
            time.sleep(0.2)
        servers.processes[0].kill()
        first.kill()
        arrived = set(sink.kept)
        unheard = arrived - known(servers)  # confirmed to who was killed before the ledger had it
        until_all(servers, 1, DISPATCHES, 3 * DISPATCHES + 300)
        assert len(sink.kept) == DISPATCHES
        assert set(sink.repeated) <= unheard and len(sink.repeated) <= 2 * LIMIT
        assert unfinished(servers) == []
        assert states(servers, 1) == Counter({"COMPLETED": DISPATCHES})
