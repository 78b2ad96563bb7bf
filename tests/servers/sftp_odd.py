"""SFTP servers that are not OpenSSH's: without posix-rename, without any rename, with a hidden stat, without a shell.

    python -m tests.servers.sftp_odd --port 2222 --root FOLDER --host-key KEY --user U [--without posix-rename,...]

Made of asyncssh, in a process of its own. What they do may be changed while they run by words in `FOLDER/../<control>`:
`shorten` (bytes after the first 2,000 of a file are lost without an error), `refuse NAME`, `full` (no space left),
`full N` (none for what a file has beyond N bytes), `crowded N` (the same; until the first of these is removed, others
fail without a reason), `hang up N` (the connection is cut when a file gets longer), `stall N` (what a file has beyond N
bytes is never confirmed), `tire N` (the connection is cut after N files).
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talaria.testing import process
from tests.servers.openssh import PASSWORD, fingerprint, make_key, public

KEPT_BYTES = 2000
USER = "lab"


@dataclass
class Odd:
    """A running odd server; `control` is written to change what it does."""

    port: int
    root: Path
    control: Path
    key: Path
    host_key: str
    fingerprint: str
    user: str = USER
    password: str = PASSWORD

    @contextmanager
    def doing(self, words: str) -> Iterator[None]:
        """Make it do something else for the time of a block."""
        self.control.write_text(words)
        try:
            yield
        finally:
            self.control.write_text("")


@contextmanager
def odd(
    folder: Path, root: Path, *, without: tuple[str, ...] = (), login: str = "publickey", password: str = PASSWORD
) -> Iterator[Odd]:
    """Run one.

    Args:
        root: the folder that its clients see as `/`.
        without: `posix-rename`, `rename`, `stat`, `folders` (nor a stat of these), `sizes` (a stat without), `limits`,
            `read`, `remove`, `parallel` (one session per connection).
        login: `publickey`, `password` or `keyboard-interactive`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    port = process.free_port()
    host, key = make_key(folder / "host"), make_key(folder / "user")
    control = folder / "control"
    control.write_text("")
    secret = folder / "secret"
    secret.write_text(password)
    argv = [
        sys.executable, "-m", "tests.servers.sftp_odd", "--port", str(port), "--root", str(root), "--login", login,
        "--host-key", str(host), "--authorized", f"{key}.pub", "--control", str(control), "--secret", str(secret),
        "--without", ",".join(without),
    ]  # fmt: skip
    with process.server(argv, port, folder / "odd.log", cwd=Path(__file__).parents[2]):
        yield Odd(port, root, control, key, public(host), fingerprint(host), password=password)


def main() -> None:
    import asyncssh
    from asyncssh import sftp

    parser = argparse.ArgumentParser()
    for option in ("port", "root", "host-key", "authorized", "control", "secret", "without", "login"):
        parser.add_argument(f"--{option}", default="")
    given = parser.parse_args()
    secret = Path(given.secret).read_text()
    without = set(given.without.split(",")) - {""}
    lacking = {"posix-rename": b"posix-rename@openssh.com", "limits": b"limits@openssh.com"}
    gone = {lacking[word] for word in without if word in lacking}
    if "rename" in without:
        gone.add(lacking["posix-rename"])
    if "stat" in without:
        gone |= {b"statvfs@openssh.com", b"fstatvfs@openssh.com"}
    handler: Any = sftp.SFTPServerHandler
    handler._extensions = [pair for pair in handler._extensions if pair[0] not in gone]
    for name in gone:
        handler._packet_handlers.pop(name, None)

    def words() -> str:
        return Path(given.control).read_text()

    freed: list[bytes] = []  # what was removed while it was crowded

    class Files(asyncssh.SFTPServer):
        def __init__(self, chan: Any) -> None:
            super().__init__(chan, chroot=os.fsencode(given.root))
            self.offsets: dict[int, int] = {}
            self.files = 0  # that got their names

        def open(self, path: bytes, pflags: int, attrs: Any) -> Any:
            said = words()
            if said.startswith("refuse ") and os.fsencode(said[7:]) in path:
                raise asyncssh.SFTPFailure("refused")
            if "read" in without and pflags & 1:
                raise asyncssh.SFTPPermissionDenied("nobody may read")
            return super().open(path, pflags, attrs)

        def write(self, file_obj: Any, offset: int, data: bytes) -> Any:
            said = words()
            end = offset + len(data)
            if said == "full" or (said.startswith("full ") and end > int(said[5:])):
                raise OSError(errno.ENOSPC, "No space left on device")
            if said.startswith("crowded ") and end > int(said[8:]):
                raise OSError(errno.ENOSPC, "No space left on device")
            if said.startswith("crowded ") and not freed:
                raise asyncssh.SFTPFailure("Failure")
            if said.startswith("hang up ") and end > int(said[8:]):
                self.channel.get_connection().abort()
            if said.startswith("stall ") and end > int(said[6:]):
                return asyncio.Event().wait()
            if said == "shorten":
                data = data[: max(0, KEPT_BYTES - offset)]
            return super().write(file_obj, offset, data)

        def rename(self, oldpath: bytes, newpath: bytes) -> Any:
            said = words()
            if "rename" in without:
                raise asyncssh.SFTPOpUnsupported("no rename here")
            if said.startswith("refuse ") and os.fsencode(said[7:]) in newpath:
                raise asyncssh.SFTPFailure("refused")
            if os.path.lexists(self.map_path(newpath)):
                raise asyncssh.SFTPFailure("it is there already")
            return super().rename(oldpath, newpath)

        def posix_rename(self, oldpath: bytes, newpath: bytes) -> Any:
            said = words()
            if said.startswith("refuse ") and os.fsencode(said[7:]) in newpath:
                raise asyncssh.SFTPFailure("refused")
            self.files += 1
            if said.startswith("tire ") and self.files > int(said[5:]):
                self.channel.get_connection().abort()
                raise asyncssh.SFTPFailure("tired")
            return super().posix_rename(oldpath, newpath)

        def remove(self, path: bytes) -> Any:
            if "remove" in without:
                raise asyncssh.SFTPPermissionDenied("what is here stays here")
            if words().startswith("crowded ") and b"/.incoming-" in path:
                freed.append(path)
            return super().remove(path)

        def stat(self, path: bytes) -> Any:
            folder = os.path.isdir(self.map_path(path))
            if ("folders" if folder else "stat") in without and path != b"/":
                raise asyncssh.SFTPNoSuchFile("there is nothing to be seen here")
            found: Any = super().stat(path)
            return asyncssh.SFTPAttrs(permissions=found.st_mode) if "sizes" in without and not folder else found

        def lstat(self, path: bytes) -> Any:
            return self.stat(path)

        def fstat(self, file_obj: Any) -> Any:
            if "stat" in without:
                raise asyncssh.SFTPOpUnsupported("not here")
            found: Any = super().fstat(file_obj)
            return asyncssh.SFTPAttrs(permissions=found.st_mode) if "sizes" in without else found

    class Doorman(asyncssh.SSHServer):
        def public_key_auth_supported(self) -> bool:
            return bool(given.login == "publickey")

        def password_auth_supported(self) -> bool:
            return bool(given.login == "password")

        def validate_password(self, username: str, password: str) -> bool:
            return bool(password == secret)

        def kbdint_auth_supported(self) -> bool:
            return bool(given.login == "keyboard-interactive")

        def get_kbdint_challenge(self, username: str, lang: str, submethods: str) -> Any:
            return "", "", "", [("Your secret word: ", False)]

        def validate_kbdint_response(self, username: str, responses: Any) -> bool:
            return bool(list(responses) == [secret])

    async def serve() -> None:
        more: Mapping[str, Any] = {"authorized_client_keys": given.authorized} if given.login == "publickey" else {}
        await asyncssh.create_server(
            Doorman, "127.0.0.1", int(given.port), server_host_keys=[given.host_key], sftp_factory=Files, **more
        )
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
