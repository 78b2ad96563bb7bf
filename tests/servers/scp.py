"""A DICOM peer that does at any step what a test's script says, the right thing as well as every wrong one.

It speaks the upper layer protocol (PS3.8 section 9.3) and DIMSE (PS3.7) on its own socket, so that it can send what a
library would refuse to: half a PDU, one byte at a time, a wrong message ID, an empty response, or nothing at all.

    with scp(on_store=lambda store: 0xA700 if store.number == 3 else 0x0000) as peer:
        ...  # send to 127.0.0.1:peer.port
        assert peer.kept.keys() == {...}

What it confirmed it keeps, so that C-FIND and storage commitment answer truly unless told otherwise.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, TypeVar

import pydicom
from pydicom.dataset import Dataset

from tests.servers import wire
from tests.servers.steps import (
    Abort,
    Accept,
    Answer,
    Close,
    Commit,
    Partly,
    Raw,
    Reject,
    Report,
    Reset,
    Script,
    Silence,
    Store,
    Wait,
)  # fmt: skip
from tests.servers.wire import EXPLICIT, IMPLICIT, Context, Proposal

S = TypeVar("S", bound="Scp")

AET = "PARROT"
APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
COMMITMENT = "1.2.840.10008.1.20.1"
COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"
PDU_BYTES = 16_384
POLL_S = 0.1


class _End(Exception):
    """The connection ends here."""


@dataclass
class Association:
    """What became of one connection."""

    number: int
    begun: float
    proposal: Proposal | None = None
    ended: str = ""  # released, aborted (by the other side), closed (by it), done (by the script)
    ended_at: float = 0.0
    bytes: int = 0  # of P-DATA


@dataclass
class Scp:
    """A running peer and what it saw; settings may be changed while it runs.

    Attributes:
        accept: transfer syntax for a proposed context, or the reason of refusal.
        on_connect, on_associate, on_store, on_commit, on_release: scripts; None does the right thing.
        on_data: asked after each piece of a message: (Association, bytes of this message so far).
        max_pdu: granted to the other side; 0 is unlimited.
        window: asynchronous operations that are granted; None leaves the item out.
        write_size: bytes of each write; None for whole PDUs.
        split: whether command sets come in two PDUs.
        reverse: so many C-STORE requests are answered together, the last one first.
        finds: whether C-FIND is supported.
        gives_roles: whether the roles that were asked for are granted.
        keep_data: whether the data sets are kept.
        watch: whether to look, before each answer, if the other side has gone on without it (`early` counts).
        host: the address to listen on.
        report_tls: with which a commitment is reported, and a move sent, on a new association; None for a plain one.
    """

    port: int = 0
    aet: str = AET
    accept: Callable[[Context], str | int] = lambda context: context.offered[0]
    on_connect: Callable[[int], Script] | None = None
    on_associate: Callable[[Proposal], Script] | None = None
    on_store: Callable[[Store], Script] | None = None
    on_commit: Callable[[Commit], Script] | None = None
    on_release: Callable[[int], Script] | None = None
    on_data: Callable[[Association, int], Script] | None = None
    max_pdu: int = PDU_BYTES
    window: tuple[int, int] | None = None
    write_size: int | None = None
    split: bool = False
    reverse: int = 1
    finds: bool = True
    gives_roles: bool = True
    keep_data: bool = True
    watch: bool = False
    host: str = "127.0.0.1"
    report_tls: ssl.SSLContext | None = None
    tls: ssl.SSLContext | None = None
    stores: list[Store] = field(default_factory=list)
    kept: dict[str, Store] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)  # came again although they had been confirmed
    associations: list[Association] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    reported: list[tuple[str, int | None]] = field(default_factory=list)  # transaction, status of the answer
    echoes: int = 0
    early: int = 0
    most_open: int = 0  # associations at once
    errors: list[BaseException] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def files(self) -> dict[str, bytes]:
        """Every kept instance as a DICOM file."""
        with self.lock:
            return {uid: store.file() for uid, store in self.kept.items()}

    @property
    def open(self) -> int:
        """Connections that have not ended."""
        with self.lock:
            return sum(not association.ended for association in self.associations)

    def wait_closed(self, seconds: float = 30.0) -> bool:
        """Wait until no connection is open."""
        end = time.monotonic() + seconds
        while self.open and time.monotonic() < end:
            time.sleep(0.01)
        return not self.open


@contextmanager
def scp(**settings: Any) -> Iterator[Scp]:
    """Run a scripted peer on loopback until the block ends.

    Raises:
        BaseException: what a script raised, once the block is through.
    """
    with served(Scp(**settings), Connection) as peer:
        yield peer


@contextmanager
def served(peer: S, kind: type[Connection]) -> Iterator[S]:
    """Run a peer whose connections are of this kind; see `scp`."""
    family = socket.AF_INET6 if ":" in peer.host else socket.AF_INET
    listener = socket.create_server((peer.host, peer.port), family=family, backlog=128)
    listener.settimeout(POLL_S)
    peer.port = listener.getsockname()[1]
    threads: list[threading.Thread] = []

    def listen() -> None:
        while not peer.stopped.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with peer.lock:
                association = Association(len(peer.associations) + 1, time.monotonic())
                peer.associations.append(association)
            thread = threading.Thread(target=kind(peer, connection, association).run, daemon=True)
            threads.append(thread)
            thread.start()

    main = threading.Thread(target=listen, daemon=True)
    main.start()
    try:
        yield peer
    finally:
        peer.stopped.set()
        main.join(5)
        listener.close()
        for thread in threads:
            thread.join(5)
    if peer.errors:
        raise peer.errors[0]


class Connection:
    """Serves one connection."""

    def __init__(self, peer: Scp, connection: socket.socket, association: Association) -> None:
        self.peer, self.socket, self.association = peer, connection, association
        self.contexts: dict[int, tuple[str, str]] = {}
        self.limit = PDU_BYTES
        self.waiting: list[tuple[int, Store, Script]] = []
        self.command = bytearray()
        self.data = bytearray()
        self.fields: dict[int, bytes] | None = None

    def run(self) -> None:
        association = self.association
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.peer.tls is not None:
                self.socket.settimeout(60)
                self.socket.getpeername()  # of a connection that was reset, TLS would leave a socket unclosed
                self.socket = self.peer.tls.wrap_socket(self.socket, server_side=True)
            self.socket.settimeout(POLL_S)
            self.play(self.peer.on_connect(association.number) if self.peer.on_connect else None)
            self.serve()
        except _End:
            association.ended = association.ended or "done"
        except OSError:
            association.ended = association.ended or "closed"
        except BaseException as exc:
            self.peer.errors.append(exc)
            association.ended = "error"
        finally:
            association.ended_at = time.monotonic()
            self.socket.close()

    # ---- bytes

    def read(self, count: int) -> bytes:
        piece = bytearray()
        while len(piece) < count:
            if self.peer.stopped.is_set():
                raise _End
            try:
                more = self.socket.recv(min(1 << 20, count - len(piece)))
            except (TimeoutError, ssl.SSLWantReadError):
                self.flush()
                continue
            if not more:
                self.association.ended = "closed"
                raise _End
            piece += more
        return bytes(piece)

    def write(self, data: bytes) -> None:
        size = self.peer.write_size or len(data)
        self.socket.settimeout(60)
        for start in range(0, len(data), size):
            self.socket.sendall(data[start : start + size])
        self.socket.settimeout(POLL_S)

    def pdu(self, kind: int, body: bytes) -> None:
        self.write(struct.pack(">BBI", kind, 0, len(body)) + body)

    # ---- the upper layer

    def serve(self) -> None:
        while True:
            self.step()

    def step(self) -> None:
        """Serve one PDU."""
        kind, length = struct.unpack(">BxI", self.read(6))
        if kind == 1:
            self.associate(self.read(length))
        elif kind == 4:
            self.p_data(length)
        elif kind == 5:
            self.read(length)
            self.flush()
            self.association.ended = "released"
            if self.peer.on_release:
                self.play(self.peer.on_release(self.association.number))
            self.pdu(6, bytes(4))
            raise _End
        elif kind == 7:
            self.association.ended = "aborted"
            raise _End
        else:
            self.association.ended = "alien"  # a TLS handshake, for one, which finds out what we speak
            raise _End

    def associate(self, body: bytes) -> None:
        proposal = wire.decode_proposal(self.association.number, body)
        self.association.proposal = proposal
        self.limit = proposal.max_pdu or 1 << 20
        script = self.peer.on_associate(proposal) if self.peer.on_associate else None
        if isinstance(script, Accept):
            self.contexts = {cx.id: (cx.abstract_syntax, cx.offered[0]) for cx in proposal.contexts}
            self.write(script.data)
            return
        self.play(script)
        items = wire.item(0x10, APPLICATION_CONTEXT.encode())
        for context in proposal.contexts:
            answer = self.peer.accept(context)
            syntax, result = (answer, 0) if isinstance(answer, str) else (context.offered[0], answer)
            if not result:
                self.contexts[context.id] = (context.abstract_syntax, syntax)
            head = struct.pack(">BBBB", context.id, 0, result, 0)
            items += wire.item(0x21, head + wire.item(0x40, syntax.encode()))
        user = wire.item(0x51, struct.pack(">I", self.peer.max_pdu)) + wire.item(0x52, wire.IMPLEMENTATION.encode())
        if self.peer.window is not None:
            user += wire.item(0x53, struct.pack(">HH", *self.peer.window))
        for sop_class, roles in proposal.roles.items() if self.peer.gives_roles else ():
            uid = sop_class.encode()
            user += wire.item(0x54, struct.pack(">H", len(uid)) + uid + bytes(roles))
        called, calling = body[4:20], body[20:36]
        with self.peer.lock:
            self.peer.most_open = max(self.peer.most_open, self.peer.open)
        self.pdu(2, struct.pack(">HH", 1, 0) + called + calling + bytes(32) + items + wire.item(0x50, user))

    def p_data(self, length: int) -> None:
        left = length
        while left:
            size, context, flags = struct.unpack(">IBB", self.read(6))
            piece = self.read(size - 2)
            left -= 4 + size
            self.association.bytes += len(piece)
            (self.command if flags & 1 else self.data).extend(piece)
            if self.peer.on_data:
                self.play(self.peer.on_data(self.association, len(self.data)))
            if not flags & 2:
                continue
            if flags & 1:
                self.fields = wire.decode_command(bytes(self.command))
                self.command.clear()
                if wire.number(self.fields[0x00000800]) != wire.NO_DATA:
                    continue
            assert self.fields is not None, "a data set came without a command"
            fields, self.fields, data = self.fields, None, bytes(self.data)
            self.data.clear()
            self.message(context, fields, data)
        if self.peer.max_pdu and length > self.peer.max_pdu:
            raise AssertionError(f"a P-DATA-TF of {length} bytes came, {self.peer.max_pdu} were granted")

    # ---- messages

    def message(self, context: int, fields: dict[int, bytes], data: bytes) -> None:
        kind = wire.number(fields[0x00000100])
        if kind == 0x0001:
            self.store(context, fields, data)
        elif kind == 0x0030:
            self.peer.echoes += 1
            self.respond(context, fields, Answer())
        elif kind == 0x0020:
            self.find(context, fields, data)
        elif kind == 0x0130:
            self.action(context, fields, data)
        elif kind == 0x8100:
            status = fields.get(0x00000900)
            self.peer.reported.append(("", None if status is None else wire.number(status)))
        else:
            self.other(kind, context, fields, data)

    def other(self, kind: int, context: int, fields: dict[int, bytes], data: bytes) -> None:
        """A message that is none of these."""
        if kind != 0x0FFF:  # C-CANCEL
            raise AssertionError(f"a message of type {kind:04X} came")

    def store(self, context: int, fields: dict[int, bytes], data: bytes) -> None:
        peer = self.peer
        abstract, syntax = self.contexts[context]
        with peer.lock:
            store = Store(
                number=len(peer.stores) + 1,
                association=self.association.number,
                message_id=wire.number(fields[0x00000110]),
                SOPClassUID=wire.uid_of(fields[0x00000002]),
                SOPInstanceUID=wire.uid_of(fields[0x00001000]),
                syntax=syntax,
                data=data if peer.keep_data else b"",
                command=fields,
            )
            peer.stores.append(store)
            if store.SOPInstanceUID in peer.kept:
                peer.repeated.append(store.SOPInstanceUID)
        if abstract != store.SOPClassUID:
            raise AssertionError(f"{store.SOPClassUID} came in a context of {abstract}")
        if peer.watch and select.select([self.socket], [], [], 0.05)[0]:
            peer.early += 1
        script: Script = peer.on_store(store) if peer.on_store else 0
        self.waiting.append((context, store, script))
        if len(self.waiting) >= peer.reverse:
            self.flush()

    def flush(self) -> None:
        """Answer what waits, the last one first; there is more than one where answers are to be reversed."""
        waiting, self.waiting = self.waiting, []
        for context, store, script in reversed(waiting):
            self.play(script, context, store.command, store)

    def find(self, context: int, fields: dict[int, bytes], data: bytes) -> None:
        syntax = self.contexts[context][1]
        if not self.peer.finds:
            self.respond(context, fields, Answer(0x0122))
            return
        keys = wire.decode_dataset(data, syntax)
        with self.peer.lock:
            kept = list(self.peer.kept.values())
        for store in kept:
            ds = pydicom.dcmread(BytesIO(store.file()), stop_before_pixels=True)
            if all(
                _matches(ds, keys, keyword) for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
            ):
                found = Dataset()
                for element in keys:
                    setattr(found, element.keyword, ds.get(element.keyword, element.value))
                found.QueryRetrieveLevel = keys.QueryRetrieveLevel
                self.respond(context, fields, Answer(0xFF00), wire.encode_dataset(found, syntax))
        self.respond(context, fields, Answer())

    def action(self, context: int, fields: dict[int, bytes], data: bytes) -> None:
        ds = wire.decode_dataset(data, self.contexts[context][1])
        uids = {one.ReferencedSOPInstanceUID: one.ReferencedSOPClassUID for one in ds.ReferencedSOPSequence}
        proposal = self.association.proposal
        assert proposal is not None
        commit = Commit(self.association.number, str(ds.TransactionUID), uids, proposal.calling)
        self.peer.commits.append(commit)
        script: Script = [0, Report()] if self.peer.on_commit is None else self.peer.on_commit(commit)
        self.play(script, context, fields, commit=commit)

    # ---- steps

    def play(
        self,
        script: Script,
        context: int = 0,
        fields: dict[int, bytes] | None = None,
        store: Store | None = None,
        commit: Commit | None = None,
    ) -> None:
        for step in [] if script is None else [script] if not isinstance(script, Sequence) else script:
            if isinstance(step, int):
                step = Answer(step)
            if isinstance(step, Answer):
                assert fields is not None
                arrived = step.status is not None and (step.status == 0 or step.status >> 12 == 0xB)
                if store is not None and (arrived if step.kept is None else step.kept):
                    with self.peer.lock:
                        self.peer.kept.setdefault(store.SOPInstanceUID, store)
                self.respond(context, fields, step)
            elif isinstance(step, Report):
                assert commit is not None
                self.report(context, commit, step)
            elif isinstance(step, Wait):
                self.peer.stopped.wait(step.seconds)
            elif isinstance(step, Raw):
                self.write(step.data)
            elif isinstance(step, Partly):
                assert fields is not None
                self.write(wire.p_data(context, _response(fields, Answer()))[: step.count])
                raise _End
            elif isinstance(step, Abort):
                self.pdu(7, bytes((0, 0, step.source, step.reason)))
                raise _End
            elif isinstance(step, Reject):
                self.pdu(3, bytes((0, step.result, step.source, step.reason)))
                raise _End
            elif isinstance(step, Reset):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raise _End
            elif isinstance(step, Close):
                raise _End
            elif isinstance(step, Silence):
                self.silence()
            else:
                raise TypeError(f"{step!r} is no step for here")

    def silence(self) -> None:
        """Swallow what comes until the other side ends it; a polite abort counts as such."""
        tail = b""
        while not self.peer.stopped.is_set():
            with suppress(TimeoutError, ssl.SSLWantReadError):
                more = self.socket.recv(1 << 16)
                if not more:
                    self.association.ended = "aborted" if tail[-10:-9] == b"\x07" else "closed"
                    break
                tail = (tail + more)[-10:]
        raise _End

    def respond(self, context: int, fields: dict[int, bytes], answer: Answer, data: bytes = b"") -> None:
        command = _response(fields, answer, bool(data))
        if self.peer.split:
            half = len(command) // 4 * 2  # fragments have an even length, PS3.8 Annex E.2
            self.write(wire.p_data(context, command[:half], last=False) + wire.p_data(context, command[half:]))
        else:
            self.write(wire.p_data(context, command))
        if data:
            for start in range(0, len(data), self.limit - 6):
                piece = data[start : start + self.limit - 6]
                last = start + len(piece) == len(data)
                self.write(wire.p_data(context, piece, command=False, last=last))

    def report(self, context: int, commit: Commit, step: Report) -> None:
        if step.port is not None:
            thread = threading.Thread(target=self._report_anew, args=(commit, step), daemon=True)
            thread.start()
            return
        self.peer.stopped.wait(step.delay_s)
        data = wire.encode_dataset(_result(commit, step), self.contexts[context][1])
        command = wire.encode_command(
            {
                0x00000002: wire.padded(COMMITMENT),
                0x00000100: struct.pack("<H", 0x0100),
                0x00000110: struct.pack("<H", 77),
                0x00000800: struct.pack("<H", 0),
                0x00001000: wire.padded(COMMITMENT_INSTANCE),
                0x00001002: struct.pack("<H", 2 if step.failed else 1),
            }
        )
        self.write(wire.p_data(context, command) + wire.p_data(context, data, command=False))

    def _report_anew(self, commit: Commit, step: Report) -> None:
        """Open an association to the requester's listener, as most archives do, and report there."""
        from pynetdicom import build_role

        from tests.servers.scu import AE

        self.peer.stopped.wait(step.delay_s)
        assert step.port is not None
        try:
            ae = AE(self.peer.aet)
            ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = 5
            ae.add_requested_context(COMMITMENT, [IMPLICIT, EXPLICIT])
            role = build_role(COMMITMENT, scu_role=False, scp_role=True)
            tls = (self.peer.report_tls, "127.0.0.1") if self.peer.report_tls else None
            assoc = ae.associate("127.0.0.1", step.port, ae_title=commit.calling, ext_neg=[role], tls_args=tls)
            if not assoc.is_established:
                self.peer.reported.append((commit.transaction, None))
                return
            try:
                kind = 2 if step.failed else 1
                status, _ = assoc.send_n_event_report(_result(commit, step), kind, COMMITMENT, COMMITMENT_INSTANCE)
                self.peer.reported.append((commit.transaction, status.get("Status")))
            finally:
                assoc.release()
        except Exception as exc:
            self.peer.errors.append(exc)


def _result(commit: Commit, step: Report) -> Dataset:
    """The data set of an N-EVENT-REPORT, PS3.4 table J.3-2."""
    ds = Dataset()
    ds.TransactionUID = step.transaction or commit.transaction
    good, bad = [], []
    for uid, sop_class in commit.uids.items():
        one = Dataset()
        one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = sop_class, uid
        if uid in step.failed:
            one.FailureReason = step.failed[uid]
            bad.append(one)
        elif uid not in step.missing:
            good.append(one)
    if good:
        ds.ReferencedSOPSequence = good
    if bad:
        ds.FailedSOPSequence = bad
    return ds


def _response(fields: dict[int, bytes], answer: Answer, data: bool = False) -> bytes:
    if answer.bare:
        return wire.encode_command({})
    message_id = wire.number(fields[0x00000110]) if answer.message_id is None else answer.message_id
    elements = {
        0x00000100: struct.pack("<H", wire.number(fields[0x00000100]) | 0x8000),
        0x00000120: struct.pack("<H", message_id),
        0x00000800: struct.pack("<H", 0 if data else wire.NO_DATA),
    }
    for tag in (0x00000002, 0x00001000, 0x00001008):
        if tag in fields:
            elements[tag] = fields[tag]
    if 0x00000003 in fields:  # N-ACTION names its class and instance as requested ones
        elements |= {0x00000002: fields[0x00000003], 0x00001000: fields[0x00001001]}
    if answer.uid is not None:
        elements[0x00001000] = wire.padded(answer.uid)
    if answer.status is not None:
        elements[0x00000900] = struct.pack("<H", answer.status)
    if answer.comment:
        elements[0x00000902] = answer.comment.encode().ljust(len(answer.comment) + len(answer.comment) % 2)
    return wire.encode_command(elements)


def _matches(ds: Dataset, keys: Dataset, keyword: str) -> bool:
    wanted = keys.get(keyword)
    if not wanted:
        return True
    return str(ds.get(keyword, "")) in ([wanted] if isinstance(wanted, str) else list(wanted))
