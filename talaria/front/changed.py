"""Answers of Prefect's that are changed on their way: its UI asks for no password, and its icons come from here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Send

from talaria.front.access import Role

# Block types keep their icons' addresses with this host (RFC 2606: there is none), for where this server is reached
# is known only when somebody asks. It must be an address: Prefect's clients take no path.
NOWHERE = b"https://talaria.invalid/"
_LOGO = re.compile(rb'("logo_url":\s?)(null|"https?://[^"]*")')
_WITH_ICONS = ("/api/block_types", "/api/block_documents", "/api/block_schemas")

Change = Callable[[bytes], bytes]


def change_for(path: str, role: Role, base: str) -> Change | None:
    """Return what changes the answers of one of Prefect's addresses; None if they stay as they are.

    Args:
        base: where the client reaches this server, as in https://talaria.example.org.
    """
    if path.rstrip("/").endswith("/ui-settings"):
        return _without_login
    if role < Role.WORKER and path.startswith(_WITH_ICONS):
        return lambda answer: _with_icons(answer, f"{base}/".encode())
    return None


def changed(send: Send, change: Change) -> Send:
    """Return a `send` that changes an answer's body, which must not be compressed."""
    start: dict[str, Any] = {}
    body = bytearray()

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        if message["type"] == "http.response.body":
            body.extend(message.get("body", b""))
            if message.get("more_body", False):
                return
            answer = change(bytes(body)) if start["status"] == 200 else bytes(body)
            headers = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
            await send({**start, "headers": [*headers, (b"content-length", str(len(answer)).encode())]})
            await send({"type": "http.response.body", "body": answer})
            return
        await send(message)

    return sent


def _with_icons(answer: bytes, here: bytes) -> bytes:
    """Return an answer with the icons of this server: Prefect's own block types have theirs elsewhere."""
    answer = answer.replace(NOWHERE, here)
    ours = b'"%stalaria/static/icons/' % here
    return _LOGO.sub(lambda one: one[0] if one[2].startswith(ours) else b'%s%sblock.svg"' % (one[1], ours), answer)


def _without_login(answer: bytes) -> bytes:
    """Stop Prefect's UI from asking for a password: its users have logged in here."""
    try:
        settings = json.loads(answer)
    except ValueError:
        return answer  # a page of Prefect's, not its settings
    if not isinstance(settings, dict):
        return answer
    return json.dumps(settings | {"auth": None, "api_url": "/api"}).encode()
