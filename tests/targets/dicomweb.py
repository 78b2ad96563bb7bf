"""Harnesses of DICOMweb targets: Orthanc, plain and behind TLS; a scripted server, which alone can refuse; folders."""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from blocks.base import Target
from blocks.dicomweb import DicomWebTarget
from talaria.testing import process
from talaria.testing.harness import Harness
from talaria.testing.process import patient
from talaria.testing.relay import relay
from tests.servers.certificates import Authority, Leaf
from tests.servers.dicomweb import Scripted, scripted
from tests.servers.orthanc import DICOMWEB_ROOT, shared_orthanc, tls_front
from tests.targets import dicomweb_file
from transfer.plan import Item, Plan

CANNOT_UNDERSTAND = 0xC000  # PS3.4 table B.2-1: this instance is refused for good


def dicomweb_target(url: str, **settings: Any) -> DicomWebTarget:
    """A target on loopback with timeouts that fit a test, and no waiting between attempts."""
    defaults: dict[str, Any] = {
        "url": url,
        "connect_timeout_s": 5,
        "idle_timeout_s": 10,
        "retry_delay_s": 0,
        "retry_max_delay_s": 0,
        "direction": "both",
    }
    target = DicomWebTarget(**patient(defaults | settings))
    target.named("dicomweb-test")
    return target


def cutting(url: str, port: int, **settings: Any) -> Callable[[int], AbstractContextManager[Target]]:
    """Make a Harness's `cut`: a relay before the server, which breaks the link once.

    Batches are small, so that some are confirmed before.
    """

    @contextmanager
    def cut(count: int) -> Iterator[Target]:
        with relay(port, cut_after=count) as link:
            yield dicomweb_target(url.format(port=link.port), batch_items=3, concurrency=2, **settings)

    return cut


@contextmanager
def _orthanc(folder: Path) -> Iterator[Harness]:
    server = shared_orthanc()
    credentials = {"http_user": server.user, "http_password": server.password}
    url = f"http://127.0.0.1:{{port}}{DICOMWEB_ROOT}"
    yield Harness(
        name="dicomweb-orthanc",
        target=dicomweb_target(server.dicomweb_url, **credentials),
        dead=dicomweb_target(url.format(port=process.free_port()), **credentials),
        read_back=lambda plan: server.files(),
        names=server.uids,
        leftovers=server.uids,
        cut=cutting(url, server.http_port, **credentials),
        secrets=(server.password,),
    )


@functools.cache
def _certificates() -> tuple[Authority, Leaf, Leaf]:
    """An authority, and certificates of a server and a client; made once in a process."""
    folder = tempfile.TemporaryDirectory(prefix="talaria-ca-")
    atexit.register(folder.cleanup)
    authority = Authority(Path(folder.name))
    return authority, authority.leaf("server"), authority.leaf("client")


@contextmanager
def _orthanc_tls(folder: Path) -> Iterator[Harness]:
    server = shared_orthanc()
    ca, leaf, client = _certificates()
    settings = {
        "http_user": server.user,
        "http_password": server.password,
        "ca_cert": ca.ca.read_text(),
        "tls_cert": str(client.cert),
        "tls_key": client.key.read_text(),
    }
    url = f"https://127.0.0.1:{{port}}{DICOMWEB_ROOT}"
    with tls_front(folder, leaf, server.http_port, client_ca=ca.ca) as port:
        yield Harness(
            name="dicomweb-orthanc-tls",
            target=dicomweb_target(url.format(port=port), **settings),
            dead=dicomweb_target(url.format(port=process.free_port()), **settings),
            read_back=lambda plan: server.files(),
            names=server.uids,
            leftovers=server.uids,
            cut=cutting(url, port, **settings),
            secrets=(server.password, client.key.read_text().splitlines()[1]),
        )


@contextmanager
def _script(folder: Path) -> Iterator[Harness]:
    with scripted() as server:
        yield harness_of_script(server)


def harness_of_script(server: Scripted) -> Harness:
    """What the suite must know of a scripted server: OAuth2, XML answers, and it can refuse one item."""
    server.xml = True
    server.authorization = lambda given: given in [f"Bearer {token}" for token in server.tokens]
    client, secret = server.client

    def settings(port: int) -> dict[str, Any]:
        url = f"http://127.0.0.1:{port}/token"
        return {"token_url": url, "client_id": client, "client_secret": secret, "scope": "dicom"}

    @contextmanager
    def reject(plan: Plan, item: Item) -> Iterator[Target]:
        assert item.header is not None
        server.refuses = {item.header.SOPInstanceUID: CANNOT_UNDERSTAND}
        yield dicomweb_target(server.url, **settings(server.port))

    dead = process.free_port()
    return Harness(
        name="dicomweb-script",
        target=dicomweb_target(server.url, **settings(server.port)),
        dead=dicomweb_target(f"http://127.0.0.1:{dead}/rs", **settings(dead)),
        read_back=lambda plan: dict(server.stored),
        names=lambda: set(server.stored),
        leftovers=lambda: set(server.stored),
        cut=cutting("http://127.0.0.1:{port}/rs", server.port, **settings(server.port)),
        reject=reject,
        secrets=(secret, "-xyz"),
    )


HARNESSES: dict[str, Callable[[Path], AbstractContextManager[Harness]]] = {
    "dicomweb-orthanc": _orthanc,
    "dicomweb-orthanc-tls": _orthanc_tls,
    "dicomweb-script": _script,
    "dicomweb-file": dicomweb_file.harness,
}
SOURCES = ("dicomweb-orthanc", "dicomweb-orthanc-tls", "dicomweb-file")
NEEDED = {"url": "https://pacs.example.org/dicom-web"}
