"""The server process: on sockets that it inherits, with TLS, before a Prefect server elsewhere."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse
from starlette.routing import Route, Router, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from talaria import listener
from talaria.front import __main__ as front
from talaria.front.access import Role
from talaria.testing.process import stop
from tests.front.door import PASSWORD, basic
from tests.servers.certificates import Authority

SECRET = "prefect:elsewhere"


async def echo(request: Request) -> JSONResponse:
    return JSONResponse(
        {
            "path": request.scope["path"],
            "query": request.scope["query_string"].decode(),
            "body": (await request.body()).decode(),
            "headers": dict(request.headers),
        }
    )


async def redirect(request: Request) -> RedirectResponse:
    return RedirectResponse(f"http://{request.headers['host']}/v2/runs", 307)


async def talk(websocket: WebSocket) -> None:
    await websocket.accept("prefect")
    word = await websocket.receive_json()
    if word.get("token") != SECRET:
        await websocket.close(1008)
        return
    await websocket.send_json({"type": "auth_success"})
    await websocket.send_json(await websocket.receive_json())
    await websocket.close(1000)


@contextmanager
def elsewhere() -> Iterator[str]:
    """A server that stands for Prefect's."""
    methods = ["GET", "POST", "PATCH", "DELETE"]
    routes = [
        Route("/moved", redirect),
        WebSocketRoute("/api/{path:path}", talk),
        Route("/{path:path}", echo, methods=methods),
    ]
    with listener.bind("127.0.0.1", 0) as one:
        server = uvicorn.Server(uvicorn.Config(Router(routes), lifespan="off", log_level="warning"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([one])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{one.getsockname()[1]}/api"
        finally:
            server.should_exit = True
            thread.join()


class Process:
    """`python -m talaria.front` in a state directory, on sockets that outlive it."""

    def __init__(self, folder: Path, upstream: str, *, inner: bool = False, **orders: Any) -> None:
        self.home = folder / "home"
        self.outer, self.inner = listener.bind("127.0.0.1", 0), listener.bind("127.0.0.1", 0) if inner else None
        self.log = folder / "front.log"
        self.orders = {
            "outer": self.outer.fileno(), "inner": self.inner.fileno() if self.inner else -1, "auth": True, "hosts": [],
            "certificate": "", "key": "", "peers": [], "user_header": "", "proxy_role": "", "upstream": upstream,
        } | orders  # fmt: skip
        self.start()

    def start(self) -> None:
        environment = {
            "TALARIA_HOME": str(self.home), "TALARIA_FRONT": json.dumps(self.orders), "PREFECT_API_AUTH_STRING": SECRET,
        }  # fmt: skip
        sockets = [one.fileno() for one in (self.outer, self.inner) if one]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "talaria.front"],
                env={**os.environ, **environment}, pass_fds=sockets, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    @property
    def port(self) -> int:
        return int(self.outer.getsockname()[1])

    @property
    def machine(self) -> dict[str, str]:
        return basic((self.home / "api.auth").read_text().strip())

    def close(self) -> None:
        stop(self.process)
        for one in (self.outer, self.inner):
            if one:
                one.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []
    with elsewhere() as url:

        def begin(**more: Any) -> Process:
            started.append(Process(tmp_path, url, **more))
            return started[-1]

        yield begin
        for one in started:
            one.close()


def test_a_server_elsewhere_is_behind_the_same_door(run: Callable[..., Process]) -> None:
    one = run()
    with httpx.Client(base_url=f"http://127.0.0.1:{one.port}", timeout=60, trust_env=False) as client:
        assert client.get("/talaria/health").json() == {"status": "ok", "prefect": "ready"}
        assert client.get("/api/flows/x").status_code == 401
        assert client.get("/api/flows/x", headers={**one.machine, "Host": "evil.example"}).status_code == 421
        asked = client.post("/api/flows/?a=%2F&b", content=b"x" * 100_000, headers=one.machine).json()
        assert (asked["path"], asked["query"], asked["body"]) == ("/api/flows/", "a=%2F&b", "x" * 100_000)
        assert asked["headers"]["authorization"] == basic(SECRET)["Authorization"]
        odd = client.get("/api/variables/name/a%3Fb%25c%2Fd", headers=one.machine).json()
        assert odd["path"] == "/api/variables/name/a?b%c/d" and odd["query"] == ""
        assert client.get("/moved", headers=one.machine).headers["location"] == "/v2/runs"
        made = client.post("/api/deployments/x/create_flow_run", json={"parameters": {}}, headers=one.machine).json()
        assert json.loads(made["body"])["labels"] == {"talaria.by": "talaria"}
        secrets = {"include_secrets": True}
        assert client.post("/api/block_documents/filter", json=secrets, headers=one.machine).status_code == 403

    async def case() -> None:
        url = f"ws://127.0.0.1:{one.port}/api/events/out"
        machine = (one.home / "api.auth").read_text().strip()
        async with connect(url, subprotocols=["prefect"], proxy=None) as there:  # type: ignore[list-item]
            assert there.subprotocol == "prefect"
            await there.send(json.dumps({"type": "auth", "token": machine}))
            assert json.loads(await there.recv()) == {"type": "auth_success"}
            await there.send(json.dumps({"filter": "ä"}))
            assert json.loads(await there.recv()) == {"filter": "ä"}
        async with connect(url, subprotocols=["prefect"], proxy=None) as there:  # type: ignore[list-item]
            await there.send(json.dumps({"type": "auth", "token": "wrong"}))
            await there.wait_closed()
            assert there.close_code == 1008
        with pytest.raises(InvalidStatus):
            async with connect(url, origin="http://evil.example", proxy=None):  # type: ignore[arg-type]
                pass

    asyncio.run(case())


def test_the_socket_outlives_the_process(run: Callable[..., Process]) -> None:
    """Who connects while the process is started again waits, and is not refused; sessions go on."""
    one = run()
    with httpx.Client(base_url=f"http://127.0.0.1:{one.port}", timeout=60, trust_env=False) as client:
        line = (client.get("/talaria/health"), (one.home / "api.auth").read_text().strip())[1]
        assert client.post("/talaria/login", data={"user": "", "password": line}).status_code == 303
        assert client.get("/api/flows/x").status_code == 200
        one.process.kill()
        one.process.wait()
        with socket.create_connection(("127.0.0.1", one.port), 10) as early:
            early.sendall(b"GET /talaria/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            one.start()
            early.settimeout(60)
            assert early.recv(100).startswith(b"HTTP/1.1 200")
        assert client.get("/api/flows/x").status_code == 200


def test_tls_outside_a_socket_of_our_own_inside_and_renewed_certificates(
    run: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path / "ca")
    first, second = authority.leaf("first"), authority.leaf("second")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(first.cert, certificate)
    shutil.copy(first.key, key)
    one = run(inner=True, certificate=str(certificate), key=str(key))
    assert one.inner
    context = ssl.create_default_context(cafile=authority.ca)

    def subject() -> str:
        with (
            socket.create_connection(("127.0.0.1", one.port), 60) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            assert tls.version() in ("TLSv1.2", "TLSv1.3")
            names: Any = tls.getpeercert()
            return str(dict(part[0] for part in names["subject"])["commonName"])

    assert subject() == "first"
    with httpx.Client(base_url=f"http://127.0.0.1:{one.inner.getsockname()[1]}", timeout=60, trust_env=False) as client:
        assert client.get("/api/flows/x", headers=one.machine).status_code == 200
    with httpx.Client(base_url=f"https://127.0.0.1:{one.port}", timeout=60, trust_env=False, verify=context) as client:
        assert client.get("/api/flows/x").status_code == 401
        origin = {"Origin": f"https://127.0.0.1:{one.port}"}
        line = (one.home / "api.auth").read_text().strip()
        done = client.post("/talaria/login", data={"password": line}, headers=origin)
        assert done.status_code == 303 and done.headers["set-cookie"].startswith("__Host-")
        assert client.get("/api/flows/x").status_code == 200
    shutil.copy(second.cert, certificate)  # half of the pair: what was good goes on
    shutil.copy(second.key, key)
    end = time.monotonic() + 60
    while subject() != "second":
        assert time.monotonic() < end
        time.sleep(0.2)


def test_what_is_heard_goes_into_the_audit_trail(run: Callable[..., Process]) -> None:
    one = run()
    with httpx.Client(base_url=f"http://127.0.0.1:{one.port}", timeout=60, trust_env=False) as client:
        client.get("/talaria/health")
        client.post("/talaria/login", data={"user": "anna", "password": PASSWORD})
        line = (one.home / "api.auth").read_text().strip()
        client.post("/talaria/login", data={"user": "", "password": line})
        client.post("/api/logs/", json=[], headers=one.machine)
    stop(one.process)
    trail = [json.loads(line) for line in (one.home / "audit" / "trail.jsonl").read_text().splitlines()]
    assert [(entry["event"], entry["who"], entry["result"]) for entry in trail] == [
        ("login", "anna", "serious"), ("login", "talaria", "success"), ("refused", "talaria", "serious"),
    ]  # fmt: skip
    assert PASSWORD not in json.dumps(trail) and line.partition(":")[2] not in json.dumps(trail)


def test_what_was_heard_is_written_before_the_process_ends(run: Callable[..., Process]) -> None:
    """However long the disk takes; here somebody else writes to the trail."""
    one = run()
    with httpx.Client(base_url=f"http://127.0.0.1:{one.port}", timeout=60, trust_env=False) as client:
        client.get("/talaria/health")
        trail = one.home / "audit" / "trail.jsonl"
        trail.parent.mkdir(mode=0o700, exist_ok=True)
        with socket.create_connection(("127.0.0.1", one.port), 60) as idle, trail.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            client.post("/talaria/login", data={"user": "anna", "password": PASSWORD})
            one.process.terminate()
            assert idle.recv(1) == b""  # it serves nobody any more
    assert one.process.wait(60) == 0
    assert [json.loads(line)["event"] for line in trail.read_text().splitlines()] == ["login"]


def test_strangers_do_not_fill_the_disk() -> None:
    from talaria.front.heard import STRANGERS, AuditWriter

    written: list[Any] = []
    now = [0.0]
    listener_ = AuditWriter(lambda *entry, **_: written.append(entry), lambda: now[0])
    for _ in range(STRANGERS * 3):
        listener_("refused", "", "GET /")
        listener_("login refused", "anna", "192.0.2.7")
    listener_("login", "anna", "192.0.2.7")
    now[0] = 61
    listener_("refused", "", "GET /")
    listener_.close()
    assert len(written) == STRANGERS + 2


def test_orders_are_what_the_supervisor_sends() -> None:
    """The fields that `talaria.server` writes and the process reads."""
    from inspect import getsource

    from talaria.server import FrontServer

    assert all(f'"{name}":' in getsource(FrontServer._start) for name in front.Orders.__dataclass_fields__)
    assert Role.of("viewer") is Role.VIEWER
