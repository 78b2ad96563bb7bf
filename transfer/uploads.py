"""What people upload to be sent: `TALARIA_HOME/uploads/ID/`, which holds `upload.json` and the files as they come in.

An upload is announced with the names and sizes of its files; each file is then appended to, from wherever it is, so
that one that broke off goes on. Archives (.zip) are unpacked when all is there. A day after it was delivered, or last
touched if it never was sent, an upload is removed; one that could not be delivered stays as long as receipts do.

`lock` in its folder says who works on it: those who bring pieces share it; whoever unpacks, sends or removes it has it
alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import lzma
import os
import secrets
import shutil
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from transfer.errors import Busy, Misconfigured, NotFound, Rejected
from transfer.home import Home, locked
from transfer.ledger import write_json
from transfer.oserrors import kind_of, words_of

FOLDER = "uploads"
LIMIT, LIMIT_B = "TALARIA_UPLOAD_LIMIT", 50 << 30  # bytes of one upload, and of what its archives hold
MOST_FILES = 100_000
RESERVE_B = 1 << 30  # of the file system, which uploads leave free: the ledger lies there, too
NAME_B, PATH_B, DEPTH = 255, 2048, 32
DAY_S = 86_400.0
PIECE = 1 << 20
# An entry in an archive's list of files: lengths of its name, of what is extra, and of its comment; it has many bytes
# more only in one that is made to fill the memory.
ENTRY, ENTRY_B = struct.Struct("<28x3H12x"), 400
ZIP = ".zip"
# What zipfile and the decoders raise of a damaged one.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError)


@dataclass
class BrowserUpload:
    """One upload.

    Attributes:
        by: who has begun it; nobody else may go on with it.
        files: path below `content` and size in bytes of each.
        asked: what is to be done with it.
        run: id of the flow run that sends it; "" before.
        sending: whether a run may have been made for it, known here or not.
        unpacked: whether all was there, and its archives are unpacked.
    """

    folder: Path
    by: str
    files: list[tuple[str, int]] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)
    run: str = ""
    sending: bool = False
    unpacked: bool = False

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def content(self) -> Path:
        return self.folder / "files"

    def save(self) -> None:
        """Save what is known of it, whole or not at all."""
        known = {name: getattr(self, name) for name in ("by", "files", "asked", "run", "sending", "unpacked")}
        write_json(self.folder / "upload.json", known)

    @contextmanager
    def held(self, *, alone: bool = True) -> Iterator[None]:
        """Keep others from working on it during the block: everybody, or those who need it alone.

        Raises:
            Busy: somebody works on it. NotFound: it has been removed.
        """
        how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        with ExitStack() as stack:
            try:
                mine = stack.enter_context(locked(self.folder / "lock", how | fcntl.LOCK_NB))
            except FileNotFoundError as exc:
                raise _gone() from exc
            if mine is None:
                raise Busy("another request works on this upload just now: try again when it has ended")
            if not (self.folder / "upload.json").exists():
                raise _gone()
            yield

    def sizes(self) -> list[int]:
        """Return how many bytes of each file are there; all of them once the archives among them are unpacked."""
        if self.unpacked:
            return [size for _, size in self.files]
        return [_size(self.content / path) for path, _ in self.files]

    def append(self, number: int, offset: int) -> Appending:
        """Return a file to append to.

        Raises:
            NotFound: there is no such file, or no such upload any more.
            Misconfigured: it has another length than `offset`, or is in use already.
            Busy: somebody else appends to it, or sends the upload.
        """
        if not 0 <= number < len(self.files):
            raise NotFound(f"the upload has no file {number}")
        if self.unpacked:
            raise Misconfigured("all files of this upload are there")
        path, size = self.files[number]
        return Appending(self, path, size, offset)

    def missing(self) -> int:
        """Return how many files are not whole."""
        return sum(there != size for there, (_, size) in zip(self.sizes(), self.files, strict=True))

    def unpack(self) -> None:
        """Unpack the archives, each into a folder of its name, and remove them; do nothing if that was done.

        Whoever calls holds the upload alone. What a process that was killed has left half done is done anew: archives
        are unpacked elsewhere, and appear among the files when all of them are whole.

        Raises:
            Rejected: one is damaged, encrypted, or holds what an upload may not.
            Busy: there is no room, or the disk fails in another way that may pass.
        """
        archives, aside = self._archives(), self.folder / "unpacking"
        shutil.rmtree(aside, ignore_errors=True)
        if not self.unpacked:
            try:
                left = limit() - sum(size for _, size in self.files)
                paths = [self.content / path for path in archives]
                _unpack_all(paths, aside, left, MOST_FILES - len(self.files) + len(paths))
                for number, into in enumerate(archives.values()):
                    shutil.rmtree(
                        self.content / into, ignore_errors=True
                    )  # as it was made by a process that was killed
                    if (made := aside / str(number)).exists():  # else the archive was empty
                        made.rename(self.content / into)
            except OSError as exc:
                raise trouble(exc) from exc
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            self.unpacked = True
            self.save()
        for path in archives:
            (self.content / path).unlink(missing_ok=True)

    def _archives(self) -> dict[str, str]:
        """Return the archives, and the folder that each is unpacked into: one whose name nothing of the upload has."""
        used = {path for path, _ in self.files}
        for path, _ in self.files:
            used |= {str(one) for one in PurePosixPath(path).parents}
        found: dict[str, str] = {}
        for path in sorted(path for path, _ in self.files if path.lower().endswith(ZIP)):
            into = path[: -len(ZIP)]
            if into in used or into.endswith("/") or not into:
                into = f"{path}.unpacked"
            while into in used:
                into += "_"
            used.add(into)
            found[path] = into
        return found

    def top(self) -> Path:
        """Return the folder whose folders a user means: below the one that was chosen, if that is all there is."""
        entries = list(self.content.iterdir())
        return entries[0] if len(entries) == 1 and entries[0].is_dir() else self.content


class Appending:
    """A file of an upload that is appended to, by nobody else meanwhile; used by one thread at a time."""

    def __init__(self, upload: BrowserUpload, path: str, size: int, offset: int) -> None:
        self._upload = upload
        with ExitStack() as stack:
            stack.enter_context(upload.held(alone=False))
            file = upload.content / path
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, self._fd)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise Busy("another connection brings this file just now: try again when it has ended") from exc
            self.offset, self._left = os.fstat(self._fd).st_size, size - offset
            if self.offset != offset:
                raise Misconfigured(f"{self.offset} bytes of this file are there: go on from them")
            self._open = stack.pop_all()

    def write(self, data: bytes) -> None:
        """Append; what comes beyond the announced size is refused.

        Raises:
            Misconfigured: there is more than was announced. Rejected: there is no room. Busy: it can't be written now.
        """
        if len(data) > self._left:
            raise Misconfigured("the file is longer than was announced")
        room(self._upload.folder, len(data))
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._fd, view, self.offset)
                view, self.offset, self._left = view[count:], self.offset + count, self._left - count
        except OSError as exc:
            raise trouble(exc) from exc

    def close(self) -> None:
        with suppress(OSError):
            os.utime(self._upload.folder / "upload.json")  # somebody still brings it: see `tidy`
        self._open.close()


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
    if not key.isalnum():
        raise _gone()
    try:
        known = json.loads((home.root / FOLDER / key / "upload.json").read_text(encoding="utf-8"))
    except OSError as exc:
        raise _gone() from exc
    if known["by"] != by:
        raise _gone()
    known["files"] = [(str(path), int(size)) for path, size in known["files"]]
    return BrowserUpload(home.root / FOLDER / key, **known)


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
    for folder in (home.root / FOLDER).glob("*/"):
        path = folder / "upload.json"
        with suppress(OSError):
            if not path.exists() and folder.stat().st_mtime < yesterday:  # of a process that was killed
                shutil.rmtree(folder, ignore_errors=True)
        with suppress(Busy, NotFound, OSError), BrowserUpload(folder, "").held():
            run, sending, since = _way(path)
            if run and run in keep:
                continue
            done = _is_delivered(home, run) if run else not sending
            if since < before or (since < yesterday and done):
                path.unlink()  # first: nobody goes on with what a process that is killed here leaves of it
                shutil.rmtree(folder, ignore_errors=True)
                count += 1
    return count


def _way(path: Path) -> tuple[str, bool, float]:
    """Return how far an upload has come: its run, whether it may have another, and when it was last touched."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        run, sending = str(known["run"]), bool(known.get("sending"))
    except (ValueError, KeyError, TypeError):  # nobody can go on with it
        run, sending = "", False
    return run, sending, path.stat().st_mtime


def _is_delivered(home: Home, run: str) -> bool:
    with suppress(OSError, ValueError):
        return bool(json.loads(home.receipt(run).read_text(encoding="utf-8"))["state"] == "delivered")
    return False


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _gone() -> NotFound:
    return NotFound("this upload is not known any more: begin it again")


def trouble(exc: OSError) -> Busy | Rejected:
    """Return what to say where the disk fails, without any path.

    Raises:
        OSError: it is a bug of ours.
    """
    kind = kind_of(exc)
    if kind is None:
        raise exc
    return (Busy if kind.retryable else Rejected)(f"it can't be kept on Talaria's machine: {words_of(exc)}")


def _unpack_all(archives: Sequence[Path], aside: Path, left: int, files: int) -> None:
    """Unpack archives into folders that are numbered as they are.

    Args:
        left, files: bytes and files that all of them may hold.

    Raises:
        Rejected: one is damaged, encrypted, or holds what an upload may not. OSError: it can't be read or written.
    """
    for number, path in enumerate(archives):
        try:
            _count(path, 2 * files)  # with folders
            with zipfile.ZipFile(path) as archive:
                found = _allowed(archive, aside.parent, left, files)
                for one in found:
                    _extract(archive, one, aside / str(number) / one.filename)
        except (Misconfigured, Rejected) as exc:
            raise Rejected(f"{path.name}: {exc.message}") from exc
        except (*DAMAGED, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno not in (None, errno.EINVAL):  # these: of what stands in it
                raise
            words = "can't be unpacked: it is damaged, or of a kind that is not known here"
            raise Rejected(f"{path.name} {words}") from exc
        left -= sum(one.file_size for one in found)
        files -= len(found)


def _count(path: Path, most: int) -> None:
    """Count the entries of an archive before they are read into memory as objects.

    Raises:
        Rejected: there are more than `most`.
    """
    with open(path, "rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # nothing public tells before it has read them
        if not end:
            return  # no archive, as ZipFile is going to say
        size = end[zipfile._ECD_SIZE]  # type: ignore[attr-defined]
        file.seek(max(0, end[zipfile._ECD_LOCATION] - size))  # type: ignore[attr-defined]
        listed = file.read(min(size, most * ENTRY_B + 1))
    at = count = 0
    while at + ENTRY.size <= len(listed):
        at += ENTRY.size + sum(ENTRY.unpack_from(listed, at))
        count += 1
    if count > most or len(listed) > most * ENTRY_B:
        raise Rejected(_too_many())


def _too_many() -> str:
    return f"with it, the upload has more than {MOST_FILES} files: make several of them"


def _allowed(archive: zipfile.ZipFile, into: Path, left: int, files: int) -> list[zipfile.ZipInfo]:
    """Return the files of an archive.

    Raises:
        Misconfigured, Rejected: there are too many or they are too large, encrypted, links, or with names that lead
            away.
    """
    found = [one for one in archive.infolist() if not one.is_dir()]
    check([(one.filename, one.file_size) for one in found])
    total = sum(one.file_size for one in found)
    if len(found) > files:
        raise Rejected(_too_many())
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
