"""Harness of rsync targets: OpenSSH and rsync on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pydantic import SecretStr

from blocks.rsync import RsyncTarget
from talaria.testing.harness import Harness
from tests.servers.openssh import shared
from tests.targets.remote_folder import TIMES, RemoteFolder


@contextmanager
def openssh(folder: Path) -> Iterator[Harness]:
    server = shared()
    target = RsyncTarget(
        host="127.0.0.1",
        port=server.port,
        user=server.user,
        folder=str(folder),
        private_key=SecretStr(server.key.read_text()),
        host_key="\n".join(server.host_keys),
        **TIMES,
    )
    remote = RemoteFolder(folder, target)
    yield Harness(
        name="rsync-openssh",
        target=target,
        dead=remote.dead(),
        read_back=remote.read_back,
        names=remote.names,
        cut=remote.cut,
        final=remote.final,
        leftovers=remote.leftovers,
        reject=remote.in_the_way,
        secrets=(server.key.read_text().splitlines()[2],),
    )


HARNESSES: dict[str, Callable[[Path], AbstractContextManager[Harness]]] = {"rsync-openssh": openssh}
NEEDED = {
    "host": "files.example.org",
    "user": "talaria",
    "folder": "/data",
}
