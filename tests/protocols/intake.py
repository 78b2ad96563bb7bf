"""A listener for modalities in the test's own process, and what lies in its folder."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from imaging.header import read_header
from protocols.dimse.committing import Reports
from protocols.dimse.intake import ListenerDesk, Reception
from protocols.dimse.keeping import Terms
from protocols.dimse.receivers import Receivers
from protocols.dimse.scp import StorageScp
from talaria.testing import studies
from tests.servers import wire
from transfer.plan import Origin
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


class Refused(ConnectionRefusedError):
    """There is no association.

    Attributes:
        why: result, source and reason of a rejection, PS3.8 table 9-21; () where it is none.
    """

    def __init__(self, kind: int, answer: bytes) -> None:
        super().__init__(f"the association was not accepted: PDU {kind}, {answer.hex()}")
        self.why = tuple(answer[1:4]) if kind == 3 else ()


def refusal(port: int, calling: str = "CT1", called: str = AET) -> tuple[int, ...]:
    """Ask for an association, which must be rejected; return result, source and reason.

    For pynetdicom it is aborted, where the answer is here before one of its threads has looked whether it is connected.
    """
    try:
        PlainSender(port, calling, called).close()
    except Refused as exc:
        return exc.why
    raise AssertionError("an association was given")


class PlainSender:
    """An association for CT images in explicit VR little endian, which is cut off by a kill without any fuss.

    Raises:
        Refused: no association is given. OSError: from whatever is called, once the other side is gone.
    """

    def __init__(self, port: int, calling: str | bytes = "CT1", called: str = AET, *, host: str = "127.0.0.1") -> None:
        self._sock = socket.create_connection((host, port), 60)
        inner = wire.item(0x30, b"1.2.840.10008.5.1.4.1.1.2") + wire.item(0x40, wire.EXPLICIT.encode())
        user = wire.item(0x51, struct.pack(">I", 0)) + wire.item(0x52, b"1.2.3")
        items = wire.item(0x10, b"1.2.840.10008.3.1.1.1") + wire.item(0x20, b"\1\0\0\0" + inner)
        titles = called.encode().ljust(16) + (calling.encode() if isinstance(calling, str) else calling).ljust(16)
        body = struct.pack(">HH32s32x", 1, 0, titles) + items + wire.item(0x50, user)
        self._sock.sendall(struct.pack(">BxI", 1, len(body)) + body)
        kind, answer = self._pdu()
        if kind != 2:
            self.close()
            raise Refused(kind, answer)

    def store(self, ds: Dataset) -> int:
        """Store an instance; return the status."""
        self.begin(ds)
        return self.end(wire.encode_dataset(ds, wire.EXPLICIT))

    def begin(self, ds: Dataset, uid: str = "") -> None:
        """Ask to store an instance, whose data set follows by `more` and `end`."""
        command = wire.encode_command(
            {
                0x00000002: wire.padded(str(ds.SOPClassUID)),
                0x00000100: struct.pack("<H", 1),
                0x00000110: struct.pack("<H", 1),
                0x00000700: struct.pack("<H", 0),
                0x00000800: struct.pack("<H", 1),
                0x00001000: wire.padded(uid or str(ds.SOPInstanceUID)),
            }
        )
        self._sock.sendall(wire.p_data(1, command))

    def ask(self, kind: int) -> tuple[int, int]:
        """Send a request of another kind; return the answer's kind and status."""
        command = {0x00000100: struct.pack("<H", kind), 0x00000110: struct.pack("<H", 1)}
        self._sock.sendall(wire.p_data(1, wire.encode_command(command | {0x00000800: struct.pack("<H", 0x0101)})))
        answer = wire.decode_command(self._pdu()[1][6:])
        return wire.number(answer[0x00000100]), wire.number(answer[0x00000900])

    def more(self, data: bytes, size: int = 65_536) -> None:
        """Send a part of a data set, which is not the last, in PDUs of this size."""
        for at in range(0, len(data), size):
            self._sock.sendall(wire.p_data(1, data[at : at + size], command=False, last=False))

    def end(self, data: bytes) -> int:
        """Send the last part of a data set; return the status."""
        self._sock.sendall(wire.p_data(1, data, command=False))
        return wire.number(wire.decode_command(self._pdu()[1][6:])[0x00000900])

    def _pdu(self) -> tuple[int, bytes]:
        kind, length = struct.unpack(">BxI", self._exactly(6))
        return kind, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._sock.recv(count - len(data))
            if not piece:
                raise ConnectionResetError("the other side hung up")
            data += piece
        return data

    def close(self) -> None:
        self._sock.close()


def store_until_cut_off(port: int, confirmed: set[str], calling: str, called: str = AET) -> None:
    """Store one instance after the other of one study; those that are confirmed get into the set."""
    with suppress(OSError), closing(PlainSender(port, calling, called)) as sender:
        study = studies.uid()
        while True:
            ds = studies.dataset(study=study)
            if sender.store(ds) == 0:
                confirmed.add(str(ds.SOPInstanceUID))


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
def listening(
    home: Path, *, reports: Reports | None = None, scp: Any = None, receivers: Receivers | None = None, **terms: Any
) -> Iterator[Listening]:
    """Listen on a free port, for one source named `ct`, until the block ends."""
    sends = reports or Reports()
    delivered: set[str] = set()

    def confirmed(origin: Origin, uids: Collection[str]) -> set[str]:
        return delivered & set(uids)

    reception = Reception(
        Terms(**{"name": "ct", "aet": AET, "keep_free": 0, **terms}),
        Spool(home / "received" / "ct"),
        confirmed,
        sends,
        receivers.versions if receivers else None,
    )
    home.mkdir(exist_ok=True)
    reception.prepare()
    desk = ListenerDesk()
    desk.seat([reception])
    server = StorageScp("127.0.0.1", 0, "", desk, **(scp or {}), lend=receivers.lend if receivers else None)
    try:
        yield Listening(server, desk, reception, delivered)
    finally:
        server.close()
        sends.close()
