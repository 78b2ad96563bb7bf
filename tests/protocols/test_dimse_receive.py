"""An instance on its way from a connection to its name: when its sender is told, and what becomes of it otherwise."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from imaging.header import EXPLICIT_LITTLE
from protocols.dimse.command import (
    AFFECTED_CLASS,
    AFFECTED_INSTANCE,
    DATASET_TYPE,
    FIELD,
    MESSAGE_ID,
    STATUS,
    decoded,
    encoded,
)
from protocols.dimse.message import C_STORE_RQ, HEADERS
from protocols.dimse.receive import SUCCESS, Depot, Responder, receive
from protocols.dimse.stream import BUFFERS, Stream, pdus
from protocols.files.durable import DurableFile
from protocols.files.partial import PartialFile
from talaria.testing import studies
from transfer.errors import DiskFull, Interrupted
from transfer.plan import Item

UID, CT = "1.2.826.0.1.77", "1.2.840.10008.5.1.4.1.1.2"


class Sender:
    """A connection on which one instance has come; it does something when it is sent the answer."""

    def __init__(self, told: Callable[[], None], uid: str = UID, more: bytes = b"") -> None:
        with studies.quiet():
            file = studies.encoded(studies.dataset(SOPInstanceUID=uid))
        asked = {AFFECTED_CLASS: CT, FIELD: C_STORE_RQ, MESSAGE_ID: 1, DATASET_TYPE: 1, AFFECTED_INSTANCE: uid}
        self.data = file[file.index(b"\x08\x00\x05\x00") :] + more
        self._left = pdus(1, encoded(asked), self.data, 0)
        self._told = told
        self.answers: list[int | None] = []
        self.rooms: list[int] = []

    def then(self, other: Sender) -> None:
        """Send what another one sends, too."""
        self._left += other._left

    def recv_into(self, room: memoryview) -> int:
        self.rooms.append(len(room))
        piece, self._left = self._left[: len(room)], self._left[len(room) :]
        room[: len(piece)] = piece
        return len(piece)

    def send(self, data: bytes) -> int:
        self._told()
        self.answers.append(decoded(data[HEADERS:]).number(STATUS))
        return len(data)

    def settimeout(self, seconds: float | None) -> None:
        pass

    def setsockopt(self, *args: object) -> None:
        pass


def received(sender: Sender, depot: Depot) -> int:
    stream = Stream(cast(socket.socket, sender), "peer", 5.0)
    return receive(stream, stream.command(), EXPLICIT_LITTLE, depot, Responder(stream, 0))


@pytest.mark.parametrize("durable", [True, False])
def test_the_name_is_there_before_the_answer_where_it_is_durable(durable: bool, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    kept: list[Item] = []
    depot = Depot(tmp_path, kept=kept.append, durable=durable)
    sender = Sender(lambda: seen.append(os.listdir(tmp_path)))
    assert received(sender, depot) == SUCCESS
    depot.close()
    assert sender.answers == [SUCCESS]
    assert seen == [[f"{UID}.dcm"] if durable else []]
    assert [item.path for item in kept] == os.listdir(tmp_path) == [f"{UID}.dcm"]


def test_nothing_is_silent_while_the_disk_keeps_what_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depot, seen = Depot(tmp_path), list[float]()
    really = Depot._name

    def slow(self: Depot, part: DurableFile, uid: str) -> None:
        seen.extend((depot.heard, depot.last_heard(), depot.last_heard()))
        really(self, part, uid)

    monkeypatch.setattr(Depot, "_name", slow)
    received(Sender(lambda: None), depot)
    depot.close()
    came, *during = seen
    assert came < during[0] < during[1] < depot.last_heard() == depot.heard


def test_a_large_instance_is_read_in_larger_pieces_and_what_follows_it_is_whole(tmp_path: Path) -> None:
    filler = bytes(range(256)) * 80_000
    private = (0xFFFC_FFFC).to_bytes(4, "little") + b"OB\0\0" + len(filler).to_bytes(4, "little")  # (FFFC,FFFC)
    sender, small = Sender(lambda: None, more=private + filler), Sender(lambda: None, f"{UID}.1")
    sender.then(small)
    depot = Depot(tmp_path, durable=False)
    stream = Stream(cast(socket.socket, sender), "peer", 5.0)
    for _ in range(2):
        assert receive(stream, stream.command(), EXPLICIT_LITTLE, depot, Responder(stream, 0)) == SUCCESS
    depot.close()
    assert (tmp_path / f"{UID}.dcm").read_bytes().endswith(sender.data)
    assert (tmp_path / f"{UID}.1.dcm").read_bytes().endswith(small.data)
    first, most = BUFFERS
    assert max(sender.rooms[:10]) == first and max(sender.rooms) == most


@pytest.mark.parametrize("durable", [True, False])
def test_what_has_come_is_kept_though_its_sender_has_gone(durable: bool, tmp_path: Path) -> None:
    def gone() -> None:
        raise Interrupted("the peer broke the connection")

    kept: list[Item] = []
    depot = Depot(tmp_path, kept=kept.append, durable=durable)
    sender = Sender(gone)
    with pytest.raises(Interrupted):
        received(sender, depot)
    depot.close()
    assert [item.path for item in kept] == os.listdir(tmp_path) == [f"{UID}.dcm"]


@pytest.mark.parametrize("durable", [True, False])
def test_what_can_not_be_named_is_not_counted(durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(part: PartialFile, name: str, *, replace: bool = True) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PartialFile, "keep", full)
    kept: list[Item] = []
    depot = Depot(tmp_path, kept=kept.append, durable=durable)
    received(Sender(lambda: None), depot)
    depot.close()
    assert isinstance(depot.failure, DiskFull)
    assert kept == [] and os.listdir(tmp_path) == [] and not depot.here
    depot.settle()
