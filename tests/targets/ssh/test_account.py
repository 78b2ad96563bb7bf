"""What paramiko carries, and what ssh(1): logins, host keys, shells; how each of them names what goes wrong."""

from __future__ import annotations

import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

import paramiko
import pytest

from blocks.rsync import RsyncTarget
from blocks.sftp import SftpTarget
from blocks.ssh import HostKeyPolicy, SshTarget
from protocols.ssh.account import Account, suits
from protocols.ssh.client import SshClient
from protocols.ssh.login import Login
from talaria.testing import process, studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded
from talaria.testing.relay import relay
from tasks import DRIVERS
from tasks.ssh import login
from tests.servers.openssh import IS_ROOT, Server, make_key, openssh, public, shared, temporary_user
from tests.targets.remote_folder import ssh_target
from transfer.errors import (
    Busy,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    NotTrusted,
    Retryable,
    TimedOut,
    Unreachable,
)
from transfer.receipt import PushReport, State

pytestmark = pytest.mark.usefixtures("empty_state")
LOCKED = "Accounts are locked after 3 failures. Permission denied (publickey). Host key verification failed."


def target(kind: type[SshTarget], server: Server, folder: Path, **more: object) -> SshTarget:
    folder.mkdir(exist_ok=True)
    return ssh_target(kind, server, folder, **more)


def study(tmp_path: Path, count: int = 2) -> Path:
    if not (tmp_path / "study").exists():
        studies.ct(tmp_path / "study", count)
    return tmp_path / "study"


# ---- what paramiko carries


@contextmanager
def recorded() -> Iterator[list[tuple[str, ...]]]:
    """Note what paramiko is really asked to do, and let it do that."""
    calls: list[tuple[str, ...]] = []
    connects, logs_in, runs = (
        paramiko.Transport.start_client,
        paramiko.Transport.auth_publickey,
        paramiko.Channel.exec_command,
    )

    def start_client(self: paramiko.Transport, *arguments: object, **named: object) -> None:
        calls.append(("keys", self.get_security_options().key_types[0]))
        connects(self, *arguments, **named)  # type: ignore[arg-type]

    def auth_publickey(self: paramiko.Transport, *arguments: object, **named: object) -> object:
        calls.append(("login",))
        return logs_in(self, *arguments, **named)  # type: ignore[arg-type]

    def exec_command(self: paramiko.Channel, command: str) -> None:
        calls.append(("run", command))
        runs(self, command)

    with (
        mock.patch.object(paramiko.Transport, "start_client", start_client),
        mock.patch.object(paramiko.Transport, "auth_publickey", auth_publickey),
        mock.patch.object(paramiko.Channel, "exec_command", exec_command),
    ):
        yield calls


def test_paramiko_asks_for_the_pinned_key_by_one_connection_for_each_type(tmp_path: Path) -> None:
    server = shared()
    one = target(SftpTarget, server, tmp_path / "in", host_key=server.fingerprints[1])  # of the RSA key
    with recorded() as calls:
        assert attempt(one, study(tmp_path)).require().state is State.DELIVERED
        assert calls == [("keys", "ssh-ed25519"), ("keys", "ecdsa-sha2-nistp256"), ("keys", "rsa-sha2-512")]
        calls.clear()
        assert attempt(one, study(tmp_path)).require().state is State.DELIVERED
        assert not calls, "once found, the key is known"


def test_paramiko_runs_the_shell_of_a_push_and_rsync_uses_ssh(tmp_path: Path) -> None:
    one = target(RsyncTarget, shared(), tmp_path / "in", verify="proven")
    with recorded() as calls:
        assert attempt(one, study(tmp_path)).require().state is State.DELIVERED
    assert calls == [("keys", "ssh-ed25519"), ("login",), ("run", "sh -s")], "one login, one channel, all scripts"


def test_paramiko_logs_in_for_checks_and_runs_hooks(kind: type[SshTarget], tmp_path: Path) -> None:
    one = target(kind, shared(), tmp_path / "in", on_complete=True)
    script = tmp_path / "in" / "mercure_complete.sh"
    script.write_text("#!/bin/sh\necho done\n")
    script.chmod(0o755)
    with recorded() as calls:
        health = DRIVERS.of(one).check(one)
        assert health.ok, health.to_json("x")
        assert ("login",) in calls
        sent = attempt(one, study(tmp_path))
        calls.clear()
        hook = DRIVERS.of(one).hook
        assert hook is not None
        assert hook(one, sent.plan, PushReport(), set()).output == "done\n"
    assert calls == [("keys", "ssh-ed25519"), ("login",), ("run", "sh -s")]


@pytest.mark.parametrize("kinds", [("ed25519",), ("rsa",), ("ecdsa", "rsa")], ids="+".join)
def test_what_paramiko_has_learned_ssh_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "state"))  # a path that needs no quoting for ssh below
    with openssh(tmp_path / "sshd", kinds=kinds) as server:
        one = target(
            SftpTarget, server, tmp_path / "in", host_key="", host_key_policy=HostKeyPolicy.ACCEPT_NEW
        )  # fmt: skip
        with recorded() as calls:
            assert attempt(one, study(tmp_path)).require().state is State.DELIVERED
        assert calls, "paramiko was not asked"
        known = tmp_path / "state" / "known_hosts"
        assert [line.split()[0] for line in known.read_text().splitlines()] == [f"[127.0.0.1]:{server.port}"]
        argv = [
            "ssh", "-F", "/dev/null", "-i", str(server.key), "-o", f"UserKnownHostsFile={known}",
            "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-p", str(server.port),
            f"{server.user}@127.0.0.1", "true",
        ]  # fmt: skip
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


# ---- what ssh(1) carries


def test_hosts_with_certificates_are_for_ssh(kind: type[SshTarget], tmp_path: Path) -> None:
    authority, host = make_key(tmp_path / "authority"), make_key(tmp_path / "host")
    argv = ["ssh-keygen", "-q", "-s", str(authority), "-I", "host", "-h", "-n", "127.0.0.1", f"{host}.pub"]
    subprocess.run(argv, check=True)
    with openssh(tmp_path / "sshd", kinds=(), more=f"HostKey {host}\nHostCertificate {host}-cert.pub") as server:
        one = target(kind, server, tmp_path / "in", host_key=f"@cert-authority * {public(authority)}")
        with recorded() as calls:
            assert DRIVERS.of(one).check(one).ok
            assert attempt(one, study(tmp_path)).require().state is State.DELIVERED
        assert not calls


def test_a_key_of_hardware_is_for_ssh(tmp_path: Path) -> None:
    what = "OPENSSH PRIVATE KEY-----"
    key = f"-----BEGIN {what}\nAAAA of type sk-ssh-ed25519@openssh.com\n-----END {what}\n".encode()
    with SshClient(Login("h", key=key, pins=(public(make_key(tmp_path / "k")),))) as client:
        assert not suits(client)
    with SshClient(Login("h", key=shared().key.read_bytes(), pins=(public(make_key(tmp_path / "l")),))) as client:
        assert suits(client)


@pytest.mark.parametrize("pin", [True, False], ids=["fingerprint", "accept-new"])
def test_a_host_with_algorithms_that_only_ssh_knows(kind: type[SshTarget], tmp_path: Path, pin: bool) -> None:
    with openssh(tmp_path / "sshd", more="Ciphers chacha20-poly1305@openssh.com") as server:
        one = target(
            kind, server, tmp_path / "in", host_key=server.fingerprints[1] if pin else "",
            host_key_policy=HostKeyPolicy.ACCEPT_NEW,
        )  # fmt: skip
        assert DRIVERS.of(one).check(one).ok
        assert attempt(one, study(tmp_path)).require().state is State.DELIVERED


# ---- a question that failed is no answer


@contextmanager
def peer(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve each connection in a thread; yields the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def one(sock: socket.socket) -> None:
        with sock, suppress(OSError):
            serve(sock)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize("words", [b"", b"Not allowed at this time\r\n", b"Exceeded MaxStartups\r\n"])
def test_a_host_that_hangs_up_before_it_shows_a_key_is_busy(
    kind: type[SshTarget], tmp_path: Path, words: bytes
) -> None:
    server = shared()
    with peer(lambda sock: sock.sendall(words) if words else None) as port:
        one = target(kind, server, tmp_path / "in", port=port, host_key=server.fingerprints[0])
        error = attempt(one, study(tmp_path)).error
        assert isinstance(error, Busy), repr(error)
        assert server.fingerprints[0] not in error.message
        health = DRIVERS.of(one).check(one)
        assert isinstance(health.error, Retryable | Misconfigured)


def test_a_question_that_is_dropped_says_nothing_of_the_key(kind: type[SshTarget], tmp_path: Path) -> None:
    """sshd drops clients at random above MaxStartups: here each one, as long as some do not log in.

    It may count a question, and the logins that follow, together, for a while: there is room for those.
    """
    with openssh(tmp_path / "sshd", more="MaxStartups 3:100:3") as server, ExitStack() as idlers:
        one = target(kind, server, tmp_path / "in", host_key=server.fingerprints[1])
        counted = 0

        def full() -> bool:
            nonlocal counted
            idler = idlers.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            with suppress(OSError):  # the connection that saw the server begin may still count
                counted += idler.recv(4) == b"SSH-"
            return counted == 3

        process.until(full)
        error = attempt(one, study(tmp_path)).error
        assert isinstance(error, Retryable), repr(error)
        assert server.fingerprints[1] not in error.message
        idlers.close()
        sent: list[Sent] = []

        def goes_on() -> bool:
            sent.append(attempt(one, study(tmp_path)))
            return not isinstance(sent[-1].error, Retryable)

        process.until(goes_on)
        assert sent[-1].require().state is State.DELIVERED


def test_several_hosts_of_one_name_are_never_called_a_changed_key(kind: type[SshTarget], tmp_path: Path) -> None:
    """Where a name leads here and there, one host is asked for its key, and another one logged in to."""
    with openssh(tmp_path / "a", kinds=("ed25519",)) as a, openssh(tmp_path / "b", kinds=("ed25519",), key=a.key) as b:
        turn = iter([a.port] + [b.port] * 100)
        one = target(kind, a, tmp_path / "in", host_key=f"{a.fingerprints[0]}\n{b.fingerprints[0]}")
        with peer(lambda sock: carry(sock, next(turn))) as port:
            one.port = port
            errors = [attempt(one, study(tmp_path)).error for _ in range(3)]
        assert all(error is None or isinstance(error, Retryable) for error in errors), errors
        assert errors[-1] is None


def carry(sock: socket.socket, port: int, first: bytes = b"", cut_after: int | None = None) -> None:
    """Carry a connection to a port of this machine; cut it after so many bytes from the client."""
    with socket.create_connection(("127.0.0.1", port)) as other:
        sock.sendall(first)

        def back() -> None:
            with suppress(OSError):
                while piece := other.recv(65_536):
                    sock.sendall(piece)
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=back, daemon=True).start()
        while piece := sock.recv(65_536):
            if cut_after is not None:
                cut_after -= len(piece)
                if cut_after < 0:
                    return
            other.sendall(piece)


# ---- what a host says to everybody


@pytest.mark.parametrize("where", ["banner", "before its first line"])
def test_words_for_everybody_are_no_answer_to_us(kind: type[SshTarget], tmp_path: Path, where: str) -> None:
    (tmp_path / "banner").write_text(LOCKED + "\n" + "No space left on device\n")
    more, first = ("", (LOCKED + "\r\n").encode()) if where != "banner" else (f"Banner {tmp_path}/banner", b"")
    studies.multiframe(tmp_path / "study" / "large.dcm", 40)
    with openssh(tmp_path / "sshd", more=more) as server:
        with peer(lambda sock: carry(sock, server.port, first, 6_000_000)) as port:
            one = target(kind, server, tmp_path / "in", port=port, host_key=server.fingerprints[0])
            error = attempt(one, tmp_path / "study").error
            assert isinstance(error, Interrupted), repr(error)
        with peer(lambda sock: carry(sock, server.port, first)) as port:
            one.port = port
            health = DRIVERS.of(one).check(one)
            assert health.ok, health.to_json("x")
            assert attempt(one, tmp_path / "study").require().state is State.DELIVERED


def test_a_host_that_closes_at_once_is_not_called_something_else(kind: type[SshTarget], tmp_path: Path) -> None:
    with peer(lambda sock: None) as port:
        health = DRIVERS.of(one := target(kind, shared(), tmp_path, port=port)).check(one)
    assert isinstance(health.error, Busy) and "closed the connection before its first line" in health.error.message


def failing_rsync(tmp_path: Path, script: str) -> str:
    """Return the line of sshd's settings by which the server's rsync is a shell script."""
    (tmp_path / "bin").mkdir()
    fails = tmp_path / "bin" / "rsync"
    fails.write_text(f"#!/bin/sh\n{script}\n")
    fails.chmod(0o755)
    return f'ForceCommand PATH={tmp_path}/bin:$PATH sh -c "$SSH_ORIGINAL_COMMAND"'


def test_a_banner_is_not_what_rsync_says(tmp_path: Path) -> None:
    (tmp_path / "banner").write_text("Who says Permission denied, or No space left on device?\n")
    fails = failing_rsync(tmp_path, "echo 'its own words' >&2\nexit 12")
    with openssh(tmp_path / "sshd", more=f"Banner {tmp_path}/banner\n{fails}") as server:
        error = attempt(target(RsyncTarget, server, tmp_path / "in"), study(tmp_path)).error
        assert isinstance(error, Interrupted), repr(error)
        assert "its own words" in error.message and "Who says" not in error.message


def test_the_end_of_a_long_text_is_kept(tmp_path: Path) -> None:
    fails = failing_rsync(tmp_path, "seq 1 1000 >&2; echo 'write failed: No space left on device' >&2\nexit 11")
    with openssh(tmp_path / "sshd", more=fails) as server:
        error = attempt(target(RsyncTarget, server, tmp_path / "in"), study(tmp_path)).error
        assert error is not None and "No space left on device" in error.message
        assert len(error.message) < 600


@pytest.mark.skipif(not IS_ROOT, reason="only root may have sshd change the root of an account")
def test_a_chroot_of_the_wrong_owner_is_named(kind: type[SshTarget], tmp_path: Path) -> None:
    with ExitStack() as stack:
        # Not below pytest's own folder, which is closed to others.
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="talaria-chroot-")))
        place.chmod(0o755)
        user = stack.enter_context(temporary_user(place / "home"))
        more = f"ChrootDirectory {place}/home\nForceCommand internal-sftp"
        server = stack.enter_context(openssh(place / "sshd", user=user, more=more))
        one = target(kind, server, tmp_path / "in")
        error = attempt(one, study(tmp_path)).error
        assert isinstance(error, Interrupted), repr(error)
        assert "ChrootDirectory" in error.message
        health = DRIVERS.of(one).check(one)
        assert "ChrootDirectory" in str(health.error)
        assert next(probe for probe in health.probes if probe.name == "authenticate").result == "ok"


# ---- paramiko's errors


def begin(port: int, **more: object) -> Account:
    """Log in by paramiko, whatever the host."""
    server = shared()
    fields: dict[str, object] = {
        "host": "127.0.0.1", "port": port, "user": server.user, "key": server.key.read_bytes(),
        "pins": server.host_keys[:1], "connect_timeout_s": 1, "idle_timeout_s": 3,
    }  # fmt: skip
    with SshClient(Login(**(fields | more))) as client:  # type: ignore[arg-type]
        one = Account(client)
        one.begin()
        return one


def silent(sock: socket.socket) -> None:
    sock.recv(1)
    threading.Event().wait(20)


def first_line_only(sock: socket.socket) -> None:
    sock.sendall(b"SSH-2.0-Stopped\r\n")
    silent(sock)


def http(sock: socket.socket) -> None:
    sock.recv(1000)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def old(sock: socket.socket) -> None:
    sock.sendall(b"SSH-1.5-Old\r\n")
    silent(sock)


def test_a_host_that_stops_after_its_first_line_is_timed_out() -> None:
    """paramiko's start_client returns without an error, if it is given a time to wait."""
    with peer(first_line_only) as port:
        sock = socket.create_connection(("127.0.0.1", port))
        transport = paramiko.Transport(sock)
        transport.start_client(timeout=1)  # the trap: this is as if all were well
        transport.close()
        begun = time.monotonic()
        with pytest.raises(TimedOut, match="handshake"):
            begin(port)
        assert time.monotonic() - begun < as_loaded(15)


@pytest.mark.parametrize(
    ("serve", "error", "words"),
    [(silent, TimedOut, "says nothing"), (http, Misconfigured, "not SSH: HTTP/1.1 400"), (old, Misconfigured, "1.5")],
    ids=["silent", "http", "ssh-1"],
)
def test_what_is_no_ssh_is_named(serve: Callable[[socket.socket], None], error: type, words: str) -> None:
    with peer(serve) as port, pytest.raises(error, match=words):
        begin(port)


def test_a_closed_port_is_unreachable_and_another_key_is_not_trusted(tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        begin(process.free_port())
    with pytest.raises(NotTrusted, match=re.escape(shared().fingerprints[0])):
        begin(shared().port, pins=(public(make_key(tmp_path / "other")),))


def test_a_login_that_is_cut_is_not_denied() -> None:
    """paramiko calls a link that breaks during the login a failed one."""
    with relay(shared().port) as link:
        real = paramiko.Transport.auth_publickey

        def cut(self: paramiko.Transport, *arguments: object) -> object:
            link.cut_after = link.sent
            return real(self, *arguments)  # type: ignore[arg-type]

        with mock.patch.object(paramiko.Transport, "auth_publickey", cut), pytest.raises(Retryable) as caught:
            begin(link.port)
    assert not isinstance(caught.value, Denied)


def test_a_question_that_can_not_be_sent_is_not_denied() -> None:
    """What is written fails first: paramiko goes on reading, and calls the connection active."""

    def ask(self: paramiko.Transport, *arguments: object) -> object:
        self.packetizer.write_all = mock.Mock(side_effect=EOFError)  # type: ignore[attr-defined]
        try:
            return asks(self, *arguments)  # type: ignore[arg-type]
        finally:
            assert self.is_active()

    asks = paramiko.Transport.auth_publickey
    with mock.patch.object(paramiko.Transport, "auth_publickey", ask), pytest.raises(Interrupted):
        begin(shared().port)


@pytest.mark.parametrize(
    ("command", "typed"),
    [("cat", b"x"), ("head -c 400000 /dev/zero; cat", b""), ("head -c 400000 /dev/zero >&2; cat", b"")],
)
def test_a_link_that_breaks_while_something_is_written_is_interrupted(command: str, typed: bytes) -> None:
    """Input, or the word that there is room for more output: paramiko raises EOFError, and goes on reading."""
    server = shared()
    fields = {"host": "127.0.0.1", "port": server.port, "user": server.user, "key": server.key.read_bytes()}
    with SshClient(Login(**fields, pins=server.host_keys[:1])) as client:  # type: ignore[arg-type]
        one = Account(client)
        one.begin()
        started = one.start(command)
        one._transport.packetizer.write_all = mock.Mock(side_effect=EOFError)  # type: ignore[method-assign]
        started.send(typed)
        process.until(lambda: started.receive(0.1) == b"")
        assert isinstance(started.failure(), Interrupted)


def test_a_host_that_hangs_up_after_its_refusal_is_denied(tmp_path: Path) -> None:
    """Whether paramiko sees the end of the connection before it looks at the answer, or after it."""
    refuse = paramiko.auth_handler.AuthHandler._parse_userauth_failure

    def hang_up(self: paramiko.auth_handler.AuthHandler, message: paramiko.Message) -> None:
        self.transport.active = False  # type: ignore[attr-defined]
        refuse(self, message)

    with (
        mock.patch.object(paramiko.auth_handler.AuthHandler, "_parse_userauth_failure", hang_up),
        pytest.raises(Denied, match=r"Permission denied \(publickey"),
    ):
        begin(shared().port, key=make_key(tmp_path / "key").read_bytes())


def test_a_key_that_the_host_does_not_know_is_denied(tmp_path: Path) -> None:
    with pytest.raises(Denied, match=r"Permission denied \(publickey"):
        begin(shared().port, key=make_key(tmp_path / "key").read_bytes())


def test_a_host_that_falls_silent_under_a_script_is_noticed(tmp_path: Path) -> None:
    one = target(RsyncTarget, shared(), tmp_path / "in", on_complete=True, idle_timeout_s=2, hook_timeout_s=300)
    script = tmp_path / "in" / "mercure_complete.sh"
    script.write_text(f"#!/bin/sh\n: >{tmp_path}/begun\nsleep 300\n")
    script.chmod(0o755)
    sent = attempt(one, study(tmp_path))
    with relay(shared().port) as link:
        one.port = link.port
        with SshClient(login(one)) as client:
            assert suits(client)

        def stall() -> None:
            process.until((tmp_path / "begun").exists)
            link.stall_after = 0

        thread = threading.Thread(target=stall)
        thread.start()
        hook = DRIVERS.of(one).hook
        assert hook is not None
        begun = time.monotonic()
        with pytest.raises(DispatchError) as caught:
            hook(one, sent.plan, PushReport(), set())
        thread.join()
    assert isinstance(caught.value, Retryable)
    assert time.monotonic() - begun < as_loaded(60)
