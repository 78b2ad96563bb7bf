"""A POSIX shell on the server: scripts go through its standard input, so that nothing is quoted twice.

The user's login shell only sees the constant command `sh -s`, which every shell understands alike; what follows is read
by a POSIX shell, in which `quote` makes any value safe, byte for byte.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from shlex import quote

from protocols.ssh.account import Account, Command, suits
from protocols.ssh.client import END_S, SshClient, Started
from protocols.ssh.handshake import NothingInCommon
from protocols.ssh.login import LoginFacts
from protocols.ssh.words import short
from transfer.errors import Interrupted, Misconfigured, TimedOut

COMMAND = "sh -s"
POLL_S = 0.2  # between two looks at whether to stop
END_BYTES = 64  # the last line of a script's output: a word of 32 letters, and a code
HEAD_BYTES = TAIL_BYTES = 8 << 20  # of a longer output, which is an error's, its beginning and its end are kept
ENDLESS_BYTES = 64 << 20  # a login that prints so much will not run anything
HOOK_OUTPUT_BYTES = 65_536  # of a script's output, its end is kept
NAME_CHARS = 255  # the longest name that file systems take
HANG_UP_S = 0.5  # ssh waits for whatever the program has left running; we don't
KILL_S = 5  # a script that was asked to end has this long before it is killed


class NoShell(Misconfigured):
    """The account may log in, but gets no shell that runs commands."""


class NoScript(Misconfigured):
    """The program doesn't exist, or may not be executed."""


class Shell:
    """A shell that runs one script after the other over one login. A context manager.

    The first script shows whether there is a shell: asking before would cost a round trip.
    """

    def __init__(self, client: SshClient, check: Callable[[], None] = lambda: None) -> None:
        self.client, self._check = client, check
        self.facts = LoginFacts()
        self.banner = ""  # what the host says to everybody
        self.started: Started | Command | None = None

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.started is not None:
            self.started.stop()  # a shell that waits for its next script has nothing to end

    def run(
        self, script: str, *, idle_s: float | None = None, check: Callable[[], None] | None = None
    ) -> tuple[int, bytes]:
        """Run a script; return its exit code and its output, with errors, in English.

        The output of a script that fails may be cut in the middle.

        Args:
            idle_s: seconds of silence after which the other side counts as hung.
            check: called again and again; may raise to stop.

        Raises:
            NoShell: logged in, but there is no shell. TimedOut: it is silent for too long.
            Misconfigured: the login prints without end, or a script prints too much.
            DispatchError: no connection, no login, or the link broke.
        """
        idle_s, check = idle_s or self.client.login.idle_timeout_s, check or self._check
        if self.started is not None and self.started.exit_code(0) is not None:
            self.started.stop()  # who has been silent while rsync ran may have been cut off
            self.started = None
        begun = self.started is not None
        try:
            if self.started is None:
                self.started = begin(self.client, check, self._learn)
                # The handshake, the login (programs that it runs), and the start of a shell: each may take its time.
                idle_s += 2 * self.client.login.connect_timeout_s
            code, output = self._run(self.started, script, idle_s, check)
        except BaseException:
            if self.started is not None:
                self.started.stop()
            raise
        finally:
            if self.started is not None:
                self.facts = self.started.facts
        if not begun and isinstance(self.started, Started):
            self.banner = self.started.errors
        return code, output

    def _learn(self, account: Account) -> None:
        self.facts, self.banner = account.facts, account.banner

    def _run(
        self, started: Started | Command, script: str, idle_s: float, check: Callable[[], None]
    ) -> tuple[int, bytes]:
        token = uuid.uuid4().hex
        begin = f"printf '%s +\\n' {token}\n"  # what comes before it, a login has printed
        frame = f"(\nLC_ALL=C\nexport LC_ALL\nunset CDPATH\n{script}\n) </dev/null 2>&1\nprintf '%s %d\\n' {token} $?\n"
        started.send((begin + frame).encode("utf-8", "surrogateescape"), check)
        output, end = bytearray(), re.compile(token.encode() + rb" (\d+)\n$")
        mark, begun, before, cut = f"{token} +\n".encode(), False, 0, 0
        silent_since = time.monotonic()
        while True:
            check()
            piece = started.receive(POLL_S)
            if piece is None:
                if time.monotonic() - silent_since > idle_s:
                    raise TimedOut(f"{self.client.login.shown}: no answer for {idle_s:g} s")
                continue
            if not piece:
                raise _ended(started, bytes(output))
            silent_since = time.monotonic()
            output += piece
            if not begun:
                at = output.find(mark, max(0, len(output) - len(piece) - len(mark)))
                begun = at >= 0
                if begun:
                    del output[: at + len(mark)]
                elif len(output) > 2 * TAIL_BYTES:
                    before += len(output) - TAIL_BYTES
                    del output[:-TAIL_BYTES]
                if before > ENDLESS_BYTES:
                    raise Misconfigured(f"{self.client.login.shown}: the login prints without end, and runs nothing")
            elif len(output) > HEAD_BYTES + 2 * TAIL_BYTES:
                cut += len(output) - HEAD_BYTES - TAIL_BYTES
                del output[HEAD_BYTES:-TAIL_BYTES]
            found = end.search(output, max(0, len(output) - END_BYTES))
            if found:
                code = int(found[1])
                if cut and not code:  # then it is data, of which nothing may be missing
                    raise Misconfigured(f"{self.client.login.shown}: a script printed {cut} bytes too many")
                return code, bytes(output[: found.start()])


def begin(
    client: SshClient, check: Callable[[], None], learn: Callable[[Account], None] = lambda account: None
) -> Started | Command:
    """Start a shell: by paramiko if it can do the login, else by ssh(1).

    Args:
        learn: called with the account, whether it opens or not.
    """
    if suits(client):
        account = Account(client)
        try:
            try:
                account.begin(check)
            finally:
                learn(account)
            return account.start(COMMAND, check)
        except NothingInCommon:
            account.close()
        except BaseException:
            account.close()
            raise
    return client.start(COMMAND)


def run_script(
    client: SshClient,
    script: str,
    arguments: tuple[str, ...],
    *,
    timeout_s: float,
    check: Callable[[], None] = lambda: None,
) -> tuple[int | None, str]:
    """Run a program on the host with these arguments, unchanged; return its exit code and its last output.

    The client removes from the output what must not show. The exit code is None if the program was stopped after
    `timeout_s`. It is also stopped when the connection breaks, so that a later try doesn't find it running. Programs
    that it leaves running in the background are not waited for.

    Raises:
        NoScript: the program doesn't exist, or may not be executed.
        Interrupted: the connection broke before the program ended.
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
    started = begin(client, check)
    try:
        started.send(frame.encode("utf-8", "surrogateescape"), check)
        return _follow(started, script, token.encode() + b" ", timeout_s, check)
    finally:
        started.close(HANG_UP_S)


def _follow(
    started: Started | Command, script: str, mark: bytes, timeout_s: float, check: Callable[[], None]
) -> tuple[int | None, str]:
    login, hide = started.client.login, started.client.hide
    output, begun, stopped = bytearray(), False, False
    end = time.monotonic() + 2 * login.connect_timeout_s + login.idle_timeout_s
    while True:
        check()
        piece = started.receive(POLL_S)
        if piece == b"" and not stopped:
            if begun:
                raise Interrupted(f"{login.shown}: the link broke while {script} was running")
            raise _ended(started, bytes(output))
        output += piece or b""
        found = re.search(mark + rb"(-|\+|\d+)\n", output)
        if found and found[1] == b"-":
            raise NoScript(f"{script}: not there, or not executable for this user")
        if found and found[1] == b"+":
            del output[: found.end()]
            begun, end = True, time.monotonic() + timeout_s
            found = re.search(mark + rb"(\d+)\n", output)
        if found and not stopped:
            return int(found[1]), _last(output[: found.start()], hide)
        if found or piece == b"" or (stopped and time.monotonic() > end):
            return None, f"{_last(output[: found.start()] if found else output, hide)}\nstopped after {timeout_s:g} s"
        if begun and len(output) > 2 * HOOK_OUTPUT_BYTES:
            del output[:-HOOK_OUTPUT_BYTES]
        if time.monotonic() > end:
            if not begun:
                raise TimedOut(f"{login.shown}: no answer")
            started.end_input()
            stopped, end = True, time.monotonic() + KILL_S + END_S


def _last(output: bytearray, hide: Callable[[str], str]) -> str:
    """Return the end of a script's output without what must not show, even if it was cut in half there."""
    text = hide(bytes(output[-HOOK_OUTPUT_BYTES:]).decode("utf-8", "replace"))
    return text[NAME_CHARS:] if len(output) >= HOOK_OUTPUT_BYTES else text


def _ended(started: Started | Command, output: bytes) -> Exception:
    """Return why a shell has ended unexpectedly: no login, no shell, or a broken connection."""
    code = started.exit_code()
    refused = re.search(r"(exec|shell) request failed", started.words)
    if not refused and (not started.facts.method or code in (None, started.LOST)):
        return started.failure(begun=bool(output))
    words = started.words if refused else output.decode("utf-8", "replace") + " " + started.errors
    why = "the account gets no shell there, which rsync and scripts need; SFTP needs none"
    if "does not run rsync" in words:
        why = "the account is restricted by rrsync, and rsync targets need a shell: let it use SFTP, in a chroot"
    return NoShell(f"{started.client.login.shown}: logged in, but {why} ({short(words, started.client.hide)})")
