"""Harness of XNAT targets: the stand-in of `tests/servers/xnat`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from blocks.base import Target
from blocks.xnat import XnatTarget
from talaria.testing import process
from talaria.testing.harness import Harness
from talaria.testing.process import patient
from talaria.testing.relay import relay
from tests.servers.xnat import Xnat, xnat
from transfer.plan import Item, Plan

PASSWORD = "sesame-7f3a"


def xnat_target(url: str, **settings: Any) -> XnatTarget:
    """A target on loopback with timeouts that fit a test, and no waiting between attempts."""
    defaults: dict[str, Any] = {
        "host": url,
        "project_id": "P",
        "user": "sender",
        "password": PASSWORD,
        "connect_timeout_s": 5,
        "idle_timeout_s": 10,
        "archive_timeout_s": 10,
        "retry_delay_s": 0,
        "retry_max_delay_s": 0,
    }
    target = XnatTarget(**(patient(defaults) | settings))  # shorter ones are measured by how long the server is silent
    target.named("xnat-test")
    return target


@contextmanager
def serving(folder: Path | None, **roles: str) -> Iterator[Xnat]:
    """Run a server with the user that `xnat_target` is, a member of project P if not told otherwise."""
    with xnat(folder) as server:
        server.store.add_user("sender", PASSWORD)
        server.store.add_project("P", **(roles or {"sender": "member"}))
        yield server


@contextmanager
def _stand_in(folder: Path) -> Iterator[Harness]:
    with serving(folder) as server:

        @contextmanager
        def cut(count: int) -> Iterator[Target]:
            with relay(server.port, cut_after=count) as link:
                yield xnat_target(f"http://127.0.0.1:{link.port}")

        @contextmanager
        def reject(plan: Plan, item: Item) -> Iterator[Target]:
            assert item.header is not None
            server.rules.commit_ignores = False
            server.rules.unreadable = {item.header.SOPInstanceUID}
            yield xnat_target(server.url)

        yield Harness(
            name="xnat-stand-in",
            target=xnat_target(server.url),
            dead=xnat_target(f"http://127.0.0.1:{process.free_port()}"),
            read_back=lambda plan: server.instances(),
            names=server.names,
            leftovers=server.names,
            cut=cut,
            reject=reject,
            secrets=(PASSWORD,),
        )
        assert not server.store.logins, "a session at XNAT was not ended"


HARNESSES: dict[str, Callable[[Path], AbstractContextManager[Harness]]] = {"xnat-stand-in": _stand_in}
NEEDED = {
    "host": "https://xnat.example.org",
    "project_id": "P1",
    "user": "u",
    "password": "p",
}
