"""Studies that are pulled from DICOM nodes, and what has come of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from imaging.header import read_header
from talaria.testing import studies
from talaria.testing.process import free_port, program
from tests.servers.qr import Archive
from tests.servers.steps import REFUSED_CLASS
from tests.servers.wire import Context
from transfer.outcome import Kind
from transfer.receipt import Receipt, State

AET = "RECEIVER"
GETS = ("1.2.840.10008.5.1.4.1.2.2.3", "1.2.840.10008.5.1.4.1.2.1.3")
MOVES = ("1.2.840.10008.5.1.4.1.2.2.2", "1.2.840.10008.5.1.4.1.2.1.2")
STUDY_ROOT = ("1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.2", "1.2.840.10008.5.1.4.1.2.2.3")


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


def only(roots: Sequence[str]) -> Callable[[Context], str | int]:
    """Accept everything but these models."""
    return lambda context: REFUSED_CLASS if context.abstract_syntax in roots else context.offered[0]


def in_latin_1(refused: Sequence[str] = ()) -> dict[str, Any]:
    """An archive of Patient Root alone that reads Latin-1 alone, with a patient whose ID is not ASCII."""
    ds = studies.dataset(SpecificCharacterSet="ISO_IR 100", PatientID="Müller-7")
    return {
        "files": [studies.encoded(ds)],
        "accept": only((*STUDY_ROOT, *refused)),
        "refuses": lambda request: 0xA900 if request.charset not in ("", "ISO_IR 100") else 0,
    }


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
