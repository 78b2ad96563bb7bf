"""Requests over HTTP: answers that come early or late, connections that go, and what is never sent twice."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest

from protocols.http import exchange as http
from protocols.http.exchange import Content
from protocols.http.origin import WebOrigin
from protocols.http.session import Session
from protocols.net.tls import Tls
from transfer.errors import Interrupted

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BODY = b"x" * 100_000


@dataclass
class Peer:
    """A server that reads requests whole and answers them, one after the other, as its script says.

    Attributes:
        script: the bytes of each answer; b"" closes the connection instead. After its end, `OK`.
        heads: a script of the same kind for what comes between a request's head and its body.
    """

    port: int = 0
    script: list[bytes] = field(default_factory=list)
    heads: list[bytes | None] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    connections: int = 0

    @property
    def origin(self) -> WebOrigin:
        return WebOrigin.of(f"http://127.0.0.1:{self.port}", Tls(), 5, 5)

    def serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as file, suppress(OSError):
            while head := file.readline():
                length = 0
                while (line := file.readline()).strip():
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                early = self.heads.pop(0) if self.heads else None
                if early == b"":
                    return
                sock.sendall(early or b"")
                self.bodies.append(head.split()[0] + b" " + file.read(length))
                answer = self.script.pop(0) if self.script else OK
                if answer == b"":
                    return
                sock.sendall(answer)


@contextmanager
def peer() -> Iterator[Peer]:
    made = Peer()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made.port = listener.getsockname()[1]

        def accept() -> None:
            with suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    made.connections += 1
                    threading.Thread(target=made.serve, args=(sock,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield made
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def ask(session: Session, method: str, body: bytes | None = None, *, expect: bool = False) -> bytes:
    content = None if body is None else Content(body)
    with session.request(method, "/", body=content, expect=expect) as answer:
        return answer.read()


@pytest.mark.parametrize("stale_s", [0.0, 60.0])
def test_a_post_that_may_have_been_carried_out_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch, stale_s: float
) -> None:
    """RFC 9110 section 9.2.2. The server closes a connection that was used before, after the whole body."""
    monkeypatch.setattr("protocols.http.session.STALE_S", stale_s)
    with peer() as server, Session(server.origin) as session:
        server.script = [OK, b""]
        ask(session, "POST", b"first")
        with pytest.raises(Interrupted):
            ask(session, "POST", BODY)
        assert server.bodies == [b"POST first", b"POST " + BODY]
        # A connection that a server may be about to close is not used for what can't be repeated.
        assert server.connections == (2 if stale_s == 0 else 1)


@pytest.mark.parametrize("body", [None, b""])
def test_a_post_without_a_body_is_not_sent_again_either(monkeypatch: pytest.MonkeyPatch, body: bytes | None) -> None:
    monkeypatch.setattr("protocols.http.session.STALE_S", 60.0)
    with peer() as server, Session(server.origin) as session:
        server.script = [OK, b""]
        ask(session, "GET")
        with pytest.raises(Interrupted):
            ask(session, "POST", body)
        assert server.bodies == [b"GET ", b"POST "]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_what_may_be_repeated_is_sent_again(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr("protocols.http.session.STALE_S", 0.0)
    with peer() as server, Session(server.origin) as session:
        server.script = [OK, b""]
        ask(session, "GET")
        assert ask(session, method) == b"ok"
        assert server.connections == 2
        assert len(server.bodies) == 3


def test_a_body_is_not_sent_twice_because_a_connection_was_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocols.http.session.STALE_S", 0.0)
    with peer() as server, Session(server.origin) as session:
        server.script = [OK, b""]
        ask(session, "GET")
        with pytest.raises(Interrupted):
            ask(session, "PUT", BODY)
        assert server.connections == 2
        assert server.bodies == [b"GET ", b"PUT " + BODY]


def test_a_post_of_which_no_body_went_out_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocols.http.session.STALE_S", 60.0)
    with peer() as server, Session(server.origin) as session:
        server.heads = [None, b"", b"HTTP/1.1 100 Continue\r\n\r\n"]
        ask(session, "GET")
        assert ask(session, "POST", BODY, expect=True) == b"ok"
        assert server.bodies == [b"GET ", b"POST " + BODY]
        assert server.connections == 2


def test_a_new_connection_that_goes_is_no_reason_to_repeat() -> None:
    with peer() as server, Session(server.origin) as session:
        server.script = [b""]
        with pytest.raises(Interrupted):
            ask(session, "GET")
        assert server.connections == 1


@pytest.mark.parametrize("informational", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early\nLink: x\n\n"])
def test_answers_before_the_final_one(informational: bytes) -> None:
    with peer() as server, Session(server.origin) as session:
        server.heads = [informational * 3]
        server.script = [informational * 2 + OK]
        assert ask(session, "PUT", BODY) == b"ok"
        assert ask(session, "PUT", BODY) == b"ok"
        assert server.connections == 1


def test_answers_of_1xx_without_end() -> None:
    with peer() as server, Session(server.origin) as session:
        server.script = [b"HTTP/1.1 102 Processing\r\n\r\n" * (http.MAX_INFORMATIONAL + 1) + OK]
        with pytest.raises(Interrupted, match="1xx"):
            ask(session, "PUT", BODY)


def test_an_early_refusal_ends_the_upload() -> None:
    with peer() as server, Session(server.origin) as session:
        server.heads = [b"HTTP/1.1 413 Too much\r\nContent-Length: 3\r\n\r\nno!"]
        sent: list[int] = []

        class Large(Content):
            def sent(self, count: int) -> None:
                sent.append(count)

        size = 256 << 20
        with session.request("PUT", "/", body=Large(bytes(size))) as answer:
            assert (answer.status, answer.read(), answer.early) == (413, b"no!", True)
        assert sum(sent) < size


def test_a_rest_that_nobody_wants_and_that_never_comes_costs_the_connection_only() -> None:
    with peer() as server:
        server.script = [b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nok"]
        origin = WebOrigin.of(f"http://127.0.0.1:{server.port}", Tls(), 5, 0.3)
        with Session(origin) as session:
            with session.request("GET", "/") as answer:
                assert answer.status == 200
            assert ask(session, "GET") == b"ok"
            assert server.connections == 2


def test_a_length_of_thousands_of_digits_is_none() -> None:
    with peer() as server, Session(server.origin) as session:
        server.script = [b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nok"]
        with pytest.raises(Interrupted, match="Content-Length"):
            ask(session, "GET")
