"""The studies of a flood: which of them a folder of folders, several paths, or a list in a file names."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from transfer import roots, unitlist
from transfer.beneath import resolved
from transfer.errors import Misconfigured, Rejected
from transfer.globs import is_excluded
from transfer.plan import DISPATCH_ID_CHARS, LEADS_OUT, OWN_NAMES, Item, Origin, Plan, scan

LIST_BYTES = 16 << 20  # of a list of studies


class Each(StrEnum):
    """What is a study of its own."""

    FOLDER = "folder"  # each folder directly below the paths; files that lie beside them are one more
    PATH = "path"  # each path
    LINE = "line"  # each line of the paths, which are text files
    UNIT = "unit"  # each unit of a source, which the paths list (`transfer.unitlist`)


@dataclass(frozen=True, slots=True)
class FloodStudy:
    """One study of a flood.

    Attributes:
        name: unique in the flood, for people.
        paths: its files and folders.
        problem: why it can't be sent; "" if nothing is wrong so far.
        within: the folder, without links, that its files must lie in; "" if they were asked for by their own paths.
        mark: of what its files were when they were listed; "" if that is not known. Files that are others by that are
            another dispatch, also where names, lengths, times and UIDs are the same.
    """

    name: str
    paths: tuple[str, ...]
    problem: str = ""
    within: str = ""
    mark: str = ""

    def read(self, exclude: tuple[str, ...], origin: Origin, check: Callable[[], None] = lambda: None) -> Plan:
        """Plan its files, as `scan` does.

        Raises:
            Rejected: a link leads out of the folder of studies.
        """
        if self.problem:
            raise Rejected(self.problem)
        plan = scan(self.paths, exclude, origin, check)
        if self.within and not all(roots.is_in(source, self.within) for source in plan.sources):
            raise Rejected(LEADS_OUT)
        if self.mark:
            of_both = hashlib.sha256(f"{plan.dispatch_id}\0{self.mark}".encode())
            plan = replace(plan, dispatch_id=of_both.hexdigest()[:DISPATCH_ID_CHARS])
        return plan


def listed(paths: Iterable[str], each: Each, exclude: tuple[str, ...] = ()) -> list[FloodStudy]:
    """Return the studies that the paths name, without reading any of them.

    Raises:
        NotFound, Denied: as `scan` does.
        Misconfigured: a path is not what `each` asks for, or there is no study.
    """
    given = list(dict.fromkeys(map(str, paths)))
    found: list[FloodStudy] = []
    for path in given:
        if not path:
            raise Misconfigured("an empty path was given to send")
        if each is Each.PATH:
            found.append(_study(path, path))
        elif each is Each.LINE:
            found += _lines(path)
        elif each is Each.UNIT:
            found += (FloodStudy(one.key, one.paths, within=one.within, mark=one.mark) for one in unitlist.read(path))
        else:
            found += _folders(path, exclude, "" if len(given) == 1 else path.rstrip("/") + "/")
    if not found:
        raise Misconfigured(f"no study in {', '.join(given)}")
    return list(_told_apart(found))


def flood_id(studies: Iterable[FloodStudy]) -> str:
    """Return the id of a flood: that of the same paths, whatever lies in them."""
    digest = hashlib.sha256()
    for study in studies:
        digest.update("\0".join((study.name, *study.paths, "")).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:DISPATCH_ID_CHARS]


def _study(name: str, *paths: str, problem: str = "", within: str = "") -> FloodStudy:
    return FloodStudy(Item(name, 0, 0).shown, paths, problem, within)


def _told_apart(studies: Iterable[FloodStudy]) -> Iterator[FloodStudy]:
    """Yield each study once; those that share a name, of two lists or folders, get their path as one."""
    unique: dict[tuple[str, ...], FloodStudy] = {}
    for study in studies:
        unique.setdefault(study.paths, study)
    times, taken = Counter(study.name for study in unique.values()), set[str]()
    for paths, study in unique.items():
        name = study.name
        if times[name] > 1 and len(paths) == 1:
            name = Item(paths[0], 0, 0).shown
        known, number = name, 2
        while name in taken:
            name, number = f"{known} ({number})", number + 1
        taken.add(name)
        yield replace(study, name=name)


def _lines(path: str) -> Iterator[FloodStudy]:
    fd = roots.sources().open(path)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Misconfigured(f"{path}: is not a file that lists studies, one path in each line")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(LIST_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > LIST_BYTES:
        raise Misconfigured(f"{path}: a list of studies has at most {LIST_BYTES >> 20} MiB")
    folder = os.path.dirname(os.path.abspath(path))
    text = data.decode("utf-8-sig", "surrogateescape")
    for line in text.replace("\r", "\n").split("\n"):  # what `splitlines` ends lines at besides may be part of a name
        name = line.strip()
        if name and not name.startswith("#"):
            yield _study(name, os.path.join(folder, name))


def _folders(path: str, exclude: tuple[str, ...], prefix: str) -> Iterator[FloodStudy]:
    fd = roots.sources().open(path)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise Misconfigured(f"{path}: is not a folder of studies")
        names = sorted(os.listdir(fd))
    except OSError as exc:
        raise Misconfigured(f"{path}: can't be read: {exc.strerror}") from exc
    finally:
        os.close(fd)
    loose, real = [], resolved(path)
    for name in names:
        below = os.path.join(path, name)
        if is_excluded(name, (*exclude, *OWN_NAMES)):
            continue
        if os.path.islink(below) and not _within(below, real):
            yield _study(prefix + name, below, problem=LEADS_OUT)
        elif os.path.isdir(below):
            yield _study(prefix + name, below, within=real)
        elif os.path.islink(below) and not os.path.exists(below):  # which stops none of the others
            yield _study(prefix + name, below, problem="a symbolic link that leads nowhere")
        else:
            loose.append(below)
    if loose:
        yield _study(f"{prefix or Path(path).name + '/'}*", *loose, within=real)


def _within(link: str, folder: str) -> bool:
    with suppress(OSError):
        return roots.is_in(resolved(link), folder)
    return False
