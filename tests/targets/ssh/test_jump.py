"""The way through a jump host, which is a second sshd, to a server that is reached in no other way."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr, ValidationError

from blocks.rsync import RsyncTarget
from blocks.sftp import SftpTarget
from blocks.ssh import HostKeyPolicy, SshTarget
from talaria.testing import process, studies
from talaria.testing.harness import attempt
from talaria.testing.relay import relay
from tasks import DRIVERS
from tests.servers.openssh import Server, install, make_key, openssh
from transfer.errors import Denied, Misconfigured, NotTrusted, Retryable, Unreachable
from transfer.receipt import PushReport, State

pytestmark = pytest.mark.usefixtures("empty_state")
PASSPHRASE = "of the jump host's key"


@dataclass
class Way:
    """A server, and the jump host before it, each with keys of its own."""

    server: Server
    jump: Server

    def target(self, kind: type[SshTarget], folder: Path, **more: object) -> SshTarget:
        folder.mkdir(exist_ok=True)
        fields = {
            "host": "localhost", "port": self.server.port, "user": self.server.user, "folder": str(folder),
            "host_key": self.server.fingerprints[1], "private_key": SecretStr(self.server.key.read_text()),
            "jump_host": f"{self.jump.user}@127.0.0.1:{self.jump.port}", "jump_host_key": self.jump.fingerprints[0],
            "jump_private_key": SecretStr(str(self.jump.key)), "jump_passphrase": SecretStr(PASSPHRASE),
            "connect_timeout_s": 5, "idle_timeout_s": 10,
        }  # fmt: skip
        return kind(**(fields | more))


@contextmanager
def only_from(folder: Path, more: str = "") -> Iterator[Way]:
    """Run both; the server notes where its clients come from."""
    key = make_key(folder / "jump_key", "ed25519", PASSPHRASE)
    with openssh(folder / "jump", key=key, more=more) as jump, openssh(folder / "server") as server:
        yield Way(server, jump)


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    with only_from(tmp_path_factory.mktemp("way")) as both:
        yield both


@pytest.fixture
def study(tmp_path: Path) -> Path:
    studies.ct(tmp_path / "study", 3)
    return tmp_path / "study"


def test_everything_goes_through_the_jump_host(kind: type[SshTarget], way: Way, study: Path, tmp_path: Path) -> None:
    """Host keys, logins, shells, files, checksums, hooks."""
    one = way.target(kind, tmp_path / "in", verify="proven", on_complete=True)
    install(tmp_path / "in", "echo hooked")
    passed, logins = [server.log.read_text().count("Accepted publickey") for server in (way.jump, way.server)]
    health = DRIVERS.of(one).check(one)
    assert health.ok, health.to_json("x")
    assert [probe.name for probe in health.probes][:4] == ["resolve", "tcp", "jump_host", "trust"]
    sent = attempt(one, study)
    assert sent.require().state is State.DELIVERED
    assert sent.require().verified == "proven"
    hook = DRIVERS.of(one).hook
    assert hook is not None
    assert hook(one, sent.plan, PushReport(), set()).output == "hooked\n"
    passed, logins = (
        way.jump.log.read_text().count("Accepted publickey") - passed,
        way.server.log.read_text().count("Accepted publickey") - logins,
    )
    assert logins >= 4 and passed >= logins, "a login came in another way"
    ours = [p for p in psutil.Process().children(recursive=True) if p.name() == "ssh"]
    assert not ours, "an ssh to the jump host is left"


def test_both_hosts_are_learned_apart(kind: type[SshTarget], way: Way, study: Path, tmp_path: Path) -> None:
    one = way.target(kind, tmp_path / "in", host_key="", jump_host_key="", host_key_policy=HostKeyPolicy.ACCEPT_NEW)
    assert attempt(one, study).require().state is State.DELIVERED
    one.host_key_policy = HostKeyPolicy.STRICT
    assert attempt(one, study).require().state is State.DELIVERED


def test_the_servers_key_opens_the_jump_host_where_it_has_none(study: Path, tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    with openssh(tmp_path / "jump", key=key) as jump, openssh(tmp_path / "server", key=key) as server:
        one = Way(server, jump).target(SftpTarget, tmp_path / "in", jump_private_key=SecretStr(""))
        assert attempt(one, study).require().state is State.DELIVERED


@pytest.mark.parametrize("what", ["key", "trust", "port"])
def test_what_the_jump_host_refuses_is_said_of_it(
    kind: type[SshTarget], way: Way, study: Path, tmp_path: Path, what: str
) -> None:
    more: dict[str, object] = {
        "key": {"jump_private_key": SecretStr(make_key(tmp_path / "strange").read_text())},
        "trust": {"jump_host_key": "SHA256:" + "A" * 43},
        "port": {"jump_host": f"127.0.0.1:{process.free_port()}"},
    }[what]  # type: ignore[assignment]
    expected = {"key": Denied, "trust": NotTrusted, "port": Unreachable}[what]
    for pin in way.server.host_keys[0], way.server.fingerprints[0]:
        one = way.target(kind, tmp_path / "in", host_key=pin, **more)
        error = attempt(one, study).error
        assert isinstance(error, expected), repr(error)
        assert str(one.jump[2]) in error.message, error.message
        if what != "port":
            assert {"key": "this jump_private_key", "trust": "set jump_host_key to"}[what] in error.message
        health = DRIVERS.of(one).check(one)
        assert isinstance(health.error, expected), health.to_json("x")


def test_a_server_that_the_jump_host_can_not_reach_is_unreachable(
    kind: type[SshTarget], way: Way, study: Path, tmp_path: Path
) -> None:
    for pin in way.server.host_keys[0], way.server.fingerprints[0]:
        one = way.target(kind, tmp_path / "in", host_key=pin, port=process.free_port())
        error = attempt(one, study).error
        assert isinstance(error, Unreachable), repr(error)
        assert "jump_host" in error.message
        assert isinstance(DRIVERS.of(one).check(one).error, Unreachable)


def test_a_jump_host_that_passes_nothing_on_is_misconfigured(
    kind: type[SshTarget], study: Path, tmp_path: Path
) -> None:
    with only_from(tmp_path, "AllowTcpForwarding no") as both:
        for pin in both.server.host_keys[0], both.server.fingerprints[0]:
            one = both.target(kind, tmp_path / "in", host_key=pin)
            error = attempt(one, study).error
            assert isinstance(error, Misconfigured), repr(error)
            assert "prohibited" in error.message
            assert isinstance(DRIVERS.of(one).check(one).error, Misconfigured)


def test_a_server_that_refuses_us_is_not_the_jump_hosts_fault(
    kind: type[SshTarget], way: Way, study: Path, tmp_path: Path
) -> None:
    strange = SecretStr(make_key(tmp_path / "strange").read_text())
    error = attempt(way.target(kind, tmp_path / "in", private_key=strange), study).error
    assert isinstance(error, Denied), repr(error)
    assert "jump_host" not in error.message
    error = attempt(way.target(kind, tmp_path / "in", host_key="SHA256:" + "A" * 43), study).error
    assert isinstance(error, NotTrusted), repr(error)
    assert way.server.fingerprints[0] in error.message


def test_a_jump_host_that_goes_away_is_retryable(kind: type[SshTarget], study: Path, tmp_path: Path) -> None:
    studies.multiframe(study / "large.dcm", 40)
    with only_from(tmp_path) as both:
        one = both.target(kind, tmp_path / "in", bandwidth_limit=4_000_000)
        gone: list[bool] = []

        def moved(sent: object, count: int) -> None:
            if gone:
                return
            gone.append(True)
            for child in psutil.process_iter(["name", "cmdline"]):
                if child.info["name"] == "sshd" and f"sshd_config_{both.jump.port}" in " ".join(
                    child.info["cmdline"] or ()
                ):
                    for session in child.children(recursive=True):
                        session.kill()

        error = attempt(one, study, moved=moved).error
        if kind is RsyncTarget or error:  # SFTP goes on by itself
            assert isinstance(error, Retryable), repr(error)
        one.bandwidth_limit = None
        assert attempt(one, study).require().state is State.DELIVERED


@pytest.mark.parametrize("fault", [{"stall_after": 1_500}, {"cut_after": 1_500, "stays_cut": True}])
def test_a_jump_host_that_hangs_or_hangs_up_is_retryable(
    way: Way, study: Path, tmp_path: Path, fault: dict[str, Any]
) -> None:
    """Before it lets us in: that shows nothing of keys and rights; by ssh(1), and by paramiko."""
    with relay(way.jump.port, **fault) as link:
        for pin in way.server.host_keys[0], way.server.fingerprints[0]:
            one = way.target(
                SftpTarget, tmp_path / "in", jump_host=f"{way.jump.user}@127.0.0.1:{link.port}", host_key=pin,
                connect_timeout_s=1, idle_timeout_s=2,
            )  # fmt: skip
            error = attempt(one, study).error
            assert isinstance(error, Retryable), repr(error)
            assert "jump_host" in error.message or f":{link.port}" in error.message, error.message
            assert PASSPHRASE not in str(error)
        assert isinstance(DRIVERS.of(one).check(one).error, Retryable)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("bastion", ("", "bastion", 22)),
        ("bastion.example.org:2200", ("", "bastion.example.org", 2200)),
        ("me@10.0.0.1", ("me", "10.0.0.1", 22)),
        ("me@realm@[fe80::1%eth0]:22", ("me@realm", "fe80::1%eth0", 22)),
    ],
)
def test_how_a_jump_host_is_written(given: str, parts: tuple[str, str, int]) -> None:
    assert SftpTarget(host="h", folder="/in", jump_host=given).jump == parts


@pytest.mark.parametrize(
    "given", ["a,b", "-oProxyCommand=touch owned", "a b", "u@", "a:0", "a:99999", "a:b", "$(id)@a", "u@h:22,v@i", "::1"]
)
def test_what_is_no_jump_host_is_refused(kind: type[SshTarget], given: str) -> None:
    with pytest.raises(ValidationError):
        kind(host="h", folder="/in", jump_host=given)


def test_the_secrets_of_the_jump_host_are_in_no_argument(way: Way, study: Path, tmp_path: Path) -> None:
    seen: set[str] = set()

    def moved(sent: object, count: int) -> None:
        for process_ in psutil.Process().children(recursive=True):
            try:
                seen.add(" ".join(process_.cmdline()) + str(process_.environ()))
            except psutil.Error:
                continue

    one = way.target(SftpTarget, tmp_path / "in")
    attempt(one, study, moved=moved).require()
    assert any("ProxyCommand" in text for text in seen)
    body = subprocess.run(
        ["ssh-keygen", "-p", "-P", PASSPHRASE, "-N", "", "-f", str(_copy(way.jump.key, tmp_path))],
        check=True, capture_output=True,
    ).returncode  # fmt: skip
    assert body == 0
    secret = (tmp_path / "copy").read_text().splitlines()[2]
    assert not any(PASSPHRASE in text or secret in text for text in seen)


def _copy(key: Path, folder: Path) -> Path:
    (folder / "copy").write_bytes(key.read_bytes())
    (folder / "copy").chmod(0o600)
    return folder / "copy"
