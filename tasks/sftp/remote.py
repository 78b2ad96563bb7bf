"""What is known about an SFTP server during a push: its folders, how it renames, what its failures mean."""

from __future__ import annotations

import asyncio
import hashlib
import posixpath
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from blocks.sftp import Rename, SftpTarget
from protocols.ssh.client import SshClient
from protocols.ssh.packets import FLAG_CREATE, FLAG_TRUNCATE, FLAG_WRITE, Code, Space, Status
from protocols.ssh.sftp import Sftp
from tasks import ssh
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotFound, Rejected
from transfer.plan import Item, Plan
from transfer.receipt import PushReport

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


class Unexplained(Rejected):
    """The server refused one item without a reason. If it was sent alone, or no disk was full, that is a rejection."""


class NoRename(Exception):
    """The server turned out to be unable to rename."""


class Remote:
    """The folders of a dispatch on an SFTP server, and what the server can do."""

    def __init__(self, target: SftpTarget, plan: Plan, report: PushReport, client: SshClient) -> None:
        self.target, self.plan, self.report, self.client, self.hide = target, plan, report, client, client.hide
        self.folders = [
            Folder(ssh.under(target.folder, name), items) for name, items in ssh.by_folder(target, plan).items()
        ]
        self.folder_of = {item.path: folder for folder in self.folders for item in folder.items}
        self.barred: dict[bytes, str] = {}  # folders that could not be made, and why
        self.renames = target.rename is Rename.AUTO
        self.posix = True
        self.sized = True  # whether the server shows lengths
        self.notes: list[str] = []
        self.found: set[str] = set()  # folders that were there before: an earlier attempt may have left something

    # ---- folders

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
        """Make a folder in a dispatch's folder; if that fails, its files are rejected and the others go on."""
        try:
            await self.mkdir(session, path)
        except Status as exc:
            error = await self.why(session, exc, path)
            folder = next(f for f in self.folders if path.startswith(encoded(f.path) + b"/"))
            if not isinstance(error, (Denied, NotFound)) or not await self.may_write(session, folder):
                raise error from exc
            self.barred[path] = error.message

    async def mkdir(self, session: Sftp, path: bytes) -> None:
        """Make a folder if it isn't there. Version 3 has no status of its own for one that exists."""
        try:
            await session.mkdir(path)
        except Status as exc:
            try:
                there = await session.stat(path)
            except Status:
                if exc.code == Code.FAILURE and posixpath.dirname(path) not in self.barred:
                    space = await self.space(session, path)
                    if space is None or not (space.read_only or is_full(space)):
                        return  # a server that hides what it has: opening the file will show it
                raise exc from None
            if there.mode is not None and not there.is_folder:
                raise Status(Code.FAILURE, "a file is in the way of the folder", path) from exc

    # ---- names

    @property
    def hidden(self) -> bytes:
        """The beginning of this dispatch's temporary names, unlike that of other targets in the same folder."""
        owner = hashlib.sha256(self.target.name.encode()).hexdigest()[:8]
        return f".incoming-{self.plan.dispatch_id}-{owner}-".encode()

    async def probe_rename(self, session: Sftp, folder: Folder) -> None:
        """Find out whether the server renames at all, before a large file has been written for nothing."""
        name = encoded(f"{folder.path}/.incoming-{self.plan.dispatch_id}-probe")
        with suppress(Status):
            await session.close_file(await session.open(name, FLAG_WRITE | FLAG_CREATE | FLAG_TRUNCATE))
            try:
                await session.rename(name, name + b"-")
                name += b"-"
            except Status as exc:
                self.renames = exc.code != Code.OP_UNSUPPORTED
            await session.remove(name)

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
                raise NoRename from exc
            # Servers of version 3 don't rename over a file that is there.
            try:
                await session.remove(new)
            except Status:
                raise exc from None
            await session.rename(old, new)

    # ---- errors

    async def why(self, session: Sftp, status: Status, path: bytes, item: Item | None = None) -> DispatchError:
        """Return the error that a status means; the state of the file system explains a plain FAILURE."""
        shown = path.decode("utf-8", "backslashreplace") if item is None else item.shown
        kind = ERRORS.get(status.code, Rejected)
        if status.code in (Code.FAILURE, Code.PERMISSION_DENIED, Code.NO_SUCH_FILE):
            space = await self.space(session, path)
            if space and space.read_only:
                return Denied(f"{self.target.folder}: the file system is read-only")
            if space and status.code == Code.FAILURE and is_full(space, item.size if item else 0):
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
            refused = Unexplained if status.code == Code.FAILURE else Rejected
            return refused(str(status), item=item.shown)
        return kind(f"{shown}: {status}")

    async def space(self, session: Sftp, path: bytes) -> Space | None:
        """Return the free space where a path is or would be; None if the server doesn't say."""
        while True:
            space = await session.space(path or b".")
            if space is not None or path in (b"", b"/") or not session.extensions:
                return space
            path = posixpath.dirname(path.rstrip(b"/"))

    async def may_write(self, session: Sftp, folder: Folder) -> bool:
        """Return True if a file can be written into a dispatch's folder at all."""
        name = encoded(f"{folder.path}/{ssh.probe_name()}")
        try:
            await session.close_file(await session.open(name, FLAG_WRITE | FLAG_CREATE | FLAG_TRUNCATE))
        except Status:
            return False
        with suppress(Status):
            await session.remove(name)
        return True


def is_full(space: Space, size: int = 0) -> bool:
    """Return True if a file of this size has no room."""
    return space.free_bytes < max(LEAST_FREE_BYTES, size) or space.free_files == 0


def encoded(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


async def is_there(session: Sftp, path: str) -> bool:
    """Return True if there is a folder with this name, as far as the server shows.

    Raises:
        Misconfigured: something else has this name.
    """
    try:
        there = await session.stat(encoded(path))
    except Status:
        return False
    if there.mode is not None and not there.is_folder:
        raise Misconfigured(f"{path}: there is a file where a folder is expected")
    return True


def plain(status: Status, path: str) -> DispatchError:
    """Return the error that a status means by itself."""
    kind = ERRORS.get(status.code, Denied)
    return (Denied if kind is Rejected else kind)(f"{path}: {status}")


async def each(values: Iterable[T], at_once: int, job: Callable[[T], Awaitable[None]]) -> None:
    """Call `job` with each value, a number of them at once."""
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
    """Return the first error of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = next(
            (one for one in error.exceptions if not isinstance(one, asyncio.CancelledError)), error.exceptions[0]
        )
    return error
