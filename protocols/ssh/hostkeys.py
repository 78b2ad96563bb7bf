"""Keys of SSH hosts, which prove whom we talk to: pinned, known or learned.

A pin is a fingerprint (`SHA256:...`) or a key as in a known_hosts line without its host, `[@marker ]type base64`.
ssh itself compares keys, not fingerprints; so the key that a fingerprint stands for is asked of the host and compared
with the pin here, and ssh is then given this key alone. A host shows one key in each connection, so each type of key
that it may have takes another connection.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import paramiko

from protocols.ssh.programs import environment, program

# Each type of key, and the names under which it is negotiated: RSA has one for each kind of signature (RFC 8332).
KINDS = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
}

Ask = Callable[[str], str | None]  # takes a type of KINDS, returns `type base64`, None if the host has none of it

_resolved: dict[tuple[str, int, str], str] = {}
_lock = threading.Lock()


def fingerprint(key: str) -> str:
    """Return the fingerprint of `type base64` (RFC 4648 base64 of the SHA-256, without padding, as ssh shows it)."""
    digest = hashlib.sha256(base64.b64decode(key.split()[-1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def text_of(key: paramiko.PKey) -> str:
    """Return one of paramiko's keys as `type base64`."""
    return f"{key.get_name()} {key.get_base64()}"


def pattern(host: str, port: int) -> str:
    """Return the name of a host in known_hosts; a port other than 22 must be part of it (sshd(8))."""
    return host if port == 22 else f"[{host}]:{port}"


def line(host: str, port: int, key: str) -> str:
    """Return a line of known_hosts for a key `[@marker ]type base64`, as ssh(1) reads it."""
    marker, at, rest = key.partition(" ") if key.startswith("@") else ("", "", key)
    return f"{marker}{at}{pattern(host, port)} {rest}\n"


def resolved(host: str, port: int, pins: Iterable[str], ask: Ask) -> tuple[str, ...]:
    """Return the keys that pins stand for; a fingerprint of no key of the host adds nothing.

    Raises:
        DispatchError: the host could not be asked, which shows nothing about its key.
    """
    keys: list[str] = []
    wanted = [pin for pin in pins if pin.startswith("SHA256:")]
    with _lock:  # once found, a key holds for ever: no other one has its fingerprint
        found = {pin: _resolved[host, port, pin] for pin in wanted if (host, port, pin) in _resolved}
    for kind in KINDS:
        if all(pin in found for pin in wanted):
            break
        key = ask(kind)
        if key and (pin := fingerprint(key)) in wanted:
            found[pin] = key
    with _lock:
        _resolved.update({(host, port, pin): key for pin, key in found.items()})
    for pin in pins:
        if key := (found.get(pin) if pin.startswith("SHA256:") else pin):
            keys.append(key)
    return tuple(keys)


def known(host: str, port: int, files: Iterable[Path]) -> tuple[str, ...]:
    """Return the keys, `[@marker ]type base64`, that known_hosts files, hashed or not, have for this host."""
    found: list[str] = []
    for file in files:
        if not file.is_file():
            continue
        argv = [program("ssh-keygen"), "-F", pattern(host, port), "-f", str(file)]
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, env=environment(), check=False
        )
        for text in done.stdout.decode("utf-8", "replace").splitlines():
            fields = text.split()
            if text.startswith("#") or len(fields) < 3:
                continue
            marker = [fields.pop(0)] if fields[0].startswith("@") else []
            if len(fields) >= 3:
                found.append(" ".join([*marker, *fields[1:3]]))
    return tuple(found)


def learn(file: Path, host: str, port: int, key: str) -> None:
    """Save a host's key, for us and for ssh(1)."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, line(host, port, key).encode())
    finally:
        os.close(fd)
