"""Dispatches that can't be tried now: they are created resting, unless a worker has to look at them."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from prefect.server import models  # noqa: F401 - before what it imports
from prefect.server.orchestration import global_policy

from blocks.dicom import DicomTarget
from talaria.engine import resting
from talaria.engine.asgi import Message
from talaria.engine.resting import Resting, expect_what_rests_now
from talaria.testing import studies
from tasks.dispatch import breaker, line, waiting
from transfer import live
from transfer.errors import Unreachable
from transfer.home import Home
from transfer.ledger import Ledger

SOON = {"retry_delay_s": 0.1, "retry_max_delay_s": 1}
LATER = {"retry_delay_s": 3600, "retry_max_delay_s": 86_400}


class Server:
    """Prefect's application as far as creating runs goes, behind ours, and its client."""

    def __init__(self, home: Home, target: DicomTarget, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.target, self.entrypoint = home, target, "flows.dispatch:dispatch"
        self.bodies: list[Any] = []
        self.forced: list[Any] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self.run_id = str(uuid4())

        async def loaded(*_: Any) -> list[DicomTarget]:
            return [self.target]

        monkeypatch.setattr(waiting, "loaded", loaded)
        monkeypatch.setattr("tasks.happened.emit_event", lambda *_, **__: None)

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        self.bodies.append(json.loads((await receive())["body"]))
        self.meanwhile()
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps({"id": self.run_id}).encode()})

    async def read_deployment(self, deployment: Any) -> Any:
        return SimpleNamespace(work_pool_name="talaria", entrypoint=self.entrypoint, parameters={})

    async def set_flow_run_state(self, run_id: Any, state: Any, force: bool = False) -> None:
        self.forced.append((str(run_id), state, force))

    def created(self, body: Any) -> Any:
        """Create a run; return what Prefect was asked for."""

        async def client() -> Any:
            return self

        async def create() -> None:
            app = Resting(cast(Any, self), self.home, client, lambda: "")
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://talaria") as one:
                answer = await one.post(f"/api/deployments/{uuid4()}/create_flow_run", json=body)
            assert answer.json() == {"id": self.run_id}

        asyncio.run(create())
        return self.bodies[-1]

    def down(self) -> None:
        with Ledger(self.home.ledger) as ledger:
            for _ in range(breaker.LIMIT):
                breaker.failed(ledger, self.target, Unreachable("no route"), "no route")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    studies.ct(tmp_path / "study", 1)
    home = Home(tmp_path / "home")
    home.root.mkdir()
    target = DicomTarget(host="127.0.0.1", port=1, aet_target="PACS", **LATER).named("away")
    return Server(home, target, monkeypatch)


def asked(tmp_path: Path, **parameters: Any) -> dict[str, Any]:
    return {"parameters": {"paths": [str(tmp_path / "study")], "targets": ["away"], **parameters}}


def test_what_a_dead_target_keeps_waiting_is_created_so_and_can_be_called(server: Server, tmp_path: Path) -> None:
    assert server.created(asked(tmp_path)) == asked(tmp_path)
    server.down()
    body = server.created(asked(tmp_path, targets=["dicom/away"]) | {"name": "nightly"})
    state = body.pop("state")
    assert body == asked(tmp_path, targets=["dicom/away"]) | {"name": "nightly"}
    assert (state["type"], state["name"]) == ("SCHEDULED", "AwaitingRetry")
    assert "away to answer, which it hasn't since" in state["message"] and waiting.UNREAD in state["message"]
    assert datetime.fromisoformat(state["state_details"]["scheduled_time"]) > datetime.now(UTC) + timedelta(minutes=4)
    with Ledger(server.home.ledger) as ledger:
        assert ledger.rests.of(server.run_id) and ledger.deliveries.of([server.run_id])[server.run_id]["away"]
        assert ledger.waits.call(breaker.queue(server.target), 5) == [server.run_id]
    assert not server.forced


def test_who_answers_while_a_run_is_created_is_not_waited_for(server: Server, tmp_path: Path) -> None:
    server.down()

    def answers() -> None:
        with Ledger(server.home.ledger) as ledger:
            breaker.answered(ledger, server.target)

    server.meanwhile = answers
    assert server.created(asked(tmp_path))["state"]["name"] == "AwaitingRetry"
    ((run_id, state, force),) = server.forced
    assert (run_id, force) == (server.run_id, True)
    assert state.name == "AwaitingRetry" and state.state_details.scheduled_time <= datetime.now(UTC)


def test_what_a_worker_has_to_look_at_is_created_as_it_was_asked_for(server: Server, tmp_path: Path) -> None:
    server.down()
    (tmp_path / "empty").mkdir()
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": f"{datetime.now(UTC) + timedelta(hours=1)}"}}
    for body in (
        asked(tmp_path, paths=[str(tmp_path / "missing")]),
        asked(tmp_path, paths=[str(tmp_path / "empty")]),
        asked(tmp_path, paths=[]),
        asked(tmp_path, each="folder"),
        *(asked(tmp_path, targets=odd) for odd in ([], [""], ["away", ""], ["away", "alive"], [7], "away")),
        asked(tmp_path) | {"labels": {live.SHOW_PLAN: True}},
        asked(tmp_path) | {"state": later},
        asked(tmp_path) | {"state": {"type": "PENDING"}},
        {"parameters": None},
        {},
    ):
        assert server.created(body) == body, body
    server.entrypoint = "flows.retrieve:retrieve"
    assert server.created(asked(tmp_path)) == asked(tmp_path)


def test_what_waits_for_a_disabled_target_behind_others_is_created_so(server: Server, tmp_path: Path) -> None:
    """Each took a place of the worker once, only to find that."""
    server.target = server.target.model_copy(update={"enabled": False}).named("away")
    assert server.created(asked(tmp_path)) == asked(tmp_path)  # the first one finds it out
    queue, first = line.to_be_enabled("away"), str(uuid4())
    with Ledger(server.home.ledger) as ledger:
        ledger.waits.join(queue, first, ledger.now(), ledger.now() + 600)
        state = server.created(asked(tmp_path))["state"]
        assert state["name"] == "AwaitingRetry" and "away to be enabled; its files" in state["message"]
        assert ledger.waits.call(queue, 5) == [first, server.run_id]
    assert not server.forced


def test_what_comes_while_a_target_that_failed_is_tested_is_created_resting(server: Server, tmp_path: Path) -> None:
    """Else each would read its files, and wait for as long as it takes to be refused or hung up on."""
    with Ledger(server.home.ledger) as ledger:
        breaker.failed(ledger, server.target, Unreachable("no route"), "no route")
        assert server.created(asked(tmp_path)) == asked(tmp_path)  # nobody tests it: a worker has to
        queue, tester = breaker.queue(server.target), str(uuid4())
        ledger.waits.join(queue, tester, ledger.now(), ledger.now() + 600)
        state = server.created(asked(tmp_path))["state"]
        assert state["name"] == "AwaitingRetry" and "away to answer a test; its files" in state["message"]
        ledger.waits.leave(queue, tester)
        assert ledger.waits.call(queue, 5) == [server.run_id] and not server.forced

        def ends() -> None:
            ledger.waits.leave(queue, tester)

        ledger.waits.gone(server.run_id)
        ledger.waits.join(queue, tester, ledger.now(), ledger.now() + 600)
        server.meanwhile = ends  # the one that tests it ends, and calls nobody: this one stands in no line yet
        assert server.created(asked(tmp_path))["state"]["name"] == "AwaitingRetry"
    ((run_id, now, force),) = server.forced
    assert (run_id, force) == (server.run_id, True) and now.state_details.scheduled_time <= datetime.now(UTC)


def test_what_is_tried_soon_is_left_to_the_worker(server: Server, tmp_path: Path) -> None:
    server.target = DicomTarget(host="127.0.0.1", port=1, aet_target="PACS", **SOON).named("away")
    server.down()
    assert server.created(asked(tmp_path)) == asked(tmp_path)


@pytest.mark.parametrize("rests", [True, False])
def test_its_place_in_lists_is_that_of_its_creation(monkeypatch: pytest.MonkeyPatch, rests: bool) -> None:
    theirs = global_policy.SetExpectedStartTime.before_transition
    assert list(inspect.signature(theirs).parameters) == ["self", "context"]
    monkeypatch.setattr(global_policy.SetExpectedStartTime, "before_transition", theirs)
    expect_what_rests_now()
    until = datetime.now(UTC) + timedelta(hours=1)
    state = SimpleNamespace(is_scheduled=lambda: True, state_details=SimpleNamespace(scheduled_time=until))
    context = SimpleNamespace(run=SimpleNamespace(expected_start_time=None), proposed_state=state)
    token = resting._rests.set(rests)
    asyncio.run(
        global_policy.SetExpectedStartTime.before_transition(
            SimpleNamespace(nullified_transition=lambda: False), context
        )
    )  # type: ignore[arg-type]
    resting._rests.reset(token)
    assert (context.run.expected_start_time == until) is not rests
    assert context.run.expected_start_time <= until
