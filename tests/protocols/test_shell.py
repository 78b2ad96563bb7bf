"""A shell on the other side, here without a host: scripts, and rsync in it in the place of ssh."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocols.ssh import bridge, programs
from protocols.ssh.client import Client, Login, Started
from protocols.ssh.rsync import SILENCED, Rsync
from protocols.ssh.shell import Shell
from transfer.errors import Misconfigured, Retryable

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


class Here(Client):
    """Starts shells on this machine instead of ssh."""

    def __init__(self, argv: tuple[str, ...]) -> None:
        super().__init__(Login("here", idle_timeout_s=5, connect_timeout_s=1))
        self.shell_argv, self.shells = argv, 0

    def start(self, command: str, **more: object) -> Started:
        self.shells += 1
        log, errors = self.file(), self.file()
        return Started(self, programs.start(list(self.shell_argv), errors, dict(os.environ)), log, errors)


@pytest.fixture(params=[PIPE, SOCKET], ids=["pipe", "socket"])
def here(request: pytest.FixtureRequest) -> Iterator[Here]:
    client = Here(request.param)
    with client:
        yield client


def tell(shell: Shell, line: str) -> None:
    """Have the shell itself do something, which outlives the script."""
    assert shell.started.process.stdin is not None
    os.write(shell.started.process.stdin.fileno(), line.encode() + b"\n")


def test_an_answer_that_comes_in_pieces(here: Here) -> None:
    """A piece may end anywhere within the last line."""
    with Shell(here) as shell:
        for cut in (1, 2, 5, 30, 36):
            # What prints the end is the shell that reads the scripts: it gets a printf that takes its time.
            slow = (
                f'printf() {{ text=$(command printf "$@"; echo .); text=${{text%.}}; command printf %s '
                f'"${{text%{"?" * cut}}}"; sleep 0.2; command printf %s "${{text#"${{text%{"?" * cut}}}"}}"; }}'
            )
            assert here.shells == 1
            tell(shell, slow)
            assert shell.run("echo said; exit 123", idle_s=2) == (123, b"said\n")


@pytest.mark.parametrize("count", [1, 300])
def test_rsync_runs_in_the_shell_again_and_again(here: Here, tmp_path: Path, count: int) -> None:
    source, into = tmp_path / "source", tmp_path / "in to's"
    for name in range(count):
        (source / str(name % 7)).mkdir(parents=True, exist_ok=True)
        (source / str(name % 7) / str(name)).write_bytes(os.urandom(30_000))
    (into / ".talaria-temp").mkdir(parents=True)
    paths = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    with Shell(here) as shell:
        rsync = Rsync(shell)
        assert shell.run("echo before") == (0, b"before\n")
        assert rsync.send(source, paths, str(into)).code == 0
        assert shell.run("cat")[0] == 0
        result, differing = rsync.differing(source, paths, str(into), checksum=True)
        assert (result.code, differing) == (0, [])
        large = shell.run("i=0; while [ $i -lt 40000 ]; do echo $i; i=$((i + 1)); done")[1]
        assert large.split() == [b"%d" % number for number in range(40_000)], "what a full pipe held back is lost"
    sent = {str(path.relative_to(into)): path.read_bytes() for path in into.rglob("*") if path.is_file()}
    assert sent == {path: (source / path).read_bytes() for path in paths}


def test_an_rsync_that_is_missing_is_named(here: Here, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with Shell(here) as shell:
        shell.run("")
        tell(shell, "PATH=/nowhere")
        result = Rsync(shell).send(tmp_path, ["file"], str(tmp_path / "in"))
        assert result.code == 127
        assert isinstance(result.failure(), Misconfigured)
        assert "not installed on the server" in result.failure().message


def test_a_shell_that_is_killed_under_rsync_is_a_broken_link(here: Here, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with Shell(here) as shell:
        shell.run("")
        tell(shell, "rsync() { kill -KILL $$; }")
        result = Rsync(shell).send(tmp_path, ["file"], str(tmp_path / "in"))
        assert result.code in (SILENCED, bridge.LOST) and isinstance(result.failure(), Retryable)


def test_what_follows_a_command_is_never_taken_for_a_script(tmp_path: Path) -> None:
    """rsync may die while bytes of files are on their way; what they say must not be done."""
    for code in (0, 23, 11):
        script = bridge.START.format(word="w" * 32, command=f"sh -c 'exit {code}'", ended="0|23|24|25")
        shell = subprocess.Popen(["sh", "-s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert shell.stdin and shell.stdout
        shell.stdin.write(script.encode())
        shell.stdin.flush()
        assert shell.stdout.readline() == b"w" * 32 + b" +\n"
        assert shell.stdout.readline() == b"w" * 32 + b" %d\n" % code
        output, _ = shell.communicate(f"\0touch {tmp_path}/done\n{'w' * 32}.\ntouch {tmp_path}/done\n".encode())
        assert (output, shell.returncode) == (b"", 11 if code == 11 else 1)
        assert not (tmp_path / "done").exists()
