"""Debian's OpenSSH as an instance of its own: keys for whoever runs the tests, more where that is root.

An ordinary user's sshd logs in that user alone, by key. Passwords, keyboard-interactive login and chrooted users need
root; where the tests run without, `tests/servers/sftp_odd.py` stands in for those.
"""

from __future__ import annotations

import atexit
import functools
import getpass
import itertools
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from talaria.testing import process

IS_ROOT = os.geteuid() == 0
PASSWORD = "wort-8812-Zeichen"

# What ssh(1) would agree on first costs it fifty milliseconds of a processor each time. A bash that sshd starts reads
# .bashrc, here that of whoever runs the tests, unless another shell has started sshd's.
CONFIG = """
KexAlgorithms curve25519-sha256,curve25519-sha256@libssh.org
SetEnv SHLVL=1
Port {port}
ListenAddress 127.0.0.1
{host_keys}
PidFile none
AuthorizedKeysFile {authorized}
StrictModes no
UsePAM no
UseDNS no
PermitRootLogin yes
PermitUserEnvironment no
PrintMotd no
MaxStartups 500
MaxSessions 50
LoginGraceTime 20
PasswordAuthentication {passwords}
KbdInteractiveAuthentication {interactive}
Subsystem sftp internal-sftp
{more}
"""


@dataclass(frozen=True)
class Server:
    """A running sshd.

    Attributes:
        key: private key that lets `user` in.
        host_keys: the server's public keys as `type base64`.
        fingerprints: the same as SHA256:...
    """

    port: int
    folder: Path
    key: Path
    host_keys: tuple[str, ...]
    fingerprints: tuple[str, ...]
    log: Path
    user: str = field(default_factory=getpass.getuser)


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "", *options: str) -> Path:
    """Make a key pair with ssh-keygen; return the private key's path."""
    bits = ["-b", "2048"] if kind == "rsa" else []  # a third of what one of 3072 bits takes
    argv = ["ssh-keygen", "-q", "-t", kind, *bits, "-N", passphrase, "-C", "", "-f", str(path), *options]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return path


def public(key: Path) -> str:
    """Return the public half as `type base64`."""
    return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])


def fingerprint(key: Path) -> str:
    """Return the fingerprint, as ssh-keygen computes it."""
    argv = ["ssh-keygen", "-l", "-f", str(key) + ".pub"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[1]


_turn = itertools.cycle(range(3))


def _host_key(path: Path, kind: str) -> Path:
    """Make a host key. Three of RSA, which take their time, serve in turn: no two servers of a test share one."""
    if kind != "rsa":
        return make_key(path, kind)
    made = _rsa_key(next(_turn))
    shutil.copy(f"{made}.pub", f"{path}.pub")
    return Path(shutil.copy(made, path))


@functools.cache
def _rsa_key(number: int) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="talaria-rsa-")
    atexit.register(folder.cleanup)
    return make_key(Path(folder.name) / f"key{number}", "rsa")


@contextmanager
def openssh(
    folder: Path,
    *,
    kinds: tuple[str, ...] = ("ed25519", "rsa"),
    passwords: bool = False,
    interactive: bool = False,
    more: str = "",
    port: int = 0,
    before: tuple[str, ...] = (),
    key: Path | None = None,
    user: str = "",
    umask: int = 0o022,
) -> Iterator[Server]:
    """Run an sshd.

    Args:
        kinds: types of its host keys.
        more: further lines of its configuration.
        before: a command that runs it, such as one that gives it a mount namespace.
        key: whose holder gets in; a fresh one if None.
        user: who that is; whoever runs the tests if "".
        umask: of sessions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or process.free_port()
    hosts = [_host_key(folder / f"host_{kind}_{uuid.uuid4().hex[:6]}", kind) for kind in kinds]
    key = key or make_key(folder / f"user_{uuid.uuid4().hex[:6]}")
    authorized = folder / f"authorized_{port}"
    authorized.write_text(public(key) + "\n")
    authorized.chmod(0o644)
    config = folder / f"sshd_config_{port}"
    config.write_text(
        CONFIG.format(
            port=port,
            host_keys="\n".join(f"HostKey {host}" for host in hosts),
            authorized=authorized,
            passwords="yes" if passwords else "no",
            interactive="yes" if interactive else "no",
            more=more,
        ).replace("UsePAM no", "UsePAM yes" if interactive else "UsePAM no")
    )
    if IS_ROOT:  # where sshd jails the part of it that talks to strangers
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    log = folder / f"sshd_{port}.log"
    argv = [*before, process.program("sshd"), "-D", "-e", "-f", str(config)]
    old = os.umask(umask)
    try:
        running = process.server(argv, port, log)
        running.__enter__()
    finally:
        os.umask(old)
    try:
        yield Server(
            port,
            folder,
            key,
            tuple(public(host) for host in hosts),
            tuple(fingerprint(host) for host in hosts),
            log,
            user or getpass.getuser(),
        )
    finally:
        running.__exit__(None, None, None)


@functools.cache
def shared() -> Server:
    """One sshd for all tests of a session that need nothing special; folders keep them apart."""
    stack = ExitStack()
    atexit.register(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="talaria-sshd-")))
    return stack.enter_context(openssh(folder))


def install(folder: Path, lines: str) -> None:
    """Put the script there that a target with `on_complete` runs."""
    script = folder / "mercure_complete.sh"
    script.write_text(f"#!/bin/sh\n{lines}\n")
    script.chmod(0o755)


@contextmanager
def temporary_user(home: Path, password: str = PASSWORD) -> Iterator[str]:
    """Make a user with a password (root only), who owns the folder `home`; removed afterwards."""
    name = f"talaria-{uuid.uuid4().hex[:8]}"
    home.mkdir(parents=True, exist_ok=True)
    subprocess.run([process.program("useradd"), "-M", "-d", str(home), "-s", "/bin/sh", name], check=True)
    try:
        subprocess.run([process.program("chpasswd")], input=f"{name}:{password}\n", text=True, check=True)
        subprocess.run(["chown", f"{name}:", str(home)], check=True)
        yield name
    finally:
        subprocess.run([process.program("userdel"), "-f", name], check=True, capture_output=True)


@contextmanager
def small_disk(tmp_path: Path, options: str) -> Iterator[Server]:
    """A server in a mount namespace of its own, where `/mnt` is a small disk.

    Without root that takes a user namespace in which we are root, and sshd another one in which it is not: as root it
    would look for a folder of root's, which belongs to nobody there.
    """
    back = "" if IS_ROOT else f"unshare -U --map-user={os.geteuid()} --map-group={os.getegid()} "
    script = f'mount --make-rprivate /; mount -t tmpfs -o {options} tmpfs /mnt; exec {back}"$@"'
    before = ["unshare", "-m" if IS_ROOT else "-rm", "sh", "-c", script, "sh"]
    with openssh(tmp_path / "sshd", before=tuple(before)) as server:
        yield server


def inside(server: Server, command: str) -> str:
    """Run a command where the server lives."""
    argv = ["ssh", "-F", "/dev/null", "-i", str(server.key), "-p", str(server.port), "-o", "StrictHostKeyChecking=no"]
    argv += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", f"{server.user}@127.0.0.1", command]
    return subprocess.run(argv, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


@contextmanager
def ordinary(tmp_path: Path, more: str = "") -> Iterator[tuple[Server, Path]]:
    """A server that lets in a user for whom rights count, and the user's home."""
    with tempfile.TemporaryDirectory(prefix="talaria-home-") as folder:
        home = Path(folder)
        home.chmod(0o755)
        if not IS_ROOT:
            with openssh(tmp_path / "sshd", more=more) as server:
                yield server, home
            return
        with (
            temporary_user(home / "user") as user,
            tempfile.TemporaryDirectory(prefix="talaria-sshd-") as place,
        ):
            os.chmod(place, 0o755)
            with openssh(Path(place), user=user, more=more.replace("@USER@", user)) as server:
                yield server, home / "user"
