"""The Prefect server behind the front door, whether it is in this process or elsewhere."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

import httpx

from talaria.front.gate import Message, Receive, Send


class Upstream(Protocol):
    """A Prefect server: an ASGI application, and a client for Talaria's own API.

    Attributes:
        credential: what it wants, `user:password`; "" for nothing.
        client: a client of its API (`client.post("/flow_runs/filter", …)`) with that credential; requests wait while
            the server starts. Valid while `running`.
    """

    credential: str
    client: httpx.AsyncClient

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer with Prefect's server."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Start the server, or begin to; stop it at the end of the block."""

    @property
    def state(self) -> str:
        """`starting`, `ready`, or what is wrong."""
