"""What people upload to be sent: `TALARIA_HOME/uploads/ID/`, which holds `upload.json` and the files as they come in.

An upload is announced with the names and sizes of its files; each file is then appended to, from wherever it is, so
that one that broke off goes on. Archives (.zip) are unpacked when all is there. A day after it was delivered, or last
touched if it never was sent, an upload is removed; one that could not be delivered stays as long as receipts do.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from transfer.errors import Misconfigured, NotFound, Rejected
from transfer.home import Home
from transfer.ledger import write_json

FOLDER = "uploads"
LIMIT, LIMIT_B = "TALARIA_UPLOAD_LIMIT", 50 << 30  # bytes of one upload, and of what its archives hold
MOST_FILES = 100_000
RESERVE_B = 1 << 30  # of the file system, which uploads leave free: the ledger lies there, too
NAME_B, PATH_B, DEPTH = 255, 2048, 32
DAY_S = 86_400.0
PIECE = 1 << 20
ZIP = ".zip"


@dataclass
class BrowserUpload:
    """One upload.

    Attributes:
        by: who has begun it; nobody else may go on with it.
        files: path below `content` and size in bytes of each.
        asked: what is to be done with it.
        run: id of the flow run that sends it; "" before.
        unpacked: whether all was there, and its archives are unpacked.
    """

    folder: Path
    by: str
    files: list[tuple[str, int]] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)
    run: str = ""
    unpacked: bool = False

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def content(self) -> Path:
        return self.folder / "files"

    def save(self) -> None:
        """Save what is known of it, whole or not at all."""
        known = {"by": self.by, "files": self.files, "asked": self.asked, "run": self.run, "unpacked": self.unpacked}
        write_json(self.folder / "upload.json", known)

    def sizes(self) -> list[int]:
        """Return how many bytes of each file are there."""
        return [_size(self.content / path) for path, _ in self.files]

    def append(self, number: int, offset: int) -> Appending:
        """Return a file to append to.

        Raises:
            NotFound: there is no such file.
            Misconfigured: it has another length than `offset`, or somebody else appends to it.
        """
        if not 0 <= number < len(self.files):
            raise NotFound(f"the upload has no file {number}")
        path, size = self.files[number]
        return Appending(self.content / path, size, offset)

    def missing(self) -> int:
        """Return how many files are not whole."""
        if self.unpacked:
            return 0
        return sum(there != size for there, (_, size) in zip(self.sizes(), self.files, strict=True))

    def unpack(self) -> None:
        """Unpack the archives, each into a folder of its name, and remove them; do nothing if that was done.

        Raises:
            Rejected: one is damaged, encrypted, or holds what an upload may not.
        """
        if self.unpacked:
            return
        left = limit() - sum(size for _, size in self.files)
        found = sorted(one for one in self.content.rglob("*") if one.suffix.lower() == ZIP and one.is_file())
        for path in found:
            left -= _unpack(path, left)
        for path in found:
            path.unlink()
        self.unpacked = True
        self.save()

    def top(self) -> Path:
        """Return the folder whose folders a user means: below the one that was chosen, if that is all there is."""
        entries = list(self.content.iterdir())
        return entries[0] if len(entries) == 1 and entries[0].is_dir() else self.content


class Appending:
    """A file of an upload that is appended to; used by one thread at a time."""

    def __init__(self, path: Path, size: int, offset: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self.offset, self._left = os.fstat(self._fd).st_size, size - offset
        if self.offset != offset:
            os.close(self._fd)
            raise Misconfigured(f"{self.offset} bytes of this file are there: go on from them")

    def write(self, data: bytes) -> None:
        """Append; what comes beyond the announced size is refused.

        Raises:
            Misconfigured: there is more than was announced. OSError: it can't be written.
        """
        if len(data) > self._left:
            raise Misconfigured("the file is longer than was announced")
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._left -= len(data)
        self.offset += len(data)

    def close(self) -> None:
        os.close(self._fd)


def limit() -> int:
    """Return the most bytes of an upload, by TALARIA_UPLOAD_LIMIT."""
    return int(os.environ.get(LIMIT) or LIMIT_B)


def begin(home: Home, by: str, files: Sequence[tuple[str, int]], asked: dict[str, Any]) -> BrowserUpload:
    """Begin an upload.

    Raises:
        Misconfigured: it is too large, or a file's name can't be used; Rejected where there is no room.
    """
    check(files)
    top = home.root / FOLDER
    top.mkdir(mode=0o700, exist_ok=True)
    room(top, sum(size for _, size in files))
    upload = BrowserUpload(top / secrets.token_hex(8), by, list(files), asked)
    upload.content.mkdir(parents=True, mode=0o700)
    upload.save()
    return upload


def find(home: Home, key: str, by: str) -> BrowserUpload:
    """Return an upload of this user.

    Raises:
        NotFound: there is none (any more).
    """
    gone = NotFound("this upload is not known any more: begin it again")
    if not key.isalnum():
        raise gone
    try:
        known = json.loads((home.root / FOLDER / key / "upload.json").read_text(encoding="utf-8"))
    except OSError as exc:
        raise gone from exc
    if known["by"] != by:
        raise gone
    files = [(str(path), int(size)) for path, size in known["files"]]
    return BrowserUpload(home.root / FOLDER / key, by, files, known["asked"], known["run"], known["unpacked"])


def check(files: Sequence[tuple[str, int]]) -> None:
    """Raise Misconfigured if an upload can't have these files."""
    if len(files) > MOST_FILES:
        raise Misconfigured(f"an upload has at most {MOST_FILES} files: make several of them")
    if any(size < 0 for _, size in files) or sum(size for _, size in files) > limit():
        raise Misconfigured(f"an upload has at most {limit() >> 20} MiB: make several of them, or send from a folder")
    names, folders = {checked(path) for path, _ in files}, set[str]()
    for name in names:
        folders |= {str(one) for one in PurePosixPath(name).parents}
    if len(names) < len(files) or names & folders:
        raise Misconfigured("two files of the upload have the same name")


def checked(path: str) -> str:
    """Return the path of a file of an upload.

    Raises:
        Misconfigured: it leads out of the upload, or no file can have it.
    """
    parts = path.split("/")
    good = (
        0 < len(path.encode("utf-8", "surrogatepass")) <= PATH_B
        and len(parts) <= DEPTH
        and path.isprintable()
        and all(part not in ("", ".", "..") and len(part.encode()) <= NAME_B for part in parts)
    )
    if not good or "\\" in path:
        raise Misconfigured("a file of the upload has a name that can't be used here")
    return path


def room(folder: Path, size: int) -> None:
    """Raise Rejected if a file system has no room for so many bytes."""
    if shutil.disk_usage(folder).free - size < RESERVE_B:
        raise Rejected("there is not enough free space for this upload on Talaria's machine")


def tidy(home: Home, before: float, keep: Sequence[str] | set[str] = ()) -> int:
    """Remove uploads that are not needed any more; return how many.

    Args:
        before: seconds since the epoch: what could not be delivered goes too if it is older.
        keep: ids of runs that have not ended.
    """
    count, yesterday = 0, time.time() - DAY_S
    for path in (home.root / FOLDER).glob("*/upload.json"):
        try:
            run, touched = json.loads(path.read_text(encoding="utf-8"))["run"], path.parent.joinpath("files").stat()
            since = max(path.stat().st_mtime, touched.st_mtime)
        except (OSError, ValueError, KeyError):  # it is being removed just now, or made
            continue
        if run in keep and run:
            continue
        if since < before or (since < yesterday and (not run or _is_delivered(home, run))):
            shutil.rmtree(path.parent, ignore_errors=True)
            count += 1
    return count


def _is_delivered(home: Home, run: str) -> bool:
    with suppress(OSError, ValueError):
        return bool(json.loads(home.receipt(run).read_text(encoding="utf-8"))["state"] == "delivered")
    return False


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _unpack(path: Path, left: int) -> int:
    """Unpack an archive beside itself; return the bytes of what it holds."""
    into = path.with_suffix("")
    if into.exists():
        into = path.with_name(f"{path.name}.unpacked")
    try:
        with zipfile.ZipFile(path) as archive:
            found = _allowed(archive, path.parent, left)
            for one in found:
                _extract(archive, one, into / one.filename)
    except (Misconfigured, Rejected) as exc:
        raise Rejected(f"{path.name}: {exc.message}") from exc
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, RuntimeError) as exc:
        shutil.rmtree(into, ignore_errors=True)
        raise Rejected(f"{path.name} can't be unpacked: it is damaged, or of a kind that is not known here") from exc
    return sum(one.file_size for one in found)


def _allowed(archive: zipfile.ZipFile, into: Path, left: int) -> list[zipfile.ZipInfo]:
    """Return the files of an archive.

    Raises:
        Misconfigured, Rejected: there are too many or they are too large, encrypted, links, or with names that lead
            away.
    """
    found = [one for one in archive.infolist() if not one.is_dir()]
    check([(one.filename, one.file_size) for one in found])
    total = sum(one.file_size for one in found)
    if total > left:
        raise Rejected("it holds more than is left of what an upload may have")
    if any(one.flag_bits & 1 or stat.S_ISLNK(one.external_attr >> 16) for one in found):
        raise Rejected("it is encrypted, or holds links: unpack it first")
    room(into, total)
    return found


def _extract(archive: zipfile.ZipFile, one: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    left = one.file_size  # what the archive says; it must not be more
    with archive.open(one) as source, open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        while piece := source.read(PIECE):
            left -= len(piece)
            if left < 0:
                raise zipfile.BadZipFile("a file is longer than the archive says")
            file.write(piece)
