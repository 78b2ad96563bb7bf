"""A POSIX shell on the other side: scripts through its standard input, so that nothing is quoted twice.

The command that the user's login shell sees is the constant `sh -s`, which every shell takes the same way; what
follows is read by a POSIX shell, in which `quote` makes any value safe, byte for byte.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from protocols.ssh import bridge
from protocols.ssh.client import END_S, Client, Started, quote, short
from transfer.errors import DispatchError, Interrupted, Misconfigured, TimedOut

COMMAND = "sh -s"
POLL_S = 0.2  # between two looks at whether to stop
PIECE = 65_536
END_BYTES = 64  # the last line of a script's output: a word of 32 letters, and a code
PIPE_BYTES = 1 << 20  # on the way to ssh
HOOK_OUTPUT_BYTES = 65_536  # of a script's output, its end is kept
NAME_CHARS = 255  # the longest name that file systems take
HANG_UP_S = 0.5  # ssh waits for whatever the program has left running; we don't
KILL_S = 5  # a script that was told to end has this long before it is killed


class NoShell(Misconfigured):
    """The account may log in, but gets no shell that runs commands."""


class NoScript(Misconfigured):
    """The program is not there, or may not be executed."""


class Shell:
    """A shell that runs one script after the other over one login. A context manager.

    Whether there is one shows with the first script: to ask before would cost a way there and back.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        # The handshake, the login (programs that it runs), and the start of a shell: each may take its time.
        self._start_s = 2 * client.login.connect_timeout_s
        self._lent = False  # since a script was run

    def __enter__(self) -> Shell:
        self.started = self.client.start(COMMAND)
        return self

    def __exit__(self, *exc: object) -> None:
        self.started.stop()  # a shell that waits for its next script has nothing to end

    def run(
        self, script: str, *, idle_s: float | None = None, check: Callable[[], None] = lambda: None
    ) -> tuple[int, bytes]:
        """Run a script; return its exit code and what it printed, errors included, its messages in English.

        Args:
            idle_s: seconds of silence after which the other side counts as hung.
            check: called again and again; may raise to stop.

        Raises:
            NoShell: logged in, but there is none.
            TimedOut: it says nothing for too long.
            DispatchError: as `Started.failure` says.
        """
        idle_s = idle_s or self.client.login.idle_timeout_s
        lent, self._lent = self._lent, False
        try:
            return self._run(script, self._start_s + idle_s, check)
        except BaseException as exc:
            self.started.stop()
            # Who borrowed a shell can't always give it back (bridge.py); then it has ended by itself.
            if not (lent and isinstance(exc, DispatchError) and self.started.process.returncode in range(255)):
                raise
        self.started = self.client.start(COMMAND)
        try:
            return self._run(script, 2 * self.client.login.connect_timeout_s + idle_s, check)
        except BaseException:
            self.started.stop()
            raise

    def _run(self, script: str, idle_s: float, check: Callable[[], None]) -> tuple[int, bytes]:
        token = uuid.uuid4().hex
        begin = f"printf '%s +\\n' {token}\n"  # what comes before it, a login has printed
        frame = f"(\nLC_ALL=C\nexport LC_ALL\nunset CDPATH\n{script}\n) </dev/null 2>&1\nprintf '%s %d\\n' {token} $?\n"
        _send(self.started, begin + frame)
        output, end = bytearray(), re.compile(token.encode() + rb" (\d+)\n$")
        silent_since = time.monotonic()
        while True:
            check()
            piece = _receive(self.started, POLL_S)
            if piece is None:
                if time.monotonic() - silent_since > idle_s:
                    raise TimedOut(f"{self.client.login.shown}: no answer for {idle_s:g} s")
                continue
            if not piece:
                raise _ended(self.started, bytes(output))
            silent_since = time.monotonic()
            output += piece
            told = end.search(output, max(0, len(output) - END_BYTES))
            if told:
                self._start_s = 0.0
                return int(told[1]), bytes(output[: told.start()]).partition(f"{token} +\n".encode())[2]

    def exit_code(self) -> int | None:
        """Return the code with which the shell, or its ssh, has just ended; None if it goes on."""
        with suppress(subprocess.TimeoutExpired):
            return self.started.process.wait(END_S)
        return None

    def lend(self) -> Loan:
        """Let a program have the shell that runs bridge.py, until `take_back`."""
        assert self.started.process.stdin is not None and self.started.process.stdout is not None  # noqa: S101
        fds = self.started.process.stdin.fileno(), self.started.process.stdout.fileno()
        with suppress(OSError):
            fcntl.fcntl(fds[0], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        word = uuid.uuid4().hex
        return Loan(fds, {bridge.VARIABLE: f"{fds[0]} {fds[1]} {word}"}, word)

    def take_back(self, loan: Loan) -> None:
        """Run scripts again; only after the command came to its end (`bridge.ENDED`), else the shell has ended too."""
        self._lent = True
        _send(self.started, f"{loan.word}.\n")


@dataclass(frozen=True)
class Loan:
    """What a program needs for the use of a shell.

    Attributes:
        fds: open files that it must inherit.
        env: what it must find in its environment.
    """

    fds: tuple[int, int]
    env: dict[str, str] = field(repr=False)
    word: str = field(repr=False)


def run_script(
    client: Client,
    script: str,
    arguments: tuple[str, ...],
    *,
    timeout_s: float,
    check: Callable[[], None] = lambda: None,
) -> tuple[int | None, str]:
    """Run a program on the host with these arguments, unchanged; return its exit code and its last output.

    The client takes out of the output what must not show.
    The exit code is None if the program was stopped after `timeout_s`. It is stopped, too, when the link breaks, so
    that a later try doesn't find it running. What it leaves running in the background is not waited for.

    Raises:
        NoScript: the program is not there, or may not be executed.
        Interrupted: the link broke before the program ended.
        DispatchError: no connection, no login, no shell; or what `check` raises.
    """
    token = uuid.uuid4().hex
    with_arguments = " ".join(quote(value) for value in (script, *arguments))
    # One compound command, so that the shell has read all of it before the first one takes the standard input.
    frame = f"""{{
if [ ! -f {quote(script)} ] || [ ! -x {quote(script)} ]; then printf '%s -\\n' {token}; exit; fi
exec 3<&0
group=; lead=
if command -v setsid >/dev/null 2>&1; then group=-; lead=setsid; fi
printf '%s +\\n' {token}
$lead {with_arguments} </dev/null 2>&1 3<&- &
child=$!
{{ cat <&3; kill -TERM $group$child; sleep {KILL_S}; kill -KILL $group$child; }} >/dev/null 2>&1 &
watcher=$!
wait $child
code=$?
printf '%s %d\\n' {token} $code
kill $watcher 2>/dev/null
exit
}}
"""
    started = client.start(COMMAND)
    try:
        _send(started, frame)
        return _follow(started, script, token.encode() + b" ", timeout_s, check)
    finally:
        started.close(HANG_UP_S)


def _follow(
    started: Started, script: str, mark: bytes, timeout_s: float, check: Callable[[], None]
) -> tuple[int | None, str]:
    login, hide = started.client.login, started.client.hide
    output, begun, stopped = bytearray(), False, False
    end = time.monotonic() + 2 * login.connect_timeout_s + login.idle_timeout_s
    while True:
        check()
        piece = _receive(started, POLL_S)
        if piece == b"" and not stopped:
            if begun:
                raise Interrupted(f"{login.shown}: the link broke while {script} was running")
            raise _ended(started, bytes(output))
        output += piece or b""
        told = re.search(mark + rb"(-|\+|\d+)\n", output)
        if told and told[1] == b"-":
            raise NoScript(f"{script}: not there, or not executable for this user")
        if told and told[1] == b"+":
            del output[: told.end()]
            begun, end = True, time.monotonic() + timeout_s
            told = re.search(mark + rb"(\d+)\n", output)
        if told and not stopped:
            return int(told[1]), _last(output[: told.start()], hide)
        if told or piece == b"" or (stopped and time.monotonic() > end):
            return None, f"{_last(output[: told.start()] if told else output, hide)}\nstopped after {timeout_s:g} s"
        if begun and len(output) > 2 * HOOK_OUTPUT_BYTES:
            del output[:-HOOK_OUTPUT_BYTES]
        if time.monotonic() > end:
            if not begun:
                raise TimedOut(f"{login.shown}: no answer")
            _close_input(started)
            stopped, end = True, time.monotonic() + KILL_S + END_S


def _last(output: bytearray, hide: Callable[[str], str]) -> str:
    """Return the end of a script's output without what must not show, of which a cut may have left a half in front."""
    text = hide(bytes(output[-HOOK_OUTPUT_BYTES:]).decode("utf-8", "replace"))
    return text[NAME_CHARS:] if len(output) >= HOOK_OUTPUT_BYTES else text


def _send(started: Started, text: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    assert started.process.stdin is not None  # noqa: S101 - for the type checker: it was started with a pipe
    with suppress(BrokenPipeError):  # its end is seen, and named, where its output is read
        while data:
            data = data[os.write(started.process.stdin.fileno(), data) :]


def _receive(started: Started, wait_s: float) -> bytes | None:
    """Return what has come, b"" at the end, None if nothing came in time."""
    assert started.process.stdout is not None  # noqa: S101
    poll = select.poll()
    poll.register(started.process.stdout, select.POLLIN)
    if not poll.poll(wait_s * 1000):
        return None
    return os.read(started.process.stdout.fileno(), PIECE)


def _close_input(started: Started) -> None:
    if started.process.stdin is not None:
        with suppress(OSError):
            started.process.stdin.close()


def _ended(started: Started, output: bytes) -> Exception:
    """Return why a shell has ended that should not: no login, no shell, or a broken link."""
    with suppress(subprocess.TimeoutExpired):
        started.process.wait(END_S)
    refused = re.search(r"(exec|shell) request failed", started.words)
    if not started.facts.method or (started.process.returncode == 255 and not refused):
        return started.failure()
    words = started.words if refused else output.decode("utf-8", "replace") + " " + started.errors
    why = "the account gets no shell there, which rsync and scripts need; SFTP needs none"
    return NoShell(f"{started.client.login.shown}: logged in, but {why} ({short(words, started.client.hide)})")
