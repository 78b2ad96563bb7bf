"""How a dispatch's files get to an SFTP server: folders, temporary names, resuming, renaming, what failures mean."""

from __future__ import annotations

import asyncio
import hashlib
import os
import posixpath
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from blocks.sftp import Rename, SftpTarget
from imaging.header import BEGINNING_BYTES, other_instance
from protocols.ssh.client import Client
from protocols.ssh.packets import FLAG_CREATE, FLAG_READ, FLAG_TRUNCATE, FLAG_WRITE, Code, Space, Status, Window
from protocols.ssh.sftp import WINDOW_BYTES, Sftp
from tasks import ssh
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotFound, Rejected
from transfer.layout import OTHER_INSTANCE
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

FILES_AT_ONCE = 64  # per connection: hides 20 ms of round trip at 3,000 files a second
CLAIM_BYTES = 4 * WINDOW_BYTES  # of the files that one connection works on, so that another one finds large ones left
CONNECTION_BYTES = 32 << 20  # worth the handshake of one more connection
SAMPLE_BYTES = 32_768  # compared before an interrupted file is continued
LEAST_FREE_BYTES = 1 << 20  # a file system with less is full

# Status codes of the draft, section 7. FAILURE says nothing by itself: see `Sending.why`.
ERRORS: dict[int, type[DispatchError]] = {
    Code.NO_SUCH_FILE: NotFound,
    Code.PERMISSION_DENIED: Denied,
    Code.FAILURE: Rejected,
    Code.BAD_MESSAGE: Rejected,  # OpenSSH: a name that the file system doesn't take
    Code.NO_CONNECTION: Interrupted,
    Code.CONNECTION_LOST: Interrupted,
    Code.OP_UNSUPPORTED: Misconfigured,
}

T = TypeVar("T")


@dataclass
class Folder:
    """One folder that the layout makes."""

    path: str
    items: list[Item] = field(default_factory=list)

    def final(self, item: Item) -> bytes:
        return encoded(f"{self.path}/{item.path}")


class _NoRename(Exception):
    """The server has turned out not to rename."""


class Sending:
    """One push to an SFTP server: its files, and what is known of the server."""

    def __init__(self, target: SftpTarget, plan: Plan, report: PushReport, client: Client) -> None:
        self.target, self.plan, self.report, self.client, self.hide = target, plan, report, client, client.hide
        self.folders = [
            Folder(ssh.under(target.folder, name), items) for name, items in ssh.by_folder(target, plan).items()
        ]
        self.folder_of = {item.path: folder for folder in self.folders for item in folder.items}
        self.queue = deque(plan.pending)
        self.throttle = Throttle(target.bandwidth_limit)
        self.barred: dict[bytes, str] = {}  # folders that could not be made, and why
        self.renames = target.rename is Rename.AUTO
        self.posix = True
        self.sized = True  # whether the server tells lengths
        self.notes: list[str] = []
        self.found: set[str] = set()  # folders that were there before: an earlier attempt may have left something

    async def files(self, sessions: list[Sftp]) -> None:
        """Deliver what is pending; further connections are added to `sessions`."""
        if not self.queue:
            return
        await self.prepare(sessions[0])
        async with asyncio.TaskGroup() as group:
            more = group.create_task(self.connect_more(sessions, group))
            await self.work(sessions[0])
            more.cancel()
        await self.clear(sessions[0])
        if not self.renames:
            self.notes.append("the server can't rename: files were visible while they were being written")
        if not self.sized:
            self.notes.append("the server does not tell the length of what it has got")

    # ---- before

    async def prepare(self, session: Sftp) -> None:
        """Make the folders; take away the marker of an earlier dispatch; find out how to rename."""
        self.posix = b"posix-rename@openssh.com" in session.extensions
        pending = {id(self.folder_of[item.path]): self.folder_of[item.path] for item in self.queue}
        for folder in pending.values():
            await self.make_folder(session, folder.path)
            with suppress(Status):
                await session.remove(encoded(f"{folder.path}/{ssh.MARKER}"))
        below = {
            posixpath.dirname(f"{self.folder_of[item.path].path}/{item.path}")
            for item in self.queue
            if "/" in item.path
        }
        for path in list(below):  # and what lies between
            while (path := posixpath.dirname(path)) not in below and path not in {f.path for f in pending.values()}:
                below.add(path)
        depths: dict[int, list[bytes]] = {}
        for path in below:
            depths.setdefault(path.count("/"), []).append(encoded(path))
        for depth in sorted(depths):
            await each(depths[depth], FILES_AT_ONCE, lambda path: self.make_subfolder(session, path))
        if self.renames and not self.posix:
            await self.probe_rename(session, next(iter(pending.values())))

    async def make_folder(self, session: Sftp, path: str) -> None:
        """Make a dispatch's folder and what is missing above it."""
        try:
            if (await session.stat(encoded(path))).is_folder:
                self.found.add(path)
                return
        except Status:
            pass
        missing = [path]
        while above := posixpath.dirname(missing[-1].rstrip("/")).rstrip("/"):
            if above in (".", "") or await is_there(session, above):
                break
            missing.append(above)
        for one in reversed(missing):
            try:
                await self.mkdir(session, encoded(one))
            except Status as exc:
                raise await self.why(session, exc, encoded(one)) from exc

    async def make_subfolder(self, session: Sftp, path: bytes) -> None:
        """Make a folder in a dispatch's folder; if that can't be, its files are rejected and the others go on."""
        try:
            await self.mkdir(session, path)
        except Status as exc:
            error = await self.why(session, exc, path)
            folder = next(f for f in self.folders if path.startswith(encoded(f.path) + b"/"))
            if not isinstance(error, (Denied, NotFound)) or not await self.may_write(session, folder):
                raise error from exc
            self.barred[path] = error.message

    async def mkdir(self, session: Sftp, path: bytes) -> None:
        """Make a folder; one that is there is as good. Version 3 has no status of its own for that."""
        try:
            await session.mkdir(path)
        except Status as exc:
            try:
                there = await session.stat(path)
            except Status:
                if exc.code == Code.FAILURE and posixpath.dirname(path) not in self.barred:
                    space = await self.space(session, path)
                    if space is None or not space.read_only:
                        return  # a server that hides what it has: opening the file will tell
                raise exc from None
            if there.mode is not None and not there.is_folder:
                raise Status(Code.FAILURE, "a file is in the way of the folder", path) from exc

    async def probe_rename(self, session: Sftp, folder: Folder) -> None:
        """Find out, before a large file was written twice, whether the server renames at all."""
        name = encoded(f"{folder.path}/.incoming-{self.plan.dispatch_id}-probe")
        with suppress(Status):
            await session.close_file(await session.open(name, FLAG_WRITE | FLAG_CREATE | FLAG_TRUNCATE))
            try:
                await session.rename(name, name + b"-")
                name += b"-"
            except Status as exc:
                self.renames = exc.code != Code.OP_UNSUPPORTED
            await session.remove(name)

    # ---- the files

    async def connect_more(self, sessions: list[Sftp], group: asyncio.TaskGroup) -> None:
        """Add connections where they pay; what can't be had is no failure: the first one does it alone."""
        size = sum(item.size for item in self.queue)
        wanted = min(self.target.concurrency, len(self.queue), 1 + size // CONNECTION_BYTES)
        for _ in range(wanted - 1):
            try:
                session = await Sftp.connect(self.client)
            except DispatchError:
                return
            sessions.append(session)
            group.create_task(self.work(session))

    async def work(self, session: Sftp) -> None:
        """Deliver what is left over one connection, many files at once."""
        claims = Window(CLAIM_BYTES)
        slots = Window(min(FILES_AT_ONCE, session.open_files // 2 or FILES_AT_ONCE))

        async def one(item: Item, claimed: int) -> None:
            try:
                await self.deliver(session, item)
            finally:
                claims.give(claimed)
                slots.give(1)

        async with asyncio.TaskGroup() as group:
            while self.queue:
                claimed = min(self.queue[0].size, CLAIM_BYTES)
                await slots.take(1)
                await claims.take(claimed)
                if self.queue:
                    group.create_task(one(self.queue.popleft(), claimed))

    async def deliver(self, session: Sftp, item: Item) -> None:
        """Bring one file to its final name, and tell its outcome."""
        outcome = DELIVERED
        try:
            final = self.folder_of[item.path].final(item)
            self.check_way(item, final)
            with self.plan.open(item) as fd:
                if await self.replaces(session, item, fd, final):
                    outcome = ssh.REPLACED
                try:
                    await self.bring(session, item, fd, final)
                except _NoRename:
                    await self.bring(session, item, fd, final)
        except Rejected as exc:
            outcome = Outcome(Kind.REJECTED, self.hide(exc.message))
        self.report(item, outcome)

    def check_way(self, item: Item, final: bytes) -> None:
        """Raise Rejected if a folder on the way to an item could not be made."""
        for barred, reason in self.barred.items():
            if final.startswith(barred + b"/"):
                raise Rejected(reason, item=item.shown)

    async def replaces(self, session: Sftp, item: Item, fd: int, final: bytes) -> bool:
        """Tell whether another file has an item's final name, in a folder that was there before.

        A server that can't rename has there what an earlier attempt left: that is not asked for.

        Raises:
            Rejected: it is another instance, which would be lost.
        """
        if self.folder_of[item.path].path not in self.found or not self.renames or not item.size:
            return False
        differs = False
        try:
            there = await session.stat(final)
            if there.is_folder:
                return False
            differs = there.size not in (None, item.size)
            handle = await session.open(final, FLAG_READ)
        except Status:
            return differs
        try:
            if not differs and await self.same(session, handle, fd, item.size):
                return False
            with suppress(Status):
                theirs = await session.read(handle, 0, BEGINNING_BYTES)
                if other_instance(os.pread(fd, BEGINNING_BYTES, 0), theirs):
                    raise Rejected(OTHER_INSTANCE, item=item.shown)
            return True
        finally:
            with suppress(Status, DispatchError):
                await session.close_file(handle)

    async def bring(self, session: Sftp, item: Item, fd: int, final: bytes) -> None:
        renames = self.renames
        path = self.temporary(item, final) if renames else final
        try:
            await self.write(session, item, fd, path, resume=renames)
            if renames:
                await self.rename(session, path, final)
        except (Rejected, _NoRename):
            with suppress(Status):
                await session.remove(path)
            raise
        except Status as exc:
            error = await self.why(session, exc, path, item)
            if isinstance(error, Rejected):
                with suppress(Status):
                    await session.remove(path)
            raise error from exc

    def temporary(self, item: Item, final: bytes) -> bytes:
        """A name beside the final one that every attempt at this dispatch gives to this file, as it is now.

        What came of a file that has changed since would be gone on with, and a sample may not show the change.
        """
        what = f"{item.path}\0{item.size}\0{item.mtime_ns}"
        mark = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return posixpath.dirname(final) + b"/" + self.hidden + mark.encode()

    @property
    def hidden(self) -> bytes:
        """What the names of this dispatch's temporary files begin with; another target may lead to the same place."""
        owner = hashlib.sha256(self.target.name.encode()).hexdigest()[:8]
        return f".incoming-{self.plan.dispatch_id}-{owner}-".encode()

    async def write(self, session: Sftp, item: Item, fd: int, path: bytes, *, resume: bool) -> None:
        """Write a file whole; what the server keeps has been compared with the plan when this returns."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        handle, offset = await self.open(session, item, fd, path, resume=resume)
        try:
            await session.upload(
                handle,
                fd,
                item.size,
                offset=offset,
                piece=self.throttle.piece,
                pace=self.pace if self.throttle.limit else None,
                moved=self.report.moved,
            )
            self.plan.check(item, fd)
            held = await self.length(session, handle, path)
        except EOFError as exc:
            raise Rejected("changed since the dispatch was planned", item=item.shown) from exc
        finally:
            with suppress(Status, DispatchError):
                await session.close_file(handle)
        if held is None:
            self.sized = False
        elif held != item.size:
            raise Rejected(f"the server holds {held} of {item.size} bytes", item=item.shown)

    async def open(self, session: Sftp, item: Item, fd: int, path: bytes, *, resume: bool) -> tuple[bytes, int]:
        """Open the remote file; return its handle, and from where on to write.

        A server may have confirmed later writes than it has kept, if it works on many at once: what was on the way
        when the link broke is sent again.
        """
        if resume and item.size > 2 * WINDOW_BYTES:
            try:
                handle = await session.open(path, FLAG_READ | FLAG_WRITE | FLAG_CREATE)
            except Status:
                pass  # some servers let nobody read
            else:
                held = await self.length(session, handle, path) or 0
                offset = held - WINDOW_BYTES
                if held <= item.size and offset > 0 and await self.same(session, handle, fd, offset):
                    return handle, offset
                if not held:
                    return handle, 0
                await session.close_file(handle)
        return await session.open(path, FLAG_WRITE | FLAG_CREATE | FLAG_TRUNCATE), 0

    async def same(self, session: Sftp, handle: bytes, fd: int, size: int) -> bool:
        """Tell whether both files begin alike, as far as their first and last bytes before `size` say."""
        for at in (0, max(0, size - SAMPLE_BYTES)):
            try:
                if await session.read(handle, at, SAMPLE_BYTES) != os.pread(fd, SAMPLE_BYTES, at):
                    return False
            except Status:
                return False
        return True

    async def length(self, session: Sftp, handle: bytes, path: bytes) -> int | None:
        """Return the length of an open file, None if the server doesn't tell."""
        with suppress(Status):
            return (await session.fstat(handle)).size
        with suppress(Status):
            return (await session.stat(path)).size
        return None

    async def rename(self, session: Sftp, old: bytes, new: bytes) -> None:
        if self.posix:
            try:
                await session.posix_rename(old, new)
            except Status as exc:
                if exc.code != Code.OP_UNSUPPORTED:
                    raise
                self.posix = False
            else:
                return
        try:
            await session.rename(old, new)
        except Status as exc:
            if exc.code == Code.OP_UNSUPPORTED:
                self.renames = False
                raise _NoRename from exc
            # Servers of version 3 don't rename over a file that is there.
            try:
                await session.remove(new)
            except Status:
                raise exc from None
            await session.rename(old, new)

    async def clear(self, session: Sftp) -> None:
        """Remove what earlier attempts have left of files that have changed, or are not to be sent any more."""
        below = {
            posixpath.dirname(folder.final(item))
            for folder in self.folders
            if folder.path in self.found
            for item in folder.items
        }

        async def one(path: bytes) -> None:
            with suppress(Status):
                for name in await session.listdir(path):
                    if name.startswith(self.hidden):
                        await session.remove(path + b"/" + name)

        await each(below, FILES_AT_ONCE, one)

    async def pace(self, count: int) -> None:
        if delay := self.throttle.delay(count):
            await asyncio.sleep(delay)

    # ---- after

    def has_arrived(self, item: Item) -> bool:
        return self.report.arrived(self.plan, item)

    async def mark(self, session: Sftp) -> None:
        """Put the marker into every folder that has all its files.

        Which folder lacks what can't be sent is not known: then none is marked.
        """
        if self.plan.lacks:
            return
        for folder in self.folders:
            if not all(map(self.has_arrived, folder.items)):
                continue
            path = encoded(f"{folder.path}/{ssh.MARKER}")
            try:
                await session.close_file(await session.open(path, FLAG_WRITE | FLAG_CREATE))
            except Status as exc:
                if exc.code != Code.NO_SUCH_FILE or self.plan.pending:
                    raise await self.why(session, exc, path) from exc
                self.notes.append(f"{folder.path} has been taken away since it was delivered")

    # ---- errors

    async def why(self, session: Sftp, status: Status, path: bytes, item: Item | None = None) -> DispatchError:
        """Return the error that a status means; FAILURE gets its meaning from the state of the file system."""
        shown = path.decode("utf-8", "backslashreplace") if item is None else item.shown
        kind = ERRORS.get(status.code, Rejected)
        if status.code in (Code.FAILURE, Code.PERMISSION_DENIED, Code.NO_SUCH_FILE):
            space = await self.space(session, path)
            if space and space.read_only:
                return Denied(f"{self.target.folder}: the file system is read-only")
            if space and status.code == Code.FAILURE:
                needed = max(LEAST_FREE_BYTES, item.size if item else 0)
                if space.free_bytes < needed or space.free_files == 0:
                    return Busy(f"{self.target.folder}: no room, {space.free_bytes} bytes are free")
            if any(word in status.words.lower() for word in ("no space", "quota", "disk full")):
                return Busy(f"{self.target.folder}: {status.words}")
        if item is None:
            return Denied(f"{shown}: {status}") if kind is Rejected else kind(f"{shown}: {status}")
        if kind is Denied and not await self.may_write(session, self.folder_of[item.path]):
            return Denied(f"{self.folder_of[item.path].path}: {status}")
        if kind in (Denied, NotFound, Rejected):
            with suppress(Status):
                if (await session.stat(self.folder_of[item.path].final(item))).is_folder:
                    return Rejected("a folder of this name is in the way", item=item.shown)
            return Rejected(str(status), item=item.shown)
        return kind(f"{shown}: {status}")

    async def space(self, session: Sftp, path: bytes) -> Space | None:
        """Return what room there is where a path is, or would be; None if the server doesn't tell."""
        while True:
            space = await session.space(path or b".")
            if space is not None or path in (b"", b"/") or not session.extensions:
                return space
            path = posixpath.dirname(path.rstrip(b"/"))

    async def may_write(self, session: Sftp, folder: Folder) -> bool:
        """Tell whether anything at all may be written into a dispatch's folder."""
        name = encoded(f"{folder.path}/{ssh.probe_name()}")
        try:
            await session.close_file(await session.open(name, FLAG_WRITE | FLAG_CREATE | FLAG_TRUNCATE))
        except Status:
            return False
        with suppress(Status):
            await session.remove(name)
        return True


def encoded(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


async def is_there(session: Sftp, path: str) -> bool:
    """Tell whether there is a folder of this name, as far as the server says.

    Raises:
        Misconfigured: something else is in its place.
    """
    try:
        there = await session.stat(encoded(path))
    except Status:
        return False
    if there.mode is not None and not there.is_folder:
        raise Misconfigured(f"{path}: a file is in the place of a folder")
    return True


def plain(status: Status, path: str) -> DispatchError:
    """Return the error that a status means where nothing more is known."""
    kind = ERRORS.get(status.code, Denied)
    return (Denied if kind is Rejected else kind)(f"{path}: {status}")


async def each(values: Iterable[T], at_once: int, job: Callable[[T], Awaitable[None]]) -> None:
    """Do a job for each value, so many at once."""
    iterator = iter(values)

    async def worker() -> None:
        for value in iterator:
            await job(value)

    await together(worker() for _ in range(at_once))


async def together(jobs: Iterable[Awaitable[None]]) -> None:
    """Wait for all jobs; raise the first failure when all have ended."""
    results = await asyncio.gather(*jobs, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def first(error: BaseException) -> BaseException:
    """Return the error that a group of them began with."""
    while isinstance(error, BaseExceptionGroup):
        error = next(
            (one for one in error.exceptions if not isinstance(one, asyncio.CancelledError)), error.exceptions[0]
        )
    return error
