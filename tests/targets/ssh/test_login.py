"""What opens a server: keys in every form, passwords, keyboard-interactive; and that nobody sees them.

Where the tests run as root, passwords are those of a user who is made for the test, at Debian's OpenSSH; elsewhere, of
a server in Python.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from blocks.rsync import RsyncTarget
from blocks.sftp import SftpTarget
from blocks.ssh import SshTarget
from protocols.ssh.keys import private_key
from protocols.ssh.memfiles import MemoryFiles
from talaria.testing import process, studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded
from tasks import DRIVERS
from tests.servers.openssh import IS_ROOT, PASSWORD, Server, make_key, openssh, shared, temporary_user
from tests.servers.sftp_odd import odd
from tests.targets.remote_folder import ssh_target
from tests.targets.sftp import odd_target
from transfer.errors import Busy, Denied, DispatchError, Misconfigured, TimedOut, Unreachable

PASSPHRASE = "Schlüssel-7719 mit Leerzeichen"


@pytest.fixture
def server() -> Server:
    return shared()


def target(kind: type[SshTarget], server: Server, folder: Path, **more: object) -> SshTarget:
    return ssh_target(kind, server, folder, **({"private_key": SecretStr("")} | more))


def send(target: SshTarget, tmp_path: Path) -> Sent:
    if not (tmp_path / "study").exists():
        studies.ct(tmp_path / "study", 2)
    return attempt(target, tmp_path / "study")


# ---- keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same user's keys in many forms."""
    folder = tmp_path_factory.mktemp("keys")
    return {
        "ed25519": make_key(folder / "ed25519"),
        "rsa": make_key(folder / "rsa", "rsa"),
        "ecdsa": make_key(folder / "ecdsa", "ecdsa"),
        "rsa-pem": make_key(folder / "rsa-pem", "rsa", "", "-m", "PEM"),
        "rsa-pkcs8": make_key(folder / "rsa-pkcs8", "rsa", "", "-m", "PKCS8"),
        "encrypted": make_key(folder / "encrypted", "ed25519", PASSPHRASE),
        "encrypted-pem": make_key(folder / "encrypted-pem", "rsa", PASSPHRASE, "-m", "PEM"),
        "encrypted-pkcs8": make_key(folder / "encrypted-pkcs8", "ecdsa", PASSPHRASE, "-m", "PKCS8"),
    }


@pytest.fixture(scope="module")
def many(keys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that lets all of them in."""
    folder = tmp_path_factory.mktemp("sshd-many")
    every = folder / "all_keys"
    every.write_text("".join(key.with_name(key.name + ".pub").read_text() for key in keys.values()))
    with openssh(folder, more=f"Match all\nAuthorizedKeysFile {every}") as running:
        yield running


@pytest.mark.parametrize("which", ["ed25519", "rsa-pem", "ecdsa", "encrypted", "encrypted-pem", "encrypted-pkcs8"])
@pytest.mark.parametrize("as_text", [True, False], ids=["text", "path"])
def test_a_key_opens_in_every_form(
    many: Server, keys: dict[str, Path], tmp_path: Path, which: str, as_text: bool
) -> None:
    text = keys[which].read_text().replace("\n", "\r\n") if as_text else str(keys[which])
    passphrase = PASSPHRASE if "encrypted" in which else ""
    one = target(SftpTarget, many, tmp_path / "in", private_key=SecretStr(text), passphrase=SecretStr(passphrase))
    assert send(one, tmp_path).error is None


def test_rsync_with_an_encrypted_key(many: Server, keys: dict[str, Path], tmp_path: Path) -> None:
    one = target(
        RsyncTarget,
        many,
        tmp_path / "in",
        private_key=SecretStr(str(keys["encrypted"])),
        passphrase=SecretStr(PASSPHRASE),
    )
    assert send(one, tmp_path).error is None
    assert DRIVERS.of(one).check(one).ok


@pytest.mark.parametrize(
    ("key", "passphrase", "words"),
    [
        ("encrypted", "", "set passphrase"),
        ("encrypted", "wrong", "passphrase does not open"),
        ("encrypted-pem", "wrong", "passphrase does not open"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nbm90IGEga2V5\n-----END OPENSSH PRIVATE KEY-----", "", "not a key"),
        ("-----BEGIN RSA PRIVATE KEY-----\nrubbish\n-----END RSA PRIVATE KEY-----", "", "not a key"),
        ("PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none", "", "puttygen"),
        ("/nowhere/key", "", "/nowhere/key"),
        ("/", "", "directory"),
    ],
)
def test_a_key_that_can_not_be_used_is_misconfigured(
    kind: type[SshTarget], server: Server, keys: dict[str, Path], tmp_path: Path, key: str, passphrase: str, words: str
) -> None:
    text = str(keys[key]) if key in keys else key
    one = target(kind, server, tmp_path / "in", private_key=SecretStr(text), passphrase=SecretStr(passphrase))
    sent = send(one, tmp_path)
    assert isinstance(sent.error, Misconfigured)
    assert words in sent.error.message
    health = DRIVERS.of(one).check(one)
    assert isinstance(health.error, Misconfigured)
    assert next(probe for probe in health.probes if probe.result == "failed").name == "authenticate"


def test_a_spoilt_key_does_not_show(keys: dict[str, Path]) -> None:
    body = keys["ed25519"].read_text().splitlines()[1:-1]
    for text in ("\n".join(body), "".join(body), body[0]):
        with pytest.raises(Misconfigured, match="BEGIN") as caught:
            private_key(text)
        assert body[0] not in str(caught.value) + repr(caught.value.__cause__)


def test_a_key_that_everybody_may_read_is_refused(keys: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "key"
    shutil.copy(keys["ed25519"], copy)
    for mode, good in {0o644: False, 0o640: True, 0o400: True}.items():  # 0640: how a container gets its secrets
        copy.chmod(mode)
        if good:
            assert private_key(str(copy))[0] == keys["ed25519"].read_bytes()
        else:
            with pytest.raises(Misconfigured, match="everybody"):
                private_key(str(copy))


def test_a_key_that_the_server_does_not_know_is_denied(
    kind: type[SshTarget], server: Server, keys: dict[str, Path], tmp_path: Path
) -> None:
    one = target(kind, server, tmp_path / "in", private_key=SecretStr(keys["ed25519"].read_text()))
    sent = send(one, tmp_path)
    assert isinstance(sent.error, Denied)
    assert "Permission denied" in sent.error.message
    health = DRIVERS.of(one).check(one)
    assert isinstance(health.error, Denied)
    assert {probe.name: probe.result for probe in health.probes if probe.name in ("trust", "authenticate")} == {
        "trust": "ok", "authenticate": "failed",
    }  # fmt: skip


def test_a_user_certificate_beside_the_key_is_used(tmp_path: Path) -> None:
    authority, key = make_key(tmp_path / "authority"), make_key(tmp_path / "key")
    argv = ["ssh-keygen", "-q", "-s", str(authority), "-I", "user", "-n", shared().user, f"{key}.pub"]
    subprocess.run(argv, check=True)
    with openssh(tmp_path / "sshd", more=f"TrustedUserCAKeys {authority}.pub") as server:
        one = target(SftpTarget, server, tmp_path / "in", private_key=SecretStr(str(key)))
        assert send(one, tmp_path).error is None


def test_the_agent_is_asked_where_nothing_else_is_given(
    kind: type[SshTarget], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(send(target(kind, server, tmp_path / "in"), tmp_path).error, Denied)
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("SSH_AUTH_SOCK", f"{folder}/agent")

        def answers() -> bool:  # its socket is there before it listens
            return subprocess.run(["ssh-add", "-l"], capture_output=True).returncode in (0, 1)  # 1: it has no key yet

        agent = ["ssh-agent", "-D", "-a", f"{folder}/agent"]
        with process.server(agent, 0, tmp_path / "agent.log", ready=answers):
            subprocess.run(["ssh-add", "-q", str(server.key)], check=True)
            assert send(target(kind, server, tmp_path / "in"), tmp_path).error is None


# ---- passwords


@contextmanager
def password_server(
    method: str, kind: type[SshTarget], tmp_path: Path, password: str = PASSWORD
) -> Iterator[SshTarget]:
    """A target that opens by a password, asked for in one way only."""
    with ExitStack() as stack:
        if IS_ROOT:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="talaria-home-")))
            home.chmod(0o755)
            user = stack.enter_context(temporary_user(home, password))
            by_password = method == "password"
            server = stack.enter_context(
                openssh(tmp_path / "sshd", passwords=by_password, interactive=not by_password, user=user)
            )
            yield target(kind, server, home / "in", password=SecretStr(password))
        else:
            if kind is RsyncTarget:
                kind = SftpTarget  # no server in Python gives a shell
            strange = stack.enter_context(odd(tmp_path / "odd", tmp_path / "root", login=method, password=password))
            yield odd_target(strange, "/in", login=method)


@pytest.mark.parametrize("method", ["password", "keyboard-interactive"])
def test_a_password_opens_and_a_wrong_one_is_denied(kind: type[SshTarget], method: str, tmp_path: Path) -> None:
    with password_server(method, kind, tmp_path) as one:
        health = DRIVERS.of(one).check(one)
        assert health.ok, health.to_json("x")
        assert method in next(probe.detail for probe in health.probes if probe.name == "authenticate")
        assert send(one, tmp_path).error is None
        one.password = SecretStr("not it")
        error = send(one, tmp_path).error
        assert isinstance(error, Denied)
        assert "not it" not in str(error)
        assert str(error).endswith("it does not take this user with this password")
        assert isinstance(DRIVERS.of(one).check(one).error, Denied)


@pytest.mark.skipif(not IS_ROOT, reason="needs an account whose password can expire")
def test_an_expired_password_is_denied_and_never_changed(kind: type[SshTarget], tmp_path: Path) -> None:
    with password_server("keyboard-interactive", kind, tmp_path) as one:
        hashed = shadow(one.user)
        subprocess.run(["chage", "-d", "0", one.user], check=True)
        sent = send(one, tmp_path)
        assert isinstance(sent.error, Denied), repr(sent.error)
        assert shadow(one.user) == hashed
        subprocess.run(["chage", "-d", "20000", one.user], check=True)
        assert send(one, tmp_path).error is None


def shadow(user: str) -> str:
    lines = Path("/etc/shadow").read_text().splitlines()
    return next(line.split(":")[1] for line in lines if line.startswith(f"{user}:"))


@pytest.mark.parametrize("password", ["p'a\"s $(x) `y` \\ %h ;#", "pässwörd 影", "-oProxyCommand=x", "yes"])
def test_passwords_of_any_characters(password: str, tmp_path: Path) -> None:
    with password_server("password", SftpTarget, tmp_path, password) as one:
        assert send(one, tmp_path).error is None


def test_a_key_and_a_password_may_both_be_needed(tmp_path: Path, server: Server) -> None:
    one = target(
        SftpTarget, server, tmp_path / "in",
        private_key=SecretStr(str(server.key)), password=SecretStr("of no use here"),
    )  # fmt: skip
    assert send(one, tmp_path).error is None


# ---- who sees them


def test_secrets_are_in_no_argument_environment_log_or_file(
    kind: type[SshTarget], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks at every process of this machine, and at every file that appears for them, while a transfer runs."""
    temporary = Path(tempfile.mkdtemp(prefix="talaria-test-"))
    temporary.chmod(0o755)  # the user's home will lie there
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    passphrase = f"{PASSPHRASE} {uuid.uuid4().hex}"  # of no other test: one beside this one may be making a key with it
    key = make_key(tmp_path / "key", "ed25519", passphrase)
    plain = private_key(str(key), passphrase)[0].decode()
    texts: set[str] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            for running in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    with suppress(OSError):
                        texts.add((running / name).read_bytes().decode("utf-8", "replace"))
            with suppress(OSError):  # what vanishes meanwhile
                texts.update(p.read_text(errors="replace") for p in temporary.rglob("*") if p.is_file())

    with password_server("password", kind, tmp_path) as one:
        one.private_key, one.passphrase = SecretStr(key.read_text()), SecretStr(passphrase)
        studies.ct(tmp_path / "study", 20, side=128)
        one.bandwidth_limit = 400_000
        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            sent = send(one, tmp_path)
            health = DRIVERS.of(one).check(one)
            one.password = SecretStr(PASSWORD + "-wrong")
            wrong = send(one, tmp_path)
        finally:
            done.set()
            watcher.join()
    sent.require()
    assert isinstance(wrong.error, Denied)
    texts |= {repr(one), str(one), str(wrong.error), repr(health), repr(sent.receipt)}
    assert any("ssh" in text and "BatchMode" in text for text in texts), "nothing was seen"
    secrets = (PASSWORD, passphrase, *plain.splitlines()[1:-1], *key.read_text().splitlines()[1:-1])
    for secret in secrets:
        assert not any(secret in text for text in texts), "a secret shows"
    assert not list(temporary.iterdir()), "something was left behind"
    temporary.rmdir()


def test_nothing_lies_on_the_disk_even_while_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = MemoryFiles()
    path = files.add(b"secret")
    assert Path(path).read_bytes() == b"secret"
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert not list(tmp_path.iterdir())
    files.close()
    assert not os.path.exists(path)


def test_a_system_without_files_in_memory_uses_a_folder_of_its_own(
    kind: type[SshTarget], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    modes: set[tuple[bool, int]] = set()

    def told(*_: object) -> None:
        folders = list(temporary.glob("talaria-ssh-*"))
        paths = [*folders, *(path for folder in folders for path in folder.iterdir() if path.name != "s")]
        modes.update((path.is_dir(), path.stat().st_mode & 0o777) for path in paths)

    studies.ct(tmp_path / "study", 2)
    one = target(kind, server, tmp_path / "in", private_key=SecretStr(str(server.key)))
    attempt(one, tmp_path / "study", told=told).require()
    assert modes == {(True, 0o700), (False, 0o600)}
    assert not list(temporary.glob("talaria-ssh-*"))


def test_nothing_outlives_a_push(kind: type[SshTarget], server: Server, tmp_path: Path) -> None:
    one = target(kind, server, tmp_path / "in", private_key=SecretStr(str(server.key)))

    def push() -> None:
        send(one, tmp_path).require()
        DRIVERS.of(one).check(one)

    push()  # what a process opens once stays open
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    descriptors = process.open_descriptors()
    push()
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in children]
    assert not [child.name() for child in left if child.name() in ("ssh", "rsync")]
    process.until(lambda: process.open_descriptors() <= descriptors, 10)


# ---- servers that are in the way


def test_a_program_that_is_not_installed_is_named(
    kind: type[SshTarget], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    one = target(kind, server, tmp_path / "in", private_key=SecretStr(str(server.key)))
    error = send(one, tmp_path).error
    assert isinstance(error, Misconfigured)
    assert "openssh-client" in error.message


def test_a_server_that_says_nothing_is_timed_out(kind: type[SshTarget], server: Server, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        one = target(kind, server, tmp_path / "in", port=silent.getsockname()[1], connect_timeout_s=1, idle_timeout_s=2)
        one.private_key = SecretStr(str(server.key))
        sent = send(one, tmp_path)
        assert isinstance(sent.error, TimedOut), repr(sent.error)
        assert sent.seconds < as_loaded(15)


@pytest.mark.parametrize(
    ("greeting", "kinds"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", (Misconfigured,)),
        (b"", (Busy,)),
        (b"SSH-2.0-odd\r\n", (Busy, DispatchError)),
    ],
)
def test_a_server_that_is_no_ssh_or_too_busy(
    server: Server, tmp_path: Path, greeting: bytes, kinds: tuple[type[DispatchError], ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as strange:
        stop = threading.Event()
        strange.settimeout(0.1)

        def serve() -> None:
            while not stop.is_set():
                try:
                    peer, _ = strange.accept()
                except TimeoutError:
                    continue
                with peer:
                    peer.settimeout(1)
                    peer.sendall(greeting)
                    with suppress(OSError):
                        peer.recv(4096)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            one = target(SftpTarget, server, tmp_path / "in", port=strange.getsockname()[1], connect_timeout_s=3)
            one.private_key = SecretStr(str(server.key))
            error = send(one, tmp_path).error
            assert isinstance(error, kinds), repr(error)
            assert not DRIVERS.of(one).check(one).ok
        finally:
            stop.set()
            thread.join()


def test_the_names_of_hosts_are_resolved_once_and_named(server: Server, tmp_path: Path) -> None:
    one = target(SftpTarget, server, tmp_path / "in", host="no-such-host.invalid")
    one.private_key = SecretStr(str(server.key))
    error = send(one, tmp_path).error
    assert isinstance(error, Unreachable)
    assert "no-such-host.invalid" in error.message
    health = DRIVERS.of(one).check(one)
    assert [(probe.name, probe.result) for probe in health.probes][:2] == [("resolve", "failed"), ("trust", "skipped")]


@pytest.mark.parametrize("host", [f"{'x' * 64}.example.org", "a..example.org"])
def test_a_name_that_no_host_can_have_fails_the_check_alone(
    kind: type[SshTarget], server: Server, tmp_path: Path, host: str
) -> None:
    one = target(kind, server, tmp_path / "in", host=host)
    health = DRIVERS.of(one).check(one)
    assert isinstance(health.error, Unreachable)
    assert [probe.result for probe in health.probes][:2] == ["failed", "skipped"]


def test_a_name_that_nobody_resolves_holds_the_check_up_no_longer_than_it_may(
    kind: type[SshTarget], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: over.wait(5) and [])
    one = target(kind, server, tmp_path / "in", host="archive.example.org", connect_timeout_s=0.3)
    begun = time.monotonic()
    try:
        health = DRIVERS.of(one).check(one)
        assert time.monotonic() - begun < as_loaded(3)
    finally:
        over.set()
    assert isinstance(health.error, Unreachable)
    assert "not resolved within 0.3 s" in health.error.message
