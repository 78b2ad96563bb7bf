"""The upper layer protocol (PS3.8 section 9.3) and DIMSE (PS3.7) as bytes, for a peer that must be able to err."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import pydicom
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

IMPLEMENTATION = "2.25.319044560172833"
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
DEFLATED, BIG = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
NO_DATA = 0x0101  # (0000,0800): no data set follows


@dataclass(frozen=True)
class Context:
    """A presentation context that was proposed."""

    id: int
    abstract_syntax: str
    offered: tuple[str, ...]


@dataclass(frozen=True)
class Proposal:
    """An A-ASSOCIATE-RQ; `association` counts from 1 over the peer's life."""

    association: int
    called: str
    calling: str
    contexts: tuple[Context, ...]
    max_pdu: int
    roles: dict[str, tuple[int, int]]  # SOP class: (SCU role, SCP role)
    window: tuple[int, int]  # operations invoked and performed; (1, 1) where none was proposed


def item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


def items(body: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(body):
        kind, length = struct.unpack_from(">BxH", body, at)
        yield kind, body[at + 4 : at + 4 + length]
        at += 4 + length


def decode_proposal(number: int, body: bytes) -> Proposal:
    """Decode an A-ASSOCIATE-RQ, PS3.8 section 9.3.2."""
    contexts: list[Context] = []
    roles: dict[str, tuple[int, int]] = {}
    max_pdu, window = 0, (1, 1)
    for kind, item in items(body[68:]):
        if kind == 0x20:
            inner = list(items(item[4:]))
            abstract = next(value.decode() for tag, value in inner if tag == 0x30)
            contexts.append(Context(item[0], abstract, tuple(value.decode() for tag, value in inner if tag == 0x40)))
        elif kind == 0x50:
            for tag, value in items(item):
                if tag == 0x51:
                    max_pdu = struct.unpack(">I", value)[0]
                elif tag == 0x53:
                    window = struct.unpack(">HH", value)
                elif tag == 0x54:
                    length = struct.unpack_from(">H", value)[0]
                    roles[value[2 : 2 + length].decode()] = (value[2 + length], value[3 + length])
    called, calling = body[4:20].decode("ascii").strip(), body[20:36].decode("ascii").strip()
    ids = [context.id for context in contexts]
    assert len(set(ids)) == len(ids) <= 128 and all(one % 2 for one in ids), f"context ids {ids}"
    return Proposal(number, called, calling, tuple(contexts), max_pdu, roles, window)


def decode_command(command: bytes) -> dict[int, bytes]:
    """Decode a command set: implicit little endian, PS3.7 section 6.3."""
    found, at = {}, 0
    while at < len(command):
        group, element, length = struct.unpack_from("<HHI", command, at)
        found[group << 16 | element] = command[at + 8 : at + 8 + length]
        at += 8 + length
    return found


def encode_command(elements: dict[int, bytes]) -> bytes:
    """Encode a command set, its group length first."""
    body = b"".join(
        struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value for tag, value in sorted(elements.items())
    )
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def p_data(context: int, piece: bytes, *, command: bool = True, last: bool = True) -> bytes:
    value = struct.pack(">IBB", len(piece) + 2, context, command | last << 1) + piece
    return struct.pack(">BBI", 4, 0, len(value)) + value


def number(raw: bytes) -> int:
    return int(struct.unpack("<H", raw)[0])


def uid_of(raw: bytes) -> str:
    return raw.rstrip(b"\0 ").decode("ascii")


def padded(uid: str) -> bytes:
    raw = uid.encode()
    return raw + b"\0" * (len(raw) % 2)


def part10(sop_class: str, instance: str, syntax: str, data: bytes) -> bytes:
    """A DICOM file of a data set, PS3.10 section 7.1."""

    def element(number: int, uid: str) -> bytes:
        value = padded(uid)
        return struct.pack("<HH2sH", 2, number, b"UI", len(value)) + value

    meta = struct.pack("<HH2sHI", 2, 1, b"OB", 0, 2) + b"\0\1" + element(2, sop_class) + element(3, instance)
    meta += element(0x10, syntax) + element(0x12, IMPLEMENTATION)
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta + data


def decode_dataset(data: bytes, syntax: str) -> Dataset:
    return pydicom.dcmread(BytesIO(part10("1.2.840.10008.1.1", "1.2", syntax, data)))


def encode_dataset(ds: Dataset, syntax: str) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = syntax == IMPLICIT, syntax != BIG
    write_dataset(buffer, ds)
    return buffer.getvalue()
