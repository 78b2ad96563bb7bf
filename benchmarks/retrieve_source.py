"""A source of retrievals that is never the limit: it answers from memory, with PDUs that are made beforehand."""

from __future__ import annotations

import functools
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from talaria.testing import studies
from tests.servers import wire

PDU = 131_072  # bytes
ANSWERS = 10_000  # to a query for accession number MANY
NO_GET = b"NOGET"  # AE title under which it does not do C-GET
GET_MODELS = ("1.2.840.10008.5.1.4.1.2.2.3", "1.2.840.10008.5.1.4.1.2.1.3")
STUDY, SERIES, CLASS = "1.2.826.0.1.1", "1.2.826.0.1.2", "1.2.840.10008.5.1.4.1.1.2"


def _uid(number: int) -> str:
    return f"1.2.826.0.1.3.{number + 10_000_000}"


def instance(number: int, size: int) -> tuple[bytes, bytes]:
    """Command set and data set of one instance, explicit VR little endian."""
    uid = _uid(number)
    command = wire.encode_command(
        {
            0x00000002: wire.padded(CLASS),
            0x00000100: struct.pack("<H", 1),
            0x00000110: struct.pack("<H", 1),
            0x00000700: struct.pack("<H", 0),
            0x00000800: struct.pack("<H", 1),
            0x00001000: wire.padded(uid),
        }
    )

    return command, _head(uid) + struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, size) + _pixels(size)


@functools.cache
def _pixels(size: int) -> bytes:
    return (os.urandom(1 << 16) * (size // (1 << 16) + 1))[:size]


@functools.cache
def _template() -> tuple[bytes, str]:
    """What stands before the pixels in an image of a scanner's, with its private elements, and its instance UID."""
    uid = "1.2.826.0.1.3." + "9" * 8
    with studies.quiet():
        ds = studies.dataset(study=STUDY, series=SERIES, SOPInstanceUID=uid)
        for keyword in ("PixelData", "DataSetTrailingPadding"):
            del ds[keyword]
        return wire.encode_dataset(ds, wire.EXPLICIT), uid


def _head(uid: str) -> bytes:
    data, old = _template()
    return data.replace(old.encode(), uid.encode())


def pdus(context: int, command: bytes, data: bytes) -> bytes:
    step = PDU - 12
    pieces = [wire.p_data(context, command)]
    for at in range(0, len(data), step):
        pieces.append(wire.p_data(context, data[at : at + step], command=False, last=at + step >= len(data)))
    return b"".join(pieces)


class Source:
    """Answers any query with its one series, and sends it from memory; one thread per association."""

    def __init__(self, count: int, size: int, ports: Mapping[str, int]) -> None:
        self.instances = [instance(number, size) for number in range(count)]
        self.ports = ports
        self.prepared: dict[int, list[bytes]] = {}
        self.answers: dict[bytes, bytes] = {}  # by identifier
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self.listener.getsockname()[1])

    def serve(self) -> None:
        while True:
            sock, _ = self.listener.accept()
            threading.Thread(target=self._run, args=(sock,), daemon=True).start()

    def ready(self, context: int) -> list[bytes]:
        if context not in self.prepared:
            self.prepared[context] = [pdus(context, *one) for one in self.instances]
        return self.prepared[context]

    def _run(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError, EOFError):
            peer = _Peer(sock)
            peer.accept()
            while True:
                context, fields, data = peer.message()
                kind = wire.number(fields[0x00000100])
                if kind == 0x0020:
                    self._find(peer, context, fields, data)
                elif kind == 0x0010:
                    number = next(n for n, pair in peer.contexts.items() if pair == (CLASS, wire.EXPLICIT))
                    wanted = self._wanted(data)
                    self._send(peer, number, wanted, partial(peer.respond, context, fields, 0xFF00))
                    peer.respond(context, fields, 0, len(wanted))
                elif kind == 0x0021:
                    wanted = self._wanted(data)
                    self._move(fields, wanted)
                    peer.respond(context, fields, 0, len(wanted))

    def _wanted(self, identifier: bytes) -> Sequence[int]:
        """The instances that are asked for: all, or those of a list of UIDs."""
        found = [int(one) - 10_000_000 for one in re.findall(rb"1\.2\.826\.0\.1\.3\.(\d{8})", identifier)]
        return found or range(len(self.instances))

    def _send(self, peer: _Peer, context: int, wanted: Sequence[int], told: Callable[[int], None]) -> None:
        ready = self.ready(context)
        for number, at in enumerate(wanted, 1):
            peer.sock.sendall(ready[at])
            peer.message()
            if number % 10 == 0:
                told(number)

    def _move(self, fields: Mapping[int, bytes], wanted: Sequence[int]) -> None:
        with socket.create_connection(("127.0.0.1", self.ports[wire.uid_of(fields[0x00000600]).strip()])) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = _Peer(sock)
            peer.request(wire.uid_of(fields[0x00000600]).strip())
            self._send(peer, 1, wanted, lambda done: None)
            sock.sendall(bytes((5, 0, 0, 0, 0, 4, 0, 0, 0, 0)))
            with suppress(OSError):
                sock.recv(10)

    def _find(self, peer: _Peer, context: int, fields: Mapping[int, bytes], data: bytes) -> None:
        from pydicom.dataset import Dataset

        syntax = peer.contexts[context][1]
        if data in self.answers:  # asked before: what follows takes longer than all that is measured
            peer.sock.sendall(self.answers[data])
            return
        keys = wire.decode_dataset(data, syntax)
        level = str(keys.QueryRetrieveLevel)
        many = "PatientName" in keys and str(keys.get("AccessionNumber", "")) == "MANY"
        count = ANSWERS if many else len(self.instances) if level == "IMAGE" else 1
        out = []
        for number in range(count):
            found = Dataset()
            for element in keys:
                value = {
                    "QueryRetrieveLevel": level, "StudyInstanceUID": f"{STUDY}.{number}" if many else STUDY,
                    "SeriesInstanceUID": SERIES, "SOPClassUID": CLASS, "SOPInstanceUID": _uid(number),
                    "NumberOfSeriesRelatedInstances": len(self.instances), "Modality": "CT",
                    "NumberOfStudyRelatedInstances": len(self.instances), "PatientName": f"Doe^John{number}",
                    "AccessionNumber": "MANY" if many else "ONE", "StudyDate": "20240101",
                }.get(element.keyword, "")  # fmt: skip
                setattr(found, element.keyword, value)
            out.append(peer.response(context, fields, 0xFF00, wire.encode_dataset(found, syntax)))
        out.append(peer.response(context, fields, 0))
        self.answers[data] = b"".join(out)
        peer.sock.sendall(self.answers[data])


class _Peer:
    """The other side of one association."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.contexts: dict[int, tuple[str, str]] = {}

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _pdu(self) -> tuple[int, bytes]:
        kind, length = struct.unpack(">BxI", self._exactly(6))
        return kind, self._exactly(length)

    def accept(self) -> None:
        _, body = self._pdu()
        asked = wire.decode_proposal(1, body)
        items = wire.item(0x10, b"1.2.840.10008.3.1.1.1")
        for context in asked.contexts:
            syntax = wire.EXPLICIT if wire.EXPLICIT in context.offered else context.offered[0]
            refused = body[4:20].strip() == NO_GET and context.abstract_syntax in GET_MODELS
            if not refused:
                self.contexts[context.id] = context.abstract_syntax, syntax
            items += wire.item(0x21, bytes((context.id, 0, 3 * refused, 0)) + wire.item(0x40, syntax.encode()))
        user = wire.item(0x51, struct.pack(">I", PDU)) + wire.item(0x52, wire.IMPLEMENTATION.encode())
        for uid, roles in asked.roles.items():
            user += wire.item(0x54, struct.pack(">H", len(uid)) + uid.encode() + bytes(roles))
        body = struct.pack(">HH", 1, 0) + body[4:68] + items + wire.item(0x50, user)
        self.sock.sendall(struct.pack(">BxI", 2, len(body)) + body)

    def request(self, called: str) -> None:
        titles = called.ljust(16).encode() + b"SOURCE".ljust(16) + bytes(32)
        context = bytes((1, 0, 0, 0)) + wire.item(0x30, CLASS.encode()) + wire.item(0x40, wire.EXPLICIT.encode())
        user = wire.item(0x51, struct.pack(">I", PDU)) + wire.item(0x52, wire.IMPLEMENTATION.encode())
        body = struct.pack(">HH", 1, 0) + titles + wire.item(0x10, b"1.2.840.10008.3.1.1.1") + wire.item(0x20, context)
        body += wire.item(0x50, user)
        self.sock.sendall(struct.pack(">BxI", 1, len(body)) + body)
        kind, _ = self._pdu()
        if kind != 2:
            raise RuntimeError("the destination refuses the association")

    def message(self) -> tuple[int, dict[int, bytes], bytes]:
        command, data, fields = b"", b"", None
        while True:
            kind, body = self._pdu()
            if kind == 5:
                self.sock.sendall(bytes((6, 0, 0, 0, 0, 4, 0, 0, 0, 0)))
            if kind != 4:
                raise EOFError
            at = 0
            while at < len(body):
                length, context, flags = struct.unpack_from(">IBB", body, at)
                piece = body[at + 6 : at + 4 + length]
                at += 4 + length
                if flags & 1:
                    command += piece
                else:
                    data += piece
                if flags == 3:
                    fields = wire.decode_command(command)
                    if wire.number(fields[0x00000800]) == wire.NO_DATA:
                        return context, fields, b""
                elif flags == 2 and fields is not None:
                    return context, fields, data

    def response(
        self, context: int, fields: Mapping[int, bytes], status: int, data: bytes = b"", done: int = 0
    ) -> bytes:
        elements = {
            0x00000002: fields[0x00000002],
            0x00000100: struct.pack("<H", wire.number(fields[0x00000100]) | 0x8000),
            0x00000120: fields[0x00000110],
            0x00000800: struct.pack("<H", 1 if data else wire.NO_DATA),
            0x00000900: struct.pack("<H", status),
        }
        if wire.number(fields[0x00000100]) != 0x0020:
            elements |= {0x1020: struct.pack("<H", 0), 0x1021: struct.pack("<H", done & 0xFFFF)}
            elements |= {0x1022: struct.pack("<H", 0), 0x1023: struct.pack("<H", 0)}
        out = wire.p_data(context, wire.encode_command(elements))
        return out + (wire.p_data(context, data, command=False) if data else b"")

    def respond(self, context: int, fields: Mapping[int, bytes], status: int, done: int) -> None:
        self.sock.sendall(self.response(context, fields, status, done=done))


@contextmanager
def source(count: int, size: int, ports: Mapping[str, int]) -> Iterator[int]:
    """Run a source in a process of its own; yields its port."""
    made = Source(count, size, ports)
    made.ready(1)
    child = os.fork()
    if child == 0:
        made.serve()
    try:
        yield made.port
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        made.listener.close()
