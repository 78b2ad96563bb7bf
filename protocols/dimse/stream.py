"""Messages on a connection: PDUs are parsed in the receive buffer, so that no byte of a data set is copied.

Used by both sides: by the requester of an association, on a connection lent by pynetdicom, and by the Storage SCP on
its own. Every wait calls `check` several times a second; a peer that is silent for too long counts as hung.

Source: PS3.8 section 9.3 (PDUs) and Annex E.2 (fragments).
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

from protocols.dimse.command import Commands, CommandSet, decoded
from protocols.dimse.message import ABORT, COMMAND, HEADERS, LAST, P_DATA_TF, RELEASE_RQ, aborted, header
from protocols.net.connection import SLICE_S
from transfer.errors import Interrupted, TimedOut
from transfer.throttle import Throttle

UNLIMITED = 1 << 18  # bytes of a PDU, to a peer that takes any
LARGE_BYTES = 1 << 23  # of an instance
# Bytes that are read at once: a CT of 512 x 512 pixels in one piece; of a large instance, whose reading then
# takes a twelfth less CPU.
BUFFERS = 544 << 10, 1 << 20
MAX_COMMAND = 1 << 16  # bytes; command sets have some hundred
MAX_IDENTIFIER = 1 << 20  # bytes; answers to C-FIND have some thousand
MAX_LIST = 1 << 24  # bytes; UIDs of the instances that failed, 64 bytes each
SOON_S = 0.02  # half of the time for which Linux puts off an acknowledgement
MOST_LATE = 2  # in a row; one may be the machine's fault
SHORT_PDU = 10  # bytes of the PDUs that end an association

_SLICE = struct.pack("ll", int(SLICE_S), int(SLICE_S % 1 * 1e6))  # struct timeval
_PDU, _PDV, _MESSAGE = struct.Struct(">BxI"), struct.Struct(">IBB"), struct.Struct(">BxIIBB")
_NOT_NOW = (BlockingIOError, TimeoutError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Released(Exception):
    """The peer asked to release the association."""


def pdus(context: int, command: bytes, dataset: bytes | None, most: int) -> bytes:
    """Return a message as P-DATA-TF PDUs of at most `most` bytes each (0 for any)."""
    step = max(2, (most or UNLIMITED) - 6 & ~1)
    made = []
    for data, flag in ((command, COMMAND), (dataset, 0)):
        if data is None:
            continue
        for pos in range(0, len(data) or 1, step):
            piece = data[pos : pos + step]
            made += [header(len(piece), context, flag | (LAST if pos + step >= len(data) else 0)), piece]
    return b"".join(made)


@dataclass
class Stream:
    """A connection as fragments of messages.

    Attributes:
        where: the peer, for messages.
        heard: when something last came from the peer; `time.monotonic`.
        quiet: called when nothing came for a while; returns when something was heard elsewhere (`time.monotonic`).
        context, is_command, last: of the piece that `piece` returned; `last` with the end of its message part.
        buffers: bytes that are read at once at most; the same, once `widen` was called.
        torn: whether the connection is in the middle of a PDU that we send, so that an abort can't be sent.
    """

    sock: socket.socket
    where: str
    idle_timeout_s: float
    check: Callable[[], None] = lambda: None
    throttle: Throttle = field(default_factory=lambda: Throttle(None))
    quiet: Callable[[], float] = lambda: 0.0
    moved: Callable[[int], None] = lambda count: None
    what: str = "message"
    buffers: tuple[int, int] = BUFFERS

    def __post_init__(self) -> None:
        self._buffer = self.buffers[0]
        # What nothing was read into takes no memory.
        self._memory = mmap(-1, max(self.buffers), MAP_PRIVATE | MAP_ANONYMOUS)
        self._view = memoryview(self._memory)
        self._commands = Commands()
        self._begin = self._end = 0
        self._pdu_left = self._pdv_left = 0
        self._control = 0
        self.context = 0
        self.is_command = self.last = False
        self._expected = self._low_water = 1
        self._late = 0  # waits in a row for what didn't come at once
        self.heard = self._looked = time.monotonic()
        self.torn = False
        self._answered = False  # whether we have sent something since something came
        self._plain = not isinstance(self.sock, ssl.SSLSocket)
        if self._plain:
            # Time limits of the kernel's: those of Python's sockets cost a poll(2) before every call.
            self.sock.settimeout(None)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SLICE)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SLICE)
        else:
            self.sock.settimeout(SLICE_S)

    def close(self) -> None:
        """Give the buffer's memory back now, not when somebody looks for garbage; the connection stays as it is."""
        with suppress(BufferError):  # a part of it is still held by a traceback
            self._view.release()
            self._memory.close()

    def widen(self) -> None:
        """Read more at once from now on, as a large instance is coming."""
        self._buffer = self.buffers[1]

    @property
    def ahead(self) -> bytes:
        """Return bytes that were read and not used."""
        return bytes(self._view[self._begin : self._end])

    def peek(self, count: int) -> None:
        """Wait until so many bytes, at most the buffer's, are `ahead`."""
        while self._end - self._begin < count:
            self.fill()

    def take(self, count: int) -> bytes:
        """Wait for so many bytes, at most the buffer's, and return them, whatever they are."""
        self.peek(count)
        taken = bytes(self._view[self._begin : self._begin + count])
        self._begin += count
        return taken

    # ---- reading

    def piece(self) -> memoryview | None:
        """Return the next part of a fragment in the buffer; None if more must be read (`fill`).

        A part is valid until the next `fill`.

        Raises:
            Released: the peer asks for a release. Interrupted: it aborts, or its bytes are not valid.
        """
        while True:
            there = self._end - self._begin
            if self._pdv_left:
                count = min(self._pdv_left, there)
                if not count:
                    return None
                self._pdv_left -= count
                return self._part(count)
            if self._pdu_left:
                if there < 6:
                    return None
                length, self.context, control = _PDV.unpack_from(self._memory, self._begin)
                if length < 2 or length + 4 > self._pdu_left:
                    raise Interrupted(f"{self.where}: the peer sent a fragment of impossible length")
                self._begin += 6
                self._pdu_left -= length + 4
                self._pdv_left = length - 2
                self._control = control
                self.is_command = bool(control & COMMAND)
                if length == 2:
                    return self._part(0)
            elif not self._next_pdu(there):
                return None

    def _part(self, count: int) -> memoryview:
        view = self._view[self._begin : self._begin + count]
        self._begin += count
        self.last = not self._pdv_left and bool(self._control & LAST)
        return view

    def _next_pdu(self, there: int) -> bool:
        if there < 6:
            return False
        kind, length = _PDU.unpack_from(self._memory, self._begin)
        if kind == P_DATA_TF:
            self._begin += 6
            self._pdu_left = length
            return True
        if kind not in (RELEASE_RQ, ABORT):
            raise Interrupted(f"{self.where}: the peer sent what is no {self.what} (PDU type {kind:02X})")
        if there < SHORT_PDU:
            return False
        body = self._view[self._begin + 6 : self._begin + SHORT_PDU]
        self._begin += SHORT_PDU
        if kind == RELEASE_RQ:
            raise Released
        raise Interrupted(f"{self.where}: {aborted(body[2], body[3])}")

    def expect(self, count: int) -> None:
        """Let `command` wait until so many bytes are there, as messages that come one behind the other would wake us
        two or three times; 1 for any.

        Not from a peer that lets us wait: it may be waiting for our acknowledgement (Nagle's algorithm).
        """
        self._expected = count if self._late < MOST_LATE else 1

    def _await_command(self) -> None:
        before = self.heard
        self.fill(self._expected)
        if self._expected > 1:
            self._late = self._late + 1 if self.heard - before > SOON_S else 0

    def fill(self, least: int = 1) -> None:
        """Wait for bytes and read them; what `piece` returned before is no longer valid.

        Args:
            least: how many bytes to wait for, at most SLICE_S.

        Raises:
            TimedOut: the peer is silent. Interrupted: the connection ended.
        """
        begin, end = self._begin, self._end
        if begin:
            self._begin = 0
            if begin < end:
                self._view[: end - begin] = self._view[begin:end]  # which may overlap
            end -= begin
        limited = self.throttle.limit
        room = self._view[end : min(end + self.throttle.piece, self._buffer) if limited else self._buffer]
        if not (self._answered and self._plain):
            # A peer with Nagle's algorithm waits for our ACK of a small piece, which we'd delay by 40 ms; the
            # kernel forgets this setting, so that it is made each time. What we have sent since was an ACK too, but
            # not of the first piece of a TLS record, with which OpenSSL waits for the rest.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._answered = False
        self._end = end
        if least != self._low_water and self._plain:
            self._low_water = least
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
        try:
            count = self.sock.recv_into(room)
        except OSError as exc:
            count = self._receive(room, exc)
        if not count:
            raise Interrupted(f"{self.where}: the peer closed the connection")
        self._end += count
        self.heard = now = time.monotonic()
        if now - self._looked > SLICE_S:  # a peer that goes on sending is to be stopped, too
            self._looked = now
            self.check()
        self.moved(count)
        if limited:
            self._slow_down(count)

    def _slow_down(self, count: int) -> None:
        wait = self.throttle.delay(count)
        while wait > 0:
            self.check()
            time.sleep(min(wait, SLICE_S))
            self.heard = time.monotonic()  # it is we who are silent
            self.moved(0)
            wait -= SLICE_S

    def _receive(self, room: memoryview, exc: OSError) -> int:
        """Wait for bytes that didn't come at once, as `exc` says."""
        begun = time.monotonic() - SLICE_S
        while True:
            if not isinstance(exc, _NOT_NOW):
                raise Interrupted(f"{self.where}: the connection broke: {exc.strerror or exc}") from exc
            self.check()
            if time.monotonic() - max(begun, self.heard, self.quiet()) >= self.idle_timeout_s:
                raise TimedOut(f"{self.where}: the peer was silent for {self.idle_timeout_s:g} s") from exc
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            try:
                return self.sock.recv_into(room)
            except OSError as again:
                exc = again

    def command(self) -> CommandSet:
        """Wait for the next command set.

        Raises:
            As `piece` and `fill`; Interrupted for a data set without a command.
        """
        begin, end = self._begin, self._end
        if begin == end:
            self._await_command()
            begin, end = self._begin, self._end
        if end - begin > HEADERS and not (self._pdu_left or self._pdv_left):
            # Most are alone in their PDU, which has come whole.
            kind, length, fragment, context, control = _MESSAGE.unpack_from(self._memory, begin)
            after = begin + 6 + length
            if kind == P_DATA_TF and control == COMMAND | LAST and 6 < length == fragment + 4 and after <= end:
                self._begin, self.context, self.is_command, self.last = after, context, True, True
                return self._commands.read(bytes(self._view[begin + HEADERS : after]), context)
        collected = bytearray()
        while True:
            view = self.piece()
            if view is None:
                self.fill()
                continue
            if not self.is_command:
                raise Interrupted(f"{self.where}: the peer sent a data set without a command")
            if self.last and not collected:
                return self._commands.read(bytes(view), self.context)
            collected += view
            if len(collected) > MAX_COMMAND:
                raise Interrupted(f"{self.where}: the peer sent a command set without end")
            if self.last:
                return decoded(collected, self.context)

    def dataset(self, most: int = MAX_IDENTIFIER) -> bytes:
        """Wait for the data set that belongs to the command before it."""
        first: bytes | bytearray = b""
        while True:
            view = self.piece()
            if view is None:
                self.fill()
                continue
            if self.is_command:
                raise Interrupted(f"{self.where}: the peer sent a command where a data set belongs")
            if self.last and not first:
                return bytes(view)
            if not first:
                first = bytearray()
            first += view
            if len(first) > most:
                raise Interrupted(f"{self.where}: the peer sent a data set of more than {most} bytes")
            if self.last:
                return bytes(first)

    def whole(self) -> memoryview | None:
        """Return the data set that belongs to the command before it, if it is one fragment that has come; else None.

        It is valid until the next `fill`. Whatever it is not, `piece` returns.
        """
        begin = self._begin
        if self._end - begin <= HEADERS or self._pdu_left or self._pdv_left:
            return None
        kind, length, fragment, context, control = _MESSAGE.unpack_from(self._memory, begin)
        after = begin + 6 + length
        if kind != P_DATA_TF or control != LAST or not 6 < length == fragment + 4 or after > self._end:
            return None
        self._begin, self.context, self.is_command, self.last = after, context, False, True
        return self._view[begin + HEADERS : after]

    def skip(self) -> None:
        """Read the data set that belongs to the command before it, and drop it."""
        while True:
            view = self.piece()
            if view is None:
                self.fill()
            elif self.last:
                return

    def drain(self, most: int) -> None:
        """Drop what comes until the peer closes the connection (Interrupted), is silent (TimedOut), or sent so much."""
        while most > 0:
            self._begin = self._end = 0
            self.fill()
            most -= self._end

    # ---- writing

    def send(self, data: bytes) -> None:
        """Write all bytes.

        Raises:
            TimedOut: the peer accepts none. Interrupted: the connection ended.
        """
        left: bytes | memoryview = data
        last = 0.0
        self.torn = True
        while left:
            try:
                count = self.sock.send(left)
            except _NOT_NOW as exc:
                self.check()
                last = last or time.monotonic() - SLICE_S
                if time.monotonic() - last >= self.idle_timeout_s:
                    raise TimedOut(f"{self.where}: the peer took no bytes for {self.idle_timeout_s:g} s") from exc
                continue
            except OSError as exc:
                raise self._broken(exc) from exc
            if count == len(left):
                break
            left = memoryview(left)[count:]
            last = time.monotonic()
        self.torn = False
        self._answered = True

    def _broken(self, exc: OSError) -> Interrupted:
        """Return why the connection ended: an abort that the peer sent before says more than a reset."""
        ready = select.poll()
        ready.register(self.sock, select.POLLIN)
        try:
            while ready.poll(0):
                self.fill()
                while self.piece() is not None:
                    pass
        except (Interrupted, TimedOut) as said:
            return said if isinstance(said, Interrupted) else Interrupted(said.message)
        except (OSError, Released):
            pass
        return Interrupted(f"{self.where}: the peer broke the connection: {exc.strerror or exc}")
