"""C-STORE from files, as fast as the connection takes them.

What this replaces of pynetdicom: `Association.send_c_store` and, while instances go out, the loop of its upper
layer. There, every PDU passes through a queue to a thread that polls, is encoded by itself and written by itself,
from a data set that was read or copied before. Here a file's bytes are read by one `preadv` into a buffer that is
laid out as PDUs, headers in place, and leave by one system call for many PDUs. 500 CT images of 0.5 MB to a sink that
discards them cost 3.3 s of CPU there and 0.15 s here; more in docs/performance.md. pynetdicom keeps the rest:
negotiation and state machine before, abort after, every other service.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from protocols.dimse import message
from protocols.dimse.association import RELEASE_S, Association
from protocols.dimse.message import Response, StoreCommand, aborted
from protocols.net import tls
from protocols.net.connection import SLICE_S
from transfer.errors import DispatchError, Interrupted, TimedOut
from transfer.throttle import Throttle

BUFFER = 1 << 20  # bytes that one system call sends: more doesn't go faster, less does go slower
PDU = 131_072  # bytes, for a peer that takes any
COMMAND_ROOM = 2048  # bytes before the data in the buffer: a command set of two long UIDs, cut into smallest PDUs
MIN_FRAGMENT = 2  # bytes; PS3.8 sets no least PDU, and a peer that grants almost nothing gets its way
IOV_MAX = 1024  # pieces that preadv(2) takes at once
MAX_RESPONSE = 1 << 20  # bytes; a longer PDU in answer to C-STORE is nonsense
RECEIVE = 65_536  # bytes
RELEASE_RP = bytes((message.RELEASE_RP,))
_SLICE = struct.pack("ll", int(SLICE_S), int(SLICE_S % 1 * 1e6))  # struct timeval


class ReleasedByPeer(Interrupted):
    """The peer has ended the association in order; no instance is the reason."""


class Changed(Exception):
    """The instance must not be sent, but part of it has been: the association must end."""


@dataclass(eq=False)
class OutgoingInstance:
    """A data set on its way to the peer.

    Attributes:
        fd: open file. It is read by position, so that its offset doesn't matter.
        offset: where the data set begins, bytes; advances while it is read.
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
        count = max(1, min(IOV_MAX, BUFFER // self.step))
        self.capacity = count * fragment
        self.memory = bytearray(COMMAND_ROOM + count * self.step)
        self.view = memoryview(self.memory)
        begin = COMMAND_ROOM + message.HEADERS
        self.places = [self.view[begin + n * self.step : begin + n * self.step + fragment] for n in range(count)]
        self.begin = self.end = COMMAND_ROOM  # of what is to be sent
        self.payload = 0  # bytes of data in it
        self._context = -1
        self._patched = -1  # where the header of a last fragment is

    def load(self, commands: StoreCommand, instance: OutgoingInstance) -> None:
        """Put the command set of an instance before the data, and its context id into all headers."""
        if self._context != instance.context:
            self._context, self._patched = instance.context, -1
            header = message.header(self.fragment, self._context, 0)
            for pos in range(COMMAND_ROOM, len(self.memory), self.step):
                self.memory[pos : pos + message.HEADERS] = header
        pdus = commands.pdus(instance.context, instance.message_id, instance.sop_instance, self.fragment)
        self.begin = COMMAND_ROOM - len(pdus)
        self.memory[self.begin : COMMAND_ROOM] = pdus

    def fill(self, instance: OutgoingInstance) -> bool:
        """Read the next bytes of an instance; mark the last fragment. Return False if the file ends early."""
        if self._patched >= 0:
            message.put_header(self.memory, self._patched, self.fragment, self._context, 0)
            self._patched = -1
        left = instance.size - instance.offset
        want = min(left, self.capacity)
        full, rest = divmod(want, self.fragment)
        places = self.places[:full]
        if rest:
            places.append(self.places[full][:rest])
        self.payload = os.preadv(instance.fd, places, instance.offset) if want else 0
        if self.payload < want and not self._complete(instance, want):
            return False
        instance.offset += want
        self.end = COMMAND_ROOM + full * self.step + (message.HEADERS + rest if rest else 0)
        if want == left:
            at = full if rest else full - 1
            self._patched = COMMAND_ROOM + at * self.step
            message.put_header(self.memory, self._patched, rest or self.fragment, self._context, message.LAST)
        return True

    def _complete(self, instance: OutgoingInstance, want: int) -> bool:
        """Continue after a short read, place by place."""
        while self.payload < want:
            which, done = divmod(self.payload, self.fragment)
            place = self.places[which][done : min(self.fragment, done + want - self.payload)]
            count = os.preadv(instance.fd, [place], instance.offset + self.payload)
            if not count:
                return False
            self.payload += count
        return True


class Sender:
    """Sends instances over a borrowed connection. A context manager, which gives the connection back at the end.

    Args:
        throttle: shared by all senders of a dispatch.
        moved: called with the number of bytes that were sent.
        check: called between pieces and several times a second while waiting; may raise to stop.

    Attributes:
        window: how many instances may be without a response at once.
        patience: seconds of silence after which the peer counts as hung.
        torn: whether the connection is in the middle of a PDU, so that an abort can't be sent.
    """

    def __init__(
        self,
        association: Association,
        throttle: Throttle,
        moved: Callable[[int], None] = lambda count: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.association = association
        self.peer = association.peer
        self.window = association.window
        self.patience = self.peer.idle_timeout_s
        self.torn = False
        self._throttle, self._moved, self._check = throttle, moved, check
        limits = [limit for limit in (association.max_send, association.peer.max_pdu) if limit]
        # Fragments are of even length (PS3.8 Annex E.2), and no longer than what a throttle lets go at once.
        fragment = min(PDU, *limits, throttle.piece) - message.PDV_HEADER if limits else min(PDU, throttle.piece)
        self._buffer = _Buffer(max(MIN_FRAGMENT, fragment & ~1))
        self._commands: dict[str, StoreCommand] = {}
        self._message_id = 0
        self._received = bytearray()
        self._command_set = bytearray()
        self._scratch = bytearray(RECEIVE)
        self._sock: socket.socket

    def __enter__(self) -> Self:
        # Until it is ours the peer may be in the middle of a PDU, which an abort would have to wait for.
        self.torn = True
        try:
            sock = self._sock = self.association.transport.lend(self._check)
        except TimeoutError as exc:
            raise TimedOut(f"{self.peer.where}: the peer fell silent for {self.peer.idle_timeout_s:g} s") from exc
        except ConnectionError as exc:
            raise Interrupted(f"{self.peer.where}: the peer ended the association") from exc
        self.torn = False
        self._received += self.association.transport.ahead
        self.association.transport.ahead.clear()
        if not isinstance(sock, ssl.SSLSocket):
            # Time limits of the kernel's: those of Python's sockets cost a poll(2) before every call.
            sock.settimeout(None)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SLICE)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SLICE)
        else:
            sock.settimeout(SLICE_S)
        return self

    def __exit__(self, *exc: object) -> None:
        self.association.transport.take_back()

    def prepare(self, instance: OutgoingInstance) -> None:
        """Read the beginning of an instance, or all of a small one, perhaps while the peer is busy.

        Raises:
            Changed: the file ends early, or can't be read. Other errors: what `verify` raised. Nothing has been sent.
        """
        self._message_id = self._message_id % 0xFFFF + 1
        instance.message_id = self._message_id
        commands = self._commands.get(instance.sop_class)
        if commands is None:
            commands = self._commands[instance.sop_class] = StoreCommand(instance.sop_class)
        self._buffer.load(commands, instance)
        self._fill(instance)

    def _fill(self, instance: OutgoingInstance) -> None:
        try:
            whole = self._buffer.fill(instance)
        except OSError as exc:  # a broken disk, a share that is gone
            raise Changed(f"can't be read: {exc.strerror}") from exc
        if not whole:
            instance.verify()  # knows better why
            raise Changed("the file ends early")
        if instance.offset >= instance.size:
            instance.verify()

    def transmit(self, instance: OutgoingInstance) -> None:
        """Send the instance that was prepared last; its response will name its message id.

        Raises:
            TimedOut: the peer accepts no more bytes. Interrupted: the connection ended.
            Changed: the file has changed or can't be read, and part of it has been sent: end the association.
        """
        buffer = self._buffer
        self._send(buffer)
        while instance.offset < instance.size:
            buffer.begin = COMMAND_ROOM
            try:
                self._fill(instance)
            except DispatchError as exc:
                raise Changed(exc.message) from exc
            self._send(buffer)

    def _send(self, buffer: _Buffer) -> None:
        """Write the buffer, in pieces of whole PDUs if there is a throttle."""
        if self._throttle.limit is None:
            self._write(buffer.view[buffer.begin : buffer.end])
            self._moved(buffer.payload)
            self._check()
            return
        stride = max(1, self._throttle.piece // buffer.step) * buffer.step
        pos, left = buffer.begin, buffer.payload
        while pos < buffer.end:
            stop = min(buffer.end, max(pos, COMMAND_ROOM) + stride)
            self._pay(stop - pos)
            self._write(buffer.view[pos:stop])
            data = min(left, stride // buffer.step * buffer.fragment)
            self._moved(data)
            left -= data
            pos = stop
            self._check()

    def _pay(self, count: int) -> None:
        wait = self._throttle.delay(count)
        while wait > 0:
            time.sleep(min(wait, SLICE_S))
            wait -= SLICE_S
            self._check()

    def _write(self, data: memoryview) -> None:
        end = 0.0
        self.torn = True
        while data:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, TimeoutError) as exc:
                self._check()
                self._look_for_an_end()
                now = time.monotonic()
                end = end or now - SLICE_S + self.patience
                if now >= end:
                    raise TimedOut(f"{self.peer.where}: the peer took no bytes for {self.patience:g} s") from exc
                continue
            except OSError as exc:
                raise self._broken(exc) from exc
            data = data[sent:]
            end = 0.0
        self.torn = False

    def receive(self) -> Response:
        """Wait for the next response to C-STORE.

        Raises:
            TimedOut: none comes. Interrupted: the peer aborts, releases, or sends something unexpected.
        """
        return self._response(message.C_STORE_RSP)

    def echo(self, context: int) -> None:
        """Send C-ECHO and wait for the response, to show the peer that we are alive; nothing may be outstanding."""
        self._message_id = self._message_id % 0xFFFF + 1
        self._write(memoryview(message.echo_pdu(context, self._message_id)))
        self._response(message.C_ECHO_RSP)

    def release(self) -> None:
        """End the association in order (A-RELEASE), when nothing is outstanding; everything was confirmed before.

        Not by pynetdicom, which waits for seconds for an answer if the peer asks for a release at the same time.
        """
        self.patience = min(RELEASE_S, self.patience)
        with suppress(Interrupted, TimedOut):
            self._write(memoryview(message.RELEASE_RQ_PDU))
            while self._received[:1] != RELEASE_RP:
                pdu = self._pdu()
                if pdu is None:
                    self._read()
                else:
                    self._take(*pdu)

    def _response(self, command: int) -> Response:
        while True:
            pdu = self._pdu()
            if pdu is None:
                self._read()
                continue
            response = self._take(*pdu)
            if response is not None:
                if response.command != command:
                    raise Interrupted(f"{self.peer.where}: the peer sent an unexpected message in answer to C-STORE")
                return response

    def _pdu(self) -> tuple[int, bytes] | None:
        """Return the next PDU of what was received."""
        data = self._received
        if len(data) < 6:
            return None
        length = int.from_bytes(data[2:6], "big")
        if length > MAX_RESPONSE or data[0] not in message.EXPECTED:
            raise Interrupted(
                f"{self.peer.where}: the peer sent something other than a response (PDU type {data[0]:02X})"
            )
        if len(data) < 6 + length:
            return None
        pdu = data[0], bytes(data[6 : 6 + length])
        del data[: 6 + length]
        return pdu

    def _take(self, kind: int, body: bytes) -> Response | None:
        if kind == message.ABORT:
            raise Interrupted(f"{self.peer.where}: {aborted(*(body + bytes(4))[2:4])}")
        if kind == message.RELEASE_RQ:
            if not self.torn:
                with suppress(OSError):
                    self._sock.send(message.RELEASE_RP_PDU)
            raise ReleasedByPeer(f"{self.peer.where}: the peer released the association")
        response = None
        for control, piece in message.fragments(body):
            if control & message.COMMAND:
                self._command_set += piece
                if control & message.LAST:
                    response = message.parse_response(bytes(self._command_set))
                    self._command_set.clear()
        return response

    def _read(self) -> None:
        end = time.monotonic() + self.patience
        while True:
            # A peer with Nagle's algorithm on writes a response in two pieces and waits for our ACK of the
            # first, which we'd delay by 40 ms; the kernel forgets this setting, so that it is made each time.
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            try:
                count = self._sock.recv_into(self._scratch)
            except (BlockingIOError, TimeoutError) as exc:
                self._check()
                if time.monotonic() >= end:
                    raise TimedOut(f"{self.peer.where}: no answer to C-STORE within {self.patience:g} s") from exc
                continue
            except OSError as exc:
                raise self._broken(exc) from exc
            if count == 0:
                raise Interrupted(f"{self.peer.where}: the peer closed the connection")
            self._received += memoryview(self._scratch)[:count]
            return

    def _broken(self, exc: OSError) -> DispatchError:
        """Return why the connection ended: an abort that the peer sent before says more than a reset."""
        self.torn = True
        if isinstance(exc, ssl.SSLError) and "ALERT" in (exc.reason or "") and self.peer.tls:
            return tls.classify(exc, self.peer.where, has_cert=bool(self.peer.tls.cert))
        try:
            self._look_for_an_end()
        except Interrupted as end:
            return end
        if exc.errno in (errno.EPIPE, errno.ECONNRESET) or isinstance(exc, ssl.SSLError):
            return Interrupted(f"{self.peer.where}: the peer broke the connection")
        return Interrupted(f"{self.peer.where}: the connection broke: {exc.strerror or exc}")

    def _look_for_an_end(self) -> None:
        """Check whether unexpected bytes end the association: a peer that has ended it may accept no more bytes.

        Raises:
            Interrupted: they do. What came before them stays for `drain`.
        """
        self._read_rest()
        pos = 0
        while pos + 10 <= len(self._received):
            if self._received[pos] in (message.ABORT, message.RELEASE_RQ):
                self._take(self._received[pos], bytes(self._received[pos + 6 : pos + 10]))
            pos += 6 + int.from_bytes(self._received[pos + 2 : pos + 6], "big")

    def _read_rest(self) -> None:
        """Read the bytes that have arrived, which are readable even after the connection broke."""
        with suppress(OSError):
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            while (
                len(self._received) <= MAX_RESPONSE and poll.poll(0) and (count := self._sock.recv_into(self._scratch))
            ):
                self._received += memoryview(self._scratch)[:count]

    def drain(self) -> list[Response]:
        """Return the responses that arrived before the connection broke and have not been returned yet."""
        found: list[Response] = []
        self._read_rest()
        with suppress(Interrupted):
            while (pdu := self._pdu()) is not None and pdu[0] == message.P_DATA_TF:
                response = self._take(*pdu)
                if response is not None and response.command == message.C_STORE_RSP:
                    found.append(response)
        return found
