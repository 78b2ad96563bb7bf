"""HTTP/1.1 for clients that take their time: a request that dribbles in is ended after a bounded time.

Uvicorn waits for ever for the head of a first request, and for the body of any. Whoever opens many connections and
sends a byte now and then would hold them all ("slow loris"). An upload may take as long as it needs, as long as it
moves.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD, BODY = "head", "body"


class ImpatientProtocol(H11Protocol):
    """Uvicorn's protocol, with an end to each wait for a client.

    Attributes:
        HEAD_S: from the connection, the end of the last answer or the first byte, to the end of a request's head.
        STALL_S: longest stall of a body; the same in credit is what a body gets for coming faster than RATE.
        RATE: bytes in a second that a body has to bring on average. A modem does five times that.
    """

    HEAD_S = 20.0
    STALL_S = 60.0
    RATE = 1000.0

    _waits_for = ""
    _due = 0.0
    _timer: asyncio.TimerHandle | None = None
    _over = False  # another protocol has the connection, or nobody

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect(0)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect(len(data))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect(0)  # part of a next request may have come already

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        super().handle_websocket_upgrade(event)
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()

    def _expect(self, count: int) -> None:
        """Set until when there is patience, after so many bytes."""
        if self._over:
            return
        state, now = self.conn.their_state, self.loop.time()
        if state is h11.IDLE:
            if self._waits_for != HEAD:
                self._waits_for, self._due = HEAD, now + self.HEAD_S
        elif state is h11.SEND_BODY:
            due = self._due + count / self.RATE if self._waits_for == BODY else now + self.STALL_S
            self._waits_for, self._due = BODY, min(due, now + self.STALL_S)
        else:
            self._waits_for = ""
        if self._timer is not None and self._waits_for and self._due < self._timer.when():
            self._timer.cancel()
            self._timer = None
        if self._timer is None and self._waits_for:
            self._timer = self.loop.call_at(self._due, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._waits_for or self.transport.is_closing():
            return  # `_expect` sets it again
        now = self.loop.time()
        if self._waits_for == BODY and (self.flow.read_paused or self.cycle.waiting_for_100_continue):
            self._due = now + self.STALL_S  # it is the application that takes its time
        if now < self._due:
            self._timer = self.loop.call_at(self._due, self._look)
        elif self._waits_for == HEAD:
            self._answer_late()
        else:
            self.transport.abort()  # the application gets a disconnect

    def _answer_late(self) -> None:
        """Answer 408 (RFC 9110 section 15.5.9) and close."""
        events: tuple[Any, ...] = (
            h11.Response(status_code=408, headers=[("connection", "close"), ("content-length", "0")]),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _end(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
