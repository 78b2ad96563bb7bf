"""Associations for queries and retrievals as bytes: granted, refused, broken off; their messages."""

from __future__ import annotations

import socket
import struct
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.dimse import command, stream
from protocols.dimse.command import (
    AFFECTED_CLASS,
    AFFECTED_INSTANCE,
    COMPLETED,
    DATASET_TYPE,
    FIELD,
    MESSAGE_ID,
    REMAINING,
    RESPONDED_TO,
    STATUS,
    Commands,
    decoded,
    encoded,
)
from protocols.dimse.direct import associate
from protocols.dimse.message import VERIFICATION
from protocols.dimse.receive import Responder, response
from protocols.dimse.stream import Stream
from protocols.dimse.transport import Peer
from talaria.testing.process import free_port
from tests.servers.scp import scp
from tests.servers.steps import REFUSED_CLASS, Abort, Accept, Close, Raw, Reject, Reset, Silence
from tests.targets.dicom_tls import certificates
from transfer.errors import Busy, Cancelled, DispatchError, Interrupted, Misconfigured, TimedOut, Unreachable

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
OFFERED = [(CT, [EXPLICIT]), (CT, [IMPLICIT]), (VERIFICATION, [EXPLICIT, IMPLICIT])]


def peer_of(port: int, idle_timeout_s: float = 5.0) -> Peer:
    return Peer("127.0.0.1", port, idle_timeout_s=idle_timeout_s)


def test_contexts_are_those_that_the_peer_accepts_and_the_end_is_a_release() -> None:
    accept = lambda context: REFUSED_CLASS if context.offered == (EXPLICIT,) else context.offered[-1]  # noqa: E731
    with scp(accept=accept) as server:
        association = associate(peer_of(server.port), OFFERED, providers=[CT])
        assert association.accepted == {(CT, IMPLICIT): 3, (VERIFICATION, IMPLICIT): 5}
        assert association.context(CT) == 3 and association.context("1.2.3") is None
        association.release()
        association.release()
        assert server.wait_closed()
        [one] = server.associations
        assert one.ended == "released"
        assert one.proposal is not None and one.proposal.roles[CT] == (0, 1)


def test_nothing_accepted_is_no_error_and_ends_the_association() -> None:
    with scp(accept=lambda context: REFUSED_CLASS) as server:
        assert not associate(peer_of(server.port), OFFERED).accepted
        assert server.wait_closed()


@pytest.mark.parametrize(
    ("step", "kind", "words"),
    [
        (Reject(1, 1, 7), Misconfigured, "called AE title not recognised"),
        (Reject(2, 3, 1), Busy, "temporary congestion"),
        (Reject(1, 3, 9), Misconfigured, "source 3, reason 9"),
        (Abort(2, 6), Interrupted, "invalid PDU parameter value"),
        (Close(), Interrupted, "without an answer"),
        (Reset(), Interrupted, "without an answer"),
        (Silence(), TimedOut, "no answer to the association request within 1 s"),
        (Accept(b"\2\0\0\0\0\x08" + bytes(8)), DispatchError, ""),
        (Accept(b"\2\0\0\0\0\x50" + bytes(68) + b"\x21\0\xff\xff" + bytes(8)), Interrupted, "makes no sense"),
        (Accept(b"\2\0\xff\xff\xff\xff" + bytes(100)), Interrupted, "makes no sense"),
        (Raw(b"HTTP/1.1 400 Bad Request\r\n\r\n"), Misconfigured, "does not speak DICOM"),
    ],
)
def test_a_refusal_is_named(step: object, kind: type[DispatchError], words: str) -> None:
    with scp(on_associate=lambda proposal: step) as server:  # type: ignore[arg-type]
        if isinstance(step, Accept) and words == "":
            assert not associate(peer_of(server.port, 1), OFFERED).accepted  # an answer without contexts
            return
        with pytest.raises(kind, match=words):
            associate(peer_of(server.port, 1), OFFERED)
        assert server.wait_closed()


def test_a_peer_that_is_not_there_or_speaks_tls() -> None:
    with pytest.raises(Unreachable, match="refused"):
        associate(peer_of(free_port()), OFFERED)
    with scp(tls=certificates().accepting()) as server, pytest.raises(Misconfigured, match="expects TLS"):
        associate(peer_of(server.port), OFFERED)


def test_a_silent_peer_can_be_called_off() -> None:
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Cancelled("stopped")

    with scp(on_associate=lambda proposal: Silence()) as server:
        threading.Timer(0.3, stop.set).start()
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            associate(peer_of(server.port, 60), OFFERED, check)
        assert time.monotonic() - begun < 30


def test_a_peer_that_does_not_answer_a_release_keeps_nobody_waiting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            sock.recv(65536)
            context = b"\x21\0\0\x19\1\0\0\0\x40\0\0\x11" + IMPLICIT.encode()
            user = b"\x50\0\0\x08\x51\0\0\4" + struct.pack(">I", 16384)
            body = struct.pack(">HH", 1, 0) + bytes(64) + context + user
            sock.sendall(struct.pack(">BxI", 2, len(body)) + body)
            while sock.recv(65536):
                pass
            sock.close()

        thread = threading.Thread(target=serve)
        thread.start()
        association = associate(peer_of(listener.getsockname()[1], 0.3), OFFERED)
        assert association.accepted == {(CT, IMPLICIT): 1} and association.max_send == 16384
        association.release()
        thread.join(30)
        assert not thread.is_alive()


# ---- messages

uids = st.from_regex(r"1\.2\.[0-9.]{0,20}", fullmatch=True).map(lambda uid: uid.encode() + b"\0" * (len(uid) % 2))
requests = st.lists(
    st.tuples(
        st.permutations([AFFECTED_CLASS, MESSAGE_ID, AFFECTED_INSTANCE, 0x0700]).map(lambda order: tuple(order[:4])),
        st.sampled_from([b"1.2.3\0", b"1.2.30"]),
        st.integers(0, 65_535),
        uids,
        st.booleans(),
    ),
    max_size=6,
)


def raw_request(order: tuple[int, ...], sop_class: bytes, number: int, uid: bytes, cut: bool) -> bytes:
    values = {AFFECTED_CLASS: sop_class, MESSAGE_ID: struct.pack("<H", number), AFFECTED_INSTANCE: uid, 0x0700: b"\0\0"}
    made = b"".join(struct.pack("<HHI", 0, tag, len(values[tag])) + values[tag] for tag in order)
    return made[:-3] if cut else made


PENDING = encoded({FIELD: 0x8010, RESPONDED_TO: 1, DATASET_TYPE: 0x0101, STATUS: 0xFF00, REMAINING: 7})


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The command sets that are read element by element."""
    found: list[bytes] = []

    def noted(raw: bytes, context: int = 0) -> command.CommandSet:
        found.append(raw)
        return decoded(raw, context)

    monkeypatch.setattr(command, "decoded", noted)
    return found


def test_a_count_between_two_requests_costs_them_nothing(walked: list[bytes]) -> None:
    """Some peers tell after each instance how many are left: the request before still serves to read the next one."""
    commands = Commands()
    order = (AFFECTED_CLASS, MESSAGE_ID, AFFECTED_INSTANCE)
    raws = [raw_request(order, CT.encode(), number, b"1.2.3.%d" % number, False) for number in range(4)]
    for number, raw in enumerate(raws):
        read = commands.read(raw, 3)
        assert (read.number(MESSAGE_ID), read.uid(AFFECTED_INSTANCE)) == (number, f"1.2.3.{number}")
        assert commands.read(PENDING, 1).number(REMAINING) == 7
    assert [raw for raw in walked if raw in raws] == raws[:1]


def counted(number: int, tail: list[tuple[int, bytes]], cut: int) -> bytes:
    head = encoded({FIELD: 0x8010, RESPONDED_TO: number, DATASET_TYPE: 0x0101, STATUS: 0xFF00})
    raw = head + b"".join(struct.pack("<HHI", 0, tag, len(value)) + value for tag, value in tail)
    return raw[: len(raw) - cut]


counts = st.sampled_from([*range(REMAINING, REMAINING + 4), FIELD, STATUS, AFFECTED_INSTANCE])
tails = st.lists(st.tuples(counts, st.binary(max_size=3)), max_size=5)


@given(st.lists(st.tuples(st.integers(1, 2), tails, st.integers(0, 4)), max_size=8))
def test_counts_are_read_as_if_each_came_alone(made: list[tuple[int, list[tuple[int, bytes]], int]]) -> None:
    commands = Commands()
    for at, one in enumerate(made):
        raw, context = counted(*one), at % 3
        read, alone = commands.read(raw, context), decoded(raw, context)
        assert read == alone and read.context == context
        assert (read.kind, read.has_dataset, read.sop_class) == (alone.kind, alone.has_dataset, alone.sop_class)


def test_a_peer_that_counts_is_read_once(walked: list[bytes]) -> None:
    commands = Commands()
    for left in range(9, -1, -1):
        tail = [(REMAINING, struct.pack("<H", left)), (COMPLETED, struct.pack("<H", 9 - left))]
        read = commands.read(counted(1, tail, 0), 1)
        assert (read.number(REMAINING), read.number(COMPLETED)) == (left, 9 - left)
    assert len(walked) == 2  # the empty one that it begins with, and the first


@given(requests, st.booleans())
def test_command_sets_are_read_as_if_each_came_alone(made: list[tuple[tuple[int, ...], bytes, int, bytes, bool]],
                                                     twice: bool) -> None:  # fmt: skip
    commands = Commands()
    for one in made:
        raw = raw_request(*one)
        for _ in range(1 + twice):
            read = commands.read(raw, 7)
            assert read == decoded(raw, 7) and read.context == 7
            assert commands.read(PENDING, 5) == decoded(PENDING, 5)
    assert not commands.read(b"", 9) and commands.read(b"", 11).context == 11


@given(st.lists(st.tuples(uids, st.integers(0, 65_535), st.sampled_from([0, 0xA700]), st.sampled_from([1, 3]))))
def test_answers_are_those_that_are_made_one_by_one(made: list[tuple[bytes, int, int, int]]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        respond = Responder(Stream(ours, "there", 5), 16384)
        for uid, number, status, context in made:
            raw = encoded({AFFECTED_CLASS: CT, MESSAGE_ID: number, AFFECTED_INSTANCE: uid})
            request = decoded(raw, context)
            respond(request, status)
            assert theirs.recv(4096) == stream.pdus(context, response(request, status), None, 16384)
