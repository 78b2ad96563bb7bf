"""A front door in this process, before an application that says what reached it; no Prefect is started."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from starlette.routing import BaseRoute

from talaria.front.access import Role
from talaria.front.app import build
from talaria.front.gate import Gate, Message, Receive, Send
from talaria.front.keys import Door, KeyRing
from transfer.home import Home

PASSWORD = "correct horse battery"


class Echo:
    """Answers with what it was asked, as Prefect would see it."""

    credential = "worker:behind"
    state = "ready"
    client = httpx.AsyncClient()

    def __init__(self) -> None:
        self.asked: list[Message] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.asked.append(scope)
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept", "subprotocol": "prefect"})
            word = json.loads((await receive())["text"])
            if word.get("token") != self.credential:
                await send({"type": "websocket.close", "code": 1008})
                return
            await send({"type": "websocket.send", "text": json.dumps({"type": "auth_success"})})
            await send({"type": "websocket.close", "code": 1000})
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        answer = {"path": scope["path"], "headers": headers, "body": body.decode("utf-8", "replace"), "auth": "BASIC"}
        start = [(b"content-type", b"application/json"), (b"access-control-allow-origin", b"*")]
        await send({"type": "http.response.start", "status": 200, "headers": start})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


class FrontDoor:
    """One front door and its credentials."""

    def __init__(self, folder: Path, routes: Sequence[BaseRoute] = (), upstream: Any = None, **door: Any) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.home = Home(folder)
        self.keys = KeyRing(self.home)
        self.heard: list[tuple[str, str, str]] = []
        self.upstream = upstream or Echo()
        self.gate: Gate = build(self.keys, Door(**door), self.upstream, routes, lambda *what: self.heard.append(what))

    def token(self, role: Role) -> dict[str, str]:
        """The header of a new token."""
        return {"Authorization": f"Bearer {self.keys.tokens.create(role, None)[1]}"}

    @property
    def machine(self) -> dict[str, str]:
        return basic((self.home.root / "api.auth").read_text().strip())

    @property
    def worker(self) -> dict[str, str]:
        return basic((self.home.root / "worker.auth").read_text().strip())

    def browser(self, client: str = "127.0.0.1", base: str = "http://127.0.0.1:4200") -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.gate, client=(client, 50000))
        return httpx.AsyncClient(transport=transport, base_url=base)


def basic(credential: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(credential.encode()).decode()}"}


async def handshake(door: FrontDoor, path: str, word: Any, **headers: str) -> tuple[str, list[str]]:
    """Open a websocket and say one word; returns how it ended (`refused`, `closed`, `open`) and what came."""
    raw = [(b"host", b"127.0.0.1:4200"), *((k.lower().encode(), v.encode()) for k, v in headers.items())]
    scope = {
        "type": "websocket", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "scheme": "ws", "headers": raw, "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 4200),
        "subprotocols": ["prefect"], "extensions": {}, "state": {},
    }  # fmt: skip
    given = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": json.dumps(word)}]
    got: list[Any] = []

    async def receive() -> Any:
        return given.pop(0) if given else {"type": "websocket.disconnect", "code": 1000}

    async def send(message: Any) -> None:
        got.append(message)

    await door.gate(scope, receive, send)
    kinds = [one["type"] for one in got]
    if "websocket.accept" not in kinds:
        return "refused", []
    texts = [one["text"] for one in got if one["type"] == "websocket.send"]
    return ("open" if texts else "closed"), texts
