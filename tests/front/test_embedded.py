"""Prefect behind the door: loaded while others are answered, a failure that ends the process, and who made a run."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from talaria.front import embedded
from talaria.front.access import ACTING, Identity, Role
from talaria.front.embedded import EmbeddedPrefect
from tests.front.door import FrontDoor


def prefect(events: list[str]) -> Any:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        events.append("started")
        yield
        events.append("stopped")

    async def answer(request: Request) -> JSONResponse:
        return JSONResponse({"authorization": request.headers.get("authorization")})

    return Starlette(routes=[Route("/api/{path:path}", answer, methods=["GET", "POST"])], lifespan=lifespan)


def test_the_door_answers_while_prefect_is_loaded_and_what_is_for_it_waits(tmp_path: Path) -> None:
    events: list[str] = []
    go = threading.Event()

    def load() -> Any:
        assert go.wait(60)
        app = prefect(events)
        return app, app

    async def case() -> None:
        upstream = EmbeddedPrefect("worker:secret", load)
        door = FrontDoor(tmp_path / "home", upstream=upstream)
        async with upstream.running(), door.browser() as client:
            assert (await client.get("/talaria/health")).json() == {"status": "ok", "prefect": "starting"}
            waiting = asyncio.create_task(client.get("/api/flows/x", headers=door.machine))
            inside = asyncio.create_task(upstream.client.post("/flow_runs/filter"))
            assert (await client.get("/talaria/health")).status_code == 200
            assert not waiting.done() and not inside.done()
            go.set()
            for one in (await waiting, await inside):
                assert one.status_code == 200 and one.json()["authorization"].startswith("Basic ")
            assert (await client.get("/talaria/health")).json()["prefect"] == "ready" and events == ["started"]
        assert events == ["started", "stopped"]

    asyncio.run(case())


def test_what_can_t_be_loaded_is_reported_and_ends_the_process(tmp_path: Path) -> None:
    failed: list[bool] = []

    def load() -> Any:
        raise RuntimeError("no database")

    async def case() -> None:
        upstream = EmbeddedPrefect("worker:secret", load, lambda: failed.append(True))
        door = FrontDoor(tmp_path / "home", upstream=upstream)
        async with upstream.running(), door.browser() as client:
            answer = await client.get("/api/flows/x", headers=door.machine)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
            assert (await client.get("/talaria/health")).json()["prefect"] == "failed: RuntimeError"

    asyncio.run(case())
    assert failed == [True]


def test_a_request_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WAIT_S", 0.01)
    go = threading.Event()

    def load() -> Any:
        go.wait(60)
        app = prefect([])
        return app, app

    async def case() -> None:
        upstream = EmbeddedPrefect("worker:secret", load)
        door = FrontDoor(tmp_path / "home", upstream=upstream)
        async with upstream.running(), door.browser() as client:
            assert (await client.get("/api/flows/x", headers=door.machine)).status_code == 503
            go.set()

    asyncio.run(case())


def test_runs_say_who_made_them() -> None:
    """`created_by` is what Prefect's dependency answers: a user's or token's name, and an automation's as before."""
    from prefect.server.api import dependencies

    api = FastAPI()

    @api.post("/make")
    async def make(created_by: Annotated[Any, Depends(dependencies.get_created_by)]) -> Any:
        return created_by

    whole = FastAPI()
    whole.api_app = api  # type: ignore[attr-defined]
    embedded.say_who(whole)
    automation = {
        "prefect-automation-id": "00000000-0000-0000-0000-000000000001",
        "prefect-automation-name": "bmFtZQ==",
    }

    async def case() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://x") as client:
            for who, headers, shown in (
                (Identity("anna", Role.OPERATOR), {}, ("USER", "anna")),
                (Identity("anna", Role.OPERATOR), automation, ("USER", "anna")),
                (Identity("worker", Role.WORKER), automation, ("AUTOMATION", "name")),
            ):
                token = ACTING.set(who)
                made = (await client.post("/make", headers=headers)).json()
                ACTING.reset(token)
                assert (made["type"], made["display_value"]) == shown
            assert (await client.post("/make")).json() is None

    asyncio.run(case())
