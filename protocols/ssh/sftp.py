"""SFTP, version 3, over the system's ssh: many requests at once on one connection.

Source: draft-ietf-secsh-filexfer-02 (what servers speak), and OpenSSH's PROTOCOL file for the extensions
`posix-rename@openssh.com`, `statvfs@openssh.com` and `limits@openssh.com`. Paths are bytes.

    OK            the call returns
    not OK        Status(code, the server's words)
    link lost     the DispatchError of `Started.failure`, from every call that waits, and from every later one
    silence       TimedOut, if something is awaited for longer than the login's idle timeout
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import itertools
import os
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from protocols.ssh import packets as wire
from protocols.ssh.client import SshClient, Started
from protocols.ssh.packets import Answered, Attributes, Code, FileWrites, SendWindow, Space, Status, string, take
from protocols.ssh.words import short
from transfer.content import data_parts, read_here
from transfer.errors import DispatchError, Misconfigured, Rejected, TimedOut

VERSION = 3
PIPE_BYTES = 1 << 20  # Linux lets any user make a pipe this large; fewer switches between us and ssh
WINDOW_BYTES = 4 << 20  # sent and not yet confirmed, per connection: fills 1 Gbit/s at 30 ms
SAFE_BYTES = 32_768  # data in one request that every server takes (draft section 3)
LARGEST_BYTES = 261_120  # OpenSSH's limit for a packet, without room for the header
LONGEST_ANSWER = 1 << 20  # bytes; longer means that what comes is no SFTP
READS = 16  # read requests at once
SSH_FAILED = 255  # exit code of ssh for failures of its own; others are the server's program's (ssh(1))
LOOK_S = 0.25  # between two looks at the clock


class Sftp:
    """One session. All calls from one event loop; `connect` makes it, `close` ends it."""

    def __init__(self, started: Started) -> None:
        process = started.process
        if process.stdin is None or process.stdout is None:
            raise TypeError("SFTP needs a process with pipes")
        self.started = started
        self._in, self._out = process.stdin.fileno(), process.stdout.fileno()
        for fd in (self._in, self._out):
            os.set_blocking(fd, False)
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._waiting: dict[int, Answered] = {}
        self._failed: DispatchError | None = None
        self._queue: deque[bytes | memoryview] = deque()
        self._writing = False
        self._came = bytearray()
        self._greeted: asyncio.Future[bytes] = self._loop.create_future()
        self._heard = self._loop.time()
        self._window = SendWindow(WINDOW_BYTES)
        self._watcher: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._loop.add_reader(self._out, self._readable)
        self.extensions: dict[bytes, bytes] = {}
        self.write_bytes = SAFE_BYTES
        self.read_bytes = SAFE_BYTES
        self.open_files = 0  # how many may be open at once, 0 if the server doesn't say

    @classmethod
    async def connect(cls, client: SshClient) -> Sftp:
        """Log in and begin a session.

        Raises:
            DispatchError: as `Started.failure` says; Misconfigured if the server has no SFTP.
        """
        return await cls.begin(client.start("sftp", subsystem=True))

    @classmethod
    async def begin(cls, started: Started) -> Sftp:
        """Begin a session with the subsystem `sftp` that was started; raises as `connect`."""
        self = cls(started)
        login = started.client.login
        try:
            self._send(struct.pack(">IBI", 5, wire.INIT, VERSION))
            try:
                # The handshake, the login, and the start of the server.
                async with asyncio.timeout(2 * login.connect_timeout_s + login.idle_timeout_s):
                    hello = await self._greeted
            except TimeoutError:
                raise TimedOut(f"{login.shown}: no answer to the login") from None
            self._hello(hello)
            self._watcher = self._loop.create_task(self._watch(login.idle_timeout_s))
            await self._limits()
        except BaseException:
            await self.close(by_force=True)
            raise
        return self

    async def close(self, *, by_force: bool = False) -> None:
        """End the session; by force, at once."""
        for task in (self._watcher, self._ending):
            if task is not None:
                task.cancel()
        self._loop.remove_reader(self._out)
        if self._writing:
            self._loop.remove_writer(self._in)
        await asyncio.shield(asyncio.to_thread(self.started.stop if by_force else self.started.close))

    # ---- files

    async def open(self, path: bytes, flags: int) -> bytes:
        """Open a file; return its handle."""
        return take(
            await self._ask(wire.OPEN, string(path), struct.pack(">II", flags, 0), path=path, wanted=wire.HANDLE)
        )

    async def close_file(self, handle: bytes) -> None:
        await self._ask(wire.CLOSE, string(handle))

    async def fstat(self, handle: bytes) -> Attributes:
        """Return the attributes of an open file."""
        return wire.attributes_of(await self._ask(wire.FSTAT, string(handle), wanted=wire.ATTRS))

    async def stat(self, path: bytes) -> Attributes:
        """Return the attributes of a path."""
        return wire.attributes_of(await self._ask(wire.STAT, string(path), path=path, wanted=wire.ATTRS))

    async def set_time(self, handle: bytes, seconds: int) -> None:
        """Set the times of an open file (draft section 5: 32 bits); others are not kept."""
        seconds = min(max(0, seconds), 0xFFFFFFFF)
        await self._ask(wire.FSETSTAT, string(handle), struct.pack(">III", wire.HAS_TIMES, seconds, seconds))

    async def set_size(self, handle: bytes, size: int) -> None:
        """Cut or extend an open file."""
        await self._ask(wire.FSETSTAT, string(handle), struct.pack(">IQ", wire.HAS_SIZE, size))

    @property
    def is_lost(self) -> bool:
        """Whether the connection is lost."""
        return self._failed is not None

    async def read(self, handle: bytes, offset: int, count: int) -> bytes:
        """Read up to `count` bytes; b"" at the end."""
        try:
            return take(await self._ask(wire.READ, string(handle), struct.pack(">QI", offset, count), wanted=wire.DATA))
        except Status as exc:
            if exc.code == Code.EOF:
                return b""
            raise

    async def upload(
        self,
        handle: bytes,
        fd: int,
        size: int,
        *,
        offset: int = 0,
        piece: int = LARGEST_BYTES,
        pace: Callable[[int], Awaitable[None]] | None = None,
        moved: Callable[[int], None] = lambda count: None,
        holes: bool = False,
    ) -> None:
        """Write an open local file, from `offset` to `size`, into an open remote one.

        Returns when the server has confirmed every byte. At most WINDOW_BYTES are on the way.

        Args:
            piece: the most bytes in one request.
            pace: awaited before each piece.
            moved: called with each count of bytes when it is confirmed.
            holes: whether to skip the local file's holes, so that the remote one has them too.

        Raises:
            Status: a write failed; the first failure.
            EOFError: the local file has become shorter. Rejected: it can't be read.
        """
        file = FileWrites(self._loop, self._window, moved)
        piece = min(piece, self.write_bytes)
        head, written = string(handle), offset
        for begin, end in data_parts(fd, offset, size) if holes else ((offset, size),):
            if begin > written:
                moved(begin - written)
            written = end
            while begin < end and not file.failed:
                count = min(piece, end - begin)
                if pace is not None:
                    await pace(count)
                await self._window.take(count)
                if self._failed:
                    raise self._failed
                try:
                    data = read_here(fd, count, begin)
                except Rejected:
                    self._window.give(count)
                    raise
                if len(data) < count:
                    self._window.give(count)
                    raise EOFError
                self._submit(wire.WRITE, file.sent(count), head, struct.pack(">QI", begin, count), data)
                begin += count
        try:
            await file.settled()
        except Status:
            if self._failed:
                raise self._failed from None
            raise
        if written < size:
            await self.set_size(handle, size)
            moved(size - written)

    async def sha256(self, path: bytes, size: int, check: Callable[[], None] = lambda: None) -> str:
        """Read a file back; return the hexadecimal SHA-256 of its first `size` bytes, "" if it is shorter."""
        handle = await self.open(path, wire.FLAG_READ)
        try:
            digest, at, asked = hashlib.sha256(), 0, 0
            reads: deque[tuple[int, asyncio.Task[bytes]]] = deque()
            try:
                while at < size:
                    check()
                    while asked < size and len(reads) < READS:
                        count = min(self.read_bytes, size - asked)
                        reads.append((count, self._loop.create_task(self.read(handle, asked, count))))
                        asked += count
                    count, task = reads.popleft()
                    data = await task
                    while len(data) < count:  # a server may give less than it was asked for
                        more = await self.read(handle, at + len(data), count - len(data))
                        if not more:
                            return ""
                        data += more
                    digest.update(data)
                    at += count
            finally:
                for _, task in reads:
                    task.cancel()
            return digest.hexdigest() if not await self.read(handle, size, 1) else ""
        finally:
            await self.close_file(handle)

    # ---- names

    async def listdir(self, path: bytes) -> list[bytes]:
        """Return the names in a folder."""
        handle = take(await self._ask(wire.OPENDIR, string(path), path=path, wanted=wire.HANDLE))
        names: list[bytes] = []
        try:
            # Some servers name nothing at the end, for ever, instead of saying that it is the end.
            while more := wire.names_of(await self._ask(wire.READDIR, string(handle), path=path, wanted=wire.NAME)):
                names += more
        except Status as exc:
            if exc.code != Code.EOF:
                raise
        finally:
            with suppress(Status, DispatchError):
                await self.close_file(handle)
        return names

    async def mkdir(self, path: bytes) -> None:
        await self._ask(wire.MKDIR, string(path), struct.pack(">I", 0), path=path)

    async def rmdir(self, path: bytes) -> None:
        await self._ask(wire.RMDIR, string(path), path=path)

    async def remove(self, path: bytes) -> None:
        await self._ask(wire.REMOVE, string(path), path=path)

    async def rename(self, old: bytes, new: bytes) -> None:
        """Rename a file; if `new` exists, most servers of version 3 fail."""
        await self._ask(wire.RENAME, string(old), string(new), path=new)

    async def posix_rename(self, old: bytes, new: bytes) -> None:
        """Rename a file in one step, replacing what is there, as rename(2)."""
        await self._ask(wire.EXTENDED, string(b"posix-rename@openssh.com"), string(old), string(new), path=new)

    async def space(self, path: bytes) -> Space | None:
        """Return the free space where a path lies; None if the server doesn't say."""
        if b"statvfs@openssh.com" not in self.extensions:
            return None
        try:
            body = await self._ask(
                wire.EXTENDED, string(b"statvfs@openssh.com"), string(path), wanted=wire.EXTENDED_REPLY
            )
        except Status:
            return None
        return wire.space_of(body)

    # ---- requests and answers

    async def _ask(self, kind: int, *parts: bytes, path: bytes = b"", wanted: int = wire.STATUS) -> bytes:
        """Send a request; return the content of its answer, if it is of the wanted type and not a failure."""
        future: asyncio.Future[tuple[int, bytes]] = self._loop.create_future()

        def answered(kind: int, body: bytes) -> None:
            if not future.done():
                future.set_result((kind, body))

        self._submit(kind, answered, *parts)
        kind, body = await future
        if kind == wire.LOST and self._failed:
            raise self._failed
        if kind == wire.STATUS:
            status = wire.status_of(body, path)
            if status.code != Code.OK or wanted != wire.STATUS:
                raise status
        elif kind != wanted:
            raise Misconfigured(f"{self.started.client.login.shown}: the server's SFTP answers with {kind} out of turn")
        return body

    def _submit(self, kind: int, answered: Answered, *parts: bytes) -> None:
        if self._failed:
            raise self._failed
        number = next(self._ids) & 0xFFFFFFFF
        if not self._waiting:
            self._heard = self._loop.time()
        self._waiting[number] = answered
        self._send(struct.pack(">IBI", 5 + sum(map(len, parts)), kind, number), *parts)

    def _send(self, head: bytes, *parts: bytes) -> None:
        large = parts and len(parts[-1]) > SAFE_BYTES
        self._queue.append(head + b"".join(parts[:-1] if large else parts))
        if large:
            self._queue.append(parts[-1])
        if not self._writing:
            self._writable()

    def _writable(self) -> None:
        """Write as much as the pipe takes now, and the rest when it takes more."""
        try:
            while self._queue:
                count = os.writev(self._in, list(itertools.islice(self._queue, 64)))
                self._heard = self._loop.time()
                while count:
                    first = self._queue.popleft()
                    if count < len(first):
                        self._queue.appendleft(memoryview(first)[count:])
                        break
                    count -= len(first)
        except BlockingIOError:
            pass
        except OSError:
            self._end()
            return
        if bool(self._queue) != self._writing:
            self._writing = bool(self._queue)
            if self._writing:
                self._loop.add_writer(self._in, self._writable)
            else:
                self._loop.remove_writer(self._in)

    def _readable(self) -> None:
        try:
            data = os.read(self._out, PIPE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        self._heard = self._loop.time()
        came = self._came
        came += data
        at = 0
        while len(came) - at >= wire.HEAD_BYTES:
            length, kind = struct.unpack_from(">IB", came, at)
            if length > LONGEST_ANSWER or length < 5:
                text = bytes(came[at : at + 80]).decode("utf-8", "replace")
                self._fail(Misconfigured(f"{self.started.client.login.shown}: what answers is not SFTP: {text!r}"))
                return
            if len(came) - at < 4 + length:
                break
            body = bytes(came[at + wire.HEAD_BYTES : at + 4 + length])
            number = int.from_bytes(came[at + 5 : at + wire.HEAD_BYTES], "big")
            at += 4 + length
            if kind == wire.VERSION_ANSWER:
                if not self._greeted.done():
                    self._greeted.set_result(number.to_bytes(4, "big") + body)
            elif (answered := self._waiting.pop(number, None)) is not None:
                answered(kind, body)
        del came[:at]

    def _end(self) -> None:
        """Find out why the process has closed its side, and end every wait with that error."""
        self._loop.remove_reader(self._out)
        if self._writing:
            self._loop.remove_writer(self._in)
            self._writing = False
        if self._ending is None:
            self._ending = self._loop.create_task(self._find_out_why())

    async def _find_out_why(self) -> None:
        error = await asyncio.to_thread(self.started.failure, begun=self._greeted.done())
        code = self.started.process.returncode
        if not self._greeted.done() and self.started.facts.method and code is not None and 0 <= code < SSH_FAILED:
            said = bytes(self._came[:80]).decode("utf-8", "replace") + self.started.errors
            error = Misconfigured(
                f"{self.started.client.login.shown}: logged in, but the server's SFTP ends at once, exit code {code}"
                + (f" ({short(said, self.started.client.hide)})" if said.strip() else "")
            )
        self._fail(error)

    def _fail(self, error: DispatchError) -> None:
        """End every wait with an error."""
        self._failed = self._failed or error
        if not self._greeted.done():
            self._greeted.set_exception(self._failed)
        waiting, self._waiting = self._waiting, {}
        for answered in waiting.values():
            answered(wire.LOST, b"")
        self._window.open()

    async def _watch(self, idle_s: float) -> None:
        while not self._failed:
            await asyncio.sleep(LOOK_S)
            if self._waiting and self._loop.time() - self._heard > idle_s:
                self._fail(TimedOut(f"{self.started.client.login.shown}: no answer for {idle_s:g} s"))

    def _hello(self, body: bytes) -> None:
        if int.from_bytes(body[:4], "big") < VERSION:
            raise Misconfigured(f"{self.started.client.login.shown}: the server's SFTP is older than version {VERSION}")
        at = 4
        while at < len(body):
            name = take(body, at)
            value = take(body, at + 4 + len(name))
            self.extensions[name] = value
            at += 8 + len(name) + len(value)

    async def _limits(self) -> None:
        """Ask how much one request may carry."""
        if b"limits@openssh.com" not in self.extensions:
            return
        body = await self._ask(wire.EXTENDED, string(b"limits@openssh.com"), wanted=wire.EXTENDED_REPLY)
        if len(body) >= 32:
            _, most_read, most_write, self.open_files = struct.unpack_from(">QQQQ", body)
            self.read_bytes = min(most_read or SAFE_BYTES, LARGEST_BYTES)
            self.write_bytes = min(most_write or SAFE_BYTES, LARGEST_BYTES)
