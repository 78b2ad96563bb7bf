"""Harnesses of DICOM+TLS targets: the servers of `tests.targets.dicom` behind TLS, with client certificates."""

from __future__ import annotations

import atexit
import functools
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.dicom_tls import DicomTlsTarget
from talaria.testing.harness import Harness
from talaria.testing.process import patient
from tests.servers.certificates import Authority, Leaf
from tests.servers.dcmtk import storescp
from tests.servers.orthanc import shared_orthanc
from tests.servers.scp import scp
from tests.targets.dicom import LOOPBACK, harness_of_orthanc, harness_of_script, harness_of_storescp

KEY_PASSWORD = "Schluessel-0815"


@dataclass(frozen=True)
class Certificates:
    """An authority, and certificates of it for both sides; the client's key has a password."""

    authority: Authority
    server: Leaf
    client: Leaf

    @property
    def ca(self) -> Path:
        return self.authority.ca

    def accepting(self, *, client_certificate: bool = True) -> ssl.SSLContext:
        """What a server in this process needs."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server.cert, self.server.key)
        context.load_verify_locations(self.ca)
        context.verify_mode = ssl.CERT_REQUIRED if client_certificate else ssl.CERT_NONE
        return context


@functools.cache
def certificates() -> Certificates:
    """Made once for all tests of this process: keys take a while."""
    folder = tempfile.TemporaryDirectory(prefix="talaria-ca-")
    authority = Authority(Path(folder.name))
    made = Certificates(authority, authority.leaf("server"), authority.leaf("client", password=KEY_PASSWORD))
    atexit.register(folder.cleanup)
    return made


def tls_target(port: int, **settings: Any) -> DicomTlsTarget:
    """A target as `LOOPBACK` says, which trusts the test's authority and shows a certificate."""
    made = certificates()
    defaults: dict[str, Any] = LOOPBACK | {
        "port": port,
        "ca_cert": str(made.ca),
        "tls_cert": str(made.client.cert),
        "tls_key": str(made.client.key),
        "tls_key_password": KEY_PASSWORD,
    }
    target = DicomTlsTarget(**patient(defaults | settings))
    target.named("dicom-tls-test")
    return target


def _secrets() -> tuple[str, ...]:
    lines = certificates().client.key.read_text().splitlines()
    return (KEY_PASSWORD, lines[1], lines[2])


@contextmanager
def _storescp(folder: Path) -> Iterator[Harness]:
    made = certificates()
    with storescp(folder, tls=made.server, trusted=made.ca) as server:
        yield harness_of_storescp("dicom-tls-storescp", tls_target, server, secrets=_secrets())


@contextmanager
def _orthanc(folder: Path) -> Iterator[Harness]:
    made = certificates()
    server = shared_orthanc(made.server, made.ca)
    yield harness_of_orthanc("dicom-tls-orthanc", tls_target, server, secrets=_secrets())


@contextmanager
def _script(folder: Path) -> Iterator[Harness]:
    with scp(tls=certificates().accepting()) as server:
        yield harness_of_script("dicom-tls-script", tls_target, server, secrets=_secrets())


HARNESSES: dict[str, Callable[[Path], AbstractContextManager[Harness]]] = {
    "dicom-tls-storescp": _storescp,
    "dicom-tls-orthanc": _orthanc,
    "dicom-tls-script": _script,
}
SOURCES = ("dicom-tls-orthanc",)
NEEDED = {"host": "pacs.example.org", "aet_target": "ARCHIVE"}
