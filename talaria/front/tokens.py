"""Tokens for scripts: shown once, kept as SHA-256 in `tokens.json` of the state directory.

They are 256 random bits, so a fast hash protects them as well as a slow one, and can be computed for every request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass

from talaria.front.access import Identity, Role
from talaria.front.kept import KeptFile
from transfer.home import Home

_TOKEN = re.compile(r"tal_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_AGE = re.compile(r"(\d+)([dhm])")
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
LONGEST_S = 3650 * 86_400  # so that the end is a date that can be shown


@dataclass(frozen=True)
class Token:
    """A token as lists show it: without its secret.

    Attributes:
        created: seconds since 1970.
        expires: the same; None for never.
    """

    id: str
    name: str
    role: Role
    created: float
    expires: float | None


class Tokens:
    """The tokens of a state directory."""

    def __init__(self, home: Home) -> None:
        self.file = KeptFile(home, "tokens.json")

    def all(self) -> list[Token]:
        """Return the tokens, oldest first, expired ones included."""
        found = [
            Token(key, one["name"], Role.of(one["role"]), one["created"], one["expires"])
            for key, one in self.file.read().items()
        ]
        return sorted(found, key=lambda one: one.created)

    def create(self, role: Role, expires_s: float | None, name: str = "") -> tuple[Token, str]:
        """Make a token; return it, and its text, which can't be read again."""
        if name and not _NAME.fullmatch(name):
            raise ValueError(f"token name {name!r} is not valid: letters, digits and . _ @ -")
        now = time.time()
        until = None if expires_s is None else now + expires_s
        with self.file.changing() as tokens:
            key = secrets.token_hex(4)
            while key in tokens:
                key = secrets.token_hex(4)
            text = f"tal_{key}_{secrets.token_urlsafe(32)}"
            one = Token(key, name or f"token-{key}", role, now, until)
            tokens[key] = {
                "name": one.name,
                "role": role.label,
                "created": now,
                "expires": until,
                "sha256": _hash(text),
            }
        return one, text

    def revoke(self, which: str) -> Token:
        """Remove the token of this id, or of this name if only one has it.

        Raises:
            ValueError: there is none, or there are several.
        """
        with self.file.changing() as tokens:
            found = [key for key, one in tokens.items() if key == which] or [
                key for key, one in tokens.items() if one["name"] == which
            ]
            if len(found) != 1:
                known = ", ".join(f"{key} ({one['name']})" for key, one in tokens.items()) or "none"
                raise ValueError(f"{'no' if not found else 'more than one'} token {which}; there are: {known}")
            one = tokens.pop(found[0])
        return Token(found[0], one["name"], Role.of(one["role"]), one["created"], one["expires"])

    def verify(self, text: str) -> Identity | None:
        """Return the identity of a token; None if it is not valid now."""
        match = _TOKEN.fullmatch(text)
        one = self.file.read().get(match[1]) if match else None
        if one is None or not hmac.compare_digest(str(one["sha256"]), _hash(text)):
            return None
        if one["expires"] is not None and one["expires"] <= time.time():
            return None
        return Identity(one["name"], Role.of(one["role"]), "token")


def seconds_of(age: str) -> float | None:
    """Return a period such as 90d, 12h or 30m in seconds; None for `never`.

    Raises:
        ValueError: it is not one.
    """
    if age == "never":
        return None
    match = _AGE.fullmatch(age)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_S:
        raise ValueError(f"--expires {age!r}: expected a number and d, h or m, as in 90d, up to 3650d; or never")
    return seconds


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
