"""People who may log in: names, roles and argon2id hashes of passwords, in `users.json` of the state directory."""

from __future__ import annotations

import re
import secrets
import threading
from dataclasses import dataclass
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from talaria.front.access import Identity, Role
from talaria.front.kept import KeptFile
from transfer.home import Home

SHORTEST = 10  # characters of a password
LONGEST = 1024  # so that nobody lets us hash megabytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_RESERVED = ("talaria", "worker", "machine")  # what the product's own credentials are called
_TAKEN = "a user named {0} is there already: `talaria user passwd {0}`, or remove it"
_hasher = PasswordHasher()  # argon2id, with the parameters of RFC 9106's low-memory recommendation
_two_at_once = threading.Semaphore(2)  # each takes 64 MiB


@dataclass(frozen=True)
class User:
    """A user as lists show them."""

    name: str
    role: Role
    password: bool  # False: known by the header of a trusted proxy alone


class Users:
    """The users of a state directory."""

    def __init__(self, home: Home) -> None:
        self.file = KeptFile(home, "users.json")

    def all(self) -> list[User]:
        """Return the users, sorted by name."""
        return [User(name, Role.of(one["role"]), bool(one["hash"])) for name, one in sorted(self.file.read().items())]

    def add(self, name: str, role: Role, password: str | None) -> None:
        """Add a user; without a password, one whom a trusted proxy names.

        Raises:
            ValueError: the name is taken or not valid, or the password is too short.
        """
        self.check(name)
        hashed = "" if password is None else hash_of(password)
        with self.file.changing() as users:
            if name in users:
                raise ValueError(_TAKEN.format(name))
            users[name] = {"role": role.label, "hash": hashed, "stamp": secrets.token_hex(8)}

    def check(self, name: str, *, there: bool = False) -> None:
        """Raise if a name can't be used, before a password is asked for.

        Raises:
            ValueError: it is not valid or is taken; with `there`, there is no such user.
        """
        known = self.file.read()
        if there:
            _known(name, known)
        elif not _NAME.fullmatch(name) or name.lower() in _RESERVED:
            raise ValueError(f"user name {name!r} is not valid: letters, digits and . _ @ - (not {_RESERVED[0]})")
        elif name in known:
            raise ValueError(_TAKEN.format(name))

    def remove(self, name: str) -> None:
        """Remove a user; their sessions end."""
        with self.file.changing() as users:
            del users[_known(name, users)]

    def change(self, name: str, *, password: str | None = None, role: Role | None = None) -> None:
        """Give a user another password or role; their sessions end."""
        hashed = None if password is None else hash_of(password)
        with self.file.changing() as users:
            one = users[_known(name, users)]
            if hashed is not None:
                one["hash"] = hashed
            if role is not None:
                one["role"] = role.label
            one["stamp"] = secrets.token_hex(8)

    def role_of(self, name: str) -> Role | None:
        """Return the role of a user, None if there is none of that name."""
        one = self.file.read().get(name)
        return Role.of(one["role"]) if one else None

    def stamp(self, name: str) -> str:
        """Return the stamp that a session of a user must hold; "" if there is no such user."""
        one = self.file.read().get(name)
        return str(one["stamp"]) if one else ""

    def verify(self, name: str, password: str) -> Identity | None:
        """Return the identity of a user who logs in; None, after as long a time, if name or password is wrong."""
        if len(password) > LONGEST:
            return None
        one = self.file.read().get(name)
        known = str(one["hash"]) if one else ""
        with _two_at_once:
            try:
                _hasher.verify(known or _nobodys(), password)
            except (VerificationError, InvalidHashError):
                return None
        return Identity(name, Role.of(one["role"]), "session") if one and known else None


def hash_of(password: str) -> str:
    """Return the argon2id hash of a password.

    Raises:
        ValueError: it is too short or too long.
    """
    if not SHORTEST <= len(password) <= LONGEST:
        raise ValueError(f"a password has {SHORTEST} to {LONGEST} characters")
    return _hasher.hash(password)


@cache
def _nobodys() -> str:
    return _hasher.hash(secrets.token_hex(16))


def _known(name: str, users: dict[str, dict[str, str]]) -> str:
    if name not in users:
        there = f"there are: {', '.join(sorted(users))}" if users else "there are none"
        raise ValueError(f"no user named {name}; {there}")
    return name
