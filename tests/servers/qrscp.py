"""pynetdicom's query/retrieve archive, as its package brings it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from talaria.testing import process

AET = "QRSCP"


@dataclass(frozen=True)
class QrScp:
    """A running archive: C-STORE, C-FIND, C-GET, and C-MOVE to the peers that it was told of."""

    port: int
    aet: str = AET


@contextmanager
def qrscp(folder: Path, *, peers: Mapping[str, int] | None = None) -> Iterator[QrScp]:
    """Run an archive with an empty database until the block ends.

    Args:
        peers: AE titles that C-MOVE may send to, and their ports on loopback.
    """
    folder.mkdir(parents=True)
    port = process.free_port()
    lines = [
        "[DEFAULT]", f"ae_title: {AET}", f"port: {port}", "max_pdu: 16382", "acse_timeout: 30", "dimse_timeout: 30",
        "network_timeout: 30", "bind_address: 127.0.0.1", f"instance_location: {folder / 'instances'}",
        f"database_location: {folder / 'index.sqlite'}", "log_identifier: False",
    ]  # fmt: skip
    for aet, at in (peers or {}).items():
        lines += [f"[{aet}]", "address: 127.0.0.1", f"port: {at}"]
    config = folder / "qrscp.ini"
    config.write_text("\n".join([*lines, ""]))
    argv = [sys.executable, "-m", "pynetdicom", "qrscp", "-c", str(config)]
    with process.server(argv, port, folder / "qrscp.log"):
        yield QrScp(port)
