"""Clients that take their time, at a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import h11
import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, Router, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.sync.client import connect

from talaria import listener
from talaria.front import __main__ as front
from talaria.front.impatient import ImpatientProtocol
from talaria.testing.process import until

GET = b"GET /x HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
NEVER_S = 3600.0


class Server:
    """A server with limits of its own, and the requests that broke off there."""

    def __init__(self, one: socket.socket, **limits: float) -> None:
        self.port = one.getsockname()[1]
        self.broken: list[str] = []
        self.limits = type("Limited", (ImpatientProtocol,), limits)
        self.later: float | None = None  # limit of the heads that follow an answer
        self.server = uvicorn.Server(
            uvicorn.Config(
                Router([Route("/x", self.count, methods=["GET", "POST"]), WebSocketRoute("/talk", self.talk)]),
                http=self.limits,
                lifespan="off",
                log_level="warning",
            )
        )

    async def count(self, request: Request) -> PlainTextResponse:
        if self.later:
            self.limits.HEAD_S = self.later
        try:
            return PlainTextResponse(str(len(await request.body())))
        except ClientDisconnect:
            self.broken.append(request.method)
            raise

    async def talk(self, websocket: WebSocket) -> None:
        await websocket.accept()
        while (word := await websocket.receive_text()) != "end":
            await websocket.send_text(word)
        await websocket.close()

    @contextmanager
    def client(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), 60) as one:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield one


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    ends: list[Callable[[], Any]] = []

    def begin(**limits: float) -> Server:
        one = listener.bind("127.0.0.1", 0)
        made = Server(one, **limits)
        thread = threading.Thread(target=lambda: asyncio.run(made.server.serve([one])))
        thread.start()
        until(lambda: made.server.started)
        ends.append(lambda: (setattr(made.server, "should_exit", True), thread.join(), one.close()))
        return made

    yield begin
    for end in ends:
        end()


def dribble(client: socket.socket, piece: bytes, pause_s: float = 0.02) -> bytes:
    """Send a piece again and again until the server ends it; return what it said."""
    said = b""
    client.settimeout(pause_s)
    for _ in range(int(60 / pause_s)):
        try:
            client.sendall(piece)
            part = client.recv(1000)
        except TimeoutError:
            continue
        except OSError:
            return said  # reset
        if not part:
            return said
        said += part
    pytest.fail("the server waits for ever")


def answer(client: socket.socket) -> bytes:
    """Return one answer, whose body is a number."""
    client.settimeout(60)
    said = b""
    while not said.partition(b"\r\n\r\n")[2]:
        part = client.recv(1000)
        assert part, said
        said += part
    return said


def test_a_head_that_dribbles_in_is_ended(serve: Callable[..., Server]) -> None:
    server = serve(HEAD_S=0.3)
    with server.client() as client:
        client.sendall(GET)
        said = dribble(client, b"A")
        assert not said or said.startswith(b"HTTP/1.1 408 ")
    with server.client() as client:  # nothing at all
        client.settimeout(60)
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")
    with server.client() as client:  # line ends before a request are none of it
        dribble(client, b"\r\n")


def test_the_head_of_a_later_request_is_ended_too(serve: Callable[..., Server]) -> None:
    server = serve(HEAD_S=NEVER_S)
    server.later = 0.3
    with server.client() as client:
        client.sendall(GET + b"\r\n")
        assert answer(client).startswith(b"HTTP/1.1 200 ")
        client.sendall(GET)
        dribble(client, b"A")
    server.limits.HEAD_S = NEVER_S
    with server.client() as client:  # its beginning comes together with the request before
        client.sendall(GET + b"\r\n" + GET)
        assert b" 200 " in dribble(client, b"A")


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (POST, b"a"),
        (POST.replace(b"Content-Length: 1000000", b"Transfer-Encoding: chunked"), b"1\r\na\r\n"),
        (POST.replace(b"Content-Length: 1000000", b"Transfer-Encoding: chunked") + b"1", b"0"),
    ],
    ids=["length", "chunks", "a chunk's size"],
)
def test_a_body_that_dribbles_in_is_ended_and_the_application_hears_of_it(
    serve: Callable[..., Server], begin: bytes, piece: bytes
) -> None:
    server = serve(STALL_S=0.3, HEAD_S=NEVER_S)
    with server.client() as client:
        client.sendall(begin)
        assert b" 200 " not in dribble(client, piece)
    if piece != b"0":
        until(lambda: server.broken == ["POST"])


def test_credit_is_for_bytes_and_ends_with_a_stall() -> None:
    """The clock of a body, without waiting for it."""
    now = [100.0]

    class Loop:
        def time(self) -> float:
            return now[0]

        def call_at(self, due: float, call: Any) -> Any:
            return mock.Mock(when=lambda: due)

    class Protocol(ImpatientProtocol):
        def __init__(self, state: Any) -> None:
            self.loop: Any = Loop()
            self.conn: Any = SimpleNamespace(their_state=state)
            self.flow: Any = SimpleNamespace(read_paused=False)
            self.cycle: Any = SimpleNamespace(waiting_for_100_continue=False)
            self.transport: Any = mock.Mock(is_closing=lambda: False)

    one = Protocol(h11.IDLE)
    one._expect(0)
    one._expect(10)
    assert one._due == 120
    one.conn.their_state = h11.SEND_BODY
    one._expect(500)
    assert one._due == 160
    now[0] = 130
    one._expect(10_000)
    assert one._due == 170
    now[0] = 150
    one._expect(1_000_000)  # no more credit than for one stall
    assert one._due == 210
    for second in range(1, 100):  # 100 bytes a second are too few
        now[0] = 150 + second
        one._expect(100)
    assert now[0] > one._due == pytest.approx(210 + 9.9)
    one._look()
    assert one.transport.abort.called
    one = Protocol(h11.SEND_BODY)
    for second in range(1, 1000):
        now[0] = 1000 + second
        one._expect(1000)
        assert now[0] < one._due
    now[0] += 1000
    one.flow.read_paused = True  # the application takes its time
    one._look()
    now[0] += 1000
    one.flow.read_paused, one.cycle.waiting_for_100_continue = False, True
    one._look()
    assert not one.transport.abort.called and now[0] < one._due


def test_a_websocket_is_let_be(serve: Callable[..., Server]) -> None:
    server = serve(STALL_S=0.1)
    with connect(f"ws://127.0.0.1:{server.port}/talk", proxy=None) as there:
        threading.Event().wait(0.4)
        there.send("still")
        assert there.recv(60) == "still"
        there.send("end")


def test_the_front_door_is_served_so() -> None:
    assert front._config(None, lifespan="off").http is ImpatientProtocol
    assert ImpatientProtocol.HEAD_S <= 30 and ImpatientProtocol.STALL_S <= 120
