"""How a dispatch's files get to an SFTP server: temporary names, resuming, renaming.

A file that fails affects no other file, and every attempt gets further than the one before. Where a connection breaks,
the files that were on their way over it are suspected (`suspects.py`); the others go on over a new one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import posixpath
from collections import deque
from contextlib import suppress

from blocks.sftp import SftpTarget
from imaging.header import BEGINNING_BYTES, other_instance
from protocols.ssh.client import SshClient
from protocols.ssh.packets import FLAG_CREATE, FLAG_READ, FLAG_TRUNCATE, FLAG_WRITE, Code, SendWindow, Status
from protocols.ssh.sftp import WINDOW_BYTES, Sftp
from tasks import ssh
from tasks.sftp.remote import NoRename, Remote, Unexplained, each, encoded, first
from tasks.sftp.suspects import RESUMED_BYTES, Suspects
from transfer.content import data_before, is_sparse, read_here
from transfer.errors import Busy, DispatchError, Interrupted, Permanent, Rejected, Retryable
from transfer.layout import OTHER_INSTANCE
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport
from transfer.throttle import Throttle

FILES_AT_ONCE = 64  # per connection: hides 20 ms of round trip at 3,000 files a second
CLAIM_BYTES = 4 * WINDOW_BYTES  # of the files that one connection works on, so that another one finds large ones left
CONNECTION_BYTES = 32 << 20  # worth the handshake of one more connection
SAMPLE_BYTES = 32_768  # compared before an interrupted file is continued
FULL_IN_A_ROW = 64  # files without room, and none that had some in between: the disk is full for all


class Sending(Remote):
    """One push to an SFTP server."""

    def __init__(self, target: SftpTarget, plan: Plan, report: PushReport, client: SshClient) -> None:
        super().__init__(target, plan, report, client)
        self.throttle = Throttle(target.bandwidth_limit)
        self.sparse = True  # as long as nothing shows that the server can't have holes
        self.timed = True  # whether the server keeps times
        self.no_room: dict[Item, Busy] = {}
        self.no_room_in_a_row = 0
        self.unexplained: dict[Item, Outcome] = {}  # refused, and reported only when all have been tried
        self.suspects = Suspects(target.name, plan, report, self.hide)
        self.queue = deque(item for item in plan.pending if item not in self.suspects)
        self.lost: Retryable | None = None  # why a connection that broke was not replaced
        self.written: set[Item] = set()  # files of which the server has confirmed every byte

    async def files(self, sessions: list[Sftp]) -> None:
        """Deliver what is pending.

        Args:
            sessions: at first one; further ones are added, and those that break are taken away.

        Raises:
            Retryable: what goes on in the next attempt could not be delivered; the others have their outcome.
        """
        if not self.queue and not self.suspects.alone:
            return
        await self.prepare(sessions[0])
        try:
            async with asyncio.TaskGroup() as group:
                more = group.create_task(self.connect_more(sessions, group))
                await self.work(sessions, sessions[0])
                more.cancel()
            error = self.lost if self.queue else None
            await self.send_alone(sessions)
            if error := self.suspects.error or error:
                raise error
            await self.squeeze(await self.live(sessions))
        finally:
            if not self.no_room:
                self.reject_unexplained()
        await self.clear(await self.live(sessions))
        if not self.renames:
            self.notes.append("the server can't rename: files were visible while they were being written")
        if not self.sized:
            self.notes.append("the server does not show the length of what it has got")
        if not self.timed:
            self.notes.append("the server does not keep the times of files")

    async def live(self, sessions: list[Sftp]) -> Sftp:
        """Return a session that is not lost, a new one if there is none; raises as `connect`."""
        while lost := next((one for one in sessions if one.is_lost), None):
            sessions.remove(lost)
            await lost.close(by_force=True)
        return sessions[0] if sessions else await self.connect(sessions)

    async def connect(self, sessions: list[Sftp]) -> Sftp:
        """Begin a session in the place of one that broke.

        Raises:
            Retryable: none can be had; also where the server, which let us in before, refuses the login now.
        """
        try:
            session = await Sftp.connect(self.client)
        except Permanent as exc:
            raise Interrupted(f"the connection broke, and no other can be had: {exc.message}", exc.target) from exc
        sessions.append(session)
        return session

    async def send_alone(self, sessions: list[Sftp]) -> None:
        """Send the files that were on their way when a connection broke, now or in an earlier attempt, one by one."""
        self.suspects.progress()
        for item in self.suspects.in_order():
            try:
                session = await self.live(sessions)
            except Retryable as exc:
                self.suspects.error = self.suspects.error or exc
                return
            try:
                await self.deliver(session, item)
            except Retryable as exc:
                if not session.is_lost:
                    raise
                self.suspects.put_off(item, exc)
                if self.suspects.has_enough(alone=True):
                    return

    async def squeeze(self, session: Sftp) -> None:
        """Send files for which there was no room once more, one by one: others may have taken their room for a while.

        Files that were refused without a reason are included: the reason may have been a full disk, though temporary
        files of others had been removed before we could ask.

        Raises:
            Busy: there is still no room for one of them; all others have their outcome.
        """
        twice = {item: exc for item, exc in self.no_room.items() if item in self.suspects.twice}
        failed = next(iter(twice.values()), None)
        again = [item for item in (*self.no_room, *self.unexplained) if item not in twice] if self.no_room else []
        if again:
            self.no_room, self.unexplained = twice, {}
        for item in again:
            await self.deliver(session, item)
            failed = failed or self.no_room.get(item)
        self.reject_unexplained()
        if failed is not None:
            raise failed

    def reject_unexplained(self) -> None:
        """Reject files that were refused without a reason, when a full disk can't have been it."""
        refused, self.unexplained = self.unexplained, {}
        for item, outcome in refused.items():
            self.report(item, outcome)

    # ---- before

    async def prepare(self, session: Sftp) -> None:
        """Make the folders, remove the marker of an earlier dispatch, and find out how to rename."""
        self.posix = b"posix-rename@openssh.com" in session.extensions
        items = [*self.queue, *self.suspects.alone]
        pending = {id(self.folder_of[item.path]): self.folder_of[item.path] for item in items}
        for folder in pending.values():
            await self.make_folder(session, folder.path)
            with suppress(Status):
                await session.remove(encoded(f"{folder.path}/{ssh.MARKER}"))
        below = {
            posixpath.dirname(f"{self.folder_of[item.path].path}/{item.path}") for item in items if "/" in item.path
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

    # ---- the files

    async def connect_more(self, sessions: list[Sftp], group: asyncio.TaskGroup) -> None:
        """Add connections where they pay; if none can be had, the first one does all the work."""
        size = sum(item.size for item in self.queue)
        wanted = min(self.target.concurrency, len(self.queue), 1 + size // CONNECTION_BYTES)
        for _ in range(wanted - 1):
            try:
                session = await Sftp.connect(self.client)
            except DispatchError:
                return
            sessions.append(session)
            group.create_task(self.work(sessions, session))

    async def work(self, sessions: list[Sftp], session: Sftp) -> None:
        """Deliver the remaining files over one connection, and over a new one each time that it breaks."""
        while (broken := await self.send(session)) is not None and self.queue:
            # Where it can't be replaced, other connections may deliver the rest.
            if self.suspects.has_enough():
                self.lost = broken
                return
            if session in sessions:  # a server may allow only so many
                sessions.remove(session)
                await session.close(by_force=True)
            try:
                session = await self.connect(sessions)
            except Retryable as exc:
                self.lost = exc
                return

    async def send(self, session: Sftp) -> Retryable | None:
        """Deliver the remaining files over one connection, many at once; return the error if it breaks."""
        claims = SendWindow(CLAIM_BYTES)
        slots = SendWindow(min(FILES_AT_ONCE, session.open_files // 2 or FILES_AT_ONCE))
        taken: dict[Item, bool] = {}  # from the queue, and whether it has begun

        async def one(item: Item, claimed: int) -> None:
            taken[item] = True
            try:
                await self.deliver(session, item)
                del taken[item]
            finally:
                claims.give(claimed)
                slots.give(1)

        try:
            async with asyncio.TaskGroup() as group:
                while self.queue:
                    claimed = min(self.queue[0].size, CLAIM_BYTES)
                    await slots.take(1)
                    await claims.take(claimed)
                    if self.queue:
                        item = self.queue.popleft()
                        taken[item] = False
                        group.create_task(one(item, claimed))
        except ExceptionGroup as exc:
            broken = first(exc)
            if not session.is_lost or exc.split(Retryable)[1] is not None or not isinstance(broken, Retryable):
                raise
            self.queue.extendleft(item for item, begun in reversed(taken.items()) if not begun)
            self.suspects.add((item for item, begun in taken.items() if begun), broken)
            return broken
        return None

    async def deliver(self, session: Sftp, item: Item) -> None:
        """Bring one file to its final name, and report its outcome."""
        outcome = DELIVERED
        try:
            final = self.folder_of[item.path].final(item)
            self.check_way(item, final)
            with self.plan.open(item) as fd:
                if await self.replaces(session, item, fd, final):
                    outcome = ssh.REPLACED
                try:
                    await self.bring(session, item, fd, final)
                except NoRename:
                    await self.bring(session, item, fd, final)
        except Unexplained as exc:
            self.unexplained[item] = Outcome(Kind.REJECTED, self.hide(exc.message))
            return
        except Rejected as exc:
            outcome = Outcome(Kind.REJECTED, self.hide(exc.message))
        except Interrupted as exc:
            if session.is_lost:
                raise
            self.suspects.put_off(item, exc, "")  # the server's word on this file
            return
        except Busy as exc:
            if session.is_lost:
                raise
            exc.item = item.shown
            self.no_room[item] = exc
            self.report.put_off[item.path] = self.hide(exc.message)
            self.no_room_in_a_row += 1
            if self.no_room_in_a_row >= FULL_IN_A_ROW:
                raise
            return
        self.no_room_in_a_row = 0
        self.suspects.progress()
        self.report(item, outcome)

    def check_way(self, item: Item, final: bytes) -> None:
        """Raise Rejected if a folder above an item could not be made."""
        for barred, reason in self.barred.items():
            if final.startswith(barred + b"/"):
                raise Rejected(reason, item=item.shown)

    async def replaces(self, session: Sftp, item: Item, fd: int, final: bytes) -> bool:
        """Return True if another file has an item's final name, in a folder that existed before.

        Not asked of a server that can't rename: there it is what an earlier attempt left.

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
                if other_instance(read_here(fd, BEGINNING_BYTES, 0), theirs):
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
        except (Rejected, NoRename):
            with suppress(Status):
                await session.remove(path)
            raise
        except Status as exc:
            error = await self.why(session, exc, path, item)
            if isinstance(error, Rejected | Busy):  # which must not take the room of others
                with suppress(Status):
                    await session.remove(path)
            raise error from exc

    def temporary(self, item: Item, final: bytes) -> bytes:
        """Return a temporary name, the same in every attempt at this dispatch as long as the file doesn't change.

        Otherwise an attempt would continue what it finds of a changed file, and a sample may not show the change.
        """
        what = f"{item.path}\0{item.size}\0{item.mtime_ns}"
        mark = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return posixpath.dirname(final) + b"/" + self.hidden + mark.encode()

    async def write(self, session: Sftp, item: Item, fd: int, path: bytes, *, resume: bool) -> None:
        """Write a whole file, and compare the length that the server keeps with the plan."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        holes = self.sparse and b"posix-rename@openssh.com" in session.extensions and is_sparse(os.fstat(fd))
        handle, offset = await self.open(session, item, fd, path, resume=resume)
        try:
            try:
                await self.upload(session, item, fd, handle, offset, holes=holes)
            except Status:
                if not holes:
                    raise
                self.sparse = False
                await self.upload(session, item, fd, handle, 0, holes=False)
            self.written.add(item)
            self.plan.check(item, fd)
            held, _ = await asyncio.gather(self.length(session, handle, path), self.keep_time(session, item, handle))
        except EOFError as exc:
            raise Rejected("changed since the dispatch was planned", item=item.shown) from exc
        finally:
            with suppress(Status, DispatchError):
                await session.close_file(handle)
        if held is None:
            self.sized = False
        elif held != item.size:
            raise Rejected(f"the server holds {held} of {item.size} bytes", item=item.shown)

    async def upload(self, session: Sftp, item: Item, fd: int, handle: bytes, offset: int, *, holes: bool) -> None:
        await session.upload(
            handle,
            fd,
            item.size,
            offset=offset,
            piece=self.throttle.piece,
            pace=self.pace if self.throttle.limit else None,
            moved=self.report.moved,
            holes=holes,
        )

    async def keep_time(self, session: Sftp, item: Item, handle: bytes) -> None:
        """Give the remote file the modification time of ours, in whole seconds: version 3 has no finer ones."""
        try:
            await session.set_time(handle, item.mtime_ns // 1_000_000_000)
        except Status:
            self.timed = False

    async def open(self, session: Sftp, item: Item, fd: int, path: bytes, *, resume: bool) -> tuple[bytes, int]:
        """Open the remote file; return its handle, and the offset from which to write.

        A server that works on many writes at once may have kept later ones without earlier ones: everything that was on
        the way when the connection broke is sent again.
        """
        if resume and item in self.written:  # and the connection broke before it had its name
            handle = await session.open(path, FLAG_WRITE | FLAG_CREATE)
            if await self.length(session, handle, path) == item.size:
                return handle, item.size
            await session.close_file(handle)
        elif resume and item.size > RESUMED_BYTES:
            try:
                handle = await session.open(path, FLAG_READ | FLAG_WRITE | FLAG_CREATE)
            except Status:
                pass  # some servers let nobody read
            else:
                held = await self.length(session, handle, path) or 0
                offset = data_before(fd, held, WINDOW_BYTES)
                if held <= item.size and offset > 0 and await self.same(session, handle, fd, offset):
                    return handle, offset
                if not held:
                    return handle, 0
                await session.close_file(handle)
        return await session.open(path, FLAG_WRITE | FLAG_CREATE | FLAG_TRUNCATE), 0

    async def same(self, session: Sftp, handle: bytes, fd: int, size: int) -> bool:
        """Return True if the first bytes of both files, and their last ones before `size`, are the same."""
        for at in (0, max(0, size - SAMPLE_BYTES)):
            try:
                if await session.read(handle, at, SAMPLE_BYTES) != read_here(fd, SAMPLE_BYTES, at):
                    return False
            except Status:
                return False
        return True

    async def length(self, session: Sftp, handle: bytes, path: bytes) -> int | None:
        """Return the length of an open file; None if the server doesn't show it."""
        with suppress(Status):
            return (await session.fstat(handle)).size
        with suppress(Status):
            return (await session.stat(path)).size
        return None

    async def clear(self, session: Sftp) -> None:
        """Remove what earlier attempts have left of files that have changed or are no longer to be sent."""
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

        A marker that is there is removed where a file was taken back.
        Nothing shows in which folder a file that can't be sent would lie: if there is one, no folder is marked.
        """
        for folder in self.folders:
            path = encoded(f"{folder.path}/{ssh.MARKER}")
            if any(item.path in self.report.revoked for item in folder.items):
                with suppress(Status):
                    await session.remove(path)
            if self.plan.lacks or not all(map(self.has_arrived, folder.items)):
                continue
            try:
                await session.close_file(await session.open(path, FLAG_WRITE | FLAG_CREATE))
            except Status as exc:
                if exc.code != Code.NO_SUCH_FILE or self.plan.pending:
                    raise await self.why(session, exc, path) from exc
                self.notes.append(f"{folder.path} has been taken away since it was delivered")
