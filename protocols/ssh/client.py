"""SSH by the system's own client: one way in for rsync, SFTP and scripts, so one place for trust and login.

    with Client(login) as client:
        started = client.start("sftp", subsystem=True)      # a process; `started.failure()` says why it ended
        with Shell(client) as shell: ...                    # shell.py

No file of the user's or the system's ssh configuration is read (`-F /dev/null`); every option that matters is given.
Secrets reach ssh through files in memory (`memfiles.py`) whose paths say nothing; keys are decrypted first
(`keys.py`). ssh's own words go to a log in memory as well: they say which key the host showed, how we
were let in, and why not.

Why not a library: measured on one large file, paramiko and asyncssh reach half to nine tenths of the speed of OpenSSH's
sftp at two to three times its CPU, and rsync needs the system's ssh anyway (docs/performance.md).
"""

from __future__ import annotations

import math
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from protocols.ssh import hostkeys
from protocols.ssh.memfiles import MemoryFiles, tail
from protocols.ssh.programs import environment, program, start, stop
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotTrusted, TimedOut, Unreachable

# Several times faster than ssh's first choice where the processor has AES instructions; the others stay possible.
FAST_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
ALIVE_COUNT = 3  # unanswered keep-alive messages within the idle timeout
WORDS_CHARS = 400  # of a program's own words in a message of ours
END_S = 5.0  # a program whose output has ended is gone soon

# ssh's words before and after login; the first pattern that fits counts. Source: OpenSSH, ssh(1) exits with 255 for
# every error of its own and tells them apart only in words, which it never translates.
ERRORS: tuple[tuple[str, type[DispatchError]], ...] = (
    (r"Host key verification failed|HOST IDENTIFICATION HAS CHANGED|host key is known for|revoked host key",
     NotTrusted),
    (r"Permission denied \(|Too many authentication failures|No more authentication methods|Account.*(locked|expired)"
     r"|password has expired", Denied),
    (r"Not allowed at this time|MaxStartups", Busy),
    (r"(kex|ssh)_exchange_identification: .*([Cc]losed|reset)", Busy),
    (r"(kex|ssh)_exchange_identification", Misconfigured),
    (r"banner exchange: .*invalid|Bad remote protocol version|Protocol major versions differ", Misconfigured),
    (r"[Tt]imed out during banner exchange|Connection to \S+ port \d+ timed out", TimedOut),
    (r"Unable to negotiate|no matching .* found|Bad configuration option|Bad SSH2 cipher|unknown key type",
     Misconfigured),
    (r"Could not resolve hostname|[Cc]onnect to host .* port \d+:|No route to host|Connection refused", Unreachable),
    (r"[Ss]ubsystem request failed|exec request failed|shell request failed", Misconfigured),
    (r"Timeout, server .* not responding", TimedOut),
    (r"administratively prohibited|open failed|Session open refused", Busy),
    (r"[Cc]onnection (reset|closed|aborted)|Broken pipe|[Dd]isconnect(ed|ing)?|Corrupted|message authentication code",
     Interrupted),
)  # fmt: skip
BUSY = 2  # the entry above with what a server says before it hangs up on one client too many
_NOISE = re.compile(r"debug\d: |OpenSSH_|Authenticated to |Warning: Permanently added|Transferred: |Bytes per second")
_HOST_KEY = re.compile(r"Server host (?:key|certificate): (\S+) (SHA256:\S+)")
_METHOD = re.compile(r"Authenticated to .* using \"([\w-]+)\"|Authentication succeeded \(([\w-]+)\)")
_SOFTWARE = re.compile(r"remote software version (.+)")
_NO_SSH = re.compile(r"exchange_identification: banner line \d+: (.*)")  # what came instead of SSH's first line
_CIPHER = re.compile(r"kex: client->server cipher: (\S+)")

# Answers for the password alone: neither whether to trust a host, nor with what an expired password shall be replaced.
_ASKPASS = """#!/bin/sh
case "$1" in *yes/no*|*"ew password"*|*"ew UNIX password"*) exit 1 ;; esac
exec cat {path}
"""


@dataclass(frozen=True)
class Login:
    """Whose door, and what opens it.

    Attributes:
        user: "" for the name of the account that we run under.
        key: a private key in a form that needs no passphrase (`private_key`), b"" for none.
        certificate: the certificate that belongs to the key, as ssh-keygen -s makes it.
        pins: the host keys to trust (`hostkeys.py`); without any, those that are known.
        accept_new: whether a host of which no key is known yet is trusted, and its key kept.
        known_hosts: files of known keys; the first is where a new one is kept.
        connect_timeout_s: for the connection, and again for the handshake.
        idle_timeout_s: silence after which the host counts as hung.
    """

    host: str
    port: int = 22
    user: str = ""
    key: bytes = field(default=b"", repr=False)
    certificate: bytes = field(default=b"", repr=False)
    password: str = field(default="", repr=False)
    pins: tuple[str, ...] = ()
    accept_new: bool = False
    known_hosts: tuple[Path, ...] = ()
    connect_timeout_s: float = 10
    idle_timeout_s: float = 60

    @property
    def shown(self) -> str:
        """User, host and port for messages."""
        return f"{self.user}@{self.host}:{self.port}" if self.user else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Facts:
    """What ssh told of a connection: "" where it did not get so far."""

    key_type: str = ""
    fingerprint: str = ""
    method: str = ""
    software: str = ""
    cipher: str = ""


class Started:
    """A process that runs over SSH: `ssh` itself, or a program that has started it.

    Args:
        process: leads its own process group.
        log: where ssh keeps its words.
        errors: where the other side's standard error goes.
    """

    def __init__(self, client: Client, process: subprocess.Popen[bytes], log: str, errors: str) -> None:
        self.client, self.process, self._log, self._errors = client, process, log, errors

    @property
    def facts(self) -> Facts:
        """What is known of the connection so far."""
        text = _text(tail(self._log))
        key, method = _HOST_KEY.search(text), _METHOD.search(text)
        software, cipher = _SOFTWARE.search(text), _CIPHER.search(text)
        return Facts(
            *((key[1], key[2]) if key else ("", "")),
            method=(method[1] or method[2]) if method else "",
            software=software[1].strip() if software else "",
            cipher=cipher[1] if cipher else "",
        )

    @property
    def words(self) -> str:
        """ssh's own words, without what it says when all is well."""
        lines = (line.strip() for line in _text(tail(self._log)).splitlines())
        return " ".join(line for line in lines if line and not _NOISE.match(line) and not set(line) <= {"@", " "})

    @property
    def errors(self) -> str:
        """What the other side, or the program, wrote to its standard error."""
        return _text(tail(self._errors))

    def failure(self) -> DispatchError:
        """Return why the connection, or the login, failed; ends the process.

        Outcomes: NotTrusted (host key), Denied (login), Unreachable, TimedOut, Busy, Interrupted, Misconfigured.
        """
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            stop(self.process)
        login, words, facts = self.client.login, self.words, self.facts
        came = _NO_SSH.search(_text(tail(self._log)))
        text = f"{words}\n{self.errors}\n{came[1] if came else ''}"
        kind = next((error for pattern, error in ERRORS if re.search(pattern, text)), None)
        if kind is NotTrusted:
            return NotTrusted(_why_not_trusted(login, facts, words))
        if kind is Busy and came and not facts.software and not re.search(ERRORS[BUSY][0], came[1]):
            return Misconfigured(f"{login.shown}: what answers is not SSH: {short(came[1], self.client.hide)}")
        if kind is None or (kind is Busy and facts.method):
            kind = Interrupted if facts.method else Unreachable
        said = words or self.errors.strip() or f"ssh ended with exit code {self.process.returncode}"
        advice = f": {_why_denied(login)}" if kind is Denied else ""
        return kind(f"{login.shown}: {short(said, self.client.hide)}{advice}")

    def stop(self) -> None:
        """End the process and what it has started."""
        stop(self.process)

    def close(self, wait_s: float = END_S) -> None:
        """Let it end by closing its input; stop it if it doesn't within `wait_s`."""
        if self.process.stdin is not None:
            with suppress(OSError):  # it is gone already
                self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_s)
        stop(self.process)


class Client:
    """Starts `ssh` for one login. A context manager: what it has put into files is gone at its end.

    Args:
        hide: takes out of the other side's words what must not show.

    Raises:
        Misconfigured: ssh is not installed.
    """

    def __init__(self, login: Login, hide: Callable[[str], str] = str) -> None:
        self.login, self.hide = login, hide
        self._ssh = program("ssh")
        self._files = MemoryFiles()
        self._options: list[str] = []
        self.env = environment()

    def __enter__(self) -> Client:
        try:
            self._options = [*self._timing(), *self._trust(), *self._identity()]
        except BaseException:
            self._files.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()

    def file(self, content: bytes = b"") -> str:
        """Make a private file that lives as long as this client; return its path."""
        return self._files.add(content)

    def _argv(self, log: str) -> list[str]:
        """Return the command up to, and without, the host."""
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
        argv = [self._ssh, "-F", "/dev/null", "-E", log, "-p", str(self.login.port)]
        argv += ["-l", self.login.user] if self.login.user else []
        for option in (*self._options, *given):
            argv += ["-o", option]
        return argv

    def start(self, command: str, *, subsystem: bool = False) -> Started:
        """Start ssh, to run a command or a subsystem on the host, in a session of its own.

        Args:
            command: goes to the user's login shell there, whichever it is: keep it free of anything to quote.
        """
        log, errors = self.file(), self.file()
        argv = [*self._argv(log), *(["-s"] if subsystem else []), "--", self.login.host, command]
        return Started(self, start(argv, errors, self.env), log, errors)

    def _timing(self) -> list[str]:
        login = self.login
        return [
            f"ConnectTimeout={math.ceil(login.connect_timeout_s)}",
            f"ServerAliveInterval={max(1, math.floor(login.idle_timeout_s / ALIVE_COUNT))}",
            f"ServerAliveCountMax={ALIVE_COUNT}",
        ]

    def _trust(self) -> list[str]:
        """Return the options that say which host keys are good. ssh never asks: it would wait for ever."""
        login = self.login
        if login.pins:
            text = hostkeys.known_hosts(login.host, login.port, login.pins, login.connect_timeout_s)
            file = self._files.add(text.encode())
            return ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={file}", "GlobalKnownHostsFile=/dev/null"]
        # Under accept-new, ssh takes a key of another type than the known one for new; to us the host has changed.
        learn = login.accept_new and not any(hostkeys.is_known(login.host, login.port, f) for f in login.known_hosts)
        if learn and login.known_hosts:
            login.known_hosts[0].parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            login.known_hosts[0].touch(mode=0o600)
        files = " ".join(_quoted(file) for file in login.known_hosts) or "/dev/null"
        return [
            f"StrictHostKeyChecking={'accept-new' if learn else 'yes'}",
            f"UserKnownHostsFile={files}",
            "HashKnownHosts=no",
        ]

    def _identity(self) -> list[str]:
        """Return the options that say who we are, and put what a password needs into the environment."""
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
    """Return the host's first line (RFC 4253 section 4.2), "" if it says none.

    Raises:
        Unreachable: it does not come in time, or the connection breaks.
    """
    sock.settimeout(timeout_s)
    line = b""
    end = time.monotonic() + timeout_s
    try:
        while b"\n" not in line and len(line) < 255 and time.monotonic() < end:
            piece = sock.recv(255)
            if not piece:
                break
            line += piece
    except TimeoutError as exc:
        raise Unreachable(f"{where}: no word within {timeout_s:g} s") from exc
    except OSError as exc:
        raise Unreachable(f"{where}: {exc.strerror or exc}") from exc
    return _text(line.split(b"\n")[0]).strip()


def short(text: str, hide: Callable[[str], str] = str) -> str:
    """Cut foreign words to a length that a message bears, on one line.

    Args:
        hide: takes out what must not show; called first, because it would not know the half of it that a cut leaves.
    """
    text = " ".join(hide(text).split())
    return text if len(text) <= WORDS_CHARS else text[: WORDS_CHARS - 1] + "…"


def quote(value: str) -> str:
    """Quote a value for a POSIX shell, byte for byte.

    Raises:
        Misconfigured: it holds a NUL, which no argument can.
    """
    if "\0" in value:
        raise Misconfigured("a path must not hold a NUL character")
    return shlex.quote(value)


def _why_not_trusted(login: Login, facts: Facts, words: str) -> str:
    shown = f"{facts.key_type} {facts.fingerprint}" if facts.fingerprint else "a key"
    where = f"{login.host}:{login.port}"
    if "revoked" in words:
        return f"{where}: the host shows {shown}, which is marked as revoked: the host must get a new key"
    if login.pins:
        change = f". If the change is wanted, set host_key to {facts.fingerprint}" if facts.fingerprint else ""
        return f"{where}: the host shows {shown}, which is not the pinned host_key{change}"
    if any(hostkeys.is_known(login.host, login.port, file) for file in login.known_hosts):
        files = " or ".join(str(file) for file in login.known_hosts)
        return (
            f"{where}: the host key has CHANGED: the host shows {shown}, another one is known. If the change is "
            f"wanted, set host_key to the new fingerprint, or remove the old key: "
            f"ssh-keygen -R '{hostkeys.pattern(login.host, login.port)}' -f {files}"
        )
    if not facts.fingerprint:
        return f"{where}: the host key is not trusted: {short(words)}"
    return (
        f"{where}: the host key is unknown: {shown}. If that is the server's (its administrator sees it with "
        f"ssh-keygen -lf), set host_key to {facts.fingerprint}"
    )


def _why_denied(login: Login) -> str:
    """What to look at where the host lets nobody in with what we have."""
    if login.key and login.password:
        return "it takes neither this private_key nor this password for this user"
    if login.key:
        return "it does not take this private_key: its public key must be among the account's authorized_keys"
    if login.password:
        return "it does not take this user with this password"
    return "set private_key or password: the account that Talaria runs under has no key that the host takes"


def _quoted(path: Path) -> str:
    """Quote a path for a list in an ssh option (ssh_config(5): double quotes; % begins a token)."""
    text = str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"' if re.search(r"[\s\"\\']", text) else text


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").replace("\r", "")


def _has_aes() -> bool:
    """Tell whether the processor computes AES itself; without, ssh's own first choice is the faster one."""
    try:
        text = Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return False
    return re.search(r"^(flags|Features)\s*:.*\baes\b", text, re.MULTILINE) is not None
