"""Which run begins first: its priority decides, whatever queue it stands in; none waits for ever, checks for nobody."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun

from talaria.engine.asgi import Message
from talaria.engine.due import MOST, Due
from talaria.engine.priority import QueueOfPriority
from talaria.engine.registry import QUEUES
from talaria.engine.unqueued import Unqueued
from talaria.testing import studies
from tests.servers.up import Talaria
from transfer.ledger import Ledger

LIMIT = 4
ORDER = list(QUEUES)


class Server:
    """As far as what is due goes; answers as Prefect does: by queue, then by time, and no more than is asked for."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)
        self.runs: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[str] = []
        self.ledger = cast(Ledger, SimpleNamespace(now=time.time))

    def add(self, name: str, queue: str, minutes: float, **parameters: Any) -> None:
        """A run that has waited so many minutes in a queue."""
        begin = (self.now - timedelta(minutes=minutes)).isoformat()
        flow_run = {"id": str(uuid4()), "name": name, "flow_id": str(uuid4()), "parameters": parameters}
        self.runs.append((queue, flow_run | {"next_scheduled_start_time": begin}))

    async def request(
        self, method: str, path: str, path_params: dict[str, str], json: dict[str, Any]
    ) -> httpx.Response:
        assert (method, path_params) == ("POST", {"name": "pool"}) and path.endswith("/get_scheduled_flow_runs")
        queues, before = json.get("work_queue_names") or ORDER, datetime.fromisoformat(json["scheduled_before"])
        after = datetime.fromisoformat(json.get("scheduled_after", "2000-01-01T00:00:00+00:00"))
        assert json["limit"] <= MOST
        self.asked.append(",".join(json.get("work_queue_names", ["all"])))
        due = [
            (ORDER.index(queue), begin, one)
            for queue, one in self.runs
            if queue in queues
            and after <= (begin := datetime.fromisoformat(one["next_scheduled_start_time"])) <= before
        ]
        ids = {"work_pool_id": str(uuid4()), "work_queue_id": str(uuid4())}
        found = [ids | {"flow_run": one} for _, _, one in sorted(due, key=lambda one: one[:2])][: json["limit"]]
        return httpx.Response(200, json=found)

    async def read_flow_runs(self, flow_run_filter: FlowRunFilter) -> list[FlowRun]:
        assert flow_run_filter.id and flow_run_filter.state
        ids = {str(one) for one in flow_run_filter.id.any_ or ()}
        self.asked.append("ids")
        return [FlowRun.model_validate(one) for _, one in self.runs if one["id"] in ids]

    def due(self) -> Due:
        due = Due(cast(PrefectClient, self), "pool", LIMIT, self.ledger)
        due.unqueued = cast(Unqueued, SimpleNamespace(ids=[], look=partial(asyncio.sleep, 0)))  # of test_unqueued.py
        return due


def names(due: Due, *, checks: bool = False, others: bool = True) -> list[str]:
    return [one.name for one in asyncio.run(due.found(checks=checks, others=others))]


def test_priority_decides_whatever_the_queue() -> None:
    server = Server()
    server.add("off", "normal", 5, priority="offpeak")
    server.add("old", "normal", 3, priority="normal")
    server.add("now", "normal", 1, priority="urgent")
    assert names(server.due()) == ["now", "old", "off"] and server.asked == ["all"]


@pytest.mark.parametrize(("ahead_s", "found"), [(60, ["past"]), (0, ["past", "soon"]), (-60, ["past", "soon"])])
def test_a_host_whose_clock_is_ahead_begins_nothing_too_early(ahead_s: int, found: list[str]) -> None:
    """The server would let it wait until its time has come, with its place."""
    server = Server()
    server.ledger = cast(Ledger, SimpleNamespace(now=lambda: time.time() - ahead_s))
    server.add("past", "normal", 2)
    server.add("soon", "normal", 0.5)  # by this host's clock its time came half a minute ago
    server.add("later", "normal", -0.5)
    assert names(server.due()) == found


@pytest.mark.parametrize(("queue", "minutes"), [("normal", 10), ("offpeak", 20)])
def test_who_has_waited_long_is_not_overtaken_by_those_that_come(queue: str, minutes: int) -> None:
    server = Server()
    for number in range(3 * LIMIT):
        server.add(f"urgent{number}", "urgent", 0.1, priority="urgent")
    server.add("young", queue, minutes - 1, priority=queue)
    due = server.due()
    assert "young" not in names(due)
    server.add("old", queue, minutes + 1, priority=queue)
    assert "old" not in names(due)  # there was nobody a moment ago: it does not ask each time
    due = server.due()
    assert names(due)[0] == "old" and names(due)[0] == "old"
    server.runs.pop()
    asked = len(server.asked)
    assert "old" not in names(due) and server.asked[asked:] == ["all", "normal", "offpeak"]


def test_a_check_is_found_where_there_is_no_room_for_it() -> None:
    server = Server()
    for number in range(LIMIT):
        server.add(f"urgent{number}", "urgent", 1, priority="urgent")
    server.add("check", "checks", 0, target="folder-target/archive")
    assert "check" in names(server.due(), checks=True)
    server.asked.clear()
    assert names(server.due(), checks=True, others=False) == ["check"] and server.asked == ["checks"]
    server.asked.clear()
    assert names(server.due(), others=False) == [] and server.asked == []


def test_a_run_is_found_behind_any_number_that_are_for_other_hosts() -> None:
    server = Server()
    for number in range(2 * MOST + 10):
        server.add(f"theirs{number}", "urgent", 60 + number / 1000, priority="urgent")
    for number in range(MOST + 10):
        server.add(f"theirs too{number}", "normal", 60, priority="normal")  # at the same moment
    server.add("ours", "normal", 30, priority="normal")
    server.add("ours too", "urgent", 50, priority="urgent")
    due = server.due()

    def beyond() -> list[str]:
        async def here(runs: list[FlowRun]) -> list[FlowRun]:
            return [one for one in runs if one.name.startswith("ours")]

        return [one.name for one in asyncio.run(due.beyond(here))]

    assert beyond() == ["ours too", "ours"] and beyond() == ["ours too", "ours"]
    server.runs = [(queue, one) for queue, one in server.runs if not one["name"].startswith("ours")]
    assert beyond() == []
    server.add("ours", "offpeak", 1, priority="offpeak")
    asked = len(server.asked)
    assert beyond() == [] and len(server.asked) == asked  # there was nobody a moment ago: it does not ask each time


def test_an_urgent_run_overtakes_also_from_far_behind_in_the_queue_of_its_deployment() -> None:
    """At a Prefect server elsewhere, which makes runs of schedules there, and lets nobody put them into another one."""
    server = Server()
    for number in range(2 * MOST):
        server.add(f"off{number}", "normal", 5 + number / 1000, priority="offpeak")
    for number in range(MOST):
        server.add(f"plain{number}", "normal", 3)  # at the same moment
    server.add("now", "normal", 1, priority="urgent")
    server.add("later", "normal", -1, priority="urgent")
    due = server.due()
    asyncio.run(due.look_through())
    assert server.asked == []  # nothing is known to be due
    assert not {"now", "plain0"} & {*names(due)}
    asyncio.run(due.look_through())
    found = names(due)
    assert found[0] == "now" and found[1].startswith("plain") and "later" not in found
    server.runs = [one for one in server.runs if one[1]["name"] != "now"]  # it has begun
    assert "now" not in names(due) and names(due)[0].startswith("plain")
    asked = len(server.asked)
    asyncio.run(due.look_through())
    assert len(server.asked) == asked  # it does not look through so many each time


def test_runs_that_stand_where_they_belong_are_asked_for_once() -> None:
    server = Server()
    for number in range(2 * LIMIT):
        server.add(f"plain{number}", "normal", 3, priority="normal")
        server.add(f"off{number}", "offpeak", 3, priority="offpeak")
    due = server.due()
    names(due)
    asyncio.run(due.look_through())
    names(due)
    assert "ids" not in server.asked
    embedded = server.due()
    embedded.client.saved = "1"  # type: ignore[attr-defined]  # the embedded server says so, and puts runs right itself
    names(embedded)
    asked = len(server.asked)
    asyncio.run(embedded.look_through())
    assert len(server.asked) == asked


def created(deployment: dict[str, Any], body: Any, path: str = "") -> Any:
    """What Prefect's application gets where a run of a deployment is asked for."""
    seen = list[Any]()

    async def prefect(scope: Message, receive: Any, send: Any) -> None:
        answer: Any = deployment
        if scope["method"] == "POST":
            asked = (await receive())["body"]
            assert dict(scope["headers"])[b"content-length"] == str(len(asked)).encode()
            answer = seen.append(json.loads(asked))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def create() -> None:
        transport = httpx.ASGITransport(QueueOfPriority(prefect))
        async with httpx.AsyncClient(transport=transport, base_url="http://talaria") as client:
            await client.post(f"/api/deployments/{uuid4()}/create_flow_run{path}", json=[body] if path else body)

    asyncio.run(create())
    return seen[0][0] if path else seen[0]


@pytest.mark.parametrize("pool", ["talaria", "other"])
@pytest.mark.parametrize("path", ["", "/bulk"])
def test_a_run_is_created_in_the_queue_of_its_priority(pool: str, path: str) -> None:
    where, ours = {"work_pool_name": pool}, pool == "talaria"
    for queue in ({}, {"work_queue_name": "normal"}):
        run = created(where, {"parameters": {"priority": "urgent"}} | queue, path)
        assert run.get("work_queue_name") == ("urgent" if ours else queue.get("work_queue_name"))
    for queue in ("urgent@there", "normal@there"):  # files of another host are not those that this one has there
        run = created(where, {"parameters": {"priority": "urgent"}, "work_queue_name": queue}, path)
        assert run["work_queue_name"] == ("urgent@there" if ours else queue)
    for odd in ({}, {"parameters": None}, {"parameters": {"priority": []}}, {"parameters": {"priority": "checks"}}):
        assert created(where, odd, path) == odd
        run = created(where, odd | {"enforce_parameter_schema": False}, path)
        assert run["enforce_parameter_schema"] is (None if ours else False)


@pytest.mark.parametrize(
    ("given", "own", "named", "right"),
    [
        ("offpeak", "normal", None, "offpeak"),  # by the deployment's own parameters
        ("", "normal", "urgent", "normal"),  # by those of its flow: a queue's name is no priority
        ("urgent", "normal@there", None, "urgent@there"),
        ("urgent", "normal", "of-the-lab", "of-the-lab"),  # a queue that people have made
        ("urgent", "of-the-lab", None, None),
    ],
)
def test_a_run_has_the_priority_of_its_deployment(given: str, own: str, named: str | None, right: str | None) -> None:
    deployment = {
        "work_pool_name": "talaria",
        "work_queue_name": own,
        "parameters": {"priority": given} if given else {},
        "parameter_openapi_schema": {"properties": {"priority": {"default": "normal"}}},
    }
    asked = {"parameters": {"paths": ["/x"]}} | ({"work_queue_name": named} if named else {})
    assert created(deployment, asked).get("work_queue_name") == right


def test_a_flow_without_priority_keeps_its_queue() -> None:
    deployment = {"work_pool_name": "talaria", "work_queue_name": "normal", "parameter_openapi_schema": {}}
    for asked in (
        {"parameters": {"source": "inbox"}},
        {"parameters": {"source": "inbox"}, "work_queue_name": "urgent"},
    ):
        assert created(deployment, asked) == asked


def test_runs_of_schedules_and_automations_stand_in_the_queue_of_their_priority(up: Talaria) -> None:
    """Prefect makes both itself, in the queue of their deployment: there an urgent one waited as any other."""
    deployment = up.api("GET", "/deployments/name/dispatch/talaria")["id"]
    far = (datetime.now(UTC) + timedelta(hours=5)).isoformat()
    right = {"urgent": "urgent", "normal": "normal", "offpeak": "offpeak"}

    def made_by(kind: str) -> dict[str, str]:
        asked = {"deployment_id": {"any_": [deployment]}}
        found = up.api("POST", "/flow_runs/filter", flow_runs=asked, sort="EXPECTED_START_TIME_DESC")
        return {
            one["parameters"]["priority"]: one["work_queue_name"]
            for one in found
            if (one["created_by"] or {}).get("type") == kind and one["parameters"]["targets"] == ["by-itself"]
        }

    def happens() -> bool:
        """What the automations react to; again and again, as each may have been heard of yet or not."""
        event = {"occurred": datetime.now(UTC).isoformat(), "event": "by.itself", "id": str(uuid4())}
        whole: Any = [event | {"resource": {"prefect.resource.id": "by.itself"}, "related": [], "payload": {}}]
        up.as_worker("POST", "/events", whole)
        return True

    waited = up.told("status")["queues"]["offpeak"]
    schedules, automations = [], []
    try:
        for priority in ("urgent", "normal", "offpeak"):
            asked = {"paths": ["/nowhere"], "targets": ["by-itself"], "priority": priority}
            schedule = {"interval": 86400, "anchor_date": far}
            whole: Any = [{"schedule": schedule, "active": True, "parameters": asked}]
            made = up.as_worker("POST", f"/deployments/{deployment}/schedules", whole)
            schedules += [one["id"] for one in made]
            trigger = {
                "type": "event", "posture": "Reactive", "expect": ["by.itself"], "threshold": 1, "within": 0,
                "match": {"prefect.resource.id": "by.itself"},
            }  # fmt: skip
            action = {"type": "run-deployment", "source": "selected", "deployment_id": deployment, "parameters": asked}
            wanted = {"name": f"by itself {priority}", "trigger": trigger, "actions": [action]}
            automations.append(up.api("POST", "/automations/", **wanted)["id"])
        up.until(lambda: happens() and made_by("AUTOMATION").keys() == right.keys(), 60)
        assert made_by("AUTOMATION") == right
        up.until(lambda: made_by("SCHEDULE").keys() == right.keys(), 120)
        assert made_by("SCHEDULE") == right
        up.until(lambda: up.told("status")["queues"]["offpeak"] <= waited)  # of days that are to come none waits
    finally:
        for one in automations:
            up.api("DELETE", f"/automations/{one}")
        for one in schedules:
            up.api("DELETE", f"/deployments/{deployment}/schedules/{one}")


def test_a_check_does_not_wait_for_dispatches(up: Talaria, tmp_path: Path) -> None:
    folders = [tmp_path / f"study-{number}" for number in range(9)]
    for each in folders:
        studies.ct(each, 40)
    (tmp_path / "slow").mkdir()
    slow = {"type": "folder", "folder": str(tmp_path / "slow"), "concurrency": 1, "max_dispatches": 64}
    up.apply(slow=slow | {"bandwidth_limit": 1024})
    deployment = up.api("GET", "/deployments/name/dispatch/talaria")["id"]
    # By Prefect's own API, without a queue.
    runs = []
    for each in folders:
        asked = {"paths": [str(each)], "targets": ["slow"], "priority": "urgent"}
        runs.append(up.api("POST", f"/deployments/{deployment}/create_flow_run", parameters=asked))
    assert {run["work_queue_name"] for run in runs} == {"urgent"}
    states = [""]

    def full() -> bool:
        states[:] = [up.run(run["id"])["state"]["type"] for run in runs]
        return states.count("RUNNING") == 8

    up.until(full)
    assert up.told("target", "test", "slow")["ok"]
    assert full() and "SCHEDULED" in states  # the ninth waits still
    for run in runs:
        up.api("POST", f"/flow_runs/{run['id']}/set_state", state={"type": "CANCELLING"})
    up.until(lambda: all(up.run(run["id"])["state"]["type"] == "CANCELLED" for run in runs))
