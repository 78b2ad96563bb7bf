"""A login by paramiko, for checks and for shells.

    the key, the password or the user is refused     Denied, with what to look at
    another key than the trusted ones                NotTrusted, with the fingerprint to pin
    the link breaks, or the host is silent           Interrupted, Busy, TimedOut as in `handshake.py`; never Denied
    no session beside those that there are           Busy

paramiko is not used for what it can't do (`suits`): host certificates and revoked keys, FIDO keys, and the keys that
our own account has in its agent and its folder `.ssh`. There ssh(1) does everything.
"""

from __future__ import annotations

import getpass
import io
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

import paramiko

from protocols.ssh import hostkeys
from protocols.ssh.client import ALIVE_COUNT, END_S, PIECE, SshClient
from protocols.ssh.handshake import LOOK_S, NothingInCommon, Transport
from protocols.ssh.login import LoginFacts, why_denied, why_not_trusted
from protocols.ssh.words import DENIED, ENDED_AT_ONCE, short
from transfer.errors import Busy, Denied, DispatchError, Interrupted, NotTrusted, TimedOut

T = TypeVar("T")

ERRORS_BYTES = 65_536  # of what a command writes to its standard error, its end is kept
KEYS: tuple[type[paramiko.PKey], ...] = (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey)


def suits(client: SshClient) -> bool:
    """Return True if paramiko can do the login of a client that was entered."""
    login = client.login
    if any(key.startswith("@") for key in client.keys):
        return False
    if client.keys and not any(key.split()[0] in hostkeys.KINDS for key in client.keys):
        return False
    return _key(client) is not None if login.key else bool(login.password)


def _key(client: SshClient) -> paramiko.PKey | None:
    """Return our private key with its certificate, None if it is of a type that paramiko doesn't know."""
    for kind in KEYS:
        with suppress(paramiko.SSHException, ValueError, TypeError, IndexError):
            key = kind.from_private_key(io.StringIO(client.login.key.decode("utf-8", "replace")))
            if client.login.certificate:
                key.load_certificate(client.login.certificate.decode("ascii", "replace"))
            return key
    return None


class Account:
    """An account on a host, logged in to from `begin` to `close`."""

    def __init__(self, client: SshClient) -> None:
        self.client = client
        self.facts = LoginFacts()
        self._stack = ExitStack()
        self._transport: Transport = None  # type: ignore[assignment] # until `begin`
        self._ended = threading.Event()
        self._asked = math.inf  # when, for a sign of life

    def begin(self, check: Callable[[], None] = lambda: None) -> None:
        """Connect, check the host's key and log in; `facts` shows how far it got.

        Raises:
            DispatchError: as the table above says.
        """
        try:
            self._connect(check)
            self._authenticate(check)
        except BaseException as exc:
            self._stack.__exit__(type(exc), exc, exc.__traceback__)
            raise
        threading.Thread(target=self._stay_alive, name="ssh-alive", daemon=True).start()

    def _connect(self, check: Callable[[], None]) -> None:
        login = self.client.login
        trusted = {kind for key in self.client.keys if (kind := key.split()[0]) in hostkeys.KINDS}
        kinds = sorted(hostkeys.KINDS, key=lambda kind: kind not in trusted)  # those that are known first
        names = [name for kind in kinds for name in hostkeys.KINDS[kind]]
        self._transport = transport = self._stack.enter_context(self.client.transport(names))
        shown = hostkeys.text_of(transport.exchange(login.connect_timeout_s, check))
        self.facts = LoginFacts(
            key_type=shown.split()[0],
            fingerprint=hostkeys.fingerprint(shown),
            software=transport.remote_version.removeprefix("SSH-2.0-").removeprefix("SSH-1.99-"),
            cipher=str(getattr(transport, "remote_cipher", "")),  # not among the types' stubs
        )
        if shown not in self.client.keys and self.facts.fingerprint not in login.pins:
            raise NotTrusted(why_not_trusted(login, self.facts))

    def close(self) -> None:
        """End the connection and everything that runs over it."""
        self._ended.set()
        self._stack.close()

    @property
    def is_there(self) -> bool:
        """Whether the connection is still there."""
        return self._transport.is_active()

    @property
    def banner(self) -> str:
        """What the host says to everybody who logs in."""
        said = self._transport.get_banner() if self._transport else None
        return (said or b"").decode("utf-8", "replace")

    # ---- login

    def _authenticate(self, check: Callable[[], None]) -> None:
        """Try once each method that the host names; it may want several, one after the other."""
        login = self.client.login
        user = login.user or getpass.getuser()
        ways: dict[str, Callable[[Transport], Sequence[str]]] = {}
        if login.key and (key := _key(self.client)):
            ways["publickey"] = lambda transport: transport.auth_publickey(user, key)
        if login.password:
            ways["password"] = lambda transport: transport.auth_password(user, login.password, fallback=False)
            ways["keyboard-interactive"] = lambda transport: transport.auth_interactive(user, self._answers)
        allowed: Sequence[str] = ()
        tried: list[str] = []
        asked = halfway = False  # on this connection: in vain, or with success but not enough
        while method := next((way for way in ways if way not in tried and way in (allowed or ways)), None):
            tried.append(method)
            transport = self._transport
            transport.auth_timeout = login.connect_timeout_s + login.idle_timeout_s  # hosts make wrong ones wait
            done, failed = self._wait(partial(ways[method], transport), check)
            if done and not done[0]:
                self.facts = replace(self.facts, method=method)
                return
            if done:
                allowed, asked, halfway = done[0], False, True
                continue
            if not transport.is_active() or not isinstance(failed[0], paramiko.AuthenticationException):
                transport.wait_for_end()  # a question that can't be sent means that the link broke, too
            asking = transport.auth_handler
            if asking is not None and asking.is_authenticated():
                self.facts = replace(self.facts, method=method)  # and cut off before paramiko looked
                raise Interrupted(f"{login.shown}: {self.last_words}{ENDED_AT_ONCE}") from failed[0]
            if halfway and not transport.is_active():
                raise NothingInCommon(f"{login.shown}: {self.last_words}") from failed[0]
            if asked and not transport.is_active() and not re.search(DENIED, transport.parting):
                # paramiko asks for the service again with each way, which some hosts take for a fault (asyncssh, Go).
                self._stack.close()
                self._connect(check)
                tried.remove(method)
                asked = False
                continue
            asked = True
            if isinstance(failed[0], paramiko.BadAuthenticationType):
                allowed = failed[0].allowed_types
            elif "timeout" in str(failed[0]):
                raise TimedOut(f"{login.shown}: no answer to the login") from failed[0]
            elif asking is None or asking.get_username():  # which only a host's refusal takes away
                if re.search(DENIED, transport.parting):
                    break
                raise transport.failure() from failed[0]
        words = self._transport.parting or f"Permission denied ({','.join(allowed or tried)})."
        raise Denied(f"{login.shown}: {short(words, self.client.hide)}: {why_denied(login)}")

    def _wait(self, job: Callable[[], T], check: Callable[[], None]) -> tuple[list[T], list[Exception]]:
        """Run a blocking call of paramiko's in its own thread, so that we can be stopped; return result or error."""
        done: list[T] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                done.append(job())
            except Exception as exc:
                failed.append(exc)

        thread = threading.Thread(target=work, name="ssh-login", daemon=True)
        thread.start()
        while thread.is_alive():
            check()
            thread.join(LOOK_S)
        if failed and not isinstance(failed[0], paramiko.SSHException | OSError | EOFError):
            raise failed[0]
        return done, failed

    def _answers(self, title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
        """Answer with the password, but not to a request for a new one when the old one has expired."""
        return ["" if "ew " in text and "password" in text else self.client.login.password for text, _ in prompts]

    def _stay_alive(self) -> None:
        """Ask the host for a sign of life now and then: a script may be silent, but not a host."""
        pause_s = max(1.0, self.client.login.idle_timeout_s / ALIVE_COUNT)
        while not self._ended.wait(pause_s) and self.is_there:
            self._asked = time.monotonic()
            with suppress(Exception):
                self._transport.global_request("keepalive@openssh.com", wait=True)
            self._asked = math.inf

    def look(self) -> None:
        """Close the connection if the host has not answered for too long."""
        if time.monotonic() - self._asked > self.client.login.idle_timeout_s:
            self._transport.close()

    @property
    def last_words(self) -> str:
        """Return the error with which the connection ended."""
        return short(self._transport.parting, self.client.hide) or "the connection broke"

    # ---- commands

    def start(self, command: str, check: Callable[[], None] = lambda: None) -> Command:
        """Start a command in the account's login shell.

        Raises:
            Busy: the host gives no further session.
            Interrupted, TimedOut: the connection broke, or the host doesn't answer.
        """
        login = self.client.login
        got, failed = self._wait(partial(self._transport.open_session, timeout=login.idle_timeout_s), check)
        if not got:
            if isinstance(failed[0], paramiko.ChannelException):
                raise Busy(f"{login.shown}: the host gives no session: {failed[0].text}") from failed[0]
            if "imeout" in str(failed[0]):
                raise TimedOut(f"{login.shown}: no answer to the request for a session") from failed[0]
            raise Interrupted(f"{login.shown}: {self.last_words}{ENDED_AT_ONCE}") from failed[0]
        channel = got[0]
        _, failed = self._wait(partial(channel.exec_command, command), check)
        broke = failed and (isinstance(failed[0], OSError | EOFError) or self._transport.parting)
        return Command(self, channel, "exec request failed" if failed and not broke and self.is_there else "")


class Command:
    """A command that runs on a host; the counterpart of `Started`, a process of ssh(1).

    Args:
        words: why it was not started.
    """

    LOST = None  # exit code where the link broke

    def __init__(self, account: Account, channel: paramiko.Channel, words: str) -> None:
        self.account, self.client, self.words = account, account.client, words
        self._channel = channel
        self._errors = bytearray()

    @property
    def facts(self) -> LoginFacts:
        return self.account.facts

    @property
    def errors(self) -> str:
        """The last bytes of its standard error."""
        self._hear()
        return self._errors.decode("utf-8", "replace").replace("\r", "")

    def _hear(self) -> None:
        with self._noticing():
            while self._channel.recv_stderr_ready():
                self._errors += self._channel.recv_stderr(PIECE)
                del self._errors[:-ERRORS_BYTES]

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Close a connection that nothing can be written to any more: paramiko raises, and would go on reading.

        It writes while it reads, too, namely that there is room for more.
        """
        try:
            yield
        except EOFError:
            self.stop()

    def send(self, data: bytes, check: Callable[[], None] = lambda: None) -> None:
        """Write bytes to its standard input; if it has ended, reading its output shows that, and why."""
        self._channel.settimeout(LOOK_S)
        end = time.monotonic() + self.client.login.idle_timeout_s
        with suppress(OSError), self._noticing():
            while data:
                check()
                try:
                    count = self._channel.send(data)
                except TimeoutError:
                    if time.monotonic() > end:
                        raise TimedOut(f"{self.client.login.shown}: it reads nothing") from None
                    continue
                if not count:
                    return
                data, end = data[count:], time.monotonic() + self.client.login.idle_timeout_s

    def receive(self, wait_s: float) -> bytes | None:
        """Return the bytes that have arrived, b"" at the end, None if none arrived in time."""
        self._hear()
        self.account.look()
        self._channel.settimeout(wait_s)
        try:
            with self._noticing():
                return self._channel.recv(PIECE)
        except TimeoutError:
            return None
        return b""

    def end_input(self) -> None:
        """Close its standard input."""
        with suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.shutdown_write()

    def exit_code(self, wait_s: float = END_S) -> int | None:
        """Return its exit code, -1 if a signal ended it; None if it has not ended in time, or the link broke."""
        end = time.monotonic() + wait_s
        while not self._channel.exit_status_ready() and self.account.is_there and time.monotonic() < end:
            time.sleep(LOOK_S / 5)
        code = self._channel.recv_exit_status() if self._channel.exit_status_ready() else None
        return None if code == -1 and not self.account.is_there else code

    def failure(self, *, begun: bool = True) -> DispatchError:
        """Return why the connection broke."""
        advice = "" if begun else ENDED_AT_ONCE
        return Interrupted(f"{self.client.login.shown}: {self.account.last_words}{advice}")

    def stop(self) -> None:
        """End the connection; the host ends what reads from it."""
        self.account.close()

    def close(self, wait_s: float = END_S) -> None:
        """Close its input, so that it ends; stop it if it doesn't within `wait_s`."""
        self.end_input()
        self.exit_code(wait_s)
        self.stop()
