"""The supervisor: what it does while the server that it is to start again is away."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest

from talaria import up
from talaria.entrance import Entrance
from talaria.errors import ServerError


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
