"""Private keys of SSH, converted to a form that ssh reads without asking for a passphrase.

Decrypting them here, instead of answering ssh's prompt, shows whether the passphrase is wrong or the host refuses the
key.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from transfer.errors import Misconfigured


def private_key(text: str, passphrase: str = "") -> tuple[bytes, bytes]:
    """Return a private key without a passphrase, and its certificate if one lies beside it.

    Args:
        text: the key itself, or the path of its file.

    Raises:
        Misconfigured: there is no such file, everybody may read it, it is not a key, or the passphrase is wrong.
    """
    certificate = b""
    if "-----BEGIN" not in text and "PuTTY-User-Key-File" not in text:
        path = Path(text.strip()).expanduser()
        try:
            mode = path.stat().st_mode
            text = path.read_text(encoding="utf-8", errors="replace")
            beside = path.with_name(path.name + "-cert.pub")
            certificate = beside.read_bytes() if beside.is_file() else b""
        except (OSError, ValueError, RuntimeError) as exc:
            # What doesn't look like a path may be a key that lost its first line: it must not show.
            if not text.strip().startswith(("/", "~")) or "\n" in text.strip():
                raise Misconfigured(
                    "private_key is neither a key, which begins with -----BEGIN, nor the path of a file to read"
                ) from None
            raise Misconfigured(f"private_key: {path} can't be read: {getattr(exc, 'strerror', None) or exc}") from exc
        if mode & stat.S_IROTH:
            raise Misconfigured(f"private_key: everybody may read {path}: chmod 600")
    return _decrypted(text, passphrase), certificate


def _decrypted(text: str, passphrase: str) -> bytes:
    """Return the key as text of OpenSSH's own form, which paramiko reads too, without encryption."""
    if "PuTTY-User-Key-File" in text:
        raise Misconfigured("private_key is in PuTTY's format: convert it with puttygen -O private-openssh")
    data = ("\n".join(line.strip() for line in text.strip().splitlines()) + "\n").encode()
    openssh = b"BEGIN OPENSSH PRIVATE KEY" in data
    load = load_ssh_private_key if openssh else load_pem_private_key
    try:
        try:
            key: Any = load(data, None)
        except TypeError:  # it is encrypted
            if not passphrase:
                raise Misconfigured("private_key is encrypted: set passphrase") from None
            key = load(data, passphrase.encode())
        else:
            if openssh:
                return data
        return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    except UnsupportedAlgorithm as exc:
        if passphrase or not openssh:
            raise Misconfigured("private_key is of a type that can't be used: make an ed25519 key") from exc
    except ValueError as exc:
        if passphrase:
            raise Misconfigured("passphrase does not open private_key") from exc
        raise Misconfigured("private_key is not a key that OpenSSH can use; ssh-keygen -t ed25519 makes one") from exc
    return data
