"""SSH by the system's own client and by paramiko: one place for logins and trust, for rsync, SFTP and scripts.

    with SshClient(login) as client:
        started = client.start("sftp", subsystem=True)   # a process of ssh(1); `started.failure()` says why it ended
        with Shell(client) as shell: ...                 # shell.py, account.py: by paramiko

Bulk bytes go through ssh(1): measured on one large file, libraries reach half to nine tenths of its speed at two to
three times its CPU (docs/performance.md). No file of the user's or the system's ssh configuration is read
(`-F /dev/null`); every option that matters is given. Secrets reach ssh through files in memory (`memfiles.py`) whose
paths say nothing; keys are decrypted first (`keys.py`). ssh's own words go to a log in memory as well (`words.py`).
"""

from __future__ import annotations

import math
import os
import re
import select
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

from protocols.net.connection import connect, place
from protocols.ssh import hostkeys
from protocols.ssh.handshake import LOOK_S, NothingInCommon, Transport
from protocols.ssh.login import Login, LoginFacts
from protocols.ssh.memfiles import MemoryFiles
from protocols.ssh.programs import environment, program, start, stop
from protocols.ssh.words import Said, text_of
from transfer.errors import Busy, DispatchError, Interrupted, TimedOut, Unreachable

# Several times faster than ssh's first choice where the processor has AES instructions; the others stay possible.
FAST_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
ALIVE_COUNT = 3  # unanswered keep-alive messages within the idle timeout
END_S = 5.0  # a program whose output has ended is gone soon
WAY_S = 1.0  # the ssh to a jump host, whose end of the way has closed, is gone within this
PIECE = 65_536
GLOBAL_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")

# Answers for the password alone: neither whether to trust a host, nor with what an expired password shall be replaced.
_ASKPASS = """#!/bin/sh
case "$1" in *yes/no*|*"ew password"*|*"ew UNIX password"*) exit 1 ;; esac
exec cat {path}
"""


class Started:
    """A process of ssh(1), the leader of its own process group.

    Args:
        said: where its words go.
    """

    LOST = 255  # exit code for ssh's own failures (ssh(1)); others are the command's

    def __init__(self, client: SshClient, process: subprocess.Popen[bytes], said: Said) -> None:
        self.client, self.process, self.said = client, process, said

    @property
    def facts(self) -> LoginFacts:
        """What is known about the connection so far."""
        return self.said.facts

    @property
    def words(self) -> str:
        """Why the command has not started, or why the connection broke, in ssh's own words."""
        return self.said.words

    @property
    def errors(self) -> str:
        """What the command wrote to its standard error, and the host's message to everybody."""
        return self.said.stderr

    def send(self, data: bytes, check: Callable[[], None] = lambda: None) -> None:
        """Write bytes to its standard input; if it has ended, reading its output shows that, and why."""
        assert self.process.stdin is not None  # noqa: S101 - for the type checker: it was started with a pipe
        fd = self.process.stdin.fileno()
        os.set_blocking(fd, False)  # a host that hangs takes nothing, for as long as ssh bears with it
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        with suppress(BrokenPipeError):
            while data:
                check()
                if poll.poll(LOOK_S * 1000):
                    with suppress(BlockingIOError):
                        data = data[os.write(fd, data[:PIECE]) :]

    def receive(self, wait_s: float) -> bytes | None:
        """Return the bytes that have arrived, b"" at the end, None if none arrived in time."""
        assert self.process.stdout is not None  # noqa: S101
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(wait_s * 1000):
            return None
        return os.read(self.process.stdout.fileno(), PIECE)

    def end_input(self) -> None:
        """Close its standard input."""
        if self.process.stdin is not None:
            with suppress(OSError):  # it is gone already
                self.process.stdin.close()

    def exit_code(self, wait_s: float = END_S) -> int | None:
        """Return its exit code, 255 for ssh's own failures (ssh(1)); None if it has not ended in time."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(wait_s)
        return None

    def failure(self, *, begun: bool = True) -> DispatchError:
        """Return why the connection, or the login, failed (`Said.failure`); ends the process."""
        if self.exit_code() is None:
            stop(self.process)
        return self.said.failure(self.process.returncode, begun=begun)

    def stop(self) -> None:
        """End the process and everything that it has started."""
        stop(self.process)

    def close(self, wait_s: float = END_S) -> None:
        """Close its input, so that it ends; stop it if it doesn't within `wait_s`."""
        self.end_input()
        self.exit_code(wait_s)
        stop(self.process)


class SshClient:
    """Starts `ssh` for one login. A context manager: its files are removed at the end.

    Entering it decides which keys of the host are accepted; for that it may have to ask the host.

    Args:
        hide: removes from the other side's words what must not show.
        check: called while waiting; may raise to stop.

    Raises:
        Misconfigured: ssh is not installed.
        DispatchError: the host, or the jump host, could not be asked for its key.
    """

    def __init__(
        self, login: Login, hide: Callable[[str], str] = str, check: Callable[[], None] = lambda: None
    ) -> None:
        self.login, self.hide, self.check = login, hide, check
        self._ssh = program("ssh")
        self._files = MemoryFiles()
        self._options: list[str] = []
        self._ways: list[Started] = []
        self.jump = SshClient(login.jump, hide, check) if login.jump else None
        self.env = environment()
        self.keys: tuple[str, ...] = ()  # of the host, that are trusted, as `[@marker ]type base64`

    def __enter__(self) -> SshClient:
        try:
            if self.jump is not None:
                self.jump.__enter__()
                self.env |= {name: self.jump.env[name] for name in ("SSH_AUTH_SOCK",) if name in self.jump.env}
            self._options = [*self._timing(), *self._identity(), *self._trust()]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for way in self._ways:
            way.stop()
        self._files.close()
        if self.jump is not None:
            self.jump.__exit__()

    def file(self, content: bytes = b"", mode: int = 0o600) -> str:
        """Make a private file that lives as long as this client; return its path."""
        return self._files.add(content, mode)

    @contextmanager
    def briefly(self) -> Iterator[None]:
        """Remove, at the end of the block, the files made within it, for a program that has ended by then."""
        mine = len(self._files)
        with self.jump.briefly() if self.jump is not None else nullcontext():
            try:
                yield
            finally:
                self._files.keep(mine)

    # ---- by ssh(1)

    def start(self, command: str, *, subsystem: bool = False) -> Started:
        """Start ssh, to run a command or a subsystem on the host, in a session of its own.

        Args:
            command: goes to the user's login shell there, whichever it is: keep it free of anything to quote.
        """
        argv, said = self.command()
        argv = [*argv, *(["-s"] if subsystem else []), "--", self.login.host, command]
        return Started(self, start(argv, said.errors, self.env), said)

    def command(self, options: Sequence[str] | None = None) -> tuple[list[str], Said]:
        """Return the command line before the host, and the file for its messages.

        Args:
            options: replace those that say whom to trust and who we are.
        """
        fixed = {
            "BatchMode": "no" if self.login.password else "yes",
            "CheckHostIP": "no",
            "Ciphers": FAST_CIPHERS if _has_aes() else "^chacha20-poly1305@openssh.com",
            "ClearAllForwardings": "yes",
            "ControlMaster": "no",
            "ControlPath": "none",
            "EscapeChar": "none",
            "ForwardAgent": "no",
            "GSSAPIAuthentication": "no",
            "HostbasedAuthentication": "no",
            "LogLevel": "DEBUG1",
            "PermitLocalCommand": "no",
            "RequestTTY": "no",
            "UpdateHostKeys": "no",
        }
        given = [f"{name}={value}" for name, value in fixed.items()]
        said = Said(self.login, self.hide, self.file(), self.file())
        if self.jump is not None:
            argv, way = self.jump.command()
            argv += ["-W", place(self.login.host, self.login.port), "--", self.jump.login.host]
            given.append("ProxyCommand=" + shlex.join(argv).replace("%", "%%"))
            said = Said(self.login, self.hide, said.log, said.errors, way)
        argv = [self._ssh, "-F", "/dev/null", "-E", said.log, "-p", str(self.login.port)]
        argv += ["-l", self.login.user] if self.login.user else []
        for option in (*(self._options if options is None else options), *given):
            argv += ["-o", option]
        return argv, said

    # ---- by paramiko

    @contextmanager
    def transport(self, kinds: Sequence[str] = ()) -> Iterator[Transport]:
        """Connect, directly or through the jump host; closed at the end of the block.

        If the connection leads through the jump host, an error within the block gets its reason from there.

        Args:
            kinds: types of host keys, as they are negotiated, in order of preference.
        """
        if self.jump is None:
            sock = connect(self.login.host, self.login.port, self.login.connect_timeout_s, self.check)
            with closing(Transport(sock, self.login.shown, kinds)) as transport:
                yield transport
            return
        sock, way = self.jump.through(self.login.host, self.login.port)
        try:
            with closing(Transport(sock, self.login.shown, kinds)) as transport:
                yield transport
        except (Busy, Interrupted, TimedOut) as exc:
            if way.exit_code(WAY_S) is None and not isinstance(exc, TimedOut):
                raise
            if not way.said.words:
                if way.said.facts.method:  # the jump host passes on what we say: the host is silent
                    raise
                raise type(exc)(f"jump_host {self.jump.login.shown}: has not let us in: {exc.message}") from exc
            raise way.said.failure_of_way(way.process.returncode) from exc
        finally:
            way.stop()

    def through(self, host: str, port: int) -> tuple[socket.socket, Started]:
        """Connect to a host through this one; return a socket that leads there, and the ssh process behind it."""
        ours, its = socket.socketpair()
        argv, said = self.command()
        argv += ["-W", place(host, port), "--", self.login.host]
        with its:
            way = Started(self, start(argv, said.errors, self.env, stdin=its.fileno(), stdout=its.fileno()), said)
        self._ways.append(way)
        return ours, way

    def ask(self, kind: str) -> str | None:
        """Ask the host for its key of a type; return it as `type base64`, None if it has none.

        Raises:
            DispatchError: it gave no answer, which shows nothing about its key.
        """
        names = hostkeys.KINDS[kind]
        try:
            with self.transport(names) as transport:
                return hostkeys.text_of(transport.exchange(self.login.connect_timeout_s, self.check))
        except NothingInCommon as exc:
            if "host key" in exc.message:
                return None
        return self._ask_by_ssh(names)

    def _ask_by_ssh(self, names: Sequence[str]) -> str | None:
        """Ask a host that has no algorithm in common with paramiko."""
        file = self.file()
        options = [
            "StrictHostKeyChecking=accept-new", f"UserKnownHostsFile={file}", "GlobalKnownHostsFile=/dev/null",
            f"HostKeyAlgorithms={','.join(names)}", "PreferredAuthentications=none", *self._timing(),
        ]  # fmt: skip
        argv, said = self.command(options)
        started = Started(self, start([*argv, "--", self.login.host, "true"], said.errors, self.env), said)
        try:
            end = time.monotonic() + 2 * self.login.connect_timeout_s + END_S
            while started.exit_code(0.1) is None and time.monotonic() < end:
                self.check()
            found = hostkeys.known(self.login.host, self.login.port, [Path(file)])
            if found:
                return found[0]
            if "no matching host key" in said.words:
                return None
            raise started.failure()
        finally:
            started.stop()

    # ---- options

    def _timing(self) -> list[str]:
        login = self.login
        return [
            f"ConnectTimeout={math.ceil(login.connect_timeout_s)}",
            f"ServerAliveInterval={max(1, math.floor(login.idle_timeout_s / ALIVE_COUNT))}",
            f"ServerAliveCountMax={ALIVE_COUNT}",
        ]

    def _trust(self) -> list[str]:
        """Decide which host keys are accepted; return the options. ssh must never ask: it would wait for ever."""
        login = self.login
        if login.pins:
            self.keys = hostkeys.resolved(login.host, login.port, login.pins, self.ask)
            text = "".join(hostkeys.line(login.host, login.port, key) for key in self.keys)
            file = self.file(text.encode())
            return ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={file}", "GlobalKnownHostsFile=/dev/null"]
        known = (*login.known_hosts, GLOBAL_KNOWN_HOSTS)
        self.keys = hostkeys.known(login.host, login.port, known)
        if not self.keys and login.accept_new and login.known_hosts:
            key = next((key for kind in hostkeys.KINDS if (key := self.ask(kind))), None)
            if key is None:
                raise Unreachable(f"{login.shown}: the host showed no key")
            hostkeys.learn(login.known_hosts[0], login.host, login.port, key)
            self.keys = (key,)
        files = " ".join(_quoted(file) for file in login.known_hosts) or "/dev/null"
        return ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={files}", "HashKnownHosts=no"]

    def _identity(self) -> list[str]:
        """Return the options that say who we are; put what a password needs into the environment."""
        login = self.login
        options: list[str] = []
        methods = ["publickey"] if login.key or not login.password else []
        if login.key:
            options += [f"IdentityFile={self._files.add(login.key)}", "IdentitiesOnly=yes", "IdentityAgent=none"]
            if login.certificate:
                options.append(f"CertificateFile={self._files.add(login.certificate)}")
        elif not login.password and "SSH_AUTH_SOCK" in os.environ:
            self.env["SSH_AUTH_SOCK"] = os.environ["SSH_AUTH_SOCK"]
        if login.password:
            methods += ["password", "keyboard-interactive"]
            secret = self._files.add(login.password.encode() + b"\n")
            askpass = self._files.add(_ASKPASS.format(path=secret).encode(), 0o700)
            # DISPLAY: releases before 8.4 don't know the REQUIRE, and want a display and no terminal.
            self.env |= {"SSH_ASKPASS": askpass, "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"}
            options.append("NumberOfPasswordPrompts=1")
        return [*options, f"PreferredAuthentications={','.join(methods)}"]


def greeting(sock: socket.socket, where: str, timeout_s: float) -> str:
    """Return a host's first line (RFC 4253 section 4.2), or what it sends instead; "" if it sends nothing.

    Raises:
        Unreachable: the connection broke, or nothing came in time.
    """
    sock.settimeout(timeout_s)
    came, end = b"", time.monotonic() + timeout_s
    try:
        # Other lines may come before it.
        while not re.search(rb"^SSH-.*\n", came, re.MULTILINE) and len(came) < PIECE and time.monotonic() < end:
            piece = sock.recv(PIECE)
            if not piece:
                break
            came += piece
    except OSError as exc:
        if not came:
            said = f"no word within {timeout_s:g} s" if isinstance(exc, TimeoutError) else exc.strerror or exc
            raise Unreachable(f"{where}: {said}") from exc
    lines = text_of(came).splitlines() or [""]
    return next((line for line in lines if line.startswith("SSH-")), lines[0]).strip()


def _quoted(path: Path) -> str:
    """Quote a path for a list in an ssh option (ssh_config(5): double quotes; % begins a token)."""
    text = str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"' if re.search(r"[\s\"\\']", text) else text


def _has_aes() -> bool:
    """Return True if the processor computes AES itself; if not, ssh's own first choice is the faster one."""
    try:
        text = Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return False
    return re.search(r"^(flags|Features)\s*:.*\baes\b", text, re.MULTILINE) is not None
