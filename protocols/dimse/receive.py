"""Receives instances by C-STORE: from the connection into a file, which gets its name when it is whole.

A data set's bytes are written from the buffer that they were received in, by one writev(2) for many fragments. Its
first bytes show which instance it is; memory doesn't grow with an instance or a study.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from imaging.glance import HEAD_BYTES, Glance
from imaging.header import UID, Damaged, Header, NotDicom, read_header
from protocols.dimse.command import (
    AFFECTED_CLASS,
    AFFECTED_INSTANCE,
    DATASET_TYPE,
    FIELD,
    MESSAGE_ID,
    RESPONDED_TO,
    STATUS,
    CommandSet,
)
from protocols.dimse.message import C_STORE_RSP, HEADERS, IMPLEMENTATION_UID, IMPLEMENTATION_VERSION, NO_DATASET
from protocols.dimse.stream import LARGE_BYTES, Stream, pdus
from protocols.files import partial
from protocols.files.durable import DurableFile, VolatileFile, settle, way_of
from transfer.errors import DispatchError, Interrupted
from transfer.plan import Item
from transfer.throttle import Throttle

SUCCESS, OUT_OF_RESOURCES, MISMATCH, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xA900, 0xC000  # PS3.4 table B.2-1
INVALID_INSTANCE, NOT_AUTHORISED = 0x0117, 0x0124  # PS3.7 Annex C
UNLIMITED = Throttle(None)
PIECES = 512  # that writev(2) gets at once; it takes 1024


@dataclass(eq=False)
class Depot:
    """A folder that receives instances, as `<SOP instance UID>.dcm`; safe to use from several threads.

    Args:
        refuse: returns why an instance is not wanted, "" if it is.
        kept: called with each instance that has got its name; may raise to end the association.
        here: the instances that have their names; several depots of one folder share it, and its lock.
        second: returns why a second copy of one is not taken, "" if there is no need of it.
        durable: whether file and name must be on disk before an instance counts; if not, `settle` flushes them.
        throttle, moved: of what comes for it on associations that others open: the rate, and what is told of bytes.

    Attributes:
        failure: why nothing more can be written.
        heard: when something last came for it; `time.monotonic`.
        refused: how many instances were not wanted, by reason.
        unwanted: their UIDs, as their requests named them.
    """

    folder: Path
    refuse: Callable[[Header], str] = lambda header: ""
    kept: Callable[[Item], None] = lambda item: None
    durable: bool = True
    failure: DispatchError | None = None
    refused: dict[str, int] = field(default_factory=dict)
    unwanted: set[str] = field(default_factory=set)
    here: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    second: Callable[[DurableFile, Header], str] = lambda part, header: ""
    heard: float = field(default_factory=time.monotonic)
    throttle: Throttle = UNLIMITED
    moved: Callable[[int], None] = lambda count: None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._flushing = 0  # instances that are whole, and not durable yet
        self._unsettled: list[str] = []
        self._meta: dict[tuple[str, str, int], tuple[bytes, bytes]] = {}
        self.path = str(self.folder)
        self.glance = Glance()
        self._found_way: type[DurableFile] | None = None
        self._blanks: list[DurableFile] = []
        self._closed = False

    @property
    def way(self) -> type[DurableFile]:
        """How files become durable here."""
        if self._found_way is None:
            self._found_way = way_of(self.folder) if self.durable else VolatileFile
        return self._found_way

    def last_heard(self) -> float:
        """Return when something last came for it; now, while the disk takes its time with what has come."""
        return time.monotonic() if self._flushing else self.heard

    def blank(self) -> DurableFile:
        """Return a file for an instance: one that was made before it came, if there is one.

        Raises:
            OSError: it can't be made.
        """
        try:
            return self._blanks.pop()
        except IndexError:
            return self.way(self.path)

    def prepare(self) -> None:
        """Make a file for the next instance, while its sender is preparing it."""
        if self._closed:
            return
        try:
            part = self.way(self.path)
        except OSError:
            return  # whoever needs it will say so
        self._blanks.append(part)
        if not part.is_hidden or self._closed:  # others would see it, and might take it for a leftover
            self.close()

    def close(self) -> None:
        """Give up what was made for instances that don't come; those that do are received all the same."""
        self._closed = True
        while True:
            try:
                self._blanks.pop().close()
            except IndexError:
                return

    def meta(self, sop_class: str, uid: str, syntax: str) -> bytes:
        """Return the preamble and file meta information (PS3.10 section 7.1)."""
        raw = uid.encode("ascii")
        if len(raw) % 2:
            raw += b"\0"
        around = self._meta.get((sop_class, syntax, len(raw)))
        if around is None:
            before = _VERSION + _uid_element(0x02, sop_class) + _ELEMENT.pack(2, 3, b"UI", len(raw))
            after = _uid_element(0x10, syntax) + _OURS
            length = len(before) + len(raw) + len(after)
            around = _PREAMBLE + length.to_bytes(4, "little") + before, after
            self._meta[sop_class, syntax, len(raw)] = around
        return around[0] + raw + around[1]

    def keep(self, part: DurableFile, size: int, uid: str, seen: Header | None) -> tuple[int, Header | None]:
        """Give a whole file its name, if it is wanted and not there yet; where nothing is durable yet, `note` does so.

        Args:
            seen: what a glance at the data set showed.

        Returns:
            The status to answer with, and the header of what is kept; then `note` is to follow.
        """
        status, header = self.identified(part, size, uid, seen)
        if header is None:
            self.unwanted.add(uid)
            return status, None
        with self.lock:
            second = uid in self.here
            self.here.add(uid)
        if second:
            why = self.second(part, header)
            if not why:
                return SUCCESS, None
            self._count(why)
            self.unwanted.add(uid)
            return NOT_AUTHORISED, None
        if self.durable:
            self._flush(part, uid)
        return SUCCESS, header

    def _flush(self, part: DurableFile, uid: str) -> None:
        with self._lock:
            self._flushing += 1
        try:
            self._name(part, uid)
        finally:
            with self._lock:
                self._flushing -= 1
            self.heard = time.monotonic()

    def _name(self, part: DurableFile, uid: str) -> None:
        try:
            part.written()
            part.keep(f"{uid}.dcm")
            part.named(self.path)
        except BaseException:
            with self.lock:
                self.here.discard(uid)
            raise

    def identified(self, part: DurableFile, size: int, uid: str, seen: Header | None) -> tuple[int, Header | None]:
        """Return the header of a whole file, if it is the instance that its request names, and wanted.

        Returns:
            The status to answer with, and the header; None if it is to be refused.
        """
        header = seen
        if header is None or header.SOPInstanceUID != uid or self.refuse(header):
            try:
                header = read_header(part.fd, size)
            except (NotDicom, Damaged) as exc:
                self._count(f"damaged: {exc}")
                return CANNOT_UNDERSTAND, None
            if header.SOPInstanceUID != uid:
                self._count("another instance than the request names")
                return MISMATCH, None
            why = self.refuse(header)
            if why:
                self._count(why)
                return NOT_AUTHORISED, None
        return SUCCESS, header

    def wrote(self, count: int) -> None:
        """Note that some bytes of an instance are written; may set `failure`, so that the rest is dropped."""

    def answering(self, status: int) -> None:
        """Note that nothing more comes of an instance; its sender is about to be told."""

    def note(self, part: DurableFile, size: int, header: Header) -> None:
        """Count an instance that is kept.

        Where nothing is durable yet, it gets its name only now, which its sender needn't wait for; if it can't get one,
        it is not counted, and that is the `failure`.
        """
        if not self.durable:
            try:
                self._name(part, header.SOPInstanceUID)
            except OSError as exc:
                self.failure = partial.failure(self.folder, exc)
                return
        item = Item(f"{header.SOPInstanceUID}.dcm", size, os.fstat(part.fd).st_mtime_ns, header)
        if not self.durable:
            self._unsettled.append(item.path)
        self.kept(item)

    def _count(self, why: str) -> None:
        with self._lock:
            self.refused[why] = self.refused.get(why, 0) + 1

    def settle(self, check: Callable[[], None] = lambda: None) -> None:
        """Flush everything that was received to disk at once, which costs one commit of the file system's journal.

        Args:
            check: called now and then; may raise to stop.

        Raises:
            Busy: the disk is full. Misconfigured: it can't be written to.
        """
        with self._lock:
            files, self._unsettled = self._unsettled, []
        settle(self.folder, files, check)


def receive(
    stream: Stream, request: CommandSet, syntax: str, depot: Depot, respond: Callable[[CommandSet, int], None]
) -> int:
    """Read the data set of a C-STORE request into a folder, and answer; return the status of the answer.

    A folder that can't be written to is `depot.failure`: the rest of the data set is read and dropped, and the status
    is A700. The peer gets its answer before the instance is counted, and prepares the next one meanwhile.

    Raises:
        Interrupted, TimedOut: the association ended; nothing is left of a file that had no name.
    """
    uid, sop_class = request.uid(AFFECTED_INSTANCE), request.sop_class
    if not sop_class or not UID.fullmatch(uid):
        stream.skip()
        depot.answering(INVALID_INSTANCE)
        respond(request, INVALID_INSTANCE)
        return INVALID_INSTANCE
    try:
        part = depot.blank()
    except OSError as exc:
        depot.failure = partial.failure(depot.folder, exc)
        stream.skip()
        depot.answering(OUT_OF_RESOURCES)
        respond(request, OUT_OF_RESOURCES)
        return OUT_OF_RESOURCES
    header = None
    size, status = 0, OUT_OF_RESOURCES
    try:
        try:
            meta = depot.meta(sop_class, uid, syntax)
            size, head = _spool(stream, part, depot, meta)
            if depot.failure is None:
                seen = depot.glance(head, size - len(meta), syntax, len(meta), (sop_class, uid))
                status, header = depot.keep(part, size, uid, seen)
        except OSError as exc:
            depot.failure = partial.failure(depot.folder, exc)
        depot.answering(status)
        respond(request, status)
    finally:
        try:
            if header is not None:
                depot.note(part, size, header)
        finally:
            part.close()
    if status == SUCCESS:
        depot.prepare()
    return status


def _spool(stream: Stream, part: DurableFile, depot: Depot, meta: bytes) -> tuple[int, bytes]:
    """Write a data set while it arrives; return the size of the file, and the first bytes of the data set."""
    waiting = len(meta)
    whole = stream.whole()
    if whole is not None:
        return _write(part, [meta, whole], 0, waiting + len(whole), depot), bytes(whole[:HEAD_BYTES])
    pieces: list[bytes | memoryview] = [meta]
    size = 0
    head = b""
    while True:
        view = stream.piece()
        if view is None or len(pieces) >= PIECES:
            size = _write(part, pieces, size, waiting, depot)
            pieces.clear()
            waiting = 0
            if view is None:
                if size > LARGE_BYTES:
                    stream.widen()
                stream.fill()
                continue
        if stream.is_command:
            raise Interrupted(f"{stream.where}: the peer sent a command where a data set belongs")
        if len(head) < HEAD_BYTES:
            head += view[: HEAD_BYTES - len(head)]
        pieces.append(view)
        waiting += len(view)
        if stream.last:
            return _write(part, pieces, size, waiting, depot), head


def _write(part: DurableFile, pieces: list[bytes | memoryview], size: int, count: int, depot: Depot) -> int:
    """Write so many bytes behind `size` that are there, unless the depot has failed; return the size then."""
    if not count or depot.failure is not None:
        return size
    try:
        done = os.writev(part.fd, pieces)
        while done < count:  # a disk that is almost full takes what fits
            rest, skip = [], done
            for piece in pieces:
                rest.append(piece[min(skip, len(piece)) :])
                skip -= min(skip, len(piece))
            done += os.writev(part.fd, [piece for piece in rest if piece])
        part.wrote(size + count)
    except OSError as exc:
        depot.failure = partial.failure(depot.folder, exc)
    else:
        depot.wrote(count)
    return size + count


def response(request: CommandSet, status: int) -> bytes:
    """Return the command set of a C-STORE response (PS3.7 table 9.3-2)."""
    sop_class, uid = request.get(AFFECTED_CLASS, b""), request.get(AFFECTED_INSTANCE, b"")
    body = b"".join(
        (
            _HEAD.pack(0, AFFECTED_CLASS, len(sop_class)),
            sop_class,
            _NUMBER.pack(0, FIELD, 2, C_STORE_RSP),
            _NUMBER.pack(0, RESPONDED_TO, 2, request.number(MESSAGE_ID) or 0),
            _NUMBER.pack(0, DATASET_TYPE, 2, NO_DATASET),
            _NUMBER.pack(0, STATUS, 2, status),
            _HEAD.pack(0, AFFECTED_INSTANCE, len(uid)),
            uid,
        )
    )
    return _LENGTH.pack(0, 0, 4, len(body)) + body


class Responder:
    """Answers the C-STORE requests of one association; the common part of the answers is made once.

    Args:
        most: largest PDU that the peer takes, bytes; 0 for any.
    """

    def __init__(self, stream: Stream, most: int) -> None:
        self._stream, self._most = stream, most
        self._made: dict[tuple[int, int, bytes, int], tuple[bytes, bytes]] = {}

    def __call__(self, request: CommandSet, status: int) -> None:
        """Send the answer to a request."""
        uid, message_id = request.get(AFFECTED_INSTANCE, b""), request.get(MESSAGE_ID, b"")
        sop_class = request.get(AFFECTED_CLASS, b"")
        key = request.context, status, sop_class, len(uid)
        made = self._made.get(key)
        if made is not None and len(message_id) == 2:
            self._stream.send(made[0] + message_id + made[1] + uid)
            return
        command = response(request, status)
        whole = pdus(request.context, command, None, self._most)
        if len(whole) == HEADERS + len(command):
            at = HEADERS + 12 + 8 + len(sop_class) + 10 + 8
            self._made[key] = whole[:at], whole[at + 2 : len(whole) - len(uid)]
        self._stream.send(whole)


_ELEMENT = struct.Struct("<HH2sH")
_HEAD, _NUMBER, _LENGTH = struct.Struct("<HHI"), struct.Struct("<HHIH"), struct.Struct("<HHII")


def _uid_element(element: int, uid: str) -> bytes:
    raw = uid.encode("ascii")
    raw += b"\0" * (len(raw) % 2)
    return struct.pack("<HH2sH", 2, element, b"UI", len(raw)) + raw


_PREAMBLE = bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0, b"UL", 4)
_VERSION = struct.pack("<HH2sHI", 2, 1, b"OB", 0, 2) + b"\0\1"
_NAME = IMPLEMENTATION_VERSION.encode("ascii")
_NAME += b" " * (len(_NAME) % 2)
_OURS = _uid_element(0x12, IMPLEMENTATION_UID) + struct.pack("<HH2sH", 2, 0x13, b"SH", len(_NAME)) + _NAME
