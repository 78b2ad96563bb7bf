"""A stand-in for XNAT, which needs Docker and gigabytes: its REST interface by its own source, and its rules.

It stores what it gets, so that tests can read back the instances. pyxnat and xnatpy, unchanged, log in, list projects,
upload and read sessions on it (`tests/servers/test_xnat.py`), which keeps it honest; it was never compared with a live
XNAT.

    with xnat(folder) as server:
        server.url, server.store.experiments, server.rules.archive_s = 2, server.faults.append(Fault(...))
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.xnat.http import Fault, Reply, Server, error
from tests.servers.xnat.model import Experiment, Prearchived, Refusal, Store
from tests.servers.xnat.rest import Rest
from tests.servers.xnat.service import Rules

__all__ = ["Experiment", "Fault", "Prearchived", "Refusal", "Reply", "Rules", "Xnat", "error", "xnat"]


class Xnat:
    """A running server.

    Attributes:
        store: what it has. rules: how it behaves. faults: what shall go wrong.
    """

    def __init__(self, root: Path | None, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.store, self.rules = Store(root), Rules()
        self.rest = Rest(self.store, self.rules)
        self.server = Server(("127.0.0.1", port), self.store, self.rest)
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self.server.server_address[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        self.faults = self.server.faults

    @property
    def seen(self) -> list[tuple[str, str, dict[str, str]]]:
        """Method, path and parameters of every request."""
        return self.server.seen

    @property
    def imports(self) -> list[dict[str, str]]:
        """The parameters of every import."""
        return [query for method, path, query in self.seen if (method, path) == ("POST", "/data/services/import")]

    def instances(self) -> dict[str, bytes]:
        """What is archived, by SOPInstanceUID."""
        return {file.sop: file.data for one in list(self.store.experiments.values()) for file in list(one.files)}

    def names(self) -> set[str]:
        """Every session and file that anybody could see."""
        archived = {f"{one.label}/{file.name}" for one in self.store.experiments.values() for file in one.files}
        entries = {
            f"prearchive/{one.name}/{file.name}" for one in self.store.prearchive for file in one.received.values()
        }
        return archived | entries | {one.label for one in self.store.experiments.values()}


@contextmanager
def xnat(root: Path | None, *, port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Xnat]:
    """Run a server with a user `lab` (password `lab`), who is an owner of project `P`, until the block ends."""
    server = Xnat(root, port, tls)
    server.store.add_user("lab", "lab")
    server.store.add_project("P", lab="owner")
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
        for worker in server.rest.service.workers:
            worker.join(10)
