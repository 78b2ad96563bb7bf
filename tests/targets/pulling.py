"""Studies that are pulled from DICOM nodes, and what has come of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from imaging.header import read_header
from talaria.testing import studies
from talaria.testing.process import free_port, program
from tests.servers.qr import Archive
from transfer.outcome import Kind
from transfer.receipt import Receipt, State

AET = "RECEIVER"


def port_of_moves(monkeypatch: pytest.MonkeyPatch) -> int:
    """Have the Storage SCP that C-MOVE sends to listen on a free port, and return it."""
    number = free_port()
    monkeypatch.setenv("TALARIA_SCP_PORT", str(number))
    monkeypatch.setenv("TALARIA_SCP_AET", AET)
    monkeypatch.setenv("TALARIA_SCP_HOST", "127.0.0.1")
    return number


def study(count: int = 6, series: int = 2, name: str = "CT_small.dcm") -> list[bytes]:
    """The files of one study, in several series."""
    uid, uids = studies.uid(), [studies.uid() for _ in range(series)]
    return [
        studies.encoded(studies.dataset(name, study=uid, series=uids[n % series], InstanceNumber=n))
        for n in range(count)
    ]


def datasets(folder: Path) -> dict[str, bytes]:
    """The data set of each file by SOP instance UID; nothing else may be there."""
    found = {}
    for path in folder.iterdir():
        with path.open("rb") as file:
            header = read_header(file.fileno(), path.stat().st_size)
            assert path.name == f"{header.SOPInstanceUID}.dcm"
            found[header.SOPInstanceUID] = path.read_bytes()[header.dataset_offset :]
    return found


def assert_agrees(receipt: Receipt, folder: Path, peer: Archive) -> None:
    """Assert that the receipt says of every instance what is on the disk, and that all bytes are the peer's."""
    here = datasets(folder) if folder.is_dir() else {}
    said = {item.sop_instance_uid for item in receipt.items if item.outcome in (Kind.DELIVERED, Kind.ALREADY)}
    assert said == set(here)
    for one in peer.instances:
        assert here.get(one.uid, one.data) == one.data
    if receipt.state is State.DELIVERED:
        assert set(here) == {one.uid for one in peer.instances}


def store(folder: Path, files: list[bytes], at: int, aet: str) -> None:
    for number, data in enumerate(files):
        studies.write(folder / "sent" / f"{number}.dcm", data)
    argv = [program("storescu"), "-aec", aet, "+sd", "127.0.0.1", str(at), str(folder / "sent")]
    subprocess.run(argv, check=True, capture_output=True)
