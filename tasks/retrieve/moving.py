"""Brings a study that was fetched into a folder of the user's, as `<into>/<accession>/<series>/<instance>.dcm`.

No link below the folder is followed (protocols/files/tree.py).
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from imaging.header import read_header
from protocols.files.tree import Tree, parent
from transfer import roots, silent
from transfer.beneath import above
from transfer.content import copy_bytes
from transfer.errors import DiskFull, Misconfigured
from transfer.layout import sanitised
from transfer.oserrors import FULL, words_of

NOTES = "places"  # file beside the instances that are moved: where they go
SPOOL = "spool"  # folder of what was fetched, in the one that is a retrieval's own
ANSWER_S = 4.0  # for the share of the folder: whoever cancels the run meanwhile waits for that


def check_into(into: Path) -> None:
    """Raise if studies can't be moved to a folder, or if its name is probably mistyped.

    Raises:
        Misconfigured: neither it nor the folder that it would be in is there.
        Denied: it lies where nothing may be written to.
    """
    roots.places().check(into)
    if os.path.lexists(into) and not into.is_dir():
        raise Misconfigured(f"{into} is not a folder")
    if not into.parent.is_dir():
        raise Misconfigured(f"{into}: there is no folder {into.parent} to make it in")


async def reach_into(into: str) -> None:
    """Check the folder of a run that is about to begin.

    Raises:
        SourceAway: its share does not answer: whoever looks there does not come back. Others: as `check_into`.
    """
    await silent.check([into], ANSWER_S)
    await asyncio.to_thread(check_into, Path(into))


def leave(spool: Path) -> None:
    """Remove the folder that instances were fetched into, unless something is left in it for a retry."""
    with suppress(OSError):
        (spool / SPOOL).rmdir()
        spool.rmdir()


def move_into(folder: Path, into: Path, name: str) -> int:
    """Move the instances of a folder to their final places; return how many are there, with those of earlier tries.

    What is there already is replaced.

    Args:
        name: name of the study's folder: its accession number or its UID.

    Raises:
        DiskFull: there is no room. Misconfigured: the folder can't be written to. Denied: it lies where it may not.
    """
    series, finals = "", dict[Path, str]()
    changed: dict[str, None] = {}
    try:
        for path in sorted(folder.glob("*.dcm")):
            with path.open("rb") as file:
                header = read_header(file.fileno(), path.stat().st_size)
                os.fdatasync(file)  # before its name is final: else it may be empty after a power cut
            finals[path] = f"{sanitised(name)}/{sanitised(header.SeriesInstanceUID)}/{path.name}"
        with (folder / NOTES).open("ab") as notes:
            notes.writelines(os.fsencode(into / final) + b"\0" for final in finals.values())
        with _opened(into) as tree:
            for path, final in finals.items():
                series = parent(final)
                if series not in changed:
                    tree.make_folders(series)
                    changed |= dict.fromkeys((series, parent(series), ""))
                _move(path, tree, final)
            for one in changed:
                tree.flush(one)
    except OSError as exc:
        kind = DiskFull if exc.errno in FULL else Misconfigured
        raise kind(f"can't write to {into}{_obstacle(into, series, exc)}: {words_of(exc)}") from exc
    return sum(map(os.path.exists, _noted(folder)))


def is_moved(folder: Path, count: int) -> bool:
    """Return True if so many instances were to be moved from a folder, and are in their final places."""
    finals = _noted(folder)
    return len(finals) >= max(count, 1) and all(map(os.path.exists, finals))


def _noted(folder: Path) -> set[bytes]:
    try:
        return set((folder / NOTES).read_bytes().split(b"\0")) - {b""}
    except OSError:
        return set()


def _opened(into: Path) -> Tree:
    """Open the folder, which is made where it is not there."""
    if not os.path.lexists(into):
        with Tree(into.parent) as higher:
            higher.make_folders(into.name)
    return Tree(into)


def _obstacle(into: Path, series: str, exc: OSError) -> str:
    """Name what is in the place of a folder."""
    if exc.errno in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP):
        for name in (parent(series), series):
            if name and not stat.S_ISDIR((into / name).lstat().st_mode if os.path.lexists(into / name) else 0):
                return f"/{name}"
    return ""


def _move(path: Path, tree: Tree, final: str) -> None:
    try:
        with above(tree.fd, final) as (folder, name):
            os.rename(path, name, dst_dir_fd=folder)
        return
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
    part = f"{parent(final)}/.talaria-{uuid.uuid4().hex[:16]}"
    try:
        with path.open("rb") as reader, tree.opened(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as writer:
            copy_bytes(reader.fileno(), writer)
            os.fdatasync(writer)
        tree.rename(part, final)
    except BaseException:
        if tree.exists(part):
            tree.unlink(part)
        raise
    path.unlink()
