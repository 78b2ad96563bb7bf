"""The embedded server: on SQLite no client is turned away, and what users gave our deployments stays."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.server.database import provide_database_interface
from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration, BaseDatabaseConfiguration
from prefect.server.schemas.filters import FlowRunFilter
from prefect.server.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Pending, Running
from sqlalchemy import func, select
from sqlalchemy.dialects import sqlite

from flows.dispatch import dispatch
from talaria.engine import api, database, freed, lanes, runs
from talaria.engine.listed import listed
from talaria.service.results import line
from talaria.testing import studies
from tasks.checking import LastChecks
from tasks.dispatch.audited import requester
from tasks.targets import all_targets
from tests.servers.up import Talaria

MARKS = ("talaria.engine.worker", "talaria.front")
pytestmark = pytest.mark.timeout(600)


DISPATCHES = 4
# What a dispatch of one target costs: its claim, Running, its reading at its end, its end; a place and that place given
# back; the receipt, for commands and for people. Its target is known, as long as nobody changes one.
CALLS = [
    "GET /flow_runs/ID",
    "PATCH /flow_runs/ID",  # its name, when the files have been read
    "POST /artifacts/",
    "POST /artifacts/",
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
        assert made.count(call) == DISPATCHES * CALLS.count(call), made
    # Looks for runs, and logs in bulk; the net below the events, and heartbeats, come by time.
    others = sorted({call for call in made if call not in CALLS})
    # Each minute it is looked which sources there are.
    by_time = [
        "POST /block_documents/filter",
        "POST /flow_runs/filter",
        "POST /logs/",
        "POST /work_pools/talaria/workers/heartbeat",
    ]
    assert set(others) <= {LOOKS, *by_time}
    assert made.count(LOOKS) <= 3 * DISPATCHES and made.count("POST /block_documents/filter") <= 1


def test_a_run_that_begins_is_known_as_the_server_has_it(up: Talaria) -> None:
    changing = {"updated", "total_run_time", "estimated_run_time", "estimated_start_time_delta"}

    async def begun() -> None:
        async with lanes.client(lanes.RunClient) as client:
            assert isinstance(client, lanes.RunClient)
            asked = {"paths": ["/x"], "targets": ["y"]}
            run_id = (await client.create_flow_run(dispatch, parameters=asked, state=Pending())).id
            for count in (1, 2):
                client.begins(await client.read_flow_run(run_id))
                await client.set_flow_run_state(run_id, Running())
                ours, theirs = await client.read_flow_run(run_id), await client.read_flow_run(run_id)
                assert ours.model_dump(exclude=changing) == theirs.model_dump(exclude=changing)
                assert theirs.run_count == count
                await client.set_flow_run_state(run_id, AwaitingRetry(scheduled_time=datetime.now(UTC)))
                await lanes.Client.set_flow_run_state(client, run_id, Pending())

    auth = (up.home / "worker.auth").read_text().strip()
    with temporary_settings({PREFECT_API_URL: up.url, PREFECT_API_AUTH_STRING: auth}):
        asyncio.run(begun())


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


def test_what_prefect_reads_beside_a_transaction_does_not_wait_for_it(up: Talaria) -> None:
    """Who paused a queue was answered 503 after a minute, in which nobody else could write."""
    path = "/work_pools/talaria/queues"
    up.api("POST", path, name="read-beside")
    for paused in (True, False):
        up.as_worker("PATCH", f"{path}/read-beside", {"is_paused": paused})
        assert up.api("GET", f"{path}/read-beside")["is_paused"] is paused
    up.api("DELETE", f"{path}/read-beside")
    assert not [call for call in calls(up) if call.endswith(" 503")]


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
    planned = {"deployment_id": {"any_": [deployment["id"]]}, "tags": {"all_": ["auto-scheduled"]}}

    def coming() -> set[str]:
        return {one["id"] for one in up.api("POST", "/flow_runs/filter", flow_runs=planned)}

    up.until(coming)
    before = coming()
    (other,) = up.api("POST", "/deployments/filter", flows={"name": {"any_": ["check"]}})
    up.api("PATCH", f"/deployments/{other['id']}", description="changed by somebody")
    up.stop()
    up.start()
    # Prefect deletes them with each change, and plans none for the moment: what is due in it would never begin.
    assert before <= coming()
    assert up.api("GET", f"/deployments/{other['id']}")["description"] == other["description"]
    (again,) = up.api("POST", "/deployments/filter", flows={"name": {"any_": ["dispatch"]}})
    assert again["id"] == deployment["id"] and again["description"] == deployment["description"]
    assert [one["schedule"]["cron"] for one in again["schedules"]] == ["0 2 * * *"]
    assert again["entrypoint"] == deployment["entrypoint"]
    assert again["parameter_openapi_schema"] == deployment["parameter_openapi_schema"]


def plans(up: Talaria, like: str) -> list[list[str]]:
    """How SQLite finds a page of dispatches whose names hold this, and how many they are."""
    database.let_types_name_their_operators()  # else SQLAlchemy warns, which is an error here
    prefects = provide_database_interface()
    (deployment,) = up.api("POST", "/deployments/filter", flows={"name": {"any_": ["dispatch"]}})
    wanted = FlowRunFilter.model_validate(
        {
            "deployment_id": {"any_": [deployment["id"]]},
            "name": {"like_": like},
            "state": {"type": {"any_": ["FAILED"]}},
        }
    )
    chosen = wanted.as_sql_filter()
    page = (
        select(prefects.FlowRun).where(chosen).order_by(*FlowRunSort.EXPECTED_START_TIME_DESC.as_sql_sort()).limit(51)
    )
    found = []
    with closing(sqlite3.connect(f"file:{up.database}?mode=ro", uri=True)) as db:
        for query in (page, select(func.count(None)).select_from(prefects.FlowRun).where(chosen)):
            text = str(query.compile(dialect=sqlite.dialect(), compile_kwargs={"render_postcompile": True}))
            rows = db.execute(f"EXPLAIN QUERY PLAN {text}", ["x"] * text.count("?"))
            found.append([row[3] for row in rows])
    return found


def test_lists_of_runs_are_read_from_our_index(up: Talaria) -> None:
    page, count = plans(up, "target-007")
    assert len(page) == 1 and f"USING INDEX {database.INDEX} (deployment_id=?" in page[0]  # and nothing is sorted
    assert len(count) == 1 and f"USING COVERING INDEX {database.INDEX}" in count[0]


def test_runs_that_lists_show_are_those_that_prefect_s_client_makes(up: Talaria) -> None:
    documents = up.api("POST", "/flow_runs/filter", limit=200)
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2126-11-29T12:00:00.5Z"}}
    documents.append({**documents[0], "state": documents[0]["state"] | later, "state_type": "SCHEDULED"})
    for ours, document in zip(listed(documents), documents, strict=True):
        theirs = FlowRun.model_validate(document)
        assert line(ours) == line(theirs) and requester(ours) == requester(theirs)
        for name in ("id", "state_id", "deployment_id", "state_type", "expected_start_time", "end_time", "labels"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.state and theirs.state and ours.state.is_final() == theirs.state.is_final()
        assert ours.state.timestamp == theirs.state.timestamp
        assert (runs.at_rest(ours), runs.under_way(ours)) == (runs.at_rest(theirs), runs.under_way(theirs))


def test_a_run_is_found_by_the_beginning_of_its_id_and_by_its_dispatch(up: Talaria) -> None:
    ended, ours = {"state": {"type": {"any_": ["COMPLETED"]}}}, {"name": {"any_": ["dispatch"]}}
    (one,) = up.api("POST", "/flow_runs/filter", limit=1, flow_runs=ended, flows=ours)
    dispatch = one["name"].partition(" ")[0]
    for text in (one["id"][:-1], one["id"][:-1].upper(), dispatch):
        assert up.told("jobs", "show", text)["run"]["id"] == one["id"]
    assert one["id"] in up.api("GET", f"/talaria/flow_run_ids/{one['id'][:2]}")
    for text in ("x", "0" * 37, "%25", one["id"][1:]):
        assert up.api("GET", f"/talaria/flow_run_ids/{text}") == []
    assert "no job x" in up.here("jobs", "show", "x").stderr


def test_the_last_check_is_the_last_one_however_often_it_is_asked_for(up: Talaria, tmp_path: Path) -> None:
    user, _, password = (up.home / "api.auth").read_text().strip().partition(":")
    known = LastChecks()

    async def last() -> dict[str, Any]:
        async with PrefectClient(up.url, auth_string=f"{user}:{password}") as client:
            found = await all_targets(client)
            first, again = await LastChecks().read(client, found), await known.read(client, found)
            assert first == again
            return again["checked"]

    up.apply(checked={"type": "folder", "folder": str(tmp_path)})
    up.until(lambda: up.told("status", code=None)["workers"])  # else the check is made here, and no run's
    assert up.told("target", "test", "checked")["ok"]
    before = asyncio.run(last())
    tmp_path.rmdir()
    assert not up.told("target", "test", "checked", code=1)["ok"]
    after = asyncio.run(last())
    assert before["ok"] and not after["ok"] and after["time"] >= before["time"]
    (newest,) = up.api("POST", "/artifacts/latest/filter", artifacts={"key": {"any_": ["check-checked"]}})
    assert datetime.fromisoformat(after["time"]) == datetime.fromisoformat(newest["updated"]).replace(microsecond=0)


def test_how_a_file_of_sqlite_s_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection keeps few of its pages, and a new file gives back those that are free."""
    monkeypatch.setattr(AioSqliteConfiguration, "setup_sqlite", AioSqliteConfiguration.setup_sqlite)
    assert list(inspect.signature(AioSqliteConfiguration.setup_sqlite).parameters) == ["self", "conn", "record"]
    database.set_sqlite_up()
    with closing(sqlite3.connect(tmp_path / "old.db")) as old:
        old.execute("CREATE TABLE there (x)")

    async def found(name: str) -> list[int]:
        engine = await AioSqliteConfiguration(f"sqlite+aiosqlite:///{tmp_path}/{name}.db").engine()
        async with engine.connect() as connection:
            asked = [f"PRAGMA {one}" for one in ("cache_size", "auto_vacuum")]
            values = [(await connection.exec_driver_sql(one)).scalar_one() for one in asked]
        await engine.dispose()
        return values

    assert asyncio.run(found("new")) == asyncio.run(found("new")) == [-database.CACHE_KIB, freed.INCREMENTAL]
    assert asyncio.run(found("old")) == [-database.CACHE_KIB, 0]


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
