"""A TCP relay on loopback that delays, cuts, stalls or limits what passes through it."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

PIECE = 65_536
HELD = 64 << 20  # of one direction, before it is read on
CONNECT_S = 10.0


class _Way:
    """One direction of a connection: bytes from one socket that wait until they are due at the other."""

    def __init__(self, source: socket.socket, sink: socket.socket, *, counted: bool) -> None:
        self.source, self.sink, self.counted = source, sink, counted
        self.waiting: deque[tuple[float, memoryview]] = deque()
        self.held = 0
        self.read = True  # as long as more is wanted from the source
        self.cuts = False  # everything, as soon as what waits has passed
        self.back: _Way = self

    def put(self, due: float, piece: bytes) -> None:
        """Add a piece; an empty one is the end."""
        self.waiting.append((due, memoryview(piece)))
        self.held += len(piece)

    def wants(self, now: float) -> bool:
        return bool(self.waiting) and self.waiting[0][0] <= now

    def write(self) -> None:
        due, piece = self.waiting.popleft()
        if not piece:
            with suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)
            return
        try:
            count = self.sink.send(piece)
        except BlockingIOError:
            count = 0
        except OSError:
            count = len(piece)  # nobody is there any more
        self.held -= count
        if count < len(piece):
            self.waiting.appendleft((due, piece[count:]))


@dataclass
class Relay:
    """A relay. Settings may be changed while it runs, and hold for what passes from then on.

    Attributes:
        port: where clients connect.
        upstream: where the server listens.
        cut_after: bytes from clients, over all connections, after which every connection is reset; None never.
        stays_cut: whether new connections are reset as well, once it has cut.
        stall_after: bytes from clients after which nothing is passed on, while connections stay open.
        delay_s: added in each direction.
        sent: bytes that came from clients so far.
        connections: how many connections were made so far.
        cuts: how many times it has cut.
    """

    port: int
    upstream: tuple[str, int]
    cut_after: int | None = None
    stays_cut: bool = False
    stall_after: int | None = None
    delay_s: float = 0.0
    sent: int = 0
    connections: int = 0
    cuts: int = 0
    _ways: dict[socket.socket, _Way] = field(default_factory=dict, repr=False)  # by the socket that it reads
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector, repr=False)

    def run(self, listener: socket.socket, bell: socket.socket, ended: threading.Event) -> None:
        """Serve until the event is set and the bell rung, in the thread that calls."""
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(bell, selectors.EVENT_READ)
        while not ended.is_set():
            for key, events in self._selector.select(self._watch()):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is listener:
                    self._accept(listener)
                elif sock is bell:
                    bell.recv(PIECE)
                else:
                    self._pass(sock, events)
        for sock in list(self._ways):
            sock.close()
        self._selector.close()

    def _watch(self) -> float | None:
        """Register with the selector what each socket can do now; return the seconds until the next piece is due."""
        now, next_due = time.monotonic(), None
        for sock, way in list(self._ways.items()):
            out = way.back
            events = selectors.EVENT_READ if way.read and way.held < HELD else 0
            if out.wants(now):
                events |= selectors.EVENT_WRITE
            elif out.waiting:
                next_due = min(next_due or out.waiting[0][0], out.waiting[0][0])
            if not (way.read or way.waiting or out.read or out.waiting):
                self._forget(sock)
                self._forget(way.sink)
                continue
            key = self._selector.get_map().get(sock)
            if key is None and events:
                self._selector.register(sock, events)
            elif key is not None and not events:
                self._selector.unregister(sock)
            elif key is not None and key.events != events:
                self._selector.modify(sock, events)
        return None if next_due is None else max(0.0, next_due - now)

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        self.connections += 1
        if self.cuts and self.stays_cut:
            self._reset(client)
            return
        try:
            server = socket.create_connection(self.upstream, CONNECT_S)
        except OSError:
            self._reset(client)
            return
        there, back = _Way(client, server, counted=True), _Way(server, client, counted=False)
        there.back, back.back = back, there
        for way in (there, back):
            way.source.setblocking(False)
            way.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ways[way.source] = way

    def _pass(self, sock: socket.socket, events: int) -> None:
        way = self._ways.get(sock)
        if way is None:  # cut in this same turn
            return
        if events & selectors.EVENT_WRITE:
            way.back.write()
            if way.back.cuts and not way.back.waiting:
                self._cut()
                return
        if events & selectors.EVENT_READ:
            self._read(way)

    def _read(self, way: _Way) -> None:
        try:
            piece = way.source.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        way.read = bool(piece)
        due = time.monotonic() + self.delay_s
        if way.counted and piece:
            if self.stall_after is not None and self.sent + len(piece) > self.stall_after:
                way.read = False
                return
            if self.cut_after is not None and self.sent + len(piece) > self.cut_after:
                piece = piece[: max(0, self.cut_after - self.sent)]
                way.read, way.cuts = False, True
            self.sent += len(piece)
        if piece or not way.cuts:
            way.put(due, piece)
        elif not way.waiting:
            self._cut()

    def _cut(self) -> None:
        self.cuts += 1
        self.cut_after = None
        for sock in list(self._ways):
            self._forget(sock, reset=True)

    def _forget(self, sock: socket.socket, *, reset: bool = False) -> None:
        if self._ways.pop(sock, None) is None:
            return
        if self._selector.get_map().get(sock):
            self._selector.unregister(sock)
        if reset:
            self._reset(sock)
        sock.close()

    @staticmethod
    def _reset(sock: socket.socket) -> None:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


@contextmanager
def relay(upstream_port: int, *, host: str = "127.0.0.1", **settings: float | int | None) -> Iterator[Relay]:
    """Run a relay in a thread of its own until the block ends."""
    ended = threading.Event()
    bell, rope = socket.socketpair()
    with bell, rope, socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        one = Relay(port, (host, upstream_port), **settings)  # type: ignore[arg-type]
        thread = threading.Thread(target=one.run, args=(listener, bell, ended), daemon=True)
        thread.start()
        try:
            yield one
        finally:
            ended.set()
            rope.send(b"!")
            thread.join(CONNECT_S)
