"""Whom we talk to: the keys of SSH hosts, pinned or learned.

A pin is a fingerprint (`SHA256:...`) or a key as in a known_hosts line without its host, `[@marker ]type base64`.
ssh itself compares keys, not fingerprints; so the key that a fingerprint stands for is asked of the host and held
against the pin here, and ssh is then told to accept this key alone.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path

from protocols.ssh.programs import environment, program

SCAN_SLACK_S = 5  # beyond ssh-keyscan's own timeout, which holds for each step

_resolved: dict[tuple[str, int, str], str] = {}
_lock = threading.Lock()


def fingerprint(key: str) -> str:
    """Return the fingerprint of `type base64` (RFC 4648 base64 of the SHA-256, without padding, as ssh shows it)."""
    digest = hashlib.sha256(base64.b64decode(key.split()[-1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def pattern(host: str, port: int) -> str:
    """Return how known_hosts names a host; a port other than 22 must be part of it (sshd(8))."""
    return host if port == 22 else f"[{host}]:{port}"


def scan(host: str, port: int, timeout_s: float) -> list[str]:
    """Ask a host for its keys; return them as `type base64`, none if it doesn't answer. Proves nothing by itself."""
    seconds = max(1, round(timeout_s))
    argv = [program("ssh-keyscan"), "-T", str(seconds), "-p", str(port), "--", host]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds + SCAN_SLACK_S, env=environment(),
            start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return []
    lines = [line.split() for line in done.stdout.decode("ascii", "replace").splitlines()]
    return [f"{fields[1]} {fields[2]}" for fields in lines if len(fields) >= 3 and not fields[0].startswith("#")]


def known_hosts(host: str, port: int, pins: Iterable[str], timeout_s: float) -> str:
    """Return the text of a known_hosts file that holds the pinned keys and no other.

    A fingerprint that is none of the host's keys adds nothing: ssh then refuses the host.
    """
    lines = []
    for pin in pins:
        key = _key_of(host, port, pin, timeout_s) if pin.startswith("SHA256:") else pin
        if key:
            marker, at, rest = key.partition(" ") if key.startswith("@") else ("", "", key)
            lines.append(f"{marker}{at}{pattern(host, port)} {rest}\n")
    return "".join(lines)


def _key_of(host: str, port: int, pin: str, timeout_s: float) -> str | None:
    """Return the key that a fingerprint stands for. Once found it holds for ever: no other key has it."""
    with _lock:
        known = _resolved.get((host, port, pin))
    if known is None:
        known = next((key for key in scan(host, port, timeout_s) if fingerprint(key) == pin), None)
        if known is not None:
            with _lock:
                _resolved[host, port, pin] = known
    return known


def is_known(host: str, port: int, file: Path) -> bool:
    """Tell whether a known_hosts file, hashed or not, has a key of any type for this host."""
    if not file.is_file():
        return False
    argv = [program("ssh-keygen"), "-F", pattern(host, port), "-f", str(file)]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, env=environment(), check=False
    )
    return done.returncode == 0
