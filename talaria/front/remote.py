"""A Prefect server elsewhere, behind our front door: a reverse proxy for HTTP and websockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from starlette.responses import JSONResponse
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.typing import Subprotocol

from talaria.front.gate import Message, Receive, Send
from talaria.server import trusted

TIMEOUT_S = 60
# RFC 9110 7.6.1, and what httpx sets itself.
_NOT_PASSED_ON = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"host", b"forwarded", b"x-forwarded-for", b"x-forwarded-host",
    b"x-forwarded-proto", b"origin", b"proxy-connection",
}  # fmt: skip


class RemotePrefect:
    """The server whose API is at `url`, as PREFECT_API_URL names it."""

    def __init__(self, url: str, credential: str) -> None:
        self.url, self.credential = url.rstrip("/"), credential
        self._base = self.url.removesuffix("/api")
        self._tls = trusted() if self.url.startswith("https:") else None
        name, _, password = credential.partition(":")
        # No proxy of the environment: it could read the credential.
        common: dict[str, Any] = {"timeout": TIMEOUT_S, "trust_env": self._tls is not None, "verify": self._tls or True}
        own = (name, password) if credential else None
        self.client = httpx.AsyncClient(base_url=self.url, auth=own, **common)
        self._plain = httpx.AsyncClient(follow_redirects=False, **common)

    @property
    def state(self) -> str:
        return "ready"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.client, self._plain:
            yield

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    def _there(self, scope: Message) -> str:
        """Return the other server's URL for a request, made of the path that the gate has checked."""
        path = quote(scope["path"], safe="/:@!$&'()*+,;=~")
        base = self.url if path.startswith("/api/") else self._base
        query = scope.get("query_string", b"").decode("latin-1")
        return base + (path.removeprefix("/api") if path.startswith("/api/") else path) + (f"?{query}" if query else "")

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = [(key, value) for key, value in scope["headers"] if key not in _NOT_PASSED_ON]
        has_body = any(key in (b"content-length", b"transfer-encoding") for key, _ in scope["headers"])
        request = self._plain.build_request(
            scope["method"], self._there(scope), headers=headers, content=_body(receive) if has_body else None
        )
        try:
            answer = await self._plain.send(request, stream=True)
        except httpx.HTTPError as exc:
            why = {"error": f"the Prefect server does not answer ({type(exc).__name__})"}
            await JSONResponse(why, 502)(scope, receive, send)
            return
        try:
            given = [(key.lower(), value) for key, value in answer.headers.raw if key.lower() not in _NOT_PASSED_ON]
            given = [(key, self._ours(value) if key == b"location" else value) for key, value in given]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": given})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()

    def _ours(self, location: bytes) -> bytes:
        """Return a redirect's address with ours in the place of the other server's."""
        text = location.decode("latin-1")
        host = urlsplit(self._base)
        begin = f"{host.scheme}://{host.netloc}"
        return (text.removeprefix(begin) or "/").encode("latin-1") if text.startswith(begin) else location

    async def _websocket(self, scope: Message, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        protocols = [Subprotocol(one) for one in scope.get("subprotocols", ())]
        headers = {key.decode(): value.decode("latin-1") for key, value in scope["headers"] if key == b"authorization"}
        url = "ws" + self._there(scope).removeprefix("http")
        try:
            async with connect(
                url,
                subprotocols=protocols or None,
                additional_headers=headers,
                ssl=self._tls,
                proxy=True if self._tls else None,
                max_size=16 << 20,
            ) as there:
                await send({"type": "websocket.accept", "subprotocol": there.subprotocol})
                await _both_ways(there, receive, send)
        except (OSError, WebSocketException, TimeoutError):
            await send({"type": "websocket.close", "code": 1013})


async def _both_ways(there: ClientConnection, receive: Receive, send: Send) -> None:
    """Pass messages both ways until one side closes."""

    async def out() -> None:
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                await there.close(1000)
                return
            text = message.get("text")
            await there.send(text if text is not None else message["bytes"])

    async def back() -> None:
        try:
            async for message in there:
                await send({"type": "websocket.send", "text" if isinstance(message, str) else "bytes": message})
        except ConnectionClosed:
            pass  # its code is passed on below
        await send({"type": "websocket.close", "code": _code(there.close_code)})

    tasks = [asyncio.create_task(out()), asyncio.create_task(back())]
    _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _code(code: int | None) -> int:
    """Return a code that may be sent: 1005 and 1006 mean that there was none (RFC 6455 7.4.1)."""
    return code if code and code not in (1005, 1006, 1015) else 1000


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise httpx.ReadError("the asker has gone")
        yield message.get("body", b"")
        more = message.get("more_body", False)
