"""The supervisor: what it does while the server, or the ledger, is away."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import httpx
import pytest

from talaria import up
from talaria.entrance import Entrance
from talaria.errors import ServerError
from transfer.errors import LedgerAway, Misconfigured


def test_a_call_ends_with_the_server_that_would_answer_it() -> None:
    """Seen: both died together, the socket took the recovery's call, and nobody started the server again."""
    cancelled: list[bool] = []

    async def for_ever() -> list[str]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return []

    async def at_once() -> list[str]:
        return ["run"]

    lives = iter([True, True, False])
    with pytest.raises(ServerError, match="ended"):
        asyncio.run(up._while(lambda: next(lives), for_ever()))
    assert cancelled == [True]
    assert asyncio.run(up._while(lambda: False, at_once())) == ["run"]


class Door:
    """A server process that is started again in vain, at first."""

    log = "server.log"
    entrance = Entrance("127.0.0.1", 0)

    def __init__(self, *becomes: Exception | None) -> None:
        self.becomes: Iterator[Exception | None] = iter(becomes)
        self.restart()
        self.end()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])

    def wait(self, check: Any) -> None:
        if problem := next(self.becomes):
            if not isinstance(problem, ServerError):  # it runs; what it is known by can't be written
                raise problem
            self.end()
            raise problem


class Crew:
    """The workers, who live; once they have been looked after `times` times, somebody asks to stop."""

    def __init__(self, asked: up._Asked, times: int) -> None:
        self.asked, self.left = asked, times

    def keep(self) -> None:
        self.left -= 1
        if not self.left:
            self.asked.times += 1
            self.asked.event.set()


@pytest.mark.parametrize(
    "problem", [ServerError("the server did not start"), OSError(errno.ENOSPC, "no space")], ids=["dies", "disk full"]
)
def test_a_server_that_can_t_be_started_again_yet_ends_nothing_else(
    problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(up, "say", said.append)
    monkeypatch.setattr(up, "CALM_S", 0.01)
    monkeypatch.setattr(up, "LOOK_S", 0.01)
    monkeypatch.setattr(up.signal, "signal", lambda *_: None)
    asked, door = up._Asked(), Door(problem, None)
    try:
        up._watch(cast(Any, door), cast(Any, Crew(asked, 2)), cast(Any, Crew(up._Asked(), 9)), asked)
        assert door.process.poll() is None  # it runs in the end
    finally:
        door.end()
    assert str(problem) in " ".join(said) and said[-1].startswith("stopping")


def served(answers: list[int]) -> tuple[ThreadingHTTPServer, str]:
    """Begin to serve an API whose health is the next of these codes at each look, and the last one from then on."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/api"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said; nobody waits long."""
    said: list[str] = []
    monkeypatch.setattr(up, "say", said.append)
    monkeypatch.setattr(up, "CALM_S", 0.01)
    monkeypatch.setattr(up.signal, "signal", lambda *_: None)
    return said


def test_a_prefect_server_elsewhere_that_is_away_is_waited_for(said: list[str]) -> None:
    """Seen: after a power cut it was gone for longer than systemd starts us again."""
    asked, answers = up._Asked(), [502, 503, 200]
    server, url = served(answers)
    try:
        up._wait_for(url, asked)
        assert answers == [200]
        (line,) = said
        assert url in line and "waited for" in line
        answers[:] = [404]
        with pytest.raises(ServerError, match="no Prefect API"):
            up._wait_for(url, asked)
    finally:
        server.shutdown()
        server.server_close()
    asked.event.set()
    asked.times = 1
    with pytest.raises(ServerError, match="stopped"):  # nobody listens there any more
        up._wait_for(url, asked)


@pytest.mark.parametrize("away", [httpx.ConnectError("refused"), LedgerAway("its server is away")])
def test_what_is_away_when_it_is_to_be_prepared_is_waited_for(
    away: Exception, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: a ledger's PostgreSQL that was started a moment later than we were ended us."""
    becomes: list[Any] = [away, away, ["run"], Misconfigured("a newer Talaria made it")]

    async def prepare(home: Any, *, alone: bool) -> list[str]:
        if isinstance(one := becomes.pop(0), Exception):
            raise one
        return cast(list[str], one)

    monkeypatch.setattr(up, "_prepare", prepare)
    door = Door()
    door.restart()
    what = cast(Any, door), cast(Any, None), up._Asked()
    try:
        assert up._prepared(*what, alone=True) == ["run"]
        assert len(said) == 1 and "waited for" in said[0]
        with pytest.raises(Misconfigured):
            up._prepared(*what, alone=True)
    finally:
        door.end()
