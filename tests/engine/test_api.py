"""The embedded server: on SQLite no client is turned away, and what users gave our deployments stays."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration, BaseDatabaseConfiguration

from talaria.engine import api
from talaria.testing import studies
from tests.servers.up import Talaria

MARKS = ("talaria.engine.worker", "talaria.front")
pytestmark = pytest.mark.timeout(600)


DISPATCHES = 4
# What a dispatch of one target costs: its claim, Running, its reading then and at its end, its end; its target; a place
# and that place given back; the receipt, for commands and for people.
CALLS = [
    "GET /flow_runs/ID",
    "GET /flow_runs/ID",
    "PATCH /flow_runs/ID",  # its name, when the files have been read
    "POST /artifacts/",
    "POST /artifacts/",
    "POST /block_documents/filter",
    "POST /flow_runs/ID/set_state",
    "POST /flow_runs/ID/set_state",
    "POST /flow_runs/ID/set_state",
    "POST /v2/concurrency_limits/decrement-with-lease",
    "POST /v2/concurrency_limits/increment-with-lease",
]
LOOKS = "POST /work_pools/talaria/get_scheduled_flow_runs"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talaria]:
    """A server of their own: one fills it with runs, the other kills it; and its worker's log has each call."""
    one = Talaria(tmp_path_factory.mktemp("up"))
    one.more["PREFECT_LOGGING_ROOT_LEVEL"] = "INFO"
    try:
        yield one.start()
    finally:
        one.stop()


def calls(up: Talaria, since: int = 0) -> list[str]:
    """The calls of the API that the worker has made, with the status of the answer where that is an error."""
    log = (up.home / "logs" / "worker.log").read_bytes()[since:].decode()
    found = re.findall(r'HTTP Request: (\S+) http://[^/]+/api(\S+) "\S+ (\d+)', log)
    return [
        f"{method} {re.sub('[0-9a-f]{8}-[0-9a-f-]{27}', 'ID', path)}" + (f" {status}" if status >= "400" else "")
        for method, path, status in found
    ]


def test_a_dispatch_takes_few_calls_of_the_api(up: Talaria, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    up.apply(archive={"type": "folder", "folder": str(tmp_path / "archive"), "max_dispatches": 64})
    for number in range(DISPATCHES + 1):
        studies.ct(tmp_path / f"study{number}", 3)
    assert up.told("send", str(tmp_path / "study0"), "--to", "archive")["state"] == "delivered"
    since = (up.home / "logs" / "worker.log").stat().st_size
    for number in range(1, DISPATCHES + 1):
        assert up.told("send", str(tmp_path / f"study{number}"), "--to", "archive")["state"] == "delivered"
    made = calls(up, since)
    for call in CALLS:
        by_chance = call == "POST /block_documents/filter"  # each minute it is looked which sources there are
        assert 0 <= made.count(call) - DISPATCHES * CALLS.count(call) <= by_chance, made
    # Looks for runs, and logs in bulk; the net below the events, and heartbeats, come by time.
    others = sorted({call for call in made if call not in CALLS})
    by_time = ["POST /flow_runs/filter", "POST /logs/", "POST /work_pools/talaria/workers/heartbeat"]
    assert set(others) <= {LOOKS, *by_time}
    assert made.count(LOOKS) <= 3 * DISPATCHES


def test_the_private_name_is_still_prefect_s() -> None:
    """What `let_writers_wait` replaces, and how Prefect calls it."""
    for cls in (BaseDatabaseConfiguration, AioSqliteConfiguration):
        assert list(inspect.signature(cls.begin_transaction).parameters) == ["self", "session", "with_for_update"]
    assert SQLITE_BEGIN_MODE.get() is None or "DEFERRED" in SQLITE_BEGIN_MODE.get()


def test_writers_wait_for_their_turn_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "TURN_S", 0.01)

    async def run() -> tuple[bool, bool]:
        turn = asyncio.Lock()
        return await api._taken(turn), await api._taken(turn)

    assert asyncio.run(run()) == (True, False)


def test_a_flood_is_answered_without_503_and_schedules_survive(up: Talaria) -> None:
    (deployment,) = up.api("POST", "/deployments/filter", flows={"name": {"any_": ["dispatch"]}})
    user, _, password = (up.home / "api.auth").read_text().strip().partition(":")
    path = f"{up.url}/deployments/{deployment['id']}"
    far = {
        "type": "SCHEDULED",
        "state_details": {"scheduled_time": (datetime.now(UTC) + timedelta(days=1)).isoformat()},
    }
    body = {"parameters": {"paths": ["/x"], "targets": ["y"]}, "state": far}

    async def flood() -> list[int]:
        async with httpx.AsyncClient(auth=(user, password), timeout=99, limits=httpx.Limits(max_connections=16)) as one:
            answers = await asyncio.gather(*(one.post(f"{path}/create_flow_run", json=body) for _ in range(100)))
            return [answer.status_code for answer in answers]

    assert set(asyncio.run(flood())) == {201}
    assert not [call for call in calls(up) if call.endswith(" 503")]
    schedule = {"schedule": {"cron": "0 2 * * *", "timezone": "Europe/Berlin"}, "active": True}
    httpx.post(f"{path}/schedules", json=[schedule], auth=(user, password), timeout=300).raise_for_status()
    up.api("PATCH", f"/deployments/{deployment['id']}", description="changed by somebody")
    up.stop()
    up.start()
    (again,) = up.api("POST", "/deployments/filter", flows={"name": {"any_": ["dispatch"]}})
    assert again["id"] == deployment["id"] and again["description"] == deployment["description"]
    assert [one["schedule"]["cron"] for one in again["schedules"]] == ["0 2 * * *"]
    assert again["entrypoint"] == deployment["entrypoint"]
    assert again["parameter_openapi_schema"] == deployment["parameter_openapi_schema"]


def test_up_starts_both_again_when_worker_and_server_die_together(up: Talaria) -> None:
    def pids() -> set[int]:
        """The server and the worker, as far as they live."""
        found = set()
        for one in up.children():
            with suppress(psutil.Error):  # it has just ended
                if any(mark in part for part in one.cmdline() for mark in MARKS):
                    found.add(one.pid)
        return found

    up.until(lambda: len(pids()) == 2, alive=True)
    first = pids()
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    up.until(lambda: len(pids() - first) == 2, 180, alive=True)
    up.until(lambda: up.told("status", code=None)["workers"], 120, alive=True)
    studies.ct(up.folder / "study", 1)
    (up.folder / "archive").mkdir()
    up.apply(archive={"type": "folder", "folder": str(up.folder / "archive")})
    assert up.told("send", str(up.folder / "study"), "--to", "archive")["state"] == "delivered"
