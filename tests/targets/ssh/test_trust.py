"""Host keys: pinned, learned, changed; over both protocols that log in by SSH."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from blocks.rsync import RsyncTarget
from blocks.sftp import SftpTarget
from blocks.ssh import HostKeyPolicy, SshTarget
from talaria.testing import process, studies
from talaria.testing.harness import attempt
from tasks import DRIVERS
from tests.servers.openssh import Server, make_key, openssh, public
from tests.targets.remote_folder import ssh_target
from transfer.errors import NotTrusted, Unreachable

pytestmark = pytest.mark.usefixtures("empty_state")
OTHER_KEY = "SHA256:" + "A" * 43


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with openssh(tmp_path_factory.mktemp("sshd")) as running:
        yield running


def target(kind: type[SshTarget], server: Server, folder: Path, host_key: str = "", **more: object) -> SshTarget:
    folder.mkdir(exist_ok=True)
    return ssh_target(kind, server, folder, host_key=host_key, **more)


def send(target: SshTarget, tmp_path: Path) -> Exception | None:
    if not (tmp_path / "study").exists():
        studies.ct(tmp_path / "study", 1)
    return attempt(target, tmp_path / "study").error


def learned() -> list[str]:
    file = Path(os.environ["TALARIA_HOME"]) / "known_hosts"
    return file.read_text().splitlines() if file.exists() else []


def test_an_unknown_host_is_refused_with_the_fingerprint_to_pin(
    kind: type[SshTarget], server: Server, tmp_path: Path
) -> None:
    error = send(target(kind, server, tmp_path / "in"), tmp_path)
    assert isinstance(error, NotTrusted)
    assert "unknown" in error.message
    assert f"set host_key to {server.fingerprints[0]}" in error.message
    assert not list((tmp_path / "in").iterdir())
    assert not learned()
    # And what the message says helps.
    assert send(target(kind, server, tmp_path / "in", server.fingerprints[0]), tmp_path) is None


def test_the_check_names_the_fingerprint_and_never_offers_a_password(
    kind: type[SshTarget], server: Server, tmp_path: Path
) -> None:
    one = target(kind, server, tmp_path / "in", private_key=SecretStr(""), password=SecretStr("secret"))
    health = DRIVERS.of(one).check(one)
    assert isinstance(health.error, NotTrusted)
    results = {probe.name: probe.result for probe in health.probes}
    assert (results["tcp"], results["trust"], results["authenticate"]) == ("ok", "failed", "skipped")
    assert server.fingerprints[0] in next(probe.detail for probe in health.probes if probe.name == "trust")


@pytest.mark.parametrize(
    ("form", "which"), [("fingerprint", 1), ("key", 0), ("key", 1), ("known_hosts line", 0), ("among others", 1)]
)
def test_a_pinned_key_is_good_in_every_form(server: Server, tmp_path: Path, which: int, form: str) -> None:
    pin = {
        "fingerprint": server.fingerprints[which],
        "key": server.host_keys[which],
        "known_hosts line": f"[127.0.0.1]:{server.port} {server.host_keys[which]} some comment",
        "among others": f"# our server\n{OTHER_KEY}, {server.fingerprints[which]}\n",
    }[form]
    assert send(target(SftpTarget, server, tmp_path / "in", pin), tmp_path) is None
    assert not learned()


@pytest.mark.parametrize("policy", HostKeyPolicy)
def test_another_key_than_the_pinned_one_is_not_trusted(
    kind: type[SshTarget], server: Server, tmp_path: Path, policy: HostKeyPolicy
) -> None:
    error = send(target(kind, server, tmp_path / "in", OTHER_KEY, host_key_policy=policy), tmp_path)
    assert isinstance(error, NotTrusted)
    assert f"set host_key to {server.fingerprints[0]}" in error.message
    assert not learned()


def test_a_key_that_is_pinned_as_revoked_is_not_advised(kind: type[SshTarget], server: Server, tmp_path: Path) -> None:
    error = send(target(kind, server, tmp_path / "in", f"@revoked * {server.host_keys[0]}"), tmp_path)
    assert isinstance(error, NotTrusted)
    assert "revoked" in error.message and "set host_key" not in error.message


def test_accept_new_learns_once(kind: type[SshTarget], server: Server, tmp_path: Path) -> None:
    one = target(kind, server, tmp_path / "in", host_key_policy=HostKeyPolicy.ACCEPT_NEW)
    assert send(one, tmp_path) is None
    assert [line.split()[:2] for line in learned()] == [[f"[127.0.0.1]:{server.port}", "ssh-ed25519"]]
    assert (Path(os.environ["TALARIA_HOME"]) / "known_hosts").stat().st_mode & 0o077 == 0
    assert send(one, tmp_path) is None
    assert len(learned()) == 1
    # What was learned is known to strict targets, too.
    assert send(target(kind, server, tmp_path / "in"), tmp_path) is None


def test_keys_that_the_account_knows_are_known(server: Server, tmp_path: Path) -> None:
    known = tmp_path / "home" / ".ssh" / "known_hosts"
    known.parent.mkdir(parents=True)
    known.write_text(f"[127.0.0.1]:{server.port} {server.host_keys[0]}\n")
    assert send(target(SftpTarget, server, tmp_path / "in"), tmp_path) is None
    assert not learned()


@pytest.mark.parametrize(
    ("how", "policy", "kinds"),
    [
        ("pinned", HostKeyPolicy.ACCEPT_NEW, ("ed25519",)),
        ("pinned", HostKeyPolicy.STRICT, ("rsa",)),
        ("learned", HostKeyPolicy.ACCEPT_NEW, ("ed25519", "rsa")),
        ("learned", HostKeyPolicy.ACCEPT_NEW, ("rsa",)),
        ("learned", HostKeyPolicy.STRICT, ("ed25519",)),
    ],
)
def test_a_changed_key_is_never_trusted(
    kind: type[SshTarget], tmp_path: Path, kinds: tuple[str, ...], policy: HostKeyPolicy, how: str
) -> None:
    port = process.free_port()
    with openssh(tmp_path / "before", port=port) as old:
        one = target(
            kind, old, tmp_path / "in", old.fingerprints[0] if how == "pinned" else "",
            host_key_policy=HostKeyPolicy.ACCEPT_NEW,
        )  # fmt: skip
        assert send(one, tmp_path) is None
        known = learned()
    with openssh(tmp_path / "after", port=port, kinds=kinds, key=old.key) as new:
        one.host_key_policy = policy
        error = send(one, tmp_path)
        assert isinstance(error, NotTrusted), repr(error)
        assert new.fingerprints[0] in error.message
        assert ("CHANGED" in error.message) == (how == "learned")
        assert learned() == known
        # The remedy that the message names.
        one.host_key = new.fingerprints[0]
        assert send(one, tmp_path) is None


def test_a_host_certificate_is_good_by_its_authority(tmp_path: Path) -> None:
    authority = make_key(tmp_path / "authority")
    host = make_key(tmp_path / "host")
    argv = ["ssh-keygen", "-q", "-s", str(authority), "-I", "host", "-h", "-n", "127.0.0.1", f"{host}.pub"]
    subprocess.run(argv, check=True)
    more = f"HostKey {host}\nHostCertificate {host}-cert.pub"
    with openssh(tmp_path / "sshd", kinds=(), more=more) as server:
        pin = f"@cert-authority * {public(authority)}"
        assert send(target(SftpTarget, server, tmp_path / "in", pin), tmp_path) is None


def test_a_host_that_is_not_there_is_unreachable_even_if_pinned(
    kind: type[SshTarget], server: Server, tmp_path: Path
) -> None:
    one = target(kind, server, tmp_path / "in", server.fingerprints[0], port=process.free_port())
    assert isinstance(send(one, tmp_path), Unreachable)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "-oProxyCommand=touch owned"),
        ("user", "a\nb"),
        ("user", """a'b" -oProxyCommand=id\t"""),
        ("user", """a'b" -oProxyCommand=id \""""),
        ("user", "$(id)"),
        ("host", "-oProxyCommand=touch owned"),
        ("host", "host name"),
        ("host", "host;id"),
        ("folder", "-rf"),
        ("folder", "~/-rf"),
        ("folder", "~root/in"),
        ("folder", "in\n"),
        ("folder", " "),
        ("port", 0),
        ("hook_script", "../run"),
        ("hook_script", "-x"),
        ("hook_script", "a\0b"),
        ("host_key", "SHA256:tooshort"),
        ("host_key", "16:27:ac:a5:76:28:2d:36:63:1b:56:4d:eb:df:a6:48"),
        ("host_key", "ssh-ed25519 notbase64!"),
        ("host_key", "ssh-ed25519 AAAAB3NzaC1yc2EAAAADAQABAAABgQ=="),
        ("password", "two\nlines"),
        ("layout", "../{dispatch_id}"),
        ("layout", "{PatientName}"),
    ],
)
def test_what_could_be_taken_for_something_else_is_refused_when_saved(
    kind: type[SshTarget], field: str, value: object
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**({"host": "example.org", "folder": "/in"} | {field: value}))
    assert "owned" not in str(caught.value) or "must not begin" in str(caught.value) or field == "host"


def test_a_home_folder_is_written_as_relative() -> None:
    for given, kept in {"~/in/": "in", "~": ".", "/": "/", "/a/b//": "/a/b", ".": "."}.items():
        assert SftpTarget(host="h", folder=given).folder == kept
    with pytest.raises(ValidationError, match="pattern"):
        RsyncTarget(host="h", folder="/in[1]")
