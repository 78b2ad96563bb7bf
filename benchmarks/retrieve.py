"""Retrievals beside DCMTK's programs: from a source in memory to a file system in memory, and 10,000 answers to C-FIND.

    .venv/bin/python -m benchmarks.retrieve [--rounds 5] [--set small]

Two anchors: `getscu`, and `movescu` to `storescp --fork`, as they come, which parse and re-encode what they get; and
with `+B`, which keeps bytes as Talaria does. DCMTK's programs get PDUs as large as they take them, and no Nagle. Own
CPU is that of the process, of `storescp` that of its children. Candidates take turns, ratios are those of a round.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from benchmarks.measure import MB, Run, in_turn, machine, run, section
from talaria.testing import studies
from talaria.testing.process import free_port, listening
from tests.servers import wire

NODELAY = {"TCP_NODELAY": "1"}
PDU = 131_072  # bytes
SETS = {"small": (2000, 30_000), "ct": (500, 524_288), "large": (1, 300_000_000)}  # instances, bytes of each
ANSWERS = 10_000
STUDY, SERIES, CLASS = "1.2.826.0.1.1", "1.2.826.0.1.2", "1.2.840.10008.5.1.4.1.1.2"
ROOT = "/dev/shm"


# ---- the source


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
                    self._send(peer, number, partial(peer.respond, context, fields, 0xFF00))
                    peer.respond(context, fields, 0, len(self.instances))
                elif kind == 0x0021:
                    self._move(fields)
                    peer.respond(context, fields, 0, len(self.instances))

    def _send(self, peer: _Peer, context: int, told: Callable[[int], None]) -> None:
        for number, data in enumerate(self.ready(context), 1):
            peer.sock.sendall(data)
            peer.message()
            if number % 10 == 0:
                told(number)

    def _move(self, fields: Mapping[int, bytes]) -> None:
        with socket.create_connection(("127.0.0.1", self.ports[wire.uid_of(fields[0x00000600]).strip()])) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = _Peer(sock)
            peer.request(wire.uid_of(fields[0x00000600]).strip())
            self._send(peer, 1, lambda done: None)
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
            self.contexts[context.id] = context.abstract_syntax, syntax
            items += wire.item(0x21, bytes((context.id, 0, 0, 0)) + wire.item(0x40, syntax.encode()))
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


# ---- the candidates


def ours(task: str, *arguments: object, env: Mapping[str, str] | None = None) -> Run:
    """Run a function of this module in a fresh interpreter."""
    return run([sys.executable, "-m", "benchmarks.retrieve", f"--task={task}", *map(str, arguments)], env)


def program(
    argv: Sequence[str], server: psutil.Process | None = None, folder: Path | None = None, count: int = 0
) -> Run:
    """Run a program of DCMTK's; its CPU is its own, and that of the server's children."""
    before = _children_cpu(server)
    begun = time.perf_counter()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | NODELAY)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begun
    if child.returncode:
        raise RuntimeError(f"{argv[0]} ended with {child.returncode}")
    if folder is not None and len(list(folder.iterdir())) != count:
        raise RuntimeError(f"{argv[0]} left {len(list(folder.iterdir()))} files of {count}")
    return Run(wall, used.ru_utime + used.ru_stime + _children_cpu(server) - before, 0.0)


def _children_cpu(server: psutil.Process | None) -> float:
    if server is None:
        return 0.0
    times = server.cpu_times()
    return times.children_user + times.children_system + times.user + times.system


def retrieve(port: int, folder: Path, way: str) -> None:
    """Retrieve the source's series as a driver does: find, fetch, compare."""
    from blocks.dicom import DicomTarget
    from imaging.query import Query
    from protocols.dimse.get import Retriever
    from tasks.dicom import retrieve as fetch
    from transfer.receipt import PushReport

    if way == "move":
        Retriever.stores = property(lambda one: False)  # type: ignore[method-assign,assignment]
    target = DicomTarget(host="127.0.0.1", port=port, direction="query", idle_timeout_s=60)
    with section():
        receipt = fetch(target, Query(StudyInstanceUID=STUDY), folder, PushReport())
    if receipt.state != "delivered":
        raise RuntimeError(f"{receipt}")


def find(port: int) -> None:
    from protocols.dimse.query import finder
    from protocols.dimse.search import STUDY_FIELDS
    from protocols.dimse.transport import Peer

    with finder(Peer("127.0.0.1", port)) as asked, section():
        found = list(asked.ask_for("STUDY", {"AccessionNumber": "MANY"}, STUDY_FIELDS[:11]))
    if len(found) != ANSWERS:
        raise RuntimeError(f"{len(found)} answers")


def find_pynetdicom(port: int) -> None:
    from pydicom.dataset import Dataset
    from pynetdicom import AE

    from protocols.dimse.search import STUDY_FIELDS

    ae = AE()
    ae.add_requested_context("1.2.840.10008.5.1.4.1.2.2.1")
    assoc = ae.associate("127.0.0.1", port)
    keys = Dataset()
    for keyword in STUDY_FIELDS[:11]:
        setattr(keys, keyword, "")
    keys.QueryRetrieveLevel, keys.AccessionNumber = "STUDY", "MANY"
    with section():
        found = [one for _, one in assoc.send_c_find(keys, "1.2.840.10008.5.1.4.1.2.2.1") if one is not None]
    assoc.release()
    if len(found) != ANSWERS:
        raise RuntimeError(f"{len(found)} answers")


# ---- the tables


def show(found: Mapping[str, list[Run]], size: int, anchors: Sequence[str]) -> None:
    heads = [f"rate to {anchor}" for anchor in anchors] + [f"CPU to {anchors[0]}"]
    print(f"\n| what | MB/s | wall s | CPU s | {' | '.join(heads)} |")
    print("|---|---|---|---|" + "---|" * len(heads))
    for name, runs in found.items():
        wall, cpu = (statistics.median(getattr(one, what) for one in runs) for what in ("wall_s", "cpu_s"))
        cells = []
        for anchor in anchors:
            ratios = [other.wall_s / one.wall_s for one, other in zip(runs, found[anchor], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        shares = [one.cpu_s / other.cpu_s for one, other in zip(runs, found[anchors[0]], strict=True)]
        print(f"| {name} | {size / MB / wall:.0f} | {wall:.3f} | {cpu:.3f} | {' | '.join(cells)} | "
              f"{statistics.median(shares):.2f} |")  # fmt: skip


@contextmanager
def storescp(folder: Path, *options: str) -> Iterator[tuple[int, psutil.Process]]:
    port = free_port()
    argv = ["storescp", "--fork", "-pdu", str(PDU), "-aet", "DST", "-od", str(folder), *options, str(port)]
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | NODELAY)
    try:
        while not listening(port):
            time.sleep(0.01)
        yield port, psutil.Process(server.pid)
    finally:
        server.kill()
        server.wait()


def compare(name: str, rounds: int, root: Path) -> None:
    count, size = SETS[name]
    total = count * size
    print(f"\n## {name}: {count} instances of {size / MB:.2f} MB")
    folder = root / "in"
    scp_port = free_port()

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    clear()
    with storescp(folder) as (plain, plain_server), storescp(folder, "+B") as (kept, kept_server):
        ports = {"PLAIN": plain, "KEPT": kept, "TALARIA": scp_port}
        with source(count, size, ports) as port:
            keys = ["-S", "-k", "0008,0052=SERIES", "-k", f"0020,000d={STUDY}", "-k", f"0020,000e={SERIES}"]
            get = ["getscu", "-pdu", str(PDU), *keys, "-od", str(folder)]
            move = ["movescu", "-pdu", str(PDU), *keys]
            at = ["127.0.0.1", str(port)]
            scp = {"TALARIA_SCP_PORT": str(scp_port), "TALARIA_SCP_HOST": "127.0.0.1"}
            by_get = {
                "talaria, C-GET": partial(ours, "retrieve", port, folder, "get"),
                "getscu": partial(program, [*get, *at], None, folder, count),
                "getscu +B": partial(program, [*get, "+B", *at], None, folder, count),
            }
            show(in_turn(by_get, rounds, clear), total, ("getscu", "getscu +B"))
            by_move = {
                "talaria, C-MOVE": partial(ours, "retrieve", port, folder, "move", env=scp),
                "movescu to storescp": partial(program, [*move, "-aem", "PLAIN", *at], plain_server, folder, count),
                "movescu to storescp +B": partial(program, [*move, "-aem", "KEPT", *at], kept_server, folder, count),
            }
            show(in_turn(by_move, rounds, clear), total, ("movescu to storescp", "movescu to storescp +B"))


def compare_find(rounds: int) -> None:
    print(f"\n## C-FIND: {ANSWERS} answers of 11 attributes")
    with source(1, 1000, {}) as port:
        from protocols.dimse.search import STUDY_FIELDS

        keys = [part for keyword in STUDY_FIELDS[:11] if keyword != "AccessionNumber" for part in ("-k", keyword)]
        argv = ["findscu", "-q", "-S", "-pdu", str(PDU), "-k", "QueryRetrieveLevel=STUDY", "-k", "AccessionNumber=MANY"]
        found = in_turn(
            {
                "talaria": partial(ours, "find", port),
                "findscu -q": partial(program, [*argv, *keys, "127.0.0.1", str(port)]),
                "pynetdicom": partial(ours, "find-pynetdicom", port),
            },
            rounds,
        )
        show(found, 0, ("findscu -q", "pynetdicom"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=(*SETS, "find"), action="append", help="one or several; all if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--task", choices=("retrieve", "find", "find-pynetdicom"), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task == "retrieve":
        retrieve(int(options.arguments[0]), Path(options.arguments[1]), options.arguments[2])
    elif options.task == "find":
        find(int(options.arguments[0]))
    elif options.task == "find-pynetdicom":
        find_pynetdicom(int(options.arguments[0]))
    else:
        print(machine())
        with tempfile.TemporaryDirectory(prefix="talaria-benchmark-", dir=ROOT) as name:
            for one in options.set or (*SETS, "find"):
                if one == "find":
                    compare_find(options.rounds)
                else:
                    compare(one, options.rounds, Path(name))


if __name__ == "__main__":
    main()
