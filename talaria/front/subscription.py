"""A subscription of Prefect's events in this process: its websocket, spoken to as an ASGI application (ASGI 3.0).

So it works alike for the embedded server and for one elsewhere, and no socket of ours is opened to ourselves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from talaria.front.gate import Message
from talaria.front.upstream import Upstream

PATH = "/api/events/out"
TOO_SLOW = "too much waits for the reader of this stream: ask again, with the last event's id as Last-Event-ID"
OPENED_S = 30.0  # how long the server may take to accept it
# What waits for a slow reader before its subscription ends; a closed laptop reads nothing for hours, and asks again.
BACKLOG, BACKLOG_CHARS = 5000, 16 << 20


class Ended(Exception):
    """The subscription is over: the server closed it, or its reader is too slow."""


@asynccontextmanager
async def subscribed(upstream: Upstream, about: dict[str, Any], *, earlier: bool) -> AsyncIterator[Events]:
    """Subscribe to the events that a filter of Prefect's names, until the end of the block.

    Args:
        earlier: whether those come first that have happened since the time which the filter names.

    Raises:
        Ended: the server does not take the subscription.
    """
    events = Events()
    task = asyncio.create_task(upstream(_scope(), events.receive, events.send))
    task.add_done_callback(events.over)
    try:
        events.say({"type": "auth", "token": upstream.credential or ""})
        first = await asyncio.wait_for(events.heard(), OPENED_S)
        if first.get("type") != "auth_success":
            raise Ended("the Prefect server refused the subscription")
        events.say({"type": "filter", "filter": about, "backfill": earlier})
        yield events
    except TimeoutError as exc:
        raise Ended("the Prefect server does not answer") from exc
    finally:
        events.leave()
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class Events:
    """What comes in over the subscription; both ends of the websocket."""

    def __init__(self) -> None:
        self._out: asyncio.Queue[Message] = asyncio.Queue()
        self._in: asyncio.Queue[str | bytes | None] = asyncio.Queue()  # read when its turn comes: it is larger then
        self._waiting, self._ended = 0, False
        self._out.put_nowait({"type": "websocket.connect"})

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self._all()

    async def _all(self) -> AsyncIterator[dict[str, Any]]:
        while True:
            message = await self.heard()
            if message.get("type") == "event":
                yield message["event"]

    async def within(self, seconds: float) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of so many seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        with suppress(TimeoutError):
            while True:
                message = await asyncio.wait_for(self.heard(), end - loop.time())
                if message.get("type") == "event":
                    yield message["event"]

    async def heard(self) -> dict[str, Any]:
        """Return the next message.

        Raises:
            Ended: there are no more.
        """
        text = await self._in.get()
        if text is None:
            self._in.put_nowait(None)
            raise Ended(TOO_SLOW if self._waiting else "the subscription of events has ended")
        self._waiting -= len(text)
        message: dict[str, Any] = json.loads(text)
        return message

    def say(self, message: dict[str, Any]) -> None:
        """Send a message to the server."""
        self._out.put_nowait({"type": "websocket.receive", "text": json.dumps(message)})

    def leave(self) -> None:
        """Close the websocket; what has come and was not heard is forgotten."""
        while not self._in.empty():
            self._in.get_nowait()
        self._end()
        self._out.put_nowait({"type": "websocket.disconnect", "code": 1000})

    def over(self, task: asyncio.Task[None]) -> None:
        """Note that the server has ended it."""
        if not task.cancelled():
            task.exception()  # else it is reported as never looked at
        self._end()

    async def receive(self) -> Message:
        """Give the server what was said (ASGI)."""
        return await self._out.get()

    async def send(self, message: Message) -> None:
        """Take what the server says (ASGI)."""
        if self._ended:
            return
        if message["type"] == "websocket.close":
            self._end()
        elif message["type"] == "websocket.send":
            text = message.get("text")
            text = text if text is not None else message["bytes"]
            self._waiting += len(text)
            self._in.put_nowait(text)
            if self._in.qsize() > BACKLOG or self._waiting > BACKLOG_CHARS:
                self.leave()

    def _end(self) -> None:
        self._ended = True
        self._in.put_nowait(None)


def _scope() -> Message:
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": PATH,
        "raw_path": PATH.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"sec-websocket-protocol", b"prefect")],
        "subprotocols": ["prefect"],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
