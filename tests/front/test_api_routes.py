"""Talaria's API as it describes itself: what commands ask for is there, each route has its role, errors one form."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from talaria.cli import remote
from talaria.front import api
from talaria.front.access import SCOPE_KEY, Identity, Role, role_of
from talaria.front.api.errors import answer_to, said
from transfer.errors import Busy, Denied, Misconfigured, NotFound, Unreachable
from transfer.home import Home

HALF = "x\udcfcy"
SECRET = "swordfish"


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    async def client() -> Any:
        raise httpx.ConnectError("the Prefect server is away")

    return api.application(client, Home(tmp_path))


def ask(app: FastAPI, method: str, path: str, role: Role | None = Role.ADMIN, **more: Any) -> httpx.Response:
    async def gated(scope: Any, receive: Any, send: Any) -> None:
        known = {} if role is None else {SCOPE_KEY: Identity("anna", role)}
        await app({**scope, **known}, receive, send)

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(gated, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.request(method, path, **more)

    return asyncio.run(call())


def test_what_commands_ask_for_is_there_under_the_same_name(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    there = {
        one["operationId"]: (method.upper(), path.replace(":path", ""))
        for path, methods in paths.items()
        for method, one in methods.items()
    }
    for operation, route in {**remote.ROUTES, **remote.STREAMS}.items():
        assert there[operation] == route


def test_every_answer_is_described_by_its_keys(app: FastAPI) -> None:
    """A stream of events has its own media type; all others are objects with named keys."""
    for path, methods in app.openapi()["paths"].items():
        for method, one in methods.items():
            (status,) = {"200", "201"} & one["responses"].keys()
            kinds = one["responses"][status]["content"]
            if path.endswith("/events") or path.startswith("/target-tests"):
                assert "text/event-stream" in kinds, (method, path)
                continue
            schema = kinds["application/json"]["schema"]
            for part in schema.get("anyOf", [schema]):
                described = app.openapi()["components"]["schemas"][part["$ref"].rpartition("/")[2]]
                assert described["properties"] and described["required"], (method, path)


def test_everything_that_the_issue_names_has_a_route_with_a_summary(app: FastAPI) -> None:
    there = {f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods}
    jobs = {"GET {}", "GET {}/{{job}}", "GET {}/{{job}}/receipt", "GET {}/{{job}}/events"} | {
        f"POST {{}}/{{{{job}}}}/{action}" for action in ("retry", "cancel", "pause", "resume")
    }
    for name in ("dispatches", "retrievals", "queries"):
        assert {one.format(f"/{name}") for one in jobs} | {f"POST /{name}"} <= there
    assert {"GET /health", "GET /status", "POST /target-tests", "POST /matches"} <= there
    for methods in app.openapi()["paths"].values():
        assert all(one["description"] for one in methods.values())


def test_every_route_declares_its_role_and_holds_to_it(app: FastAPI) -> None:
    for route in app.routes:
        endpoint = getattr(route, "endpoint", None)
        assert hasattr(endpoint, "role"), route
        path = str(getattr(route, "path", "")).replace("{name:path}", "x").replace("{job}", "x")
        if path == "/openapi.json":
            continue  # the gate's
        for method in getattr(route, "methods", ()):
            needed = role_of(route)
            if needed > Role.NOBODY:
                assert ask(app, method, path, None, json={}).status_code == 401, path
                below = Role(needed - 1)
                assert ask(app, method, path, below, json={}).status_code in (401, 403), path
    changes = {"POST /targets", "DELETE /targets/{name:path}", "POST /target-tests/unsaved"}
    changes |= {f"POST /{kind}/{{name:path}}/enable" for kind in ("targets", "sources", "rules")}
    for route in app.routes:
        if any(f"{method} {route.path}" in changes for method in getattr(route, "methods", ())):  # type: ignore[attr-defined]
            assert role_of(route) is Role.ADMIN


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"paths": [], "targets": ["a"]}, "paths: must not be empty"),
        ({"targets": ["a"]}, "paths: is required"),
        ({"paths": ["/x"], "targets": ["a"], "colour": SECRET}, "colour: unknown field"),
        ({"paths": ["/x"], "targets": ["a"], "priority": SECRET}, "priority: must be 'urgent', 'normal' or 'offpeak'"),
        ({"paths": "/x", "targets": ["a"]}, "paths: must be a list, as in [one, two]"),
    ],
)
def test_what_is_not_valid_is_said_in_one_line_without_its_value(app: FastAPI, body: Any, words: str) -> None:
    answer = ask(app, "POST", "/dispatches", json=body)
    # Prefect is asked for first, and is away: what is wrong with the request itself is said all the same.
    assert answer.status_code == 422 and answer.json() == {"error": words}
    assert SECRET not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/dispatches", '{"paths": ["/x"], "targets": ["a"], "targets": ["b"]}', "targets"),
        ("/targets", '{"targets": {"a": {"type": "folder", "folder": "/a"}, "b": {}, "a": {"type": "s3"}}}', "a"),
        ("/targets", '{"targets": {"a": {"type": "folder", "folder": "/a", "folder": "/a"}}}', "folder"),
        ("/rules/ops/enable", '{"enabled": true, "enabled": false}', "enabled"),
    ],
)
def test_what_a_body_names_twice_is_refused(app: FastAPI, path: str, body: str, name: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = ask(app, "POST", path, Role.ADMIN, content=body.encode(), headers=headers)
    assert answer.status_code == 422
    assert answer.json() == {"error": f"the body has '{name}' twice: say which value is meant"}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/prune", {"older_than_s": True}, "older_than_s: must be a number"),
        ("/retrievals", {"source": "a", "studies_per_hour": True}, "studies_per_hour: must be a whole number"),
    ],
)
def test_true_is_no_number(app: FastAPI, path: str, body: Any, words: str) -> None:
    answer = ask(app, "POST", path, Role.ADMIN, json=body)
    assert answer.status_code == 422 and answer.json()["error"].startswith(words)


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/targets", {"targets": {"a": {"type": "folder", "folder": "/a", "layout": HALF}}}, "targets"),
        ("/sources", {"sources": {HALF: {"type": "inbox"}}}, "sources"),
        ("/dispatches", {"paths": ["/x"], "targets": ["a", HALF]}, "targets"),
        ("/dispatches", {"paths": ["/x"], "targets": ["a"], "exclude": HALF}, "exclude"),
    ],
)
def test_half_of_a_character_is_no_text(app: FastAPI, path: str, body: Any, name: str) -> None:
    """JSON may hold one, as Python writes a name that is not UTF-8; it was a fault of ours (500)."""
    headers = {"Content-Type": "application/json"}
    answer = ask(app, "POST", path, Role.ADMIN, content=json.dumps(body).encode(), headers=headers)
    assert answer.status_code == 422 and answer.json()["error"].startswith(f"{name}: holds half of a character")


def test_a_parameter_that_a_route_does_not_have_is_refused(app: FastAPI) -> None:
    """It would be as if it were not there: all targets tested, and removed what was only to be looked at."""
    for method, path, words in (
        ("DELETE", "/targets/pacs?dry_run=true", "unknown parameter 'dry_run': this route takes none"),
        ("POST", "/target-tests?target=pacs", "unknown parameter 'target': this route takes move, name"),
        ("POST", "/dispatches/1/retry?only=pacs&onyl=pacs", "unknown parameter 'onyl': this route takes only"),
        ("GET", "/dispatches?limit=5&page=2", "unknown parameter 'page': this route takes failed, limit"),
    ):
        answer = ask(app, method, path)
        assert answer.status_code == 422 and answer.json() == {"error": words}
    assert ask(app, "POST", "/target-tests?name=pacs&move=no").status_code == 503, "Prefect is away"


def test_a_monitor_may_ask_for_the_head_alone(app: FastAPI) -> None:
    assert ask(app, "HEAD", "/health", Role.NOBODY).status_code == 200


def test_errors_have_one_form(app: FastAPI) -> None:
    assert "no such route" in ask(app, "GET", "/nothing").json()["error"]
    assert "no such method" in ask(app, "DELETE", "/health").json()["error"]
    for kind in ("application/json", "text/plain"):
        broken = ask(app, "POST", "/dispatches", content=b"{", headers={"Content-Type": kind})
        assert "JSON object" in broken.json()["error"]
    of_json = {"Content-Type": "application/json"}
    for body in (
        b'{"paths": ["/M\xfcller"]}',
        b'{"paths": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        gzip.compress(b"{}"),
    ):
        broken = ask(app, "POST", "/dispatches", content=body, headers=of_json)
        assert broken.status_code == 422 and "JSON object in UTF-8" in broken.json()["error"]
    for number in (b"1e300", b"Infinity", b"NaN", b"-1"):
        wrong = ask(app, "POST", "/prune", Role.ADMIN, content=b'{"older_than_s": ' + number + b"}", headers=of_json)
        assert wrong.status_code == 422 and "older_than_s: must be a number" in wrong.json()["error"]
    slashed = ask(app, "POST", "/dispatches/", json={})
    assert slashed.status_code == 404 and "no such route" in slashed.json()["error"]
    away = ask(app, "GET", "/targets")
    assert away.status_code == 503 and "Prefect server" in away.json()["error"]
    assert ask(app, "GET", "/health", None).status_code == 401  # the gate names whoever asks, nobody too
    assert ask(app, "GET", "/health", Role.NOBODY).json()["ok"] is True


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (NotFound("no target named x", ""), 404, "no target named x"),
        (Misconfigured("is disabled", "pacs"), 422, "pacs: is disabled"),
        (Denied("lies elsewhere"), 422, "lies elsewhere"),
        (ValueError("--to"), 422, "--to"),
        (Unreachable("refused", "pacs"), 502, "pacs: refused"),
        (Busy("later", "pacs"), 502, "pacs: later"),
        (UnicodeEncodeError("ascii", SECRET, 0, 1, SECRET), 500, "unexpected UnicodeEncodeError: see the server's log"),
        (KeyError(SECRET), 500, "unexpected KeyError: see the server's log"),
    ],
)
def test_an_error_becomes_a_status_and_its_own_words(error: Exception, status: int, words: str) -> None:
    assert answer_to(error) == (status, words)


def test_reasons_are_told_apart_in_one_line() -> None:
    answer = said(400, "source a: no target named x\n source b: a  route to nobody \n")
    assert json.loads(answer.body) == {"error": "source a: no target named x; source b: a route to nobody"}
