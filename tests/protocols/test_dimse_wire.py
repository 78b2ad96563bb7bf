"""C-STORE as bytes: command sets, PDUs laid out in memory, responses; without a connection."""

from __future__ import annotations

import os
import struct
from io import BytesIO
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import decode

from imaging.transcode import fallbacks
from protocols.dimse import contexts, message, store
from protocols.dimse.message import StoreCommand, parse_response
from protocols.dimse.status import Meaning, meaning
from protocols.dimse.store import OutgoingInstance
from tests.servers import wire

SMALL = 40_000  # bytes
CT = "1.2.840.10008.5.1.4.1.1.2"
UIDS = st.from_regex(r"1\.2\.[1-9][0-9]{0,59}", fullmatch=True)


def pdus(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Cut a stream into (PDU length, context, control header, fragment)."""
    found, begin = [], 0
    while begin < len(data):
        kind, length = struct.unpack_from(">BxI", data, begin)
        assert kind == message.P_DATA_TF
        body, begin = data[begin + 6 : begin + 6 + length], begin + 6 + length
        assert len(body) == length, "the stream ends in the middle of a PDU"
        size, context, control = struct.unpack(">IBB", body[:6])
        assert size == length - 4, "one PDV in a PDU"
        found.append((length, context, control, body[6:]))
    return found


@given(sop_class=UIDS, instance=UIDS, message_id=st.integers(1, 0xFFFF))
def test_command_set_is_what_pynetdicom_reads(sop_class: str, instance: str, message_id: int) -> None:
    ds = decode(BytesIO(StoreCommand(sop_class).build(message_id, instance)), True, True)
    assert (ds.AffectedSOPClassUID, ds.AffectedSOPInstanceUID) == (sop_class, instance)
    assert (ds.CommandField, ds.MessageID, ds.Priority) == (1, message_id, 0)
    assert ds.CommandDataSetType != message.NO_DATASET


def test_command_set_has_the_bytes_of_pynetdicoms() -> None:
    primitive = C_STORE()
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = CT, "1.2.3.45"
    primitive.MessageID, primitive.Priority = 7, 0
    primitive.DataSet = BytesIO(b"\0\0")
    request = C_STORE_RQ()
    request.primitive_to_message(primitive)
    request.command_set.CommandDataSetType = 1
    [pdu] = [pdv[1][1:] for p in request.encode_msg(1, 16_382) for pdv in p.presentation_data_value_list][:1]
    assert StoreCommand(CT).build(7, "1.2.3.45") == pdu


@given(fragment=st.integers(4, 200).map(lambda half: 2 * half), instance=UIDS)
def test_a_command_set_in_small_pdus(fragment: int, instance: str) -> None:
    command = StoreCommand(CT)
    found = pdus(command.pdus(3, 9, instance, fragment))
    assert b"".join(piece for *_, piece in found) == command.build(9, instance)
    assert [control for _, _, control, _ in found] == [1] * (len(found) - 1) + [3]
    assert all(len(piece) <= fragment for *_, piece in found)
    assert len(command.pdus(3, 9, instance, fragment)) <= store.COMMAND_ROOM


@settings(deadline=None, max_examples=60)
@given(
    fragment=st.sampled_from([store.MIN_FRAGMENT, 58, 4090, 16_378, store.PDU - 6]),
    sizes=st.lists(
        st.one_of(
            st.integers(1, 20_000),
            st.sampled_from([8, 16, 4090, 8180, 16_378, SMALL, SMALL + 1, 3 * SMALL + 7]),
        ),
        min_size=1,
        max_size=4,
    ),
    offset=st.integers(0, 500),
)
def test_a_buffer_holds_the_file_as_pdus(
    fragment: int, sizes: list[int], offset: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Several instances after one another, as on an association: nothing of one is left in the next.

    The buffer is small, so that some instances fill it several times.
    """
    with mock.patch.object(store, "BUFFER", SMALL):
        buffer = store._Buffer(fragment)
    path = tmp_path_factory.mktemp("data") / "file"
    for number, size in enumerate(sizes):
        content = os.urandom(offset) + os.urandom(size)
        path.write_bytes(content)
        fd = os.open(path, os.O_RDONLY)
        context = 1 + 2 * (number % 2)
        instance = OutgoingInstance(fd, offset, len(content), context, CT, f"1.2.{number}")
        instance.message_id = number + 1
        buffer.load(StoreCommand(CT), instance)
        sent = b""
        while instance.offset < instance.size:
            assert buffer.fill(instance)
            sent += buffer.view[buffer.begin : buffer.end]
            buffer.begin = store.COMMAND_ROOM
        os.close(fd)
        found = pdus(sent)
        data = [(control, piece) for _, _, control, piece in found if not control & message.COMMAND]
        assert b"".join(piece for _, piece in data) == content[offset:]
        assert [control for control, _ in data] == [0] * (len(data) - 1) + [message.LAST]
        assert {context for _, context, _, _ in found} == {context}
        assert max(length for length, *_ in found) <= fragment + message.PDV_HEADER


def test_a_file_that_ends_early_fills_no_buffer(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    fd = os.open(path, os.O_RDONLY)
    instance = OutgoingInstance(fd, 0, 1001, 1, CT, "1.2")
    buffer = store._Buffer(100)
    buffer.load(StoreCommand(CT), instance)
    assert not buffer.fill(instance)
    os.close(fd)


def test_a_response_is_read() -> None:
    command = wire.encode_command(
        {
            0x00000002: wire.padded(CT),
            0x00000100: struct.pack("<H", message.C_STORE_RSP),
            0x00000120: struct.pack("<H", 513),
            0x00000800: struct.pack("<H", message.NO_DATASET),
            0x00000900: struct.pack("<H", 0xB007),
            0x00000902: b"what\r\nis \x1b[2J this?" + b"x" * 100,
        }
    )
    response = parse_response(command)
    assert (response.command, response.message_id, response.status) == (0x8001, 513, 0xB007)
    assert response.comment.startswith("whatis [2J this?xxx")
    assert len(response.comment) >= 64


@given(st.binary(max_size=200))
def test_no_response_is_too_broken_to_be_read(data: bytes) -> None:
    parse_response(data)
    list(message.fragments(data))


@pytest.mark.parametrize(
    ("status", "means"),
    [
        (0x0000, Meaning.SUCCESS),
        (0x0001, Meaning.WARNING),
        (0x0107, Meaning.WARNING),
        (0xB000, Meaning.WARNING),
        (0xB006, Meaning.WARNING),
        (0xB007, Meaning.WARNING),
        (0xBFFF, Meaning.WARNING),
        (0x0111, Meaning.ALREADY),
        (0xA700, Meaning.BUSY),
        (0xA7FF, Meaning.BUSY),
        (0x0213, Meaning.BUSY),
        (0x0124, Meaning.DENIED),
        (0x0117, Meaning.FAILURE),
        (0x0122, Meaning.FAILURE),
        (0xA900, Meaning.FAILURE),
        (0xA9AB, Meaning.FAILURE),
        (0xC000, Meaning.FAILURE),
        (0xCFFF, Meaning.FAILURE),
        (0xFE00, Meaning.FAILURE),
        (0x4711, Meaning.FAILURE),
    ],
)
def test_meaning_of_a_status(status: int, means: Meaning) -> None:
    assert meaning(status)[0] is means
    assert meaning(status)[1]


def test_contexts_of_a_class_stay_together() -> None:
    needed = [(f"1.2.{number % 100}", contexts.UNCOMPRESSED[0]) for number in range(300)]
    made = contexts.groups(needed, "lossless")
    assert all(len(group) <= 128 for group in made)
    classes = [{sop_class for sop_class, _ in group} for group in made]
    assert sum(map(len, classes)) == len(set().union(*classes)) == 100


@pytest.mark.parametrize("policy", ["never", "lossless", "any"])
def test_what_the_plan_holds_is_asked_for_first(policy: str) -> None:
    jpeg = "1.2.840.10008.1.2.4.50"
    [group] = contexts.groups([(CT, jpeg), (CT, jpeg)], policy)
    syntaxes = [syntax for _, syntax in group]
    assert syntaxes[0] == jpeg
    assert set(contexts.UNCOMPRESSED) | set(fallbacks(jpeg, policy)) == set(syntaxes[1:])
    assert len(set(syntaxes)) == len(syntaxes)
