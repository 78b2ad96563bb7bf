"""Answers without an end: informational ones, heads, chunk extensions, trailers; each has one, by count and by time."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import pytest

from protocols.http import answer as answers
from protocols.http import exchange as http
from protocols.http import head
from protocols.http.origin import WebOrigin
from protocols.http.session import Session
from protocols.net import connection
from protocols.net.tls import Tls
from transfer.errors import DispatchError, Interrupted, TimedOut

PAUSE_S = 0.02  # between two pieces of a peer that takes its time


@contextmanager
def dripping(pieces: Iterable[bytes]) -> Iterator[Session]:
    """A server that answers the first request with pieces, one after the other, until nobody listens any more."""
    over = threading.Event()

    def serve(listener: socket.socket) -> None:
        with suppress(OSError), listener.accept()[0] as sock:
            sock.recv(65_536)
            for piece in pieces:
                sock.sendall(piece)
                if over.wait(PAUSE_S):
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        with Session(WebOrigin.of(f"http://127.0.0.1:{listener.getsockname()[1]}", Tls(), 5, 5)) as session:
            yield session
        over.set()
        thread.join(20)
        assert not thread.is_alive()


def ask(session: Session) -> bytes:
    with session.request("GET", "/") as answer:
        return answer.read()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "informational answers": itertools.repeat(b"HTTP/1.1 102 Processing\r\n\r\n"),
    "a status line": itertools.chain([b"HTTP/1.1 "], itertools.repeat(b"2")),
    "a head": itertools.chain([b"HTTP/1.1 200 OK\r\n"], (b"X-%d: y\r\n" % n for n in itertools.count())),
    "a field": itertools.chain([b"HTTP/1.1 200 OK\r\nX: "], itertools.repeat(b"y")),
    "a chunk's extension": itertools.chain([CHUNKED + b"5;"], itertools.repeat(b"x")),
    "trailers": itertools.chain([CHUNKED + b"0\r\n"], (b"X-%d: y\r\n" % n for n in itertools.count())),
    "a trailer": itertools.chain([CHUNKED + b"0\r\nX: "], itertools.repeat(b"y")),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_comes_slowly_and_never_ends(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Each piece comes long before the peer would count as silent."""
    for module, name in ((connection, "LINE_S"), (answers, "TRAILER_S"), (http, "INFORMATIONAL_S")):
        monkeypatch.setattr(module, name, 0.3)
    with dripping(ENDLESS[what]) as session, pytest.raises(TimedOut):
        ask(session)


def many(piece: bytes, count: int, before: bytes = b"") -> bytes:
    return before + piece * count


@pytest.mark.parametrize(
    "said",
    [
        many(b"HTTP/1.1 102 Processing\r\n\r\n", http.MAX_INFORMATIONAL + 1),
        many(b"X: y\r\n", head.MAX_FIELDS + 1, b"HTTP/1.1 200 OK\r\n"),
        many(b"y", 400_000, b"HTTP/1.1 200 OK\r\nX: "),
        many(b"x", 100_000, CHUNKED + b"5;"),
        many(b"1;" + b"x" * 1000 + b"\r\na\r\n", 200, CHUNKED),
        many(b"X: y\r\n", head.MAX_FIELDS + 1, CHUNKED + b"0\r\n"),
        many(b"y", 100_000, CHUNKED + b"0\r\nX: "),
    ],
    ids=["informational", "fields", "a field", "an extension", "extensions", "trailers", "a trailer"],
)
def test_what_comes_at_once_and_never_ends(said: bytes) -> None:
    with dripping([said]) as session, pytest.raises(DispatchError) as caught:
        ask(session)
    assert isinstance(caught.value, Interrupted)


def test_a_slow_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes time between its lines, and not within one, has all the time that its idle timeout gives."""
    monkeypatch.setattr(connection, "LINE_S", 0.3)
    body = [b"5;a=b\r\nhello\r\n"] * 30
    with dripping([b"HTTP/1.1 102 Processing\r\n\r\n"] * 5 + [CHUNKED, *body, b"0\r\nX: y\r\n\r\n"]) as session:
        assert ask(session) == b"hello" * 30
