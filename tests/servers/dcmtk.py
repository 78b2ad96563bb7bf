"""DCMTK's servers: `storescp`, plain and under TLS, and `dcmqrscp`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from imaging.header import Damaged, read_header
from talaria.testing import process
from tests.servers.certificates import Leaf

STORE_AET = "STORESCP"
QUERY_AET = "QRSCP"
ALL_SYNTAXES = "+xa"


@dataclass(frozen=True)
class StoreScp:
    """A running `storescp`; every instance that it has becomes one file, which it writes once it has all of it."""

    port: int
    received: Path
    log_file: Path
    process: subprocess.Popen[bytes]
    aet: str = STORE_AET

    def names(self) -> set[str]:
        """Names of the files that are there now, whole or not."""
        return {entry.name for entry in os.scandir(self.received)}

    def files(self) -> dict[str, bytes]:
        """Every stored DICOM file, whole, by its SOP instance UID."""
        found = {}
        for path in self.received.iterdir():
            # One that it is still writing is not stored yet: storescp writes under the final name.
            with path.open("rb") as file, suppress(Damaged):
                uid = read_header(file.fileno(), path.stat().st_size).SOPInstanceUID
                found[uid] = file.read()
        return found

    def log(self) -> str:
        """What it has logged so far."""
        return self.log_file.read_text(errors="replace")


@contextmanager
def storescp(
    folder: Path,
    *options: str,
    syntaxes: Sequence[str] | None = None,
    fork: bool = True,
    tls: Leaf | None = None,
    trusted: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[StoreScp]:
    """Run a `storescp` in an empty folder until the block ends.

    Args:
        options: more of its options, e.g. `--ignore` or `-ic`.
        syntaxes: names of the transfer syntaxes that it accepts for CT, MR, SC and SR, as in its configuration file,
            e.g. `LittleEndianImplicit`; None for all that it knows, for every SOP class, private ones too.
        fork: whether it serves several associations at once; else the second waits for the first to end.
        tls: its certificate; it then speaks TLS only.
        trusted: PEM file of the authority of clients' certificates.
    """
    received = folder / "received"
    received.mkdir(parents=True)
    port, log = process.free_port(), folder / "storescp.log"
    argv = [process.program("storescp"), "-v", "-aet", STORE_AET, "-od", str(received)]
    argv += ["--fork"] if fork else []
    if syntaxes is None:
        argv += [ALL_SYNTAXES, "--promiscuous"]
    else:
        profile = folder / "storescp.cfg"
        profile.write_text(_profile(syntaxes))
        argv += ["--config-file", str(profile), "Test"]
    if tls is not None:
        argv += ["+tls", str(tls.key), str(tls.cert), *(("+cf", str(trusted)) if trusted else ())]
    with process.server([*argv, *options, str(port)], port, log, env=env) as running:
        yield StoreScp(port, received, log, running)


def _profile(syntaxes: Sequence[str]) -> str:
    """A configuration file that takes a few SOP classes in these transfer syntaxes, the first one preferred."""
    classes = (
        "CTImageStorage", "MRImageStorage", "EnhancedCTImageStorage", "EnhancedMRImageStorage",
        "SecondaryCaptureImageStorage", "UltrasoundImageStorage", "UltrasoundMultiframeImageStorage",
        "ComputedRadiographyImageStorage", "RTDoseStorage", "BasicTextSRStorage", "VerificationSOPClass",
    )  # fmt: skip
    return "\n".join(
        [
            "[[TransferSyntaxes]]",
            "[Taken]",
            *(f"TransferSyntax{number} = {name}" for number, name in enumerate(syntaxes, 1)),
            "[[PresentationContexts]]",
            "[Known]",
            *(f"PresentationContext{number} = {name}\\Taken" for number, name in enumerate(classes, 1)),
            "[[Profiles]]",
            "[Test]",
            "PresentationContexts = Known",
            "",
        ]
    )


@dataclass(frozen=True)
class QueryScp:
    """A running `dcmqrscp`: C-STORE, C-FIND, C-GET, and C-MOVE to the peers that it was told of."""

    port: int
    storage: Path
    log_file: Path
    process: subprocess.Popen[bytes]
    aet: str = QUERY_AET

    def files(self) -> dict[str, bytes]:
        """Every stored DICOM file, whole, by its SOP instance UID."""
        found = {}
        for path in self.storage.glob("*.dcm"):
            with path.open("rb") as file:
                found[read_header(file.fileno(), path.stat().st_size).SOPInstanceUID] = file.read()
        return found

    def log(self) -> str:
        """What it has logged so far."""
        return self.log_file.read_text(errors="replace")


@contextmanager
def dcmqrscp(
    folder: Path, *options: str, peers: Mapping[str, int] | None = None, studies: int = 200
) -> Iterator[QueryScp]:
    """Run a `dcmqrscp` with an empty database until the block ends.

    Args:
        options: more of its options; without one it takes the uncompressed transfer syntaxes.
        peers: AE titles that C-MOVE may send to, and their ports on loopback.
        studies: how many it keeps.
    """
    storage = folder / "database"
    storage.mkdir(parents=True)
    port, log, config = process.free_port(), folder / "dcmqrscp.log", folder / "dcmqrscp.cfg"
    hosts = [f"peer{number} = ({aet}, 127.0.0.1, {at})" for number, (aet, at) in enumerate((peers or {}).items())]
    lines = [
        f"NetworkTCPPort = {port}",
        "MaxPDUSize = 16384",
        "MaxAssociations = 16",
        "HostTable BEGIN",
        *hosts,
        "HostTable END",
        "VendorTable BEGIN",
        "VendorTable END",
        "AETable BEGIN",
        f"{QUERY_AET} {storage} RW ({studies}, 1024mb) ANY",
        "AETable END",
        "",
    ]
    config.write_text("\n".join(lines))
    with process.server([process.program("dcmqrscp"), "-v", "-c", str(config), *options], port, log) as running:
        yield QueryScp(port, storage, log, running)
