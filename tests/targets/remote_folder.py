"""What harnesses of rsync and SFTP have in common: a folder that a server on this machine writes to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import SecretStr

from blocks.ssh import SshTarget
from talaria.testing import process
from talaria.testing.harness import Harness, Sent
from talaria.testing.relay import relay
from tests.servers.openssh import Server, shared
from transfer.layout import names as layout_names
from transfer.plan import Item, Plan

HANDSHAKE_BYTES = 5_000  # of ours, before the first byte of a file
TIMES: dict[str, Any] = {"connect_timeout_s": 5, "idle_timeout_s": 10, "retry_delay_s": 0, "retry_max_delay_s": 0}
OWN = (".incoming-", ".talaria-")
K = TypeVar("K", bound=SshTarget)


def ssh_target(kind: type[K], server: Server, folder: Path | str, **more: Any) -> K:
    """A target at a server on this machine that logs in with the server's own key."""
    fields: dict[str, Any] = {
        "host": "127.0.0.1", "port": server.port, "user": server.user, "folder": str(folder),
        "host_key": "".join(server.host_keys[:1]), "private_key": SecretStr(str(server.key)), "connect_timeout_s": 5,
        "idle_timeout_s": 10,
    }  # fmt: skip
    return kind(**(fields | more))


def content(sent: Sent) -> dict[str, bytes]:
    """What was sent, as it lies here."""
    return {item.path: sent.plan.file(item).read_bytes() for item in sent.plan.items}


@dataclass
class RemoteFolder:
    """A folder, and a target that sends there."""

    folder: Path
    target: SshTarget

    def names(self) -> set[str]:
        """Every file and every empty folder, relative; what vanishes while it is looked at is not there."""
        found = set()
        for path, folders, files in os.walk(self.folder):
            relative = os.path.relpath(path, self.folder)
            found |= {os.path.normpath(os.path.join(relative, name)) for name in files}
            if not folders and not files and relative != ".":
                found.add(relative + "/")
        return found

    def final(self, name: str) -> bool:
        return not any(part.startswith(OWN) for part in name.split("/"))

    def leftovers(self) -> set[str]:
        return {name for name in self.names() if not self.final(name)}

    def read_back(self, plan: Plan) -> dict[str, bytes]:
        found = {}
        for name in set(layout_names(plan, self.target.layout).values()):
            for path, _, files in os.walk(self.folder / name):
                for file in files:
                    full = os.path.join(path, file)
                    relative = os.path.relpath(full, self.folder / name)
                    if relative != ".complete" and self.final(relative):
                        try:
                            found[relative] = Path(full).read_bytes()
                        except FileNotFoundError:
                            continue
        return found

    def harness(self, name: str, *secrets: str) -> Harness:
        return Harness(
            name=name,
            target=self.target,
            dead=self.dead(),
            read_back=self.read_back,
            names=self.names,
            cut=self.cut,
            final=self.final,
            leftovers=self.leftovers,
            reject=self.in_the_way,
            secrets=secrets,
        )

    def through(self, port: int) -> SshTarget:
        """The target behind a relay."""
        return self.target.model_copy(update={"port": port})

    def dead(self) -> SshTarget:
        """The target where nothing listens."""
        return self.through(process.free_port())

    @contextmanager
    def cut(self, count: int) -> Iterator[SshTarget]:
        """The target over a link that breaks once, after that many bytes."""
        with relay(self.target.port, cut_after=count + HANDSHAKE_BYTES) as one:
            yield self.through(one.port)

    @contextmanager
    def in_the_way(self, plan: Plan, item: Item) -> Iterator[SshTarget]:
        """Let a folder stand where the item should go."""
        name = layout_names(plan, self.target.layout)[item.path]
        obstacle = self.folder / name / item.path
        obstacle.mkdir(parents=True)
        yield self.target


@contextmanager
def over_openssh(kind: type[SshTarget], folder: Path) -> Iterator[Harness]:
    """A folder behind this machine's OpenSSH, for the conformance suite."""
    server = shared()
    key = server.key.read_text()
    target = ssh_target(kind, server, folder, private_key=SecretStr(key), host_key="\n".join(server.host_keys), **TIMES)
    yield RemoteFolder(folder, target).harness(f"{kind.type_name}-openssh", key.splitlines()[2])
