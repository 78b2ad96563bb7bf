"""A login: where, as whom and with what; and why one failed, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from protocols.net.connection import place
from protocols.ssh import hostkeys


@dataclass(frozen=True)
class Login:
    """Where to log in, as whom and with what.

    Attributes:
        user: "" for the name of the account that we run under.
        key: a private key in a form that needs no passphrase (`private_key`), b"" for none.
        certificate: the certificate that belongs to the key, as ssh-keygen -s makes it.
        pins: the host keys to trust (`hostkeys.py`); without any, those that are known.
        accept_new: whether to trust a host without a known key, and to save its key.
        known_hosts: files of known keys; a new one is saved in the first.
        connect_timeout_s: for the connection, and again for the handshake.
        idle_timeout_s: silence after which the host counts as hung.
        jump: the host through which the way leads, None for a direct one.
        prefix: what the names of this login's settings begin with in messages: `jump_` for a jump host's.
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
    jump: Login | None = None
    prefix: str = ""

    @property
    def shown(self) -> str:
        """User, host and port for messages."""
        where = place(self.host, self.port)
        return f"{self.user}@{where}" if self.user else where


@dataclass(frozen=True)
class LoginFacts:
    """What is known about a connection; "" where it did not get so far."""

    key_type: str = ""
    fingerprint: str = ""
    method: str = ""
    software: str = ""
    cipher: str = ""


def why_not_trusted(login: Login, facts: LoginFacts, words: str = "") -> str:
    """Return why a host's key is not trusted, and what to do if it is the right one.

    Args:
        words: ssh(1)'s.
    """
    shown = f"{facts.key_type} {facts.fingerprint}" if facts.fingerprint else "a key"
    where, setting = place(login.host, login.port), f"{login.prefix}host_key"
    if "revoked" in words:
        return f"{where}: the host shows {shown}, which is marked as revoked: the host must get a new key"
    if login.pins:
        change = f". If the change is wanted, set {setting} to {facts.fingerprint}" if facts.fingerprint else ""
        return f"{where}: the host shows {shown}, which is not the pinned {setting}{change}"
    if hostkeys.known(login.host, login.port, login.known_hosts):
        files = " or ".join(str(file) for file in login.known_hosts)
        return (
            f"{where}: the host key has CHANGED: the host shows {shown}, another one is known. If the change is "
            f"wanted, set {setting} to the new fingerprint, or remove the old key: "
            f"ssh-keygen -R '{hostkeys.pattern(login.host, login.port)}' -f {files}"
        )
    if not facts.fingerprint:
        return f"{where}: the host key is not trusted: {' '.join(words.split())[-300:]}"
    return (
        f"{where}: the host key is unknown: {shown}. If that is the server's (its administrator sees it with "
        f"ssh-keygen -lf), set {setting} to {facts.fingerprint}"
    )


def why_denied(login: Login) -> str:
    """Return what to check when a host refuses the login."""
    if login.prefix:  # passwords are not for jump hosts
        own = "jump_private_key, or private_key where that is empty"
        if login.key:
            return f"it does not take this {own}: its public key must be among the account's authorized_keys"
        return f"set {own}: the account that Talaria runs under has no key that the jump host takes"
    if login.key and login.password:
        return "it takes neither this private_key nor this password for this user"
    if login.key:
        return "it does not take this private_key: its public key must be among the account's authorized_keys"
    if login.password:
        return "it does not take this user with this password"
    return "set private_key or password: the account that Talaria runs under has no key that the host takes"
