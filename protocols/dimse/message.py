"""C-STORE and C-ECHO as bytes: the command set to send, and the response.

Sources: PS3.7 section 9.3.1 and Annex E (command sets, always implicit VR little endian), PS3.8 sections 9.3.4 to
9.3.8 (PDUs) and Annex E.2 (message control header).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

P_DATA_TF, RELEASE_RQ, RELEASE_RP, ABORT = 0x04, 0x05, 0x06, 0x07
EXPECTED = (P_DATA_TF, RELEASE_RQ, ABORT)  # PDU types that a peer may send during a transfer
COMMAND, LAST = 0x01, 0x02  # bits of the message control header
HEADERS = 12  # bytes before a fragment: PDU type, reserved, PDU length; PDV length, context id, control header
PDV_HEADER = 6  # bytes of them that count for the peer's maximum length (PS3.8 Annex D.1)
C_STORE_RQ, C_STORE_RSP = 0x0001, 0x8001
C_ECHO_RQ, C_ECHO_RSP = 0x0030, 0x8030
NO_DATASET = 0x0101
RELEASE_RQ_PDU = b"\x05\x00\x00\x00\x00\x04\x00\x00\x00\x00"
RELEASE_RP_PDU = b"\x06\x00\x00\x00\x00\x04\x00\x00\x00\x00"
ABORT_PDU = b"\x07\0\0\0\0\4\0\0\0\0"
VERIFICATION = "1.2.840.10008.1.1"  # SOP class of C-ECHO
# As whom we associate and write files: as pynetdicom, which does so too. It is not imported here, because processes
# that only receive can do without its 60 MiB.
IMPLEMENTATION_UID, IMPLEMENTATION_VERSION = "1.2.826.0.1.3680043.9.3811.3.0.4", "PYNETDICOM_304"
ABORT_REASONS = {  # PS3.8 table 9-26: why the provider of a peer aborted
    0: "no reason given",
    1: "unrecognised PDU",
    2: "unexpected PDU",
    4: "unrecognised PDU parameter",
    5: "unexpected PDU parameter",
    6: "invalid PDU parameter value",
}

_HEAD = struct.Struct("<HHI")
_FRAGMENT = struct.Struct(">BxIIBB")


def aborted(source: int, reason: int) -> str:
    """Return the meaning of an A-ABORT in words (PS3.8 section 9.3.8)."""
    if source == 0:
        return "the peer aborted the association"
    return f"the peer's provider aborted the association ({ABORT_REASONS.get(reason, 'no reason given')})"


def header(length: int, context: int, control: int) -> bytes:
    """Return the PDU and PDV header of a fragment of `length` bytes that is alone in its PDU."""
    return _FRAGMENT.pack(P_DATA_TF, length + 6, length + 2, context, control)


def put_header(memory: bytearray, pos: int, length: int, context: int, control: int) -> None:
    """Write a `header` into memory."""
    _FRAGMENT.pack_into(memory, pos, P_DATA_TF, length + 6, length + 2, context, control)


def fragments(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the control headers and fragments in the variable field of a P-DATA-TF PDU."""
    pos = 0
    while pos + 6 <= len(body):
        length = int.from_bytes(body[pos : pos + 4], "big")
        yield body[pos + 5], body[pos + 6 : pos + 4 + length]
        pos += 4 + max(length, 2)


class StoreCommand:
    """Builds the C-STORE-RQ command sets of one SOP class; everything except message id and instance is made once."""

    def __init__(self, sop_class: str) -> None:
        # The group length comes before, and counts from here on.
        self._begin = (
            _element(0x0002, _uid(sop_class))
            + _element(0x0100, struct.pack("<H", C_STORE_RQ))
            + _HEAD.pack(0, 0x0110, 2)
        )
        # Priority MEDIUM; a data set follows (any value but 0101).
        self._middle = _element(0x0700, b"\0\0") + _element(0x0800, b"\1\0")
        self._length = len(self._begin) + 2 + len(self._middle) + 8

    def build(self, message_id: int, sop_instance: str) -> bytes:
        """Return the command set (PS3.7 table 9.3-1)."""
        uid = _uid(sop_instance)
        return b"".join(
            (
                _HEAD.pack(0, 0, 4),
                (self._length + len(uid)).to_bytes(4, "little"),
                self._begin,
                message_id.to_bytes(2, "little"),
                self._middle,
                _HEAD.pack(0, 0x1000, len(uid)),
                uid,
            )
        )

    def pdus(self, context: int, message_id: int, sop_instance: str, fragment: int) -> bytes:
        """Return the command set as PDUs, with fragments of limited length."""
        data = self.build(message_id, sop_instance)
        if len(data) <= fragment:
            return header(len(data), context, COMMAND | LAST) + data
        pieces = [data[pos : pos + fragment] for pos in range(0, len(data), fragment)]
        made = b"".join(header(len(piece), context, COMMAND) + piece for piece in pieces[:-1])
        return made + header(len(pieces[-1]), context, COMMAND | LAST) + pieces[-1]


def echo_pdu(context: int, message_id: int) -> bytes:
    """Return a C-ECHO-RQ (PS3.7 table 9.3-12) as one PDU."""
    command = (
        _element(0x0002, _uid(VERIFICATION))
        + _element(0x0100, struct.pack("<H", C_ECHO_RQ))
        + _element(0x0110, struct.pack("<H", message_id))
        + _element(0x0800, struct.pack("<H", NO_DATASET))
    )
    command = _element(0x0000, struct.pack("<I", len(command))) + command
    return header(len(command), context, COMMAND | LAST) + command


def _uid(value: str) -> bytes:
    raw = value.encode("ascii", "replace")
    return raw + b"\0" if len(raw) % 2 else raw


def _element(element: int, value: bytes) -> bytes:
    return _HEAD.pack(0, element, len(value)) + value


@dataclass(frozen=True, slots=True)
class Response:
    """A response. `status` and `message_id` are None where the peer left them out."""

    command: int | None
    message_id: int | None
    status: int | None
    comment: str = ""
    sop_instance: str = ""
    has_dataset: bool = False


def parse_response(command_set: bytes) -> Response:
    """Read a command set; missing or truncated values stay None."""
    values: dict[int, bytes] = {}
    pos = 0
    while pos + 8 <= len(command_set):
        group, element, length = _HEAD.unpack_from(command_set, pos)
        pos += 8
        if group == 0 and pos + length <= len(command_set):
            values[element] = bytes(command_set[pos : pos + length])
        pos += length

    def number(element: int) -> int | None:
        value = values.get(element, b"")
        return int.from_bytes(value, "little") if len(value) == 2 else None

    said = values.get(0x0902, b"")
    try:
        comment = said.decode("utf-8")
    except UnicodeDecodeError:
        comment = said.decode("latin-1")
    return Response(
        command=number(0x0100),
        message_id=number(0x0120),
        status=number(0x0900),
        comment="".join(c for c in comment if c.isprintable()).strip(),
        sop_instance=values.get(0x1000, b"").decode("latin-1").strip("\0 "),
        has_dataset=number(0x0800) not in (None, NO_DATASET),
    )
