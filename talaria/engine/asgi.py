"""Requests that are read, asked about, changed or refused before Prefect's application gets them (ASGI 3.0)."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx

BODY_BYTES = 4 << 20  # of a document that is held before anybody's password is looked at; certificates have thousands
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
_DOCUMENTS = "/api/block_documents"
_DOCUMENT = re.compile(_DOCUMENTS + r"/([0-9a-fA-F-]{32,36})")


def asking(app: Application, scope: Message) -> httpx.AsyncClient:
    """Return a client that asks Prefect's application in the name of whoever sent a request."""
    own = [(key, value) for key, value in scope["headers"] if key == b"authorization"]
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://talaria/api", headers=own)


async def read(receive: Receive, send: Send, what: str) -> bytes | None:
    """Return the body of a request; None if it is too long, or its sender has gone, and then it is refused.

    Args:
        what: names it in the refusal, as in "runs".
    """
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > BODY_BYTES or message["type"] == "http.disconnect":
            await refuse(send, 413, f"{what} of more than {BODY_BYTES} bytes")
            return None
        more = message.get("more_body", False)
    return bytes(body)


def saved_document(scope: Message) -> str | None:
    """Return the id of the block document that a request changes, "" for one that it creates; None for others."""
    if scope["type"] != "http":
        return None
    method, path = scope["method"], scope["path"].rstrip("/")
    if method == "POST" and path == _DOCUMENTS:
        return ""
    known = _DOCUMENT.fullmatch(path) if method == "PATCH" else None
    return known[1] if known else None


def with_body(scope: Message, body: bytes) -> Message:
    """Return a request's scope for another body than it came with."""
    headers = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


def again(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that has been read to the application, in the place of `receive`."""
    pieces: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return pieces.pop() if pieces else await receive()

    return receive_again


async def refuse(send: Send, status: int, why: str) -> None:
    """Answer as FastAPI does to a request that is not valid."""
    body = json.dumps({"detail": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
