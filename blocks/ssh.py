"""What rsync and SFTP targets have in common: a login over SSH, a folder, trust in the host, a script at the end."""

from __future__ import annotations

import base64
import binascii
import re
from abc import ABC
from enum import StrEnum
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator

from blocks.base import LAYOUT, Hook, Target, check_argument, check_host, check_layout
from blocks.fields import SECONDS, TIMES, Group, about

FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")  # of ssh-keygen -l: base64 of 32 bytes, without padding
KEY_TYPE = re.compile(r"(ssh|ecdsa|sk-ssh|sk-ecdsa)-[A-Za-z0-9@.-]+")
MARKERS = ("@cert-authority", "@revoked")  # sshd(8), SSH_KNOWN_HOSTS FILE FORMAT
SCRIPT_CHARS = 200  # fits every file system's 255 bytes


class HostKeyPolicy(StrEnum):
    """What to do about a host without a known key; a changed key is never accepted."""

    STRICT = "strict"
    ACCEPT_NEW = "accept-new"


class SshTarget(Target, ABC):
    """A folder on a server that is reached over SSH."""

    where: ClassVar[tuple[str, ...]] = ("host", "port", "user", "folder", "layout")
    host_in: ClassVar[str] = "host"
    aims: ClassVar[tuple[str, ...]] = ("host", "port", "jump_host", "host_key", "host_key_policy", "jump_host_key")

    host: str = Field(
        description="Host name or IP address of the server.",
        title="Host",
        json_schema_extra=about(Group.CONNECTION, placeholder="files.example.org or 10.1.2.3"),
    )
    port: int = Field(
        default=22,
        ge=1,
        le=65_535,
        description="TCP port of the server's SSH.",
        title="Port",
        json_schema_extra=about(Group.CONNECTION, placeholder="22"),
    )
    user: str = Field(
        default="",
        description="User to log in as; empty for the account that dispatches run under.",
        title="User",
        json_schema_extra=about(Group.CONNECTION, placeholder="the worker's account"),
    )
    folder: str = Field(
        description="Folder on the server that dispatches go to; a relative one begins at the user's home.",
        title="Folder on the server",
        json_schema_extra=about(Group.CONNECTION, placeholder="incoming"),
    )
    layout: str = LAYOUT
    private_key: SecretStr = Field(
        default=SecretStr(""),
        description="Private key: its text, or the path of its file where dispatches run; without key and password, "
        "the SSH agent and the account's own keys are used.",
        title="Private key",
        json_schema_extra=about(
            Group.SIGN_IN, placeholder="path or -----BEGIN OPENSSH PRIVATE KEY-----", at=1, lines=True
        ),
    )
    passphrase: SecretStr = Field(
        default=SecretStr(""),
        description="Passphrase of the private key.",
        title="Passphrase",
        json_schema_extra=about(Group.SIGN_IN, at=2),
    )
    password: SecretStr = Field(
        default=SecretStr(""),
        description="Password of the user, also for keyboard-interactive login.",
        title="Password",
        json_schema_extra=about(Group.SIGN_IN),
    )
    host_key: str = Field(
        default="",
        description="The server's key: its fingerprint as SHA256:..., or a known_hosts line; one per line if several.",
        title="Server's key",
        json_schema_extra=about(Group.TRUST, placeholder="SHA256:...", lines=True),
    )
    host_key_policy: HostKeyPolicy = Field(
        default=HostKeyPolicy.STRICT,
        description="Whether an unknown host is refused (strict) or its key learned once (accept-new).",
        title="Unknown server",
        json_schema_extra=about(Group.TRUST, advanced=True),
    )
    jump_host: str = Field(
        default="",
        description="Jump host (bastion) through which the server is reached: host, user@host or user@host:port.",
        title="Jump host",
        json_schema_extra=about(Group.JUMP_HOST, advanced=True, placeholder="user@bastion.example.org"),
    )
    jump_host_key: str = Field(
        default="",
        description="The jump host's key, given as host_key.",
        title="Jump host's key",
        json_schema_extra=about(Group.JUMP_HOST, advanced=True, placeholder="SHA256:...", lines=True),
    )
    jump_private_key: SecretStr = Field(
        default=SecretStr(""),
        description="Private key for the jump host, given as private_key; empty for the same as the server's. "
        "Passwords are never sent to the jump host.",
        title="Private key for the jump host",
        json_schema_extra=about(Group.JUMP_HOST, advanced=True, lines=True),
    )
    jump_passphrase: SecretStr = Field(
        default=SecretStr(""),
        description="Passphrase of jump_private_key.",
        title="Passphrase for the jump host",
        json_schema_extra=about(Group.JUMP_HOST, advanced=True),
    )
    on_complete: bool = Field(
        default=False,
        description="Whether to run the script in the folder after everything has arrived.",
        title="Run a script when all is there",
        json_schema_extra=about(Group.AFTER, advanced=True),
    )
    hook_script: str = Field(
        default="mercure_complete.sh",
        description="Name of the script in the folder; gets the destination folder and the target's name.",
        title="Script",
        json_schema_extra=about(Group.AFTER, advanced=True, placeholder="mercure_complete.sh"),
    )
    hook_timeout_s: float = Field(
        default=600,
        gt=0,
        le=86_400,
        description="Seconds the script may take.",
        title="Time allowed",
        json_schema_extra=about(Group.AFTER, advanced=True, unit=SECONDS),
    )
    hook_attempts: int = Field(
        default=3,
        ge=1,
        le=50,
        description="How often the script is tried in one run.",
        title="Attempts of the script",
        json_schema_extra=about(Group.AFTER, advanced=True, unit=TIMES),
    )
    hook_retry_delay_s: float = Field(
        default=30,
        ge=0,
        le=86_400,
        description="Seconds before the second try of the script; doubles with each one, up to retry_max_delay_s.",
        title="First wait of the script",
        json_schema_extra=about(Group.AFTER, advanced=True, unit=SECONDS),
    )

    @property
    def hook(self) -> Hook:
        """The script in the folder."""
        return Hook(self.on_complete, self.layout, self.hook_attempts, self.hook_retry_delay_s)

    @property
    def pins(self) -> tuple[str, ...]:
        """The host keys to trust, without a host: fingerprints, or `[@marker ]type base64`."""
        return pinned(self.host_key)

    @property
    def jump_pins(self) -> tuple[str, ...]:
        """The jump host's keys to trust, as `pins`."""
        return pinned(self.jump_host_key)

    @property
    def jump(self) -> tuple[str, str, int]:
        """User, host and port of the jump host."""
        return check_jump_host(self.jump_host)

    @field_validator("jump_host")
    @classmethod
    def _jump_host(cls, value: str) -> str:
        value = value.strip()
        if value:
            check_jump_host(value)
        return value

    @field_validator("host")
    @classmethod
    def _host(cls, value: str) -> str:
        return check_host(value)

    @field_validator("user")
    @classmethod
    def _user(cls, value: str) -> str:
        return check_user(value)

    @field_validator("folder")
    @classmethod
    def _folder(cls, value: str) -> str:
        return check_folder(value)

    @field_validator("layout")
    @classmethod
    def _layout(cls, value: str) -> str:
        return check_layout(value)

    @field_validator("password", "passphrase", "jump_passphrase")
    @classmethod
    def _one_line(cls, value: SecretStr) -> SecretStr:
        if any(char in value.get_secret_value() for char in "\0\r\n"):
            raise ValueError("must be one line")  # ssh takes what an askpass program prints up to the line's end
        return value

    @field_validator("host_key", "jump_host_key")
    @classmethod
    def _host_key(cls, value: str) -> str:
        pinned(value)
        return value.strip()

    @field_validator("hook_script")
    @classmethod
    def _hook_script(cls, value: str) -> str:
        value = check_argument(value.strip())
        if not value or "/" in value or value in (".", "..") or len(value) > SCRIPT_CHARS:
            raise ValueError(f"{value!r}: name a script in the target's folder, without a path")
        return value


def check_user(value: str) -> str:
    """Return the name of a user.

    Raises:
        ValueError: it looks like an option, or holds a character that shells interpret.
    """
    value = check_argument(value.strip())
    if any(char in value for char in "\"'`$;|&<>(){}"):  # ssh of today refuses these as well
        raise ValueError(f"{value!r} is not valid as the name of a user: it holds a character that shells interpret")
    return value


def check_jump_host(value: str) -> tuple[str, str, int]:
    """Return user, host and port of `user@host:port`, of which only the host is required; IPv6 in brackets.

    Raises:
        ValueError: it is none of these.
    """
    user, _, where = value.rpartition("@")
    found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::(\d{1,5}))?", where)
    if found is None or "," in value or not 1 <= int(found[3] or 22) <= 65_535:
        raise ValueError(f"jump_host {value!r} is not valid: write host, user@host or user@host:port, one host only")
    return check_user(user), check_host(found[1] or found[2]), int(found[3] or 22)


def check_folder(value: str) -> str:
    """Return a folder on a server without trailing slashes and `~/`, where relative paths begin anyway.

    Raises:
        ValueError: it is empty, looks like an option, holds control characters, or is another user's home.
    """
    value = check_argument(value)
    value = value[2:].lstrip("/") or "." if value.startswith("~/") else "." if value == "~" else value
    if value.startswith("~"):
        raise ValueError(f"{value!r}: another user's home must be written as a path")
    if not value.strip():
        raise ValueError("name a folder on the server; '.' is the user's home")
    return check_argument(value.rstrip("/") or "/")


def pinned(text: str) -> tuple[str, ...]:
    """Return the entries of `host_key`: fingerprints, or keys as `[@marker ]type base64` without host and comment.

    Raises:
        ValueError: an entry is neither; the message says how to get one.
    """
    found: list[str] = []
    for line in text.splitlines():
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        if line.strip().startswith("SHA256:"):
            for entry in re.split(r"[\s,]+", line.strip()):
                entry = entry.rstrip("=")
                if not FINGERPRINT.fullmatch(entry):
                    raise ValueError(f"host_key {entry!r}: a fingerprint has 43 characters after SHA256:")
                found.append(entry)
            continue
        marker = [fields.pop(0)] if fields[0] in MARKERS else []
        at = next((i for i, field in enumerate(fields[:2]) if KEY_TYPE.fullmatch(field)), None)
        if at is None or len(fields) < at + 2 or not _is_key(*fields[at : at + 2]):
            raise ValueError(
                f"host_key {line[:60]!r}: give the fingerprint as SHA256:... (on the server: "
                "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub) or a line as in known_hosts"
            )
        found.append(" ".join([*marker, *fields[at : at + 2]]))
    return tuple(found)


def _is_key(kind: str, text: str) -> bool:
    """Return True if the text is a public key of this type (RFC 4253 section 6.6)."""
    try:
        blob = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    name = kind.encode()
    return blob[: 4 + len(name)] == len(name).to_bytes(4, "big") + name
