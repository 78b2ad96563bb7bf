"""Dead letters: the files of dispatches that were given up, so that these can be tried again without their source.

    TALARIA_HOME/failed/<flow run id>/
    ├── source.json   the folder that the files' paths were relative to
    └── files/        what was staged: links to the files, which cost no room while the source exists

Only what was staged as a whole is kept. It goes with the retention, or when the dispatch is delivered after all.

What lies in the state directory, here or in what was uploaded, received or retrieved, goes when whoever it was for has
it. A dispatch that is to send it elsewhere, and may wait for long, gets links of its own, in a folder of the same kind
that bears no run's id and has no `source.json`; that goes with the retention, but not while a dispatch that reads it
has not ended, or when that one is delivered.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from imaging.header import BEGINNING_BYTES, other_instance
from transfer import roots
from transfer.errors import Busy, NotFound
from transfer.home import Home
from transfer.ledger import write_json
from transfer.oserrors import words_of
from transfer.plan import Plan
from transfer.staging import discard

FAILED, FILES, SOURCE = "failed", "files", "source.json"
# Of a path that is kept: the id of a run, or that of what a run was lent. Nothing else is a name: ".." is none.
_READ = re.compile(rf"/{FAILED}/([0-9a-f]{{8}}(?:-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}})/{FILES}(/|$)")


def keep(home: Home, run_id: str, plan: Plan, source: Path) -> str:
    """Keep the staged files of a run that was given up; return where, "" if not all of them can be.

    Args:
        plan: that of the staged files; its folder is taken away.
        source: the folder that their paths were relative to.
    """
    folder = folder_of(home, run_id)
    if source == folder / FILES:
        return str(source)  # it was read from here, and stays
    if not may_be_kept(plan):
        return ""
    discard(folder)
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
    write_json(folder / SOURCE, {"source": os.fsencode(source).hex()})
    os.rename(plan.root, folder / FILES)
    return str(folder / FILES)


def instead(home: Home, run_id: str, paths: Sequence[str]) -> list[str]:
    """Return what to read instead of a run's paths: what was kept, if the source has not all of it any more.

    It has not where other instances have come into the place of some: a sender may give each study the same names.
    """
    folder = folder_of(home, run_id)
    files = folder / FILES
    try:
        source = os.fsdecode(bytes.fromhex(json.loads((folder / SOURCE).read_bytes())["source"]))
    except (OSError, ValueError, KeyError, TypeError):
        return list(paths)
    if is_whole(files, source):
        return list(paths)
    os.utime(folder)  # it is wanted: the time of its retention begins anew
    return [str(files)]


def may_be_kept(plan: Plan) -> bool:
    """Return True if all files of a plan are staged: none is read in place, or has something wrong with it."""
    return bool(plan.items) and not any(item.in_place or item.problem for item in plan.items)


def is_whole(files: Path, source: str) -> bool:
    """Return True if the folder that the paths of kept files were relative to has still all of them."""
    for above, _, names in os.walk(files):
        there = os.path.join(source, os.path.relpath(above, files))
        if not all(_is_there(os.path.join(above, name), os.path.join(there, name)) for name in names):
            return False
    return True


def _is_there(kept: str, place: str) -> bool:
    """Return True if the place of a kept file has it, perhaps another content of it by now."""
    try:
        ours, now = os.stat(kept), os.stat(place)
        if os.path.samestat(ours, now):
            return True
        if not stat.S_ISREG(now.st_mode):
            return False
        with open(kept, "rb") as file, open(os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as other:
            return not other_instance(file.read(BEGINNING_BYTES), other.read(BEGINNING_BYTES))
    except OSError:
        return False


def lend(home: Home, run_id: str, paths: Sequence[str]) -> list[str]:
    """Return what another dispatch is to read, as `instead`; it may wait for long, and find it then all the same.

    Raises:
        NotFound, Busy: as `Lent.path`.
    """
    found = instead(home, run_id, paths)
    with Lent(home) as lent:
        return [lent.path(path, alone=len(found) == 1) for path in found]


class Lent:
    """Links to what lies in the state directory, for a dispatch that is about to be created. A context manager.

    Nothing is left of them if the block ends with an error.
    """

    def __init__(self, home: Home) -> None:
        self.folder = folder_of(home, str(uuid.uuid4()))
        self.files = self.folder / FILES
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            discard(self.folder)

    def make(self) -> Path:
        """Make the folder of the links; return it."""
        self.folder.parent.mkdir(mode=0o700, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.files.mkdir(mode=0o700, exist_ok=True)
        return self.files

    def path(self, path: str, *, alone: bool = False) -> str:
        """Return a path to read instead of another one: that itself unless it lies in the state directory.

        Args:
            alone: whether it is the only one that is lent.

        Raises:
            NotFound: it is gone. Busy: there is no room for links.
        """
        if not roots.is_spooled(path):
            return path
        into = self.make()
        if not alone:
            self._count += 1
            into /= str(self._count)
        try:
            if os.path.isdir(path):
                into = into if alone else into / os.path.basename(path.rstrip("/"))
                shutil.copytree(path, into, symlinks=True, copy_function=_linked, dirs_exist_ok=True)
            else:
                into.mkdir(mode=0o700, exist_ok=True)
                into /= os.path.basename(path)
                _linked(path, str(into))
        except FileNotFoundError as exc:
            raise NotFound(f"{path}: no such file or folder") from exc
        except shutil.Error as exc:
            raise Busy(f"{path}: is being changed just now") from exc
        except OSError as exc:
            raise Busy(f"{path}: can't be kept for a dispatch: {words_of(exc)}") from exc
        return str(into)


def _linked(source: str, to: str) -> str:
    """Link a file, or copy it where it can't be."""
    try:
        os.link(source, to, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, to, follow_symlinks=False)
    return to


def read_by(paths: Iterable[object]) -> set[str]:
    """Return the names of what is kept that a dispatch of these paths reads: of runs, or of what it was lent.

    Args:
        paths: as whoever made the run has written them, whatever that is.
    """
    return {found[1] for path in paths if (found := _READ.search(str(path)))}


def forget(home: Home, run_id: str, paths: Iterable[str] = ()) -> None:
    """Remove what was kept of a run, and what it was lent.

    Args:
        paths: those that it was asked for.
    """
    discard(folder_of(home, run_id))
    below = f"{home.root}/{FAILED}/"
    for name in read_by(path for path in paths if path.startswith(below)):
        if not (folder_of(home, name) / SOURCE).exists():
            discard(folder_of(home, name))


def clear(home: Home, before: float, keep: Collection[str] = ()) -> int:
    """Remove what was kept before a time (seconds since the epoch); return of how many runs.

    Args:
        keep: ids of runs that have not ended, or whose files are read by such.
    """
    old = []
    for folder in (home.root / FAILED).glob("*"):
        with suppress(FileNotFoundError):
            if folder.name not in keep and folder.stat().st_mtime < min(before, time.time()):
                old.append(folder)
    for folder in old:
        discard(folder)
    return len(old)


def kept(home: Home) -> set[str]:
    """Return the ids of the runs of which something is kept."""
    return {folder.name for folder in (home.root / FAILED).glob("*")}


def used(home: Home) -> int:
    """Return the bytes that are kept here alone: of files that their source has not any more.

    Of files that could not be linked, but frozen by a reflink, it is more: they share their blocks with the source's.
    """
    found = 0
    for above, _, names in os.walk(home.root / FAILED):
        for name in names:
            with suppress(FileNotFoundError):
                info = os.lstat(os.path.join(above, name))
                found += info.st_size if info.st_nlink == 1 else 0
    return found


def folder_of(home: Home, run_id: str) -> Path:
    """Return the folder of what is kept of a run."""
    return home.root / FAILED / run_id
