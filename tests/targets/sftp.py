"""Harnesses of SFTP targets: OpenSSH, and servers that lack what it has."""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from blocks.sftp import SftpTarget
from talaria.testing.harness import Harness
from tests.servers.openssh import PASSWORD
from tests.servers.sftp_odd import Odd, odd
from tests.targets.remote_folder import TIMES, RemoteFolder, over_openssh
from transfer.plan import Item, Plan
from transfer.receipt import Level


@functools.cache
def _odd(without: tuple[str, ...], login: str) -> Odd:
    """One server of a kind for all tests."""
    stack = ExitStack()
    atexit.register(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="talaria-odd-")))
    return stack.enter_context(odd(folder, folder / "root", without=without, login=login))


def odd_target(server: Odd, folder: str, *, login: str = "publickey") -> SftpTarget:
    """A target that reaches an odd server."""
    secret: dict[str, Any] = {"password": server.password}
    if login == "publickey":
        secret = {"private_key": server.key.read_text()}
    return SftpTarget(
        host="127.0.0.1", port=server.port, user=server.user, folder=folder, host_key=server.host_key, **secret, **TIMES
    )


def _odd_factory(
    name: str, *without: str, login: str = "publickey", reaches: tuple[Level, ...] | None = None
) -> tuple[str, Callable[[Path], AbstractContextManager[Harness]]]:
    @contextmanager
    def factory(folder: Path) -> Iterator[Harness]:
        server = _odd(without, login)
        place = server.root / os.path.basename(os.path.dirname(folder))
        place.mkdir()
        remote = RemoteFolder(place, odd_target(server, f"/{place.name}", login=login))
        secret = PASSWORD if login != "publickey" else server.key.read_text().splitlines()[2]
        made = remote.harness(name, secret)
        made.reaches = reaches

        @contextmanager
        def reject(plan: Plan, item: Item) -> Iterator[SftpTarget]:
            with server.doing(f"refuse {item.path}"):
                yield remote.target  # type: ignore[misc]

        @contextmanager
        def shorten() -> Iterator[SftpTarget]:
            with server.doing("shorten"):
                yield remote.target  # type: ignore[misc]

        made.reject = reject
        made.shorten = shorten
        yield made

    return name, factory


HARNESSES: dict[str, Callable[[Path], AbstractContextManager[Harness]]] = dict(
    [
        ("sftp-openssh", functools.partial(over_openssh, SftpTarget)),
        _odd_factory("sftp-no-posix-rename", "posix-rename", "limits", login="password"),
        _odd_factory("sftp-keyboard-interactive", login="keyboard-interactive"),
    ]
)
NEEDED = {
    "host": "files.example.org",
    "user": "talaria",
    "folder": "/data",
}
