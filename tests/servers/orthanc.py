"""A real Orthanc: C-STORE, C-FIND, storage commitment, DICOM TLS and DICOMweb, with a fresh storage folder.

Its own HTTPS crashes in the release that Debian 12 has; `tls_front` puts a TLS listener before its HTTP port.
"""

from __future__ import annotations

import atexit
import base64
import functools
import http.client
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from talaria.testing import process
from tests.servers.certificates import Leaf

AET = "ORTHANC"
USER, PASSWORD = "lab", "lab-secret-4711"
DICOMWEB_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
DICOMWEB_ROOT = "/dicom-web/"
# Read anew for each instance, so that a test changes what a running server answers. The other callback,
# ReceivedCStoreInstanceFilter, is of no use here: Debian's release answers success whatever it returns.
FILTER = """
function ReceivedInstanceFilter(dicom, origin, info)
  dofile(%s)
  return rule(dicom.SOPInstanceUID)
end
"""
REST_TIMEOUT_S = 120  # a busy machine; answers come within milliseconds


@dataclass(frozen=True)
class Orthanc:
    """A running Orthanc and its REST API.

    Attributes:
        dicom_port: C-STORE and the rest of DIMSE; under TLS if it was started so.
        http_port: REST and DICOMweb, plain HTTP.
        pid: its process.
    """

    dicom_port: int
    http_port: int
    folder: Path
    aet: str = AET
    user: str = USER
    password: str = PASSWORD
    pid: int = 0

    @property
    def url(self) -> str:
        """Base URL of the REST API."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def dicomweb_url(self) -> str:
        """Base URL of QIDO, WADO and STOW."""
        return self.url + DICOMWEB_ROOT.rstrip("/")

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Make one REST call.

        Raises:
            RuntimeError: the answer was not 200.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=REST_TIMEOUT_S)
        token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        try:
            connection.request(method, path, body, {"Authorization": f"Basic {token}"})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:500]!r}")
        return content

    def get(self, path: str) -> Any:
        """The JSON at a path of the REST API."""
        return json.loads(self.request("GET", path))

    def uids(self) -> set[str]:
        """SOP instance UIDs of all that is stored."""
        return {one["MainDicomTags"]["SOPInstanceUID"] for one in self.get("/instances?expand")}

    def files(self) -> dict[str, bytes]:
        """Every stored DICOM file by its SOP instance UID."""
        return {
            one["MainDicomTags"]["SOPInstanceUID"]: self.request("GET", f"/instances/{one['ID']}/file")
            for one in self.get("/instances?expand")
        }

    def remove(self, uid: str) -> None:
        """Forget one instance."""
        for one in self.get("/instances?expand"):
            if one["MainDicomTags"]["SOPInstanceUID"] == uid:
                self.request("DELETE", f"/instances/{one['ID']}")

    def clear(self) -> None:
        """Forget everything that is stored, and what `drop` and `fail` said."""
        self._rules({})
        for patient in self.get("/patients"):
            self.request("DELETE", f"/patients/{patient}")

    def drop(self, *uids: str) -> None:
        """Lose these SOP instance UIDs: C-STORE and STOW are answered with success, but nothing is stored."""
        self._rules(dict.fromkeys(uids, "false"))

    def fail(self, *uids: str) -> None:
        """Fail with these SOP instance UIDs: C-STORE is answered with A700; no list of STOW's answer names them."""
        self._rules(dict.fromkeys(uids, "nil"))

    def _rules(self, answers: Mapping[str, str]) -> None:
        lines = [f"if uid == {json.dumps(uid)} then return {answer} end" for uid, answer in answers.items()]
        made = self.folder / "rules.new"
        made.write_text("\n".join(["function rule(uid)", *lines, "return true", "end"]))
        made.rename(self.folder / "rules.lua")

    def know(self, aet: str, port: int) -> None:
        """Make a peer on loopback known, where C-MOVE and commitment reports go that name its AE title."""
        modality = {"AET": aet, "Host": "127.0.0.1", "Port": port}
        self.request("PUT", f"/modalities/{aet.lower()}", json.dumps(modality).encode())

    def log(self) -> str:
        """What it has logged so far."""
        return (self.folder / "orthanc.log").read_text(errors="replace")


@contextmanager
def orthanc(
    folder: Path,
    *,
    tls: Leaf | None = None,
    trusted: Path | None = None,
    client_certificate: bool = True,
    modalities: Mapping[str, tuple[str, str, int]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Orthanc]:
    """Run an Orthanc in an empty folder until the block ends.

    Args:
        tls: its certificate; DICOM then speaks TLS only.
        trusted: PEM file of the authorities of clients' certificates.
        client_certificate: whether it demands a client certificate (under TLS).
        modalities: peers by name: AE title, host, port; where C-MOVE and commitment reports go.
        settings: more of its configuration, as in its manual; wins.
    """
    storage = folder / "storage"
    storage.mkdir(parents=True)
    (folder / "filter.lua").write_text(FILTER % json.dumps(str(folder / "rules.lua")))
    made = Orthanc(process.free_port(), process.free_port(), folder)
    made.drop()
    config: dict[str, Any] = {
        "Name": "Test",
        "StorageDirectory": str(storage),
        "IndexDirectory": str(storage),
        "StorageCompression": False,
        "HttpPort": made.http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "LuaScripts": [str(folder / "filter.lua")],
        "DicomAet": AET,
        "DicomPort": made.dicom_port,
        "DicomCheckCalledAet": False,
        "DicomCheckModalityHost": False,
        "DicomAlwaysAllowEcho": True,
        "DicomAlwaysAllowStore": True,
        "DicomAlwaysAllowFind": True,
        "DicomAlwaysAllowGet": True,
        "DicomAlwaysAllowMove": True,
        "DicomModalities": {name: list(modality) for name, modality in (modalities or {}).items()},
        "UnknownSopClassAccepted": True,
        "OverwriteInstances": False,
        "StableAge": 1,
        "SaveJobs": False,
        "Plugins": [str(DICOMWEB_PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": DICOMWEB_ROOT, "EnableWado": True, "WadoRoot": "/wado", "Ssl": False},
    }
    if tls is not None:
        config |= {
            "DicomTlsEnabled": True,
            "DicomTlsCertificate": str(tls.cert),
            "DicomTlsPrivateKey": str(tls.key),
            "DicomTlsTrustedCertificates": str(trusted or tls.cert),  # it doesn't start without
            "DicomTlsRemoteCertificateRequired": client_certificate,
        }
    if not DICOMWEB_PLUGIN.exists():
        raise RuntimeError(f"{DICOMWEB_PLUGIN} is not installed: run `make servers`")
    (folder / "orthanc.json").write_text(json.dumps(config | dict(settings or {})))

    def ready() -> bool:
        try:
            made.get("/system")
        except (OSError, http.client.HTTPException):
            return False
        return process.listening(made.dicom_port)

    argv = [process.program("Orthanc"), str(folder / "orthanc.json")]
    with process.server(argv, made.http_port, folder / "orthanc.log", ready=ready) as running:
        yield replace(made, pid=running.pid)


@functools.cache
def _running(tls: Leaf | None, trusted: Path | None) -> Orthanc:
    stack = ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="talaria-orthanc-"))
    return stack.enter_context(orthanc(Path(folder) / "orthanc", tls=tls, trusted=trusted))


def shared_orthanc(tls: Leaf | None = None, trusted: Path | None = None) -> Orthanc:
    """One Orthanc for all tests of this process that ask for the same, emptied now; it ends with the process."""
    server = _running(tls, trusted)
    server.clear()
    return server


@contextmanager
def tls_front(folder: Path, leaf: Leaf, http_port: int, *, client_ca: Path | None = None) -> Iterator[int]:
    """Run a TLS listener before an HTTP port until the block ends; yields its port.

    Args:
        client_ca: PEM file of the authority that clients' certificates must come from; None asks for none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    both = folder / "front.pem"
    both.write_bytes(leaf.cert.read_bytes() + leaf.key.read_bytes())
    port = process.free_port()
    listen = f"OPENSSL-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork,cert={both}"
    listen += f",cafile={client_ca},verify=1" if client_ca else ",verify=0"
    argv = [process.program("socat"), listen, f"TCP:127.0.0.1:{http_port}"]
    with process.server(argv, port, folder / "socat.log"):
        yield port
