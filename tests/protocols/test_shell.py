"""A shell on the other side, here without a host."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from protocols.ssh import programs
from protocols.ssh import shell as shells
from protocols.ssh.client import SshClient, Started
from protocols.ssh.login import Login
from protocols.ssh.shell import Shell
from protocols.ssh.words import Said
from transfer.errors import Misconfigured

# A shell whose standard input is a socket, as some servers give it.
WITH_A_SOCKET = """
import os, socket, subprocess, threading
ours, its = socket.socketpair()
shell = subprocess.Popen(["sh", "-s"], stdin=its)
its.close()
def carry():
    while piece := os.read(0, 65536):
        ours.sendall(piece)
    ours.shutdown(socket.SHUT_WR)
threading.Thread(target=carry, daemon=True).start()
os._exit(shell.wait())
"""
PIPE, SOCKET = ("sh", "-s"), (sys.executable, "-c", WITH_A_SOCKET)


class Here(SshClient):
    """Starts shells on this machine instead of ssh."""

    def __init__(self, argv: tuple[str, ...]) -> None:
        super().__init__(Login("here", idle_timeout_s=5, connect_timeout_s=1))
        self.shell_argv, self.shells = argv, 0

    def start(self, command: str, **more: object) -> Started:
        self.shells += 1
        said = Said(self.login, self.hide, self.file(), self.file())
        return Started(self, programs.start(list(self.shell_argv), said.errors, dict(os.environ)), said)


@pytest.fixture(params=[PIPE, SOCKET], ids=["pipe", "socket"])
def here(request: pytest.FixtureRequest) -> Iterator[Here]:
    client = Here(request.param)
    with client:
        yield client


def tell(shell: Shell, line: str) -> None:
    """Have the shell itself do something, which outlives the script."""
    assert shell.started is not None
    shell.started.send(line.encode() + b"\n")


def test_an_answer_that_comes_in_pieces(here: Here) -> None:
    """A piece may end anywhere within the last line."""
    with Shell(here) as shell:
        for cut in (1, 2, 5, 30, 36):
            # What prints the end is the shell that reads the scripts: it gets a printf that takes its time.
            slow = (
                f'printf() {{ text=$(command printf "$@"; echo .); text=${{text%.}}; command printf %s '
                f'"${{text%{"?" * cut}}}"; sleep 0.2; command printf %s "${{text#"${{text%{"?" * cut}}}"}}"; }}'
            )
            shell.run("")
            assert here.shells == 1
            tell(shell, slow)
            assert shell.run("echo said; exit 123", idle_s=2) == (123, b"said\n")


def test_a_long_output_of_a_failure_is_cut_in_the_middle(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shells, "HEAD_BYTES", 1000)
    monkeypatch.setattr(shells, "TAIL_BYTES", 1000)
    with Shell(here) as shell:
        code, output = shell.run("echo first; seq 300000; echo last; exit 3")
        assert code == 3
        assert output.startswith(b"first\n1\n2\n")
        assert output.endswith(b"300000\nlast\n")
        assert len(output) <= 3000
        with pytest.raises(Misconfigured, match="bytes too many"):
            shell.run("seq 300000")  # what is data must be whole


def test_a_login_that_prints_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shells, "TAIL_BYTES", 1000)
    monkeypatch.setattr(shells, "ENDLESS_BYTES", 1_000_000)
    with (
        Here(("sh", "-c", "exec yes")) as client,
        Shell(client) as shell,
        pytest.raises(Misconfigured, match="without end"),
    ):
        shell.run("echo said")
    with Here(("sh", "-c", "seq 20000; exec sh -s")) as client, Shell(client) as shell:
        assert shell.run("echo said") == (0, b"said\n")
