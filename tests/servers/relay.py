"""A TCP relay on loopback that delays, cuts, stalls or limits what passes through it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

PIECE = 65_536


@dataclass
class Relay:
    """Settings may be changed while it runs; they hold for what passes from then on.

    Attributes:
        port: where clients connect.
        upstream: where the server listens.
        cut_after: bytes from clients, over all connections, after which every connection is reset; None never.
        stall_after: bytes from clients after which nothing is passed on any more, connections stay open.
        delay_s: added in each direction.
        sent: bytes that came from clients so far.
        connections: how many connections were made so far.
        cuts: how many times it has cut.
    """

    port: int
    upstream: tuple[str, int]
    cut_after: int | None = None
    stall_after: int | None = None
    delay_s: float = 0.0
    sent: int = 0
    connections: int = 0
    cuts: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set, repr=False)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set, repr=False)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection in a task of our own: one that asyncio makes complains aloud when it is cancelled."""
        self.connections += 1
        self._writers.add(writer)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = {writer}
        try:
            try:
                up_reader, up_writer = await asyncio.open_connection(*self.upstream)
            except OSError:
                self._reset(writer)
                return
            pair.add(up_writer)
            self._writers.add(up_writer)
            with suppress(OSError):  # the relay has ended meanwhile
                for one in pair:
                    one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.gather(
                self._pump(reader, up_writer, counted=True), self._pump(up_reader, writer, counted=False)
            )
        finally:
            self._writers -= pair
            for one in pair:
                one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1024)
        loop = asyncio.get_running_loop()

        async def deliver() -> None:
            while True:
                due, piece = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not piece:
                    with suppress(OSError, RuntimeError):
                        writer.write_eof()
                    return
                with suppress(OSError):
                    writer.write(piece)
                    await writer.drain()

        task = asyncio.create_task(deliver())
        piece, broken = b"-", False
        while piece:
            try:
                piece = await reader.read(PIECE)
            except OSError:
                piece = b""
            if counted and piece:
                if self.stall_after is not None and self.sent + len(piece) > self.stall_after:
                    await asyncio.Event().wait()
                if self.cut_after is not None and self.sent + len(piece) > self.cut_after:
                    piece = piece[: max(0, self.cut_after - self.sent)]
                    with suppress(OSError):
                        writer.write(piece)
                        await writer.drain()
                    self.sent += len(piece)
                    self.cut()
                    broken = True
                    break
                self.sent += len(piece)
            await queue.put((loop.time() + self.delay_s, piece))
        if broken:
            task.cancel()
        else:
            await task  # what a later connection's server said last must still pass

    def cut(self) -> None:
        """Reset every connection now, and let later ones through again."""
        self.cuts += 1
        self.cut_after = None
        for writer in list(self._writers):
            self._reset(writer)

    def unserved(self) -> list[asyncio.StreamWriter]:
        """Connections whose task ended before it began."""
        return list(self._writers)

    @staticmethod
    def _reset(writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


@contextmanager
def relay(upstream_port: int, *, host: str = "127.0.0.1", **settings: float | int | None) -> Iterator[Relay]:
    """Run a relay in a thread of its own until the block ends."""
    made: list[Relay] = []
    ready, done = threading.Event(), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        one = Relay(0, (host, upstream_port), **settings)  # type: ignore[arg-type]
        listener = await asyncio.start_server(one.accept, "127.0.0.1", 0)
        one.port = listener.sockets[0].getsockname()[1]
        made.append(one)
        loops.append(asyncio.get_running_loop())
        stopped = asyncio.Event()
        stops.append(stopped)
        ready.set()
        await stopped.wait()
        listener.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in one.unserved():
            writer.close()
        await asyncio.sleep(0)  # what they have closed is closed in the loop's next turn

    def run() -> None:
        asyncio.run(main())
        done.set()

    stops: list[asyncio.Event] = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if not ready.wait(10):
        raise RuntimeError("the relay did not start")
    try:
        yield made[0]
    finally:
        loops[0].call_soon_threadsafe(stops[0].set)
        done.wait(10)
