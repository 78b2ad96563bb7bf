"""Files for programs that take secrets only from files: they vanish with this process, however it ends."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


class MemoryFiles:
    """Files that only this user's processes can read, until `close`.

    They lie in memory (memfd_create(2)) and are reached as `/proc/<pid>/fd/<n>`, so that nothing is left on a disk
    even if this process is killed. Where the system lacks that, they lie in a folder of mode 0700.
    """

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._folder: Path | None = None

    def add(self, content: bytes = b"", mode: int = 0o600) -> str:
        """Make a file with this content; return its path, which holds no blank and no quote."""
        if hasattr(os, "memfd_create") and Path(f"/proc/{os.getpid()}/fd").is_dir():
            fd = os.memfd_create("talaria")
            path = f"/proc/{os.getpid()}/fd/{fd}"
        else:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="talaria-ssh-"))
            path = str(self._folder / str(len(self._fds)))
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._fds.append(fd)
        os.fchmod(fd, mode)
        while content:
            content = content[os.write(fd, content) :]
        return path

    def __len__(self) -> int:
        return len(self._fds)

    def keep(self, count: int) -> None:
        """Remove all but the first so many files."""
        while len(self._fds) > count:
            os.close(self._fds.pop())
            if self._folder is not None:
                (self._folder / str(len(self._fds))).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files."""
        self.keep(0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def tail(path: str, limit: int = 1 << 20) -> bytes:
    """Return the last whole lines of such a file, up to `limit` bytes; b"" if it is gone."""
    try:
        with open(path, "rb") as file:
            skipped = max(0, os.fstat(file.fileno()).st_size - limit)
            file.seek(skipped)
            lines = file.read(limit)
    except OSError:
        return b""
    return lines.partition(b"\n")[2] if skipped else lines
