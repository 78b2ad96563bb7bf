"""The lists of units that sweeps write and dispatches read: in each line a unit, with what each of its files was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from transfer import roots
from transfer.errors import DispatchError, Misconfigured, NotFound
from transfer.home import Home, private
from transfer.ledger import noted, write_json

PART = ".part"  # of a list that is being written
SOURCES = "sources"  # of the state directory: a folder for each
BATCHES = "batches"  # the folder of a source's lists


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file as a sweep saw it; the path is absolute. What still has all of this has still its content."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    def is_still(self, now: os.stat_result) -> bool:
        """Return True if nothing has happened to the file since: not even to its permissions, or number of links."""
        return (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino) == (
            self.size,
            self.mtime_ns,
            self.ctime_ns,
            self.inode,
        )


@dataclass(frozen=True, slots=True)
class ListedUnit:
    """A unit that is dispatched.

    Attributes:
        within: the folder, without links, that its files must lie in; "" if they were asked for by their own paths.
    """

    key: str
    paths: tuple[str, ...]
    within: str = ""
    files: tuple[FileFacts, ...] = ()

    @property
    def mark(self) -> str:
        """A mark of what its files were: of their paths, lengths, times and inodes; "" if it lists none."""
        digest = hashlib.sha256()
        for one in sorted(self.files, key=lambda one: one.path):
            facts = f"{one.path}\0{one.size} {one.mtime_ns} {one.ctime_ns} {one.inode}\n"
            digest.update(facts.encode("utf-8", "surrogateescape"))
        return digest.hexdigest() if self.files else ""


def place(home: Home, source: str, batch: str) -> Path:
    """Return the path of a list."""
    return home.root / SOURCES / source / BATCHES / f"{batch}.jsonl"


def source_of(path: Path) -> str:
    """Return the name of the source whose list this is."""
    return path.parent.parent.name


def source_named(path: Path) -> str:
    """Return the name of the source whose list this is, whatever it may be; "" if it is none."""
    *_, sources, name, batches, _ = ("", "", "", *path.parts)
    return name if (sources, batches, path.suffix) == (SOURCES, BATCHES, ".jsonl") else ""


def check_there(path: Path) -> None:
    """Check that a list is there still.

    Raises:
        NotFound: no unit was failed or under way by it any more.
    """
    if path.exists():
        return
    if path.parent.name != BATCHES:
        raise NotFound("the list of what it sends has gone")
    name = source_of(path)
    raise NotFound(
        f"the source {name} has dispatched its units anew since, or needs no retry of them:"
        f" `talaria source show {name}` says what failed"
    )


def changed(home: Home) -> Path:
    """Return the file that is touched when a source is changed on this machine, so that nobody need ask often."""
    return home.root / SOURCES / ".changed"  # no source has such a name


def sweeping(home: Home, source: str) -> Path:
    """Return the file on which a sweep of a source holds a lock, so that there is one at a time."""
    folder = home.root / "locks"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder / f"source-{source}"


def batches(home: Home, source: str) -> dict[str, Path]:
    """Return the lists of a source that are there, by their marks."""
    folder = place(home, source, "x").parent
    return {path.stem: path for path in folder.glob("*.jsonl")} if folder.is_dir() else {}


def keep(path: Path, parameters: Mapping[str, Any]) -> None:
    """Keep beside a list what its dispatch is asked for, so that it can be created after a crash."""
    with noted():
        write_json(path.with_suffix(".json"), dict(parameters))


def kept(path: Path) -> dict[str, Any] | None:
    """Return what the dispatch of a list is asked for; None if the list, or that, is gone."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and path.exists() else None


def tidy(home: Home, source: str) -> None:
    """Remove what writers of a source's lists have left that were killed; only while nobody writes one."""
    for part in place(home, source, "x").parent.glob(f"*{PART}"):
        part.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a list."""
    for one in (path.with_suffix(".json"), path):
        one.unlink(missing_ok=True)


class Writer:
    """Writes a list, unit by unit; it is whole, and on the disk, when it is closed.

    Raises, as its methods do:
        LedgerFull: the disk of the state directory is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = path.with_suffix(PART)
        with noted():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file: IO[str] = open(self._part, "w", encoding="ascii", opener=private)  # noqa: SIM115 - by `close`

    def add(self, unit: ListedUnit) -> None:
        """Write a unit."""
        files = [(one.path, one.size, one.mtime_ns, one.ctime_ns, one.inode) for one in unit.files]
        line = {"key": unit.key, "paths": unit.paths, "within": unit.within, "files": files}
        with noted():
            self._file.write(
                json.dumps(line) + "\n"
            )  # ASCII: names that are not UTF-8 keep their surrogates as escapes

    def close(self) -> None:
        with noted():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._part, self.path)

    def abandon(self) -> None:
        """Remove what was written."""
        with suppress(OSError):  # what could not be written is written once more
            self._file.close()
        self._part.unlink(missing_ok=True)


def read(path: Path | str) -> Iterator[ListedUnit]:
    """Yield the units of a list.

    Raises:
        NotFound, Denied: as of what is sent. Misconfigured: it is no such list.
    """
    check_there(Path(path))
    fd = roots.sources().open(path)
    try:
        with open(fd, encoding="ascii", errors="strict", closefd=False) as file:
            for line in file:
                one = json.loads(line)
                files = tuple(FileFacts(*facts) for facts in one["files"])
                yield ListedUnit(str(one["key"]), tuple(map(str, one["paths"])), str(one["within"]), files)
    except (ValueError, KeyError, TypeError, IsADirectoryError) as exc:
        raise Misconfigured(f"{path}: is no list of a source's units") from exc
    finally:
        os.close(fd)


def folders_of(paths: Iterable[str]) -> list[str]:
    """Return the folders that the units of lists must lie in; of a list that can't be read none."""
    found = list[str]()
    for path in paths:
        with suppress(DispatchError, OSError):
            found += [one.within for one in islice(read(path), 1) if one.within]  # all of a list are of one source
    return found


def amend(path: Path, facts: Mapping[str, FileFacts]) -> None:
    """Write a list anew, with what some files are now, by path; what it was stays if that can't be written."""
    writer = Writer(path)
    try:
        for unit in read(path):
            writer.add(replace(unit, files=tuple(facts.get(one.path, one) for one in unit.files)))
        writer.close()
    except BaseException:
        writer.abandon()
        raise
