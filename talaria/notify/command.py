"""Messages to a program on this machine, as JSON on its standard input.

Only what lies in the folder that the machine's administrator has named is run: who may change rules over the network
can't run what they like here.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from blocks.rule import CommandRule
from talaria.notify.errors import NotSent, check_answers
from talaria.notify.words import Letter

FOLDER = "TALARIA_NOTIFY_COMMANDS"
PR_SET_PDEATHSIG = 1  # prctl(2)
SAID_BYTES = 300  # of the end of what it prints
PIECE_BYTES, PIPE_BYTES = 1 << 16, 1 << 20  # read at once; the most that a pipe can hold of it (pipe(7))
KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "HOME")  # of the environment: the rest holds our own secrets


async def run(rule: CommandRule, one: Letter) -> None:
    """Run the program; return when it has ended with exit code 0.

    Raises:
        NotSent: it may not be run, ends otherwise, or not in time, and then it is killed with all that it started.
    """
    if folder := os.environ.get(FOLDER, ""):
        await check_answers(folder)
    path = allowed(rule.command)
    with tempfile.TemporaryFile() as given, _Printed() as said:
        given.write(json.dumps(one.document).encode() + b"\n")
        given.seek(0)
        env = {name: os.environ[name] for name in KEPT if name in os.environ}
        try:
            process = await asyncio.create_subprocess_exec(
                path,
                *rule.arguments,
                stdin=given,
                stdout=said.end_of_theirs,
                stderr=asyncio.subprocess.STDOUT,
                env=env | {"TALARIA_RULE": rule.name},
                cwd="/",
                start_new_session=True,
                preexec_fn=_die_with_us,
            )
        except OSError as exc:
            raise NotSent(f"{rule.command} can't be run: {exc.strerror or exc}") from exc
        try:
            code = await asyncio.wait_for(process.wait(), rule.timeout_s)
        except TimeoutError as exc:
            raise NotSent(f"{rule.command} had not ended after {rule.timeout_s:g} s, and was killed") from exc
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if code:
            last = said.last()
            how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            raise NotSent(f"{rule.command} {how}" + (f": {last}" if last else ""))


class _Printed:
    """The end of what a program prints; all before it is dropped as it comes, so that no disk is filled with it."""

    def __init__(self) -> None:
        self._ours, self.end_of_theirs = os.pipe()
        os.set_blocking(self._ours, False)
        self._end = b""
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> _Printed:
        self._loop.add_reader(self._ours, self._read)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.remove_reader(self._ours)
        for fd in (self._ours, self.end_of_theirs):
            os.close(fd)

    def last(self) -> str:
        """Return the last line, once the program has ended."""
        self._read(PIPE_BYTES)
        return self._end.decode("utf-8", "replace").strip().rpartition("\n")[2]

    def _read(self, count: int = PIECE_BYTES) -> None:
        with suppress(BlockingIOError):
            self._end = (self._end + os.read(self._ours, count))[-SAID_BYTES:]


def allowed(name: str) -> Path:
    """Return the path of a program that may be run.

    Raises:
        NotSent: none may, there is none of this name, or another user could have put it there.
    """
    folder = os.environ.get(FOLDER, "")
    if not folder:
        raise NotSent(f"rules may run no programs here: set {FOLDER} to a folder with those that they may run")
    path = Path(folder) / name
    try:
        for one in (Path(folder), path):
            info = one.stat()
            if info.st_uid not in (0, os.geteuid()) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise NotSent(f"{one} can be changed by other users: it is not run")
    except OSError as exc:
        raise NotSent(f"{FOLDER} has no program {name}: {exc.strerror}") from exc
    if not stat.S_ISREG(info.st_mode) or not os.access(path, os.X_OK):
        raise NotSent(f"{path} is no program that can be run: chmod +x {path}")
    return path


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
