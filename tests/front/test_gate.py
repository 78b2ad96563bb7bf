"""The gate: who comes in, from where, and what of a request reaches what is behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from talaria.front import gate
from talaria.front.access import ACTING, Role, needs
from tests.front.door import PASSWORD, FrontDoor, basic, handshake

pytestmark = pytest.mark.usefixtures("quick_passwords")
Case = Callable[[], Coroutine[Any, Any, None]]


def run(case: Case) -> None:
    asyncio.run(case())


@pytest.fixture
def door(tmp_path: Path) -> FrontDoor:
    return FrontDoor(tmp_path / "home")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:4200", 200),
        ("127.0.0.1", 200),
        ("localhost:9999", 200),
        ("[::1]:4200", 200),
        ("LOCALHOST.", 200),
        ("evil.example", 421),
        ("evil.example:4200", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.1@evil.example", 421),
        ("192.0.2.1", 421),
        ("localhost:x", 421),
        ("", 421),
        ("2130706433", 421),
    ],
)
def test_a_host_that_is_not_ours_is_refused(door: FrontDoor, host: str, status: int) -> None:
    async def case() -> None:
        async with door.browser() as client:
            answer = await client.get("/api/flows/x", headers={**door.machine, "Host": host})
            assert answer.status_code == status, answer.text

    run(case)


def test_two_hosts_and_declared_names(tmp_path: Path) -> None:
    door = FrontDoor(tmp_path / "home", hosts=frozenset({"talaria.example"}))

    async def case() -> None:
        async with door.browser(base="http://talaria.example") as client:
            assert (await client.get("/api/flows/x", headers=door.machine)).status_code == 200
            two = [("Host", "talaria.example"), ("Host", "evil.example"), *door.machine.items()]
            assert (await client.get("/api/flows/x", headers=two)).status_code == 400

    run(case)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:4200"}, 200),
        ({"Origin": "http://127.0.0.1:4201"}, 403),
        ({"Origin": "https://127.0.0.1:4200"}, 403),
        ({"Origin": "http://localhost:4200"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:4200.evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403),
    ],
)
@pytest.mark.parametrize("auth", [True, False])
def test_a_foreign_page_is_refused_also_where_no_login_is_asked_for(
    tmp_path: Path, headers: dict[str, str], status: int, auth: bool
) -> None:
    door = FrontDoor(tmp_path / "home", auth=auth)

    async def case() -> None:
        async with door.browser() as client:
            answer = await client.get("/api/flows/x", headers={**(door.machine if auth else {}), **headers})
            assert answer.status_code == status
            assert "access-control-allow-origin" not in answer.headers
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            preflight = await client.options(
                "/api/flows/", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
            )
            assert preflight.status_code == 403

    run(case)


def test_without_a_login_the_door_is_open_on_loopback_only(tmp_path: Path) -> None:
    door = FrontDoor(tmp_path / "home", auth=False)

    async def case() -> None:
        async with door.browser() as client:
            assert (await client.post("/api/block_documents/", json={})).status_code == 200
            asked = await client.post("/api/block_documents/filter", json={"include_secrets": True})
            assert asked.status_code == 403
        async with door.browser("192.0.2.7") as client:
            assert (await client.get("/api/flows/x")).status_code == 401

    run(case)


def test_what_is_behind_gets_its_own_credential_and_nothing_of_the_asker_s(door: FrontDoor) -> None:
    async def case() -> None:
        async with door.browser() as client:
            names = {"Prefect-Automation-Id": "1", "Prefect-Automation-Name": "anna"}
            answer = await client.get("/api/flows/x", headers={**door.token(Role.VIEWER), "Cookie": "a=b", **names})
            seen = answer.json()["headers"]
            assert not {"prefect-automation-id", "prefect-automation-name"} & seen.keys()
            ours = await client.get("/api/flows/x", headers={**door.worker, **names})
            assert ours.json()["headers"]["prefect-automation-name"] == "anna"
            assert seen["authorization"] == basic("worker:behind")["Authorization"] and "cookie" not in seen
            settings = await client.get("/ui-settings", headers=door.machine)
            assert settings.json()["auth"] is None and settings.json()["api_url"] == "/api"
            assert int(settings.headers["content-length"]) == len(settings.content)

    run(case)


def test_the_roles_one_above_the_other(door: FrontDoor) -> None:
    asked = [
        ("GET", "/v2/dashboard", Role.VIEWER),
        ("GET", "/api/admin/settings", Role.VIEWER),
        ("POST", "/api/flow_runs/filter", Role.VIEWER),
        ("POST", "/api/work_pools/talaria/get_scheduled_flow_runs", Role.WORKER),
        ("POST", "/api/deployments/1/create_flow_run", Role.OPERATOR),
        ("POST", "/api/flow_runs/1/set_state", Role.OPERATOR),
        ("POST", "/api/block_documents/", Role.ADMIN),
        ("PATCH", "/api/deployments/1", Role.ADMIN),
        ("DELETE", "/api/flow_runs/1", Role.ADMIN),
        ("POST", "/api/logs/", Role.WORKER),
        ("POST", "/api/no/such/thing", Role.ADMIN),
        ("TRACE", "/api/flows/x", Role.ADMIN),
    ]

    async def case() -> None:
        async with door.browser() as client:
            for method, path, need in asked:
                assert (await client.request(method, path)).status_code == 401
                for role in (Role.VIEWER, Role.OPERATOR, Role.ADMIN):
                    headers = door.token(role)
                    answer = await client.request(method, path, headers=headers)
                    assert answer.status_code == (200 if role >= need else 403), (method, path, role)
                assert (await client.request(method, path, headers=door.worker)).status_code == 200
            assert (await client.get("/api/health")).status_code == 200
            page = await client.get("/v2/runs?x=1", headers={"Accept": "text/html"})
            assert page.status_code == 303 and page.headers["location"] == "/talaria/login?next=%2Fv2%2Fruns%3Fx%3D1"

    run(case)


@pytest.mark.parametrize(
    "body",
    [
        '{"include_secrets": true}',
        '{"include_secrets": 1}',
        '{"include_secrets": "true"}',
        '{"include_secrets": false, "include_secrets": true}',
        '{"include_secrets": true, "include_secrets": false}',
        '{"include_secret\\u0073": true}',
        '{"INCLUDE_SECRETS": "on"}',
        '{"include_secrets": true',
        '{"include_secrets": true}'.encode("utf-16").decode("latin-1"),
    ],
)
def test_secrets_are_asked_for_in_vain_in_a_body(door: FrontDoor, body: str) -> None:
    async def case() -> None:
        async with door.browser() as client:
            for headers in (door.machine, door.token(Role.VIEWER), door.token(Role.ADMIN)):
                answer = await client.post(
                    "/api/block_documents/filter", content=body.encode("latin-1"), headers=headers
                )
                assert answer.status_code == 403, body
                for fine in ("{}", '{"include_secrets": false}', '{"include_secrets": null}', ""):
                    given = await client.post("/api/block_documents/filter", content=fine, headers=headers)
                    assert given.status_code == 200 and given.json()["body"] == fine
            given = await client.post(
                "/api/block_documents/filter", content=body.encode("latin-1"), headers=door.worker
            )
            assert given.status_code == 200

    run(case)


@pytest.mark.parametrize(
    "query",
    [
        "include_secrets=true",
        "include_secrets=1",
        "include_secrets=false&include_secrets=true",
        "include_secrets=true&include_secrets=false",
        "include%5Fsecrets=on",
        "%69nclude_secrets=YES",
        "a=b&include_secrets=T",
        "Include_Secrets=true",
    ],
)
@pytest.mark.parametrize("path", ["/api/block_documents/1", "/api/block_types/slug/s/block_documents/name/n"])
def test_secrets_are_asked_for_in_vain_in_a_query(door: FrontDoor, path: str, query: str) -> None:
    async def case() -> None:
        async with door.browser() as client:
            for headers in (door.machine, door.token(Role.ADMIN)):
                assert (await client.get(f"{path}?{query}", headers=headers)).status_code == 403
                assert (await client.get(f"{path}?include_secrets=false", headers=headers)).status_code == 200
            assert (await client.get(f"{path}?{query}", headers=door.worker)).status_code == 200

    run(case)


FAILED = {"state": {"type": {"any_": ["FAILED"]}}}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/flow_runs/1/set_state", {"state": {"type": "CANCELLING"}}, 200),
        ("/api/flow_runs/1/set_state", {"state": {"type": "SCHEDULED"}, "force": True}, 200),
        ("/api/flow_runs/1/set_state", {"state": {"type": "COMPLETED"}}, 403),
        ("/api/flow_runs/bulk_set_state", {"flow_runs": FAILED, "state": {"type": "SCHEDULED"}}, 200),
        ("/api/flow_runs/bulk_set_state", {"flow_runs": {}, "state": {"type": "COMPLETED"}}, 403),
        ("/api/deployments/1/create_flow_run", {"parameters": {"state": {"type": "x"}}}, 200),
        ("/api/deployments/1/create_flow_run", {"state": {"type": "COMPLETED"}}, 403),
        ("/api/deployments/1/create_flow_run/bulk", [{}, {"state": {"type": "RUNNING"}}], 403),
    ],
)  # fmt: skip
def test_an_operator_says_of_no_run_that_it_is_done(door: FrontDoor, path: str, body: Any, status: int) -> None:
    async def case() -> None:
        async with door.browser() as client:
            answer = await client.post(path, json=body, headers=door.token(Role.OPERATOR))
            assert answer.status_code == status
            assert (await client.post(path, json=body, headers=door.token(Role.ADMIN))).status_code == 200

    run(case)


@pytest.mark.parametrize("path", ["/api/flow_runs/filter", "/talaria/api/v1/read"])
def test_no_body_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(gate, "MOST_BYTES", 100_000)

    @needs(Role.VIEWER)
    async def read(request: Request) -> Response:
        return JSONResponse({"body": (await request.body()).decode()})

    @needs(Role.OPERATOR, bounds_body=True)
    async def keep(request: Request) -> Response:
        return JSONResponse({"count": len(await request.body())})

    routes = [
        Route("/talaria/api/v1/read", read, methods=["POST"]),
        Route("/talaria/upload", keep, methods=["POST"]),
    ]
    door = FrontDoor(tmp_path / "home", routes)

    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            asked.append(count)
            yield b"x" * 10_000

    async def case() -> None:
        async with door.browser() as client:
            for headers in (door.token(Role.VIEWER), door.token(Role.ADMIN), door.machine):
                fine = await client.post(path, content=b"x" * 100_000, headers=headers)
                assert fine.json()["body"] == "x" * 100_000
                assert (await client.post(path, content=b"x" * 100_001, headers=headers)).status_code == 413
                asked.clear()
                assert (await client.post(path, content=pieces(1000), headers=headers)).status_code == 413
                assert len(asked) <= 11
            long = b"x" * 200_000
            kept = await client.post("/talaria/upload", content=long, headers=door.token(Role.OPERATOR))
            assert kept.json() == {"count": len(long)}
            asked.clear()
            refused = await client.post("/talaria/upload", content=pieces(1000), headers=door.token(Role.VIEWER))
            assert refused.status_code == 403 and len(asked) <= 11
            if not path.startswith("/talaria"):
                assert (await client.post(path, content=b"x" * 100_001, headers=door.worker)).status_code == 200

    asked: list[int] = []
    run(case)


def test_runs_are_labelled_with_who_makes_them(door: FrontDoor) -> None:
    """A Prefect server elsewhere knows nobody. Whoever asks can't be somebody else."""
    one = {"name": "ä", "parameters": {"n": 2**70, "x": 0.1}}
    by = {"talaria.by": "operator"}
    cases: list[tuple[str, Any, Any]] = [
        ("/api/deployments/x/create_flow_run", one, one | {"labels": by}),
        ("/api/deployments/x/create_flow_run/", one | {"labels": None}, one | {"labels": by}),
        ("/api/deployments/x/create_flow_run", {"labels": {"a": 1, **dict.fromkeys(by, "eve")}},
         {"labels": {"a": 1, **by}}),
        ("/api/deployments/x/create_flow_run/bulk", [one, {}, 7], [one | {"labels": by}, {"labels": by}, 7]),
        ("/api/deployments/x/create_flow_run", {"labels": [1]}, {"labels": [1]}),  # Prefect refuses it
        ("/api/flow_runs/filter", one, one),
    ]  # fmt: skip

    async def case() -> None:
        named = door.keys.tokens.create(Role.OPERATOR, None, "operator")[1]
        operator, admin = {"Authorization": f"Bearer {named}"}, door.token(Role.ADMIN)
        async with door.browser() as client:
            for path, body, expected in cases:
                answer = await client.post(path, json=body, headers=operator)
                assert answer.status_code == 200, answer.text
                assert json.loads(answer.json()["body"]) == expected
                assert int(answer.json()["headers"]["content-length"]) == len(answer.json()["body"].encode())
            answer = await client.post("/api/flow_runs/", json={"labels": {"talaria.by": "eve"}}, headers=admin)
            assert "eve" not in answer.json()["body"] and "talaria.by" in answer.json()["body"]
            whole = b'{"labels": {"talaria.by": "anna"}}'  # the worker passes on for whom it works
            answer = await client.post("/api/flow_runs/", content=whole, headers=door.worker)
            assert answer.json()["body"] == whole.decode()

    run(case)


def test_routes_of_our_own_need_the_role_that_they_declare(tmp_path: Path) -> None:
    @needs(Role.OPERATOR)
    async def send(request: Request) -> Response:
        return JSONResponse({"who": request.scope["talaria.user"].name, "acting": ACTING.get().name})

    async def undeclared(request: Request) -> Response:
        return JSONResponse({})

    routes = [
        Route("/talaria/api/v1/dispatches", send, methods=["POST"]),
        Route("/talaria/api/v1/undeclared", undeclared, methods=["POST"]),
    ]
    door = FrontDoor(tmp_path / "home", routes)

    async def case() -> None:
        async with door.browser() as client:
            path = "/talaria/api/v1/dispatches"
            assert (await client.post(path)).status_code == 401
            assert (await client.post(path, headers=door.token(Role.VIEWER))).status_code == 403
            one, text = door.keys.tokens.create(Role.OPERATOR, None, "night-script")
            answer = await client.post(path, headers={"Authorization": f"Bearer {text}"})
            assert answer.json() == {"who": "night-script", "acting": "night-script"}
            assert (await client.get(path, headers=door.token(Role.VIEWER))).status_code == 403
            assert (await client.get(path, headers=door.token(Role.OPERATOR))).status_code == 405
            undone = "/talaria/api/v1/undeclared"
            assert (await client.post(undone, headers=door.token(Role.OPERATOR))).status_code == 403
            assert (await client.post(undone, headers=door.machine)).status_code == 200
            assert (await client.get("/talaria/api/v1/none", headers=door.machine)).status_code == 404
            assert (await client.get("/talaria/api/v1/none")).status_code == 401
            assert (await client.get("/talaria/health")).json() == {"status": "ok", "prefect": "ready"}
            door.keys.tokens.revoke(one.id)
            answer = await client.post(path, headers={"Authorization": f"Bearer {text}"})
            assert (answer.status_code, "revoked" in answer.json()["error"]) == (401, True)
            assert (await client.post(path)).json()["error"] == "log in, or send a token"

    run(case)


def test_the_machine_s_token_is_worth_nothing_from_another_machine(door: FrontDoor) -> None:
    async def case() -> None:
        async with door.browser() as client:
            assert (await client.get("/api/flows/x", headers=door.machine)).status_code == 200
            wrong = basic((door.home.root / "api.auth").read_text().strip() + "x")
            assert (await client.get("/api/flows/x", headers=wrong)).status_code == 401
        async with door.browser("192.0.2.7") as client:
            assert (await client.get("/api/flows/x", headers=door.machine)).status_code == 401
            assert (await client.get("/api/flows/x", headers=door.token(Role.VIEWER))).status_code == 200
            assert (await client.get("/api/flows/x", headers=door.worker)).status_code == 200

    run(case)


# ---- behind a proxy


def test_only_a_declared_proxy_says_who_has_logged_in(tmp_path: Path) -> None:
    door = FrontDoor(
        tmp_path / "home",
        hosts=frozenset({"talaria.example"}),
        peers=("10.0.0.0/24",),
        user_header="X-Remote-User",
        proxy_role=Role.VIEWER,
    )
    door.keys.users.add("anna", Role.OPERATOR, None)

    async def case() -> None:
        anna, ben = {"X-Remote-User": "anna"}, {"X-Remote-User": "ben"}
        ours = {"Origin": "https://talaria.example"}
        run_ = "/api/deployments/1/create_flow_run"
        async with door.browser("10.0.0.9", "http://talaria.example") as client:
            assert (await client.get("/api/flows/x", headers=ben)).status_code == 200
            assert (await client.post(run_, json={}, headers=ben | ours)).status_code == 403
            answer = await client.post(run_, json={}, headers=anna | ours)
            assert answer.status_code == 200 and "x-remote-user" not in answer.json()["headers"]
            assert (await client.post(run_, json={}, headers=anna)).status_code == 403  # no page of ours
            assert (await client.get("/api/flows/x")).status_code == 401
            assert (await client.get("/api/flows/x", headers=door.machine)).status_code == 401
            two = [("X-Remote-User", "ben"), ("X-Remote-User", "anna")]
            assert (await client.get("/api/flows/x", headers=two)).status_code == 400
        async with door.browser("10.0.1.9", "http://talaria.example") as client:
            assert (await client.get("/api/flows/x", headers=anna)).status_code == 403
            assert (await client.get("/api/flows/x", headers=door.token(Role.ADMIN))).status_code == 403

    run(case)


def test_the_header_is_worth_nothing_without_a_declared_proxy(door: FrontDoor) -> None:
    door.keys.users.add("anna", Role.ADMIN, PASSWORD)

    async def case() -> None:
        async with door.browser() as client:
            for name in ("X-Remote-User", "X-Forwarded-User", "Remote-User"):
                assert (await client.get("/api/flows/x", headers={name: "anna"})).status_code == 401

    run(case)


# ---- websockets


def test_a_websocket_that_says_nothing_is_ended(door: FrontDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "FIRST_WORD_S", 0.1)
    heard: list[Any] = []

    async def listens(scope: Any, receive: Any, send: Any) -> None:
        heard.append(await receive())
        heard.append(await receive())

    async def case() -> None:
        given = [{"type": "websocket.connect"}]

        async def receive() -> Any:
            if not given:
                await asyncio.Event().wait()
            return given.pop()

        async def send(message: Any) -> None: ...

        monkeypatch.setattr(door.gate, "app", listens)
        scope = {
            "type": "websocket", "path": "/api/events/out", "headers": [(b"host", b"127.0.0.1")], "query_string": b"",
            "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 4200),
        }  # fmt: skip
        await asyncio.wait_for(door.gate(scope, receive, send), 60)

    run(case)
    assert [one["type"] for one in heard] == ["websocket.connect", "websocket.disconnect"]


def test_websockets_know_the_same_roles(door: FrontDoor) -> None:
    def word(headers: dict[str, str]) -> dict[str, str]:
        return {"type": "auth", "token": headers["Authorization"].split()[1]}

    out, into = "/api/events/out", "/api/events/in"
    machine = (door.home.root / "api.auth").read_text().strip()
    worker = (door.home.root / "worker.auth").read_text().strip()
    viewer = door.token(Role.VIEWER)

    async def case() -> None:
        async def ended(path: str, said: Any, **headers: str) -> str:
            return (await handshake(door, path, said, **headers))[0]

        assert await ended(out, word(viewer)) == "open"
        assert await ended(into, word(viewer)) == "closed"
        assert await ended(into, {"type": "auth", "token": machine}) == "closed"
        assert await ended(into, {"type": "auth", "token": worker}) == "open"
        assert await ended(out, {"type": "auth", "token": machine}) == "open"
        for wrong in ({"type": "auth", "token": "worker:none"}, {"type": "auth"}, {}, [], "x", None, {"token": ["x"]}):
            assert await ended(out, wrong) == "closed"
        assert await ended(out, {"type": "auth", "token": worker}, Origin="http://evil.example") == "refused"
        assert await ended(out, {"type": "auth", "token": worker}, Host="evil.example") == "refused"
        # A browser that has not logged in may not try credentials.
        assert await ended(out, {"type": "auth", "token": worker}, Origin="http://127.0.0.1:4200") == "refused"
        door.keys.users.add("anna", Role.VIEWER, PASSWORD)
        anna = door.keys.of_login("anna", PASSWORD, local=True)
        assert anna
        cookie = f"talaria_session={door.keys.session_for(anna)}"
        origin = "http://127.0.0.1:4200"
        assert await ended(out, {"type": "auth", "token": ""}, Cookie=cookie, Origin=origin) == "open"
        assert await ended(into, {"type": "auth", "token": ""}, Cookie=cookie, Origin=origin) == "refused"
        assert await ended(out, {"type": "auth", "token": ""}, Cookie=cookie) == "refused"
        assert await ended("/talaria/api/v1/x", {"type": "auth", "token": worker}) == "refused"

    run(case)


@pytest.mark.parametrize(
    "path",
    [
        "/api/events/count-by/..", "/api/./events/filter", "/talaria/../api/flows/x", "api", "//api/flows/filter",
        "/api//block_documents/filter", "/api/block_documents//filter", "/api\\block_documents\\filter",
    ],
)  # fmt: skip
def test_a_path_that_another_server_reads_as_another_one_is_refused(door: FrontDoor, path: str) -> None:
    """Seen: behind a client that resolves dots, `POST /api/events/count-by/..` was `POST /api/events`.

    A proxy before a server elsewhere that merges slashes made `/api//block_documents/filter` the route whose bodies are
    looked at for `include_secrets`.
    """
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "scheme": "http", "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 4200),
        "headers": [(b"host", b"localhost"), (b"authorization", door.worker["Authorization"].encode())],
    }  # fmt: skip
    got: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        got.append(message)

    asyncio.run(door.gate(scope, receive, send))
    assert got[0]["status"] == 400


def test_refusals_are_heard_of(door: FrontDoor) -> None:
    async def case() -> None:
        async with door.browser() as client:
            await client.post("/api/flows/", headers=door.token(Role.VIEWER))

    run(case)
    assert [what for what, _, _ in door.heard] == ["refused"]
    assert "POST /api/flows/" in door.heard[0][2]


def test_changes_through_prefects_api_are_heard_of(door: FrontDoor) -> None:
    asked = [
        ("POST", "/api/block_documents/", "target changed"),
        ("PATCH", "/api/block_documents/x", "target changed"),
        ("DELETE", "/api/block_documents/x", "target removed"),
        ("DELETE", "/api/block_types/x", "target removed"),
        ("DELETE", "/api/block_schemas/x", "target removed"),
        ("PATCH", "/api/block_types/x", ""),
        ("POST", "/api/deployments/x/create_flow_run", "run changed"),
        ("POST", "/api/flow_runs/x/set_state", "run changed"),
        ("DELETE", "/api/flow_runs/x", "run changed"),
        ("POST", "/api/block_documents/filter", ""),
        ("POST", "/api/flow_runs/count", ""),
        ("GET", "/api/block_documents/x", ""),
    ]

    async def case() -> None:
        async with door.browser() as client:
            login = door.token(Role.ADMIN)
            for method, path, _ in asked:
                json = None if method in ("GET", "DELETE") else {}
                answer = await client.request(method, path, headers=login, json=json)
                assert answer.status_code < 300, answer.text

    run(case)
    names = door.heard[0][1]
    assert door.heard == [(what, names, f"{method} {path}") for method, path, what in asked if what]


def test_a_broken_file_of_tokens_lets_nobody_in(door: FrontDoor) -> None:
    headers = door.token(Role.ADMIN)
    path = door.home.root / "tokens.json"

    async def case() -> None:
        async with door.browser() as client:
            path.chmod(0o644)
            assert (await client.get("/api/flows/x", headers=headers)).status_code == 500
            path.chmod(0o600)
            path.write_text("{")
            assert (await client.get("/api/flows/x", headers=headers)).status_code == 500

    run(case)
