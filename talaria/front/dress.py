"""Security headers of every answer: what a browser may load, embed and cache, and that no other site may read it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_FIXED = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_OURS = {name for name, _ in _FIXED} | {b"content-security-policy", b"strict-transport-security"}


def policy(host: str, *, own: bool) -> str:
    """Return the Content-Security-Policy, by which a page reaches nothing but this server.

    Our `own` pages run no script and use no style that stands in them. Prefect's UI calls a host of Amplitude although
    analytics are off; it needs inline styles, workers made of blobs, and `eval` for the schemas of its forms.
    """
    if own:
        return (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        )
    sockets = f" ws://{host} wss://{host}" if host else ""
    return (
        f"default-src 'self'; script-src 'self' 'unsafe-eval'; connect-src 'self' data: blob:{sockets}; "
        "img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
        "worker-src 'self' blob: data:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    )


def dressed(scope: Message, send: Send, *, tls: bool) -> Send:
    """Return a `send` that adds these headers to every answer, and removes those of CORS."""
    safe = safe_host(scope)
    path = scope["path"]

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [
                (key, value)
                for key, value in message.get("headers", ())
                if key.lower() not in _OURS and not key.lower().startswith(b"access-control-")
            ]
            headers += [*_FIXED, (b"content-security-policy", policy(safe, own=path.startswith("/talaria")).encode())]
            if tls:
                headers.append((b"strict-transport-security", b"max-age=31536000"))
            names = {key.lower() for key, _ in headers}
            if b"cache-control" not in names:
                headers.append((b"cache-control", _caching(path, message["status"])))
            message = {**message, "headers": headers}
        await send(message)

    return sent


def safe_host(scope: Message) -> str:
    """Return the Host of a request; "" if it holds what no host has."""
    host = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"host"), "")
    return host if all(letter.isalnum() or letter in ".:-[]" for letter in host) else ""


def _caching(path: str, status: int) -> bytes:
    """Return the Cache-Control header: Prefect's assets, whose names hold a hash, may be kept, other answers not."""
    return b"private, max-age=31536000, immutable" if "/assets/" in path and status == 200 else b"no-store"
