"""Harnesses of DICOM targets: DCMTK's storescp, Orthanc, and a scripted peer where only that can refuse one item."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from blocks.base import Target
from blocks.dicom import DicomTarget
from talaria.testing import process
from talaria.testing.harness import Harness
from talaria.testing.process import patient
from talaria.testing.relay import relay
from tests.servers.dcmtk import StoreScp, storescp
from tests.servers.orthanc import Orthanc, shared_orthanc
from tests.servers.scp import Scp, scp
from transfer.plan import Item, Plan
from transfer.receipt import Level

AET = "TALARIA-TEST"
CANNOT_UNDERSTAND = 0xC000  # PS3.4 table B.2-1: this instance is refused for good
MakeTarget = Callable[..., DicomTarget]


# On loopback with timeouts that fit a test, and no waiting between attempts.
LOOPBACK: dict[str, Any] = {
    "host": "127.0.0.1",
    "aet_source": AET,
    "connect_timeout_s": 5,
    "idle_timeout_s": 10,
    "retry_delay_s": 0,
    "retry_max_delay_s": 0,
}


def dicom_target(port: int, **settings: Any) -> DicomTarget:
    """A target as `LOOPBACK` says."""
    target = DicomTarget(**patient(LOOPBACK | {"port": port} | settings))
    target.named("dicom-test")
    return target


def cutting(make: MakeTarget, port: int, **settings: Any) -> Callable[[int], AbstractContextManager[Target]]:
    """Make a Harness's `cut`: a relay before the server, which breaks the link once."""

    @contextmanager
    def cut(count: int) -> Iterator[Target]:
        with relay(port, cut_after=count) as link:
            yield make(link.port, **settings)

    return cut


def harness_of_storescp(name: str, make: MakeTarget, server: StoreScp, **more: Any) -> Harness:
    """What the suite must know of a running storescp: it has neither C-FIND nor storage commitment."""
    return Harness(
        name=name,
        target=make(server.port, aet_target=server.aet),
        dead=make(process.free_port(), aet_target=server.aet),
        read_back=lambda plan: server.files(),
        names=server.names,
        leftovers=server.names,
        cut=cutting(make, server.port, aet_target=server.aet),
        reaches=(Level.ACCEPTED,),
        **more,
    )


def harness_of_orthanc(name: str, make: MakeTarget, server: Orthanc, **more: Any) -> Harness:
    """What the suite must know of a running Orthanc: it reports commitment on an association of its own."""
    port = process.free_port()
    server.know(AET, port)
    settings = {"aet_target": server.aet, "storage_commitment_port": port, "storage_commitment_host": "127.0.0.1"}
    return Harness(
        name=name,
        target=make(server.dicom_port, **settings),
        dead=make(process.free_port(), **settings),
        read_back=lambda plan: server.files(),
        names=server.uids,
        leftovers=server.uids,
        cut=cutting(make, server.dicom_port, **settings),
        **more,
    )


def harness_of_script(name: str, make: MakeTarget, server: Scp, **more: Any) -> Harness:
    """What the suite must know of a scripted peer: it can refuse one item."""

    @contextmanager
    def reject(plan: Plan, item: Item) -> Iterator[Target]:
        assert item.header is not None
        victim = item.header.SOPInstanceUID
        server.on_store = lambda store: CANNOT_UNDERSTAND if store.SOPInstanceUID == victim else 0
        yield make(server.port, aet_target=server.aet)

    return Harness(
        name=name,
        target=make(server.port, aet_target=server.aet),
        dead=make(process.free_port(), aet_target=server.aet),
        read_back=lambda plan: server.files(),
        names=lambda: set(server.kept),
        leftovers=lambda: set(server.kept),
        cut=cutting(make, server.port, aet_target=server.aet),
        reject=reject,
        **more,
    )


@contextmanager
def _storescp(folder: Path) -> Iterator[Harness]:
    with storescp(folder) as server:
        yield harness_of_storescp("dicom-storescp", dicom_target, server)


@contextmanager
def _orthanc(folder: Path) -> Iterator[Harness]:
    yield harness_of_orthanc("dicom-orthanc", dicom_target, shared_orthanc())


@contextmanager
def _script(folder: Path) -> Iterator[Harness]:
    with scp() as server:
        yield harness_of_script("dicom-script", dicom_target, server)


HARNESSES: dict[str, Callable[[Path], AbstractContextManager[Harness]]] = {
    "dicom-storescp": _storescp,
    "dicom-orthanc": _orthanc,
    "dicom-script": _script,
}
SOURCES = ("dicom-orthanc",)
NEEDED = {"host": "pacs.example.org", "aet_target": "ARCHIVE"}
