"""C-STORE from files, as fast as the connection takes them.

What this replaces of pynetdicom: `Association.send_c_store` and, while instances go out, the loop of its upper
layer. There, every PDU passes through a queue to a thread that polls, is encoded by itself and written by itself,
from a data set that was read or copied before. Here a file's bytes are read by one `preadv` into a buffer that is
laid out as PDUs, headers in place, and leave by one system call for many PDUs. pynetdicom keeps the rest:
negotiation before, release or abort after. Figures: docs/performance.md, section DICOM.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from protocols import tls
from protocols.dimse import message
from protocols.dimse.association import Link, aborted
from protocols.dimse.message import Response, StoreCommand, fragment_header
from protocols.dimse.transport import SLICE_S
from transfer.errors import DispatchError, Interrupted, TimedOut
from transfer.throttle import Throttle

BUFFER = 1 << 20  # bytes that one system call sends: more doesn't go faster, less does go slower
PDU = 131_072  # bytes, for a peer that takes any
COMMAND_ROOM = 512  # bytes before the data in the buffer, for the command set: two UIDs of 64 characters and headers
IOV_MAX = 1024  # pieces that preadv(2) takes at once
MAX_RESPONSE = 1 << 20  # bytes; a longer PDU in answer to C-STORE is nonsense
RECEIVE = 65_536


@dataclass(eq=False)
class Instance:
    """A file on its way to the peer.

    Attributes:
        fd: open file. It is read by position, so that its offset doesn't matter.
        offset: where the data set begins, bytes.
        size: of the file, bytes.
        context: presentation context id.
        verify: called after the last byte was read and before the last fragment goes out; raises to keep the
            instance from the peer.
    """

    fd: int
    offset: int
    size: int
    context: int
    sop_class: str
    sop_instance: str
    verify: Callable[[], None] = lambda: None
    message_id: int = field(default=0, init=False)


class _Buffer:
    """A piece of memory laid out as P-DATA-TF PDUs, each of one fragment, with room for a command set before.

    The places of data never move: a shorter command set begins later, so that it ends where the data begins.
    """

    def __init__(self, fragment: int) -> None:
        self.fragment = fragment  # bytes of data in a PDU
        self.step = fragment + message.HEADERS
        self.count = max(1, min(IOV_MAX, BUFFER // self.step))
        self.memory = bytearray(COMMAND_ROOM + self.count * self.step)
        self.view = memoryview(self.memory)
        self.context = -1
        begin = COMMAND_ROOM + message.HEADERS
        self.places = [self.view[begin + n * self.step : begin + n * self.step + fragment] for n in range(self.count)]
        self.begin = self.end = COMMAND_ROOM  # of what is to be sent
        self.patched = -1

    @property
    def capacity(self) -> int:
        return self.count * self.fragment

    def address(self, context: int) -> None:
        """Write the headers of full fragments for a context, if they aren't there."""
        if self.context != context:
            self.context, self.patched = context, -1
            header = fragment_header(self.fragment, context, 0)
            for pos in range(COMMAND_ROOM, len(self.memory), self.step):
                self.memory[pos : pos + message.HEADERS] = header

    def command(self, command_set: bytes, max_fragment: int) -> None:
        """Put the command set before the data."""
        pdus = b"".join(
            fragment_header(len(piece), self.context, message.COMMAND | (message.LAST if last else 0)) + piece
            for piece, last in _pieces(command_set, max_fragment)
        )
        self.begin = COMMAND_ROOM - len(pdus)
        self.memory[self.begin : COMMAND_ROOM] = pdus

    def fill(self, fd: int, offset: int, left: int) -> int:
        """Read the next bytes of a file that has `left` more; mark the last fragment. Return how many came."""
        if self.patched >= 0:
            header = fragment_header(self.fragment, self.context, 0)
            self.memory[self.patched : self.patched + message.HEADERS] = header
            self.patched = -1
        want = min(left, self.capacity)
        full, rest = divmod(want, self.fragment)
        places = self.places[:full]
        if rest:
            places.append(self.places[full][:rest])
        got = os.preadv(fd, places, offset)
        while got < want:  # a short read: go on byte for byte where it stopped
            which, done = divmod(got, self.fragment)
            more = os.preadv(fd, [self.places[which][done : min(self.fragment, done + want - got)]], offset + got)
            if not more:
                break
            got += more
        if got < want:
            return got
        if want == left:
            at = full if rest else full - 1
            self.patched = COMMAND_ROOM + at * self.step
            header = fragment_header(rest or self.fragment, self.context, message.LAST)
            self.memory[self.patched : self.patched + message.HEADERS] = header
        self.end = COMMAND_ROOM + full * self.step + (message.HEADERS + rest if rest else 0)
        return got


def _pieces(data: bytes, length: int) -> list[tuple[bytes, bool]]:
    return [(data[pos : pos + length], pos + length >= len(data)) for pos in range(0, len(data), length)]


class Changed(Exception):
    """The instance must not be sent after all, and half of it has been: the association can't go on."""


class Sender:
    """Sends instances over a borrowed connection. Use it as a context manager: the connection goes back after it.

    Args:
        throttle: shared by all senders of a dispatch.
        moved: told the bytes that went out.
        check: called between pieces and several times a second while waiting; may raise to stop.
    """

    def __init__(
        self,
        link: Link,
        throttle: Throttle,
        moved: Callable[[int], None] = lambda count: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.link = link
        self.peer = link.peer
        self.window = link.window
        self._throttle, self._moved, self._check = throttle, moved, check
        limits = [limit for limit in (link.max_send, link.peer.max_pdu) if limit]
        self._fragment = max(message.MIN_FRAGMENT, min([PDU, *limits]) - 6)
        self._buffer = _Buffer(self._fragment)
        self._commands: dict[str, StoreCommand] = {}
        self._message_id = 0
        self._received = bytearray()
        self._command_set = bytearray()
        self._sock: socket.socket
        self._plain = False
        self._scratch = bytearray(RECEIVE)

    def __enter__(self) -> Self:
        self._sock = self.link.transport.lend()
        self._plain = not isinstance(self._sock, ssl.SSLSocket)
        self._sock.settimeout(SLICE_S)
        self._received += self.link.transport.ahead
        self.link.transport.ahead.clear()
        if not self.link.assoc.is_established:
            self.link.transport.take_back()
            raise Interrupted(f"{self.peer.where}: the peer ended the association")
        return self

    def __exit__(self, *exc: object) -> None:
        self.link.transport.take_back()

    def send(self, instance: Instance) -> int:
        """Send an instance; return the id of the message that its response will name.

        Raises:
            TimedOut: the peer takes no more bytes. Interrupted: the connection ended.
            Changed: `verify` raised, after part of the instance had gone out; its error is the cause.
            Other errors: what `verify` raised, before anything had gone out; the association goes on.
        """
        self._message_id = self._message_id % 0xFFFF + 1
        instance.message_id = self._message_id
        command = self._commands.get(instance.sop_class)
        if command is None:
            command = self._commands[instance.sop_class] = StoreCommand(instance.sop_class)
        buffer = self._buffer
        buffer.address(instance.context)
        buffer.command(command.build(self._message_id, instance.sop_instance), self._fragment)
        offset, started = instance.offset, False
        while offset < instance.size:
            left = instance.size - offset
            got = buffer.fill(instance.fd, offset, left)
            offset += got
            try:
                if got < min(left, buffer.capacity):
                    instance.verify()
                    raise Changed("the file ends earlier than it did")  # noqa: TRY301
                if offset >= instance.size:
                    instance.verify()
            except Changed:
                raise
            except Exception as exc:
                if not started:
                    raise
                raise Changed(str(exc)) from exc
            self._transmit(buffer.view[buffer.begin : buffer.end], got)
            buffer.begin, started = COMMAND_ROOM, True
        return instance.message_id

    def _transmit(self, data: memoryview, payload: int) -> None:
        """Write bytes, in pieces as the throttle has them."""
        piece = self._throttle.piece
        while data:
            part = data[:piece]
            self._pay(len(part))
            self._write(part)
            data = data[len(part) :]
            self._check()
        self._moved(payload)

    def _pay(self, count: int) -> None:
        wait = self._throttle.delay(count)
        while wait > 0:
            time.sleep(min(wait, SLICE_S))
            wait -= SLICE_S
            self._check()

    def _write(self, data: memoryview) -> None:
        end = time.monotonic() + self.peer.idle_timeout_s
        while data:
            try:
                sent = self._sock.send(data)
            except TimeoutError as exc:
                self._check()
                if time.monotonic() >= end:
                    raise TimedOut(
                        f"{self.peer.where}: the peer took no bytes for {self.peer.idle_timeout_s:g} s"
                    ) from exc
                continue
            except OSError as exc:
                raise self._broken(exc) from exc
            data = data[sent:]
            end = time.monotonic() + self.peer.idle_timeout_s

    def receive(self) -> Response:
        """Wait for the next response.

        Raises:
            TimedOut: none comes. Interrupted: the peer aborts, releases, or says what makes no sense here.
        """
        while True:
            pdu = self._pdu()
            if pdu is not None:
                response = self._take(*pdu)
                if response is not None:
                    return response
                continue
            self._read()

    def _pdu(self) -> tuple[int, bytes] | None:
        """Cut the next PDU off what was received."""
        data = self._received
        if len(data) < 6:
            return None
        length = int.from_bytes(data[2:6], "big")
        if length > MAX_RESPONSE or data[0] not in (4, 5, 6, 7):
            raise Interrupted(f"{self.peer.where}: the peer sent what is no answer to C-STORE (PDU type {data[0]:02X})")
        if len(data) < 6 + length:
            return None
        pdu = data[0], bytes(data[6 : 6 + length])
        del data[: 6 + length]
        return pdu

    def _take(self, kind: int, body: bytes) -> Response | None:
        if kind == message.ABORT:
            raise Interrupted(f"{self.peer.where}: {aborted(*(body + bytes(4))[2:4])}")
        if kind == message.RELEASE_RQ:
            with suppress(OSError):
                self._sock.send(message.RELEASE_RP_PDU)
            raise Interrupted(f"{self.peer.where}: the peer released the association")
        if kind != message.P_DATA_TF:
            raise Interrupted(f"{self.peer.where}: the peer sent PDU type {kind:02X} in answer to C-STORE")
        response = None
        while len(body) >= 6:
            length = int.from_bytes(body[:4], "big")
            control, piece = body[5], body[6 : 4 + length]
            body = body[4 + max(length, 2) :]
            if control & message.COMMAND:
                self._command_set += piece
                if control & message.LAST:
                    response = message.parse_response(bytes(self._command_set))
                    self._command_set.clear()
        if response is not None and response.command != message.C_STORE_RSP:
            raise Interrupted(f"{self.peer.where}: the peer sent an unexpected message in answer to C-STORE")
        return response

    def _read(self) -> None:
        end = time.monotonic() + self.peer.idle_timeout_s
        while True:
            if self._plain:
                # A peer with Nagle's algorithm on writes a response in two pieces and waits for our ACK of the
                # first, which we'd delay by 40 ms; the kernel forgets this setting, so that it is made each time.
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            try:
                count = self._sock.recv_into(self._scratch)
            except TimeoutError as exc:
                self._check()
                if time.monotonic() >= end:
                    raise TimedOut(f"{self.peer.where}: no answer for {self.peer.idle_timeout_s:g} s") from exc
                continue
            except OSError as exc:
                raise self._broken(exc) from exc
            if count == 0:
                raise Interrupted(f"{self.peer.where}: the peer closed the connection")
            self._received += memoryview(self._scratch)[:count]
            return

    def _broken(self, exc: OSError) -> DispatchError:
        """Name why the connection ended: an abort that the peer sent before it tells more than a reset."""
        if isinstance(exc, ssl.SSLError) and "ALERT" in (exc.reason or "") and self.peer.tls:
            return tls.classify(exc, self.peer.where, has_cert=bool(self.peer.tls.cert))
        with suppress(OSError):
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            if poll.poll(0):
                count = self._sock.recv_into(self._scratch)
                self._received += memoryview(self._scratch)[:count]
                while (pdu := self._pdu()) is not None:
                    if pdu[0] == message.ABORT:
                        self._take(*pdu)
        return Interrupted(f"{self.peer.where}: the connection broke: {exc.strerror or exc}")
