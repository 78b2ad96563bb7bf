"""Messages are read alike however their bytes come: in PDUs and fragments of any size, cut anywhere."""

from __future__ import annotations

import itertools
import socket
import struct
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.dimse.command import (
    AFFECTED_CLASS,
    AFFECTED_INSTANCE,
    DATASET_TYPE,
    FIELD,
    MESSAGE_ID,
    PRIORITY,
    encoded,
)
from protocols.dimse.message import C_STORE_RQ, COMMAND, LAST, P_DATA_TF, RELEASE_RQ_PDU
from protocols.dimse.stream import MOST_LATE, Released, Stream
from protocols.net.connection import SLICE_S
from transfer.errors import Cancelled, Interrupted

CT = "1.2.840.10008.5.1.4.1.1.2"


def request(number: int, uid: str) -> bytes:
    """The command set of a C-STORE request."""
    return encoded(
        {
            AFFECTED_CLASS: CT,
            FIELD: C_STORE_RQ,
            MESSAGE_ID: number,
            PRIORITY: 0,
            DATASET_TYPE: 1,
            AFFECTED_INSTANCE: uid,
        }
    )


def as_pdus(parts: list[tuple[bytes, int]], context: int, size: int, each: int) -> bytes:
    """Write parts of messages as fragments of at most `size` bytes, of which `each` share a PDU."""
    fragments = []
    for data, control in parts:
        for at in range(0, len(data) or 1, size):
            piece = data[at : at + size]
            flag = control | (LAST if at + size >= len(data) else 0)
            fragments.append(struct.pack(">IBB", len(piece) + 2, context, flag) + piece)
    made = [b"".join(fragments[at : at + each]) for at in range(0, len(fragments), each)]
    return b"".join(struct.pack(">BxI", P_DATA_TF, len(body)) + body for body in made)


class Cut:
    """A connection whose peer has sent these bytes and closed it; each read brings as many as there is a step for."""

    def __init__(self, data: bytes, steps: list[int]) -> None:
        self._left, self._steps = memoryview(data), itertools.cycle(steps)

    def recv_into(self, room: memoryview) -> int:
        piece = self._left[: next(self._steps)]
        self._left = self._left[len(piece) :]
        room[: len(piece)] = piece
        return len(piece)

    def settimeout(self, seconds: float | None) -> None:
        pass

    def setsockopt(self, *args: object) -> None:
        pass


def reading(data: bytes, steps: list[int]) -> Stream:
    return Stream(cast(socket.socket, Cut(data, steps)), "peer", 5.0)


@settings(deadline=None)
@given(
    messages=st.lists(
        st.tuples(st.integers(0, 0xFFFF), st.integers(1, 10**12).map("1.2.{}".format), st.binary(max_size=300)),
        min_size=1,
        max_size=4,
    ),
    size=st.integers(1, 400),
    each=st.integers(1, 4),
    steps=st.lists(st.integers(1, 60), max_size=5),  # none: all at once
    at_once=st.booleans(),
)
def test_any_cut_brings_the_same_messages(
    messages: list[tuple[int, str, bytes]], size: int, each: int, steps: list[int], at_once: bool
) -> None:
    sent = b"".join(
        as_pdus([(request(number, uid), COMMAND), (data, 0)], 3, size, each) for number, uid, data in messages
    )
    stream = reading(sent + RELEASE_RQ_PDU, steps or [len(sent) + len(RELEASE_RQ_PDU)])
    for number, uid, data in messages:
        command = stream.command()
        assert (command.kind, command.context, command.has_dataset) == (C_STORE_RQ, 3, True)
        assert command.number(MESSAGE_ID) == number
        assert (command.uid(AFFECTED_INSTANCE), command.sop_class) == (uid, CT)
        whole = stream.whole() if at_once else None
        if whole is not None:
            assert not stream.is_command and stream.last
        assert (stream.dataset() if whole is None else bytes(whole)) == data
    with pytest.raises(Released):
        stream.command()


def test_a_data_set_that_has_come_whole_is_one_part() -> None:
    """One of several fragments is not, nor one that is still coming, nor another message."""
    command, data = as_pdus([(request(1, "1.2.3"), COMMAND)], 3, 400, 1), as_pdus([(b"data", 0)], 3, 400, 1)
    halves, together = (as_pdus([(b"data", 0)], 3, 2, each) for each in (1, 2))
    for rest, found in ((data, b"data"), (halves, None), (together, None), (data[:-1], None), (command, None)):
        stream = reading(command + rest, [len(command + rest)])
        stream.command()
        whole = stream.whole()
        assert (None if whole is None else bytes(whole)) == found
        assert whole is None or (stream.last, stream.is_command, stream.ahead) == (True, False, b"")
        assert whole is not None or stream.ahead == rest


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "pdu",
    [
        struct.pack(">BxIIBB", P_DATA_TF, 6, 1, 1, COMMAND | LAST),  # shorter than its own header
        struct.pack(">BxIIBB", P_DATA_TF, 6 + 4, 60, 1, COMMAND | LAST) + bytes(4),  # beyond its PDU
        struct.pack(">BxIIBB", P_DATA_TF, 6 + 4, 6, 1, LAST) + bytes(4),  # a data set without a command
        struct.pack(">BxIIBB", 0x09, 6 + 4, 6, 1, COMMAND | LAST) + bytes(4),  # no such PDU
        struct.pack(">BxIIBB", P_DATA_TF, 6 + 40, 42, 1, COMMAND | LAST) + bytes(8),  # it ends in the middle
    ],
    ids=["short", "beyond", "no-command", "unknown", "cut-off"],
)
def test_what_is_no_command_set_ends_the_association(pdu: bytes, whole: bool) -> None:
    with pytest.raises(Interrupted):
        reading(pdu, [len(pdu) if whole else 1]).command()


def test_a_peer_that_waits_for_us_is_not_made_to_wait_again_and_again() -> None:
    """It sends no more before our acknowledgement, which doesn't leave before we have read (Nagle's algorithm)."""
    low_waters = []
    message = as_pdus([(request(1, "1.2.3"), COMMAND)], 1, 1000, 1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        with near, listening.accept()[0] as far:
            stream = Stream(near, "peer", 60.0)
            for _ in range(MOST_LATE + 1):
                stream.expect(10 * len(message))
                far.sendall(message)
                assert stream.command().uid(AFFECTED_INSTANCE) == "1.2.3"
                low_waters.append(near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT))
            stream.expect(1)
            far.sendall(message + message[:20])
            assert stream.command().uid(AFFECTED_INSTANCE) == "1.2.3"
            far.sendall(message[20:])
            assert stream.command().uid(AFFECTED_INSTANCE) == "1.2.3"
    assert low_waters == [10 * len(message)] * MOST_LATE + [1]


def test_a_peer_that_goes_on_sending_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, now = itertools.count(1), itertools.count()

    def check() -> None:
        if next(looks) == 2:
            raise Cancelled("somebody has cancelled it")

    monkeypatch.setattr("protocols.dimse.stream.time.monotonic", lambda: next(now) * SLICE_S / 10)
    data = as_pdus([(request(1, "1.2.3"), COMMAND)], 1, 1000, 1) * 1000
    stream = Stream(cast(socket.socket, Cut(data, [50])), "peer", 60.0, check=check)
    with pytest.raises(Cancelled):
        for _ in range(1000):
            stream.command()
