"""A listener for modalities in the test's own process, and what lies in its folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imaging.header import read_header
from protocols.dimse.committing import Reports
from protocols.dimse.intake import ListenerDesk, Reception, Terms
from protocols.dimse.scp import StorageScp
from transfer.spool import ReceivedUnit, Spool

AET = "ROUTER"


def lying(folder: Path) -> dict[str, list[bytes]]:
    """Data sets by SOP instance UID; every file must be whole, under its UID, in the folder of its study."""
    found: dict[str, list[bytes]] = {}
    for unit, path, _ in sorted(Spool(folder).units(), key=lambda one: one[0].version):
        for file in path.iterdir():
            with file.open("rb") as opened:
                header = read_header(opened.fileno(), file.stat().st_size)
            assert file.name == f"{header.SOPInstanceUID}.dcm"
            assert unit.uid in (header.StudyInstanceUID, header.SeriesInstanceUID)
            found.setdefault(header.SOPInstanceUID, []).append(file.read_bytes()[header.dataset_offset :])
    return found


def stray(folder: Path) -> list[str]:
    """What lies in a source's folder that is no unit: nothing should."""
    return [path.name for path in folder.iterdir() if ReceivedUnit.parse(path.name) is None]


@dataclass
class Listening:
    """A running listener with one source."""

    scp: StorageScp
    desk: ListenerDesk
    reception: Reception
    delivered: set[str] = field(default_factory=set)  # SOP instance UIDs that everybody has confirmed

    @property
    def port(self) -> int:
        return self.scp.port

    @property
    def folder(self) -> Path:
        return self.reception.spool.folder

    def change(self, **terms: Any) -> None:
        """Let other terms hold from now on."""
        self.reception.terms = replace(self.reception.terms, **terms)


@contextmanager
def listening(home: Path, *, reports: Reports | None = None, scp: Any = None, **terms: Any) -> Iterator[Listening]:
    """Listen on a free port, for one source named `ct`, until the block ends."""
    sends = reports or Reports()
    delivered: set[str] = set()

    def confirmed(uids: Collection[str]) -> set[str]:
        return delivered & set(uids)

    reception = Reception(
        Terms(**{"name": "ct", "aet": AET, "keep_free": 0, **terms}), Spool(home / "received" / "ct"), confirmed, sends
    )
    home.mkdir(exist_ok=True)
    reception.prepare()
    desk = ListenerDesk()
    desk.seat([reception])
    server = StorageScp("127.0.0.1", 0, "", desk, **(scp or {}))
    try:
        yield Listening(server, desk, reception, delivered)
    finally:
        server.close()
        sends.close()
