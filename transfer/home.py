"""Where Talaria keeps its state on this machine, and which of its processes are alive.

TALARIA_HOME (default ~/.talaria, mode 0700)
├── ledger.sqlite     what arrived where, unless TALARIA_LEDGER names a database
├── identity          a name for this directory, where several share a ledger
├── receipts/         one JSON file per flow run
├── progress/         how far each flow run is that runs, or has just ended
├── listening/        one file per listener that is at work
├── uploads/          one folder per upload: what people send from their browsers
├── staging/          one folder per running flow run, and process that runs it
├── received/         one folder per DICOM source, of what was not delivered yet
├── sources/          what dispatches of sources send: lists of units
├── indexes/          one file per folder that is searched and can't hold its index itself
├── owners/           one locked file per living process that runs dispatches
└── locks/            one file per dispatch and destination in progress
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

WAIT_S = 0.2  # between two looks at a lock that somebody else holds
# One of these is in each folder that is a state directory; the others may be in one that is to be.
OURS = {"identity", "api.auth", "worker.auth", "encryption.key", "ledger.sqlite", "users.json", "tokens.json", "audit"}
NEW = {"prefect", "demo", "talaria.toml", "lost+found"}
FOLDERS = {
    *("receipts", "progress", "listening", "uploads", "staging", "received", "sources", "indexes", "owners", "locks"),
    *("logs", "checks", "failed", "retrievals", "waiting"),
}


@dataclass(frozen=True)
class Home:
    """The state directory."""

    root: Path

    @classmethod
    def current(cls) -> Home:
        """Return the directory that TALARIA_HOME names; make it if it isn't there.

        Raises:
            OSError: it can't be made or written to, or belongs to somebody else, or is a folder that others use.
        """
        home = cls(Path(os.environ.get("TALARIA_HOME") or "~/.talaria").expanduser().absolute())
        home.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = home.root.stat()
        if info.st_uid != os.geteuid():  # whoever owns it can change what we keep there
            raise PermissionError(errno.EPERM, "the state directory belongs to another user", str(home.root))
        if info.st_mode & 0o077:  # made by something else, for everybody to read
            there = {name for name in os.listdir(home.root) if not name.startswith(".")}  # as .snapshot of a volume
            if there - NEW - FOLDERS and not there & OURS:  # /tmp, or /: nobody else could use it any more
                words = "others can read it, and it has files that are not Talaria's: name a new one, or chmod 700 it"
                raise PermissionError(errno.EPERM, words, str(home.root))
            home.root.chmod(0o700)
        return home

    @property
    def ledger(self) -> Path | str:
        """Where the ledger is: a file, or the URL of a database that several hosts share."""
        return os.environ.get("TALARIA_LEDGER") or self.root / "ledger.sqlite"

    def identity(self) -> str:
        """Return a name that no other state directory has, made on first use; a copy of one gets another name."""
        path = self.root / "identity"
        with open(path, "a+", encoding="ascii", opener=private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            name, _, inode = file.read().partition(" ")
            ours = str(os.fstat(file.fileno()).st_ino)
            if not name or (inode or ours) != ours:
                name, inode = uuid.uuid4().hex, ""
            if not inode:  # a new one, or of an earlier Talaria
                file.truncate(0)
                file.write(f"{name} {ours}")
        return name

    def kernel(self) -> str:
        """Return a mark of the running kernel that keeps the locks of this directory, and of the folder they are in.

        Only whoever has the same mark can say of an owner that it is not alive: not another machine that has a copy of
        the directory, or the same share, and not this one after it has begun anew.
        """
        info = self.root.stat()
        return f"{_boot_id()} {info.st_dev:x} {info.st_ino:x}"

    def receipt(self, flow_run_id: str) -> Path:
        """Return the path of a flow run's receipts."""
        return self.root / "receipts" / f"{flow_run_id}.json"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @contextmanager
    def owner(self, label: str = "") -> Iterator[str]:
        """Make this process an owner of flow runs; yields an id that is alive until the block or the process ends.

        Args:
            label: the name that others know it by.
        """
        folder = self.root / "owners"
        folder.mkdir(exist_ok=True, mode=0o700)
        name = uuid.uuid4().hex
        path = folder / name
        with open(path, "w", encoding="ascii", opener=private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(label)
            file.flush()
            try:
                yield name
            finally:
                path.unlink(missing_ok=True)

    def alive(self, owner: str) -> bool:
        """Return True if an owner's process still runs; the kernel releases the lock of one that was killed.

        Args:
            owner: "" for that of a run which nobody has.
        """
        if not owner:
            return False
        try:
            with open(self.root / "owners" / owner, encoding="ascii") as file:
                # Shared: of two who look at once, neither takes the other one for the owner.
                return not _take(file.fileno(), fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def owners(self) -> set[str]:
        """Return the labels of the owners that are alive."""
        folder, found = self.root / "owners", set()
        for path in folder.iterdir() if folder.is_dir() else ():
            with suppress(FileNotFoundError):
                if self.alive(path.name):
                    found.add(path.read_text(encoding="ascii"))
        return found

    @contextmanager
    def exclusive(self, name: str, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait for a lock that all processes of this state directory share, and hold it during the block.

        Args:
            check: called while waiting; may raise to give up.
        """
        folder = self.root / "locks"
        folder.mkdir(exist_ok=True, mode=0o700)
        path = folder / name
        while True:
            with open(path, "a", encoding="ascii", opener=private) as file:
                while not _take(file.fileno()):
                    check()
                    time.sleep(WAIT_S)
                if not _is_still(path, file.fileno()):
                    continue  # who held it has removed the file: a lock on it keeps nobody out any more
                try:
                    yield
                    return
                finally:
                    path.unlink(missing_ok=True)


def _boot_id() -> str:
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
    return socket.gethostname()


def host_name() -> str:
    """Return the name by which other hosts know this one: TALARIA_HOST_NAME, or what the system has."""
    return os.environ.get("TALARIA_HOST_NAME") or socket.gethostname()


def private(path: str, flags: int) -> int:
    """Open a file of the state directory, for `open(opener=...)`: only we may read one that is made."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@contextmanager
def locked(path: Path, how: int) -> Iterator[IO[str] | None]:
    """Hold a lock on a file of the state directory during the block, as flock(2) takes it.

    Yields:
        The file; None if the lock was asked for without waiting and somebody else has it.
    """
    with open(path, "a", encoding="ascii", opener=private) as file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            yield None
            return
        yield file


def _is_still(path: Path, fd: int) -> bool:
    """Return True if an open file is still the one with this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _take(fd: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
