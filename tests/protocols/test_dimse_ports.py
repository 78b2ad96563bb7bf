"""A port on which several processes of a machine listen, one at a time, and the threads of one together."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from protocols.dimse.portline import PortLine
from protocols.dimse.ports import shared
from talaria.testing.process import free_port, until
from transfer.errors import Cancelled, Misconfigured


class Listening:
    """A port that is listened on."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_server(("127.0.0.1", port))

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


class User:
    """A thread of this process that uses the port until it is told to stop."""

    def __init__(self, threads: ThreadPoolExecutor, block: Callable[..., AbstractContextManager[Listening]]) -> None:
        self.has, self.stops, self.cancelled = threading.Event(), threading.Event(), threading.Event()
        self.result: Future[None] = threads.submit(self._use, block)

    def _use(self, block: Callable[..., AbstractContextManager[Listening]]) -> None:
        with block(self._check):
            self.has.set()
            assert self.stops.wait(60)

    def _check(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled("enough")

    def stop(self) -> None:
        self.stops.set()
        self.result.result(60)


@pytest.fixture
def block(tmp_path: Path) -> Callable[..., AbstractContextManager[Listening]]:
    port, line = free_port(), tmp_path / "scp"

    def listen(check: Callable[[], None], wait_s: float = 0.0) -> AbstractContextManager[Listening]:
        return shared(Listening, "127.0.0.1", port, lambda: Listening(port), wait_s, check, line=line)

    return listen


def test_another_process_of_ours_is_waited_for_and_another_program_is_not(
    tmp_path: Path, threads: ThreadPoolExecutor, block: Callable[..., AbstractContextManager[Listening]]
) -> None:
    other = PortLine(tmp_path / "scp")
    assert other.take()
    one = User(threads, block)
    until(other.is_wanted)  # it waits, though it was to wait for 0 s
    given_up = User(threads, block)
    given_up.cancelled.set()
    with pytest.raises(Cancelled):
        given_up.result.result(60)
    assert other.is_wanted() and not one.has.is_set()
    other.leave()
    assert one.has.wait(60)
    one.stop()
    assert other.take()  # nobody has it any more
    other.leave()
    with block(lambda: None) as listener, pytest.raises(Misconfigured, match="can't listen"):
        port = listener.sock.getsockname()[1]
        with shared(Path, "127.0.0.1", port, lambda: Listening(port), 0):  # type: ignore[type-var,arg-type]
            pass


def test_a_port_that_another_program_has_is_waited_for_once(tmp_path: Path) -> None:
    tries, line = [], tmp_path / "scp"

    def make(port: int) -> Listening:
        tries.append(port)
        return Listening(port)

    with socket.create_server(("127.0.0.1", 0)) as program:
        port = program.getsockname()[1]
        for wait_s, most in ((2.0, None), (600.0, 1)):
            tries.clear()
            listening = shared(Listening, "127.0.0.1", port, lambda: make(port), wait_s, line=line)
            with pytest.raises(Misconfigured), listening:
                pass
            assert len(tries) > 1 if most is None else len(tries) == most
    with shared(Listening, "127.0.0.1", port, lambda: make(port), 0, line=line):
        pass


def test_who_has_the_port_lets_nobody_else_in_while_another_process_waits(
    tmp_path: Path, threads: ThreadPoolExecutor, block: Callable[..., AbstractContextManager[Listening]]
) -> None:
    first, second = User(threads, block), User(threads, block)
    assert first.has.wait(60) and second.has.wait(60)
    other = PortLine(tmp_path / "scp")
    assert not other.take()
    third = User(threads, block)
    first.stop()
    assert not other.take()
    second.stop()
    until(other.take)
    assert not third.has.is_set()
    other.leave()
    assert third.has.wait(60)
    third.stop()


def test_the_port_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from protocols.dimse.portline import PortLine\n"
        "line = PortLine(Path(sys.argv[1])); print(line.take(), flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-P", "-c", script, str(tmp_path / "scp")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "True\n"
            one = PortLine(tmp_path / "scp")
            assert not one.take()
        finally:
            process.kill()
    assert one.take()
    one.leave()
