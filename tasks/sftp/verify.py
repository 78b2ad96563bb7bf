"""Whether an SFTP server has what it was sent: what it lists, and checksums."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import suppress
from shlex import quote

from protocols.ssh.packets import Code, Status
from protocols.ssh.sftp import Sftp
from protocols.ssh.shell import Shell
from tasks import ssh
from tasks.sftp.files import FILES_AT_ONCE, Sending
from tasks.sftp.remote import Folder, each, encoded
from transfer.content import read_here
from transfer.errors import Cancelled, DispatchError, Rejected
from transfer.plan import Item
from transfer.receipt import Level

SUMS_AT_ONCE = 100  # files in one script
SLOWEST_SUM = 20 << 20  # bytes a second that a server computes checksums at
READ_AT_ONCE = 4  # files: one is read with many requests

# One line for each file, "-" if it can't be read. BSD has sha256, macOS and others shasum.
SUMS = """
if command -v sha256sum >/dev/null; then s() { sha256sum; }
elif command -v shasum >/dev/null; then s() { shasum -a 256; }
elif command -v sha256 >/dev/null; then s() { sha256 -q; }
elif command -v openssl >/dev/null; then s() { openssl dgst -sha256 -r; }
else exit 127; fi
for f in @; do
  if [ -r "$f" ]; then s <"$f"; else echo -; fi
done
"""

Pairs = list[tuple[Item, bytes]]


async def verify(sending: Sending, session: Sftp) -> Level:
    """Verify at the target's level, or note why that is not possible; revoke what is not there.

    Covers every item that has arrived, in this attempt or an earlier one.
    """
    wanted = sending.target.verify
    if wanted is Level.ACCEPTED or not _arrived(sending):
        return Level.ACCEPTED
    reached = Level.LISTED if await _listed(sending, session) else Level.ACCEPTED
    if wanted is Level.PROVEN and await _proven(sending, session):
        return Level.PROVEN
    return reached


def _arrived(sending: Sending) -> Pairs:
    return [
        (item, folder.final(item)) for folder in sending.folders for item in folder.items if sending.has_arrived(item)
    ]


async def _listed(sending: Sending, session: Sftp) -> bool:
    """Ask for the length of every file.

    A server that shows no length at all hides them, unless it shows that of an earlier marker or the folder is gone. A
    server that shows some lengths doesn't have the other files.
    """
    pairs = _arrived(sending)
    sizes: dict[str, int] = {}

    async def ask(pair: tuple[Item, bytes]) -> None:
        item, path = pair
        with suppress(Status):
            size = (await session.stat(path)).size
            if size is not None:
                sizes[item.path] = size

    await each(pairs, FILES_AT_ONCE, ask)
    asked = [folder for folder in sending.folders if not sizes and any(map(sending.has_arrived, folder.items))]
    hidden = {id(folder) for folder in asked if await _hides(sending, session, folder)}
    if hidden:
        sending.notes.append("not listed: the server does not show what it has")
    for item, _ in pairs:
        if id(sending.folder_of[item.path]) in hidden:
            continue
        if (size := sizes.get(item.path)) != item.size:
            held = f"{size} of {item.size} bytes" if size is not None else "nothing"
            sending.report.revoke(item, f"asked afterwards, the server has {held} of it")
    return not hidden


async def _hides(sending: Sending, session: Sftp, folder: Folder) -> bool:
    """Return True if a server that shows no file's length may still have a folder's files.

    This only asks: a file written to find out could not be removed everywhere.
    """
    with suppress(Status):
        if (await session.stat(encoded(f"{folder.path}/{ssh.MARKER}"))).size is not None:
            return False
    # One that knows nothing of the target's folder either hides folders, too.
    return await _knows(session, folder.path) or not await _knows(session, sending.target.folder)


async def _knows(session: Sftp, path: str) -> bool:
    try:
        await session.stat(encoded(path))
    except Status as exc:
        return exc.code != Code.NO_SUCH_FILE
    return True


async def _proven(sending: Sending, session: Sftp) -> bool:
    """Compare checksums: computed by the server if it lets us, else by us from what we read back."""
    pairs = _arrived(sending)
    remote = await asyncio.to_thread(_remote_sums, sending, pairs)
    unread: list[Item] = []

    async def compare(pair: tuple[Item, bytes]) -> None:
        item, path = pair
        theirs = remote.get(item.path)
        if theirs is None:
            try:
                theirs = await session.sha256(path, item.size, sending.report.check)
            except Status as exc:
                if exc.code == Code.NO_SUCH_FILE and sending.sized:
                    sending.report.revoke(item, "not there when it was read back")
                else:
                    unread.append(item)
                return
        try:
            ours = await asyncio.to_thread(_local_sum, sending, item)
        except Rejected as exc:
            sending.report.revoke(item, exc.message)
            return
        if theirs != ours:
            with suppress(Status):
                await session.remove(path)
            sending.report.revoke(item, "the server holds other bytes than were sent")

    await each(pairs, READ_AT_ONCE, compare)
    if unread:
        sending.notes.append(f"not proven: the server lets nobody read {len(unread)} of {len(pairs)} files")
    return not unread


def _local_sum(sending: Sending, item: Item) -> str:
    """Compute the SHA-256 of what was planned; raises Rejected if the file has changed since."""
    digest, at = hashlib.sha256(), 0
    with sending.plan.open(item) as fd:
        while piece := read_here(fd, 1 << 20, at):
            sending.report.check()
            digest.update(piece)
            at += len(piece)
        sending.plan.check(item, fd)
    return digest.hexdigest()


def _remote_sums(sending: Sending, pairs: Pairs) -> dict[str, str]:
    """Let the server compute checksums; return them by path, as far as it can; none if it gives no shell."""
    found: dict[str, str] = {}
    check = sending.report.check
    try:
        with Shell(sending.client) as shell:
            for begin in range(0, len(pairs), SUMS_AT_ONCE):
                batch = pairs[begin : begin + SUMS_AT_ONCE]
                paths = " ".join(quote(path.decode("utf-8", "surrogateescape")) for _, path in batch)
                idle_s = sending.target.idle_timeout_s + max(item.size for item, _ in batch) / SLOWEST_SUM
                code, output = shell.run(SUMS.replace("@", paths), idle_s=idle_s, check=check)
                lines = output.decode("ascii", "replace").splitlines()
                if code or len(lines) != len(batch):
                    break
                found |= {item.path: line[:64] for (item, _), line in zip(batch, lines, strict=True) if len(line) >= 64}
    except Cancelled:
        raise
    except DispatchError:
        pass  # no shell, or none beside the session that we have: reading back needs none
    return found
