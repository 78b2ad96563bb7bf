"""A small JSON file of the state directory that several processes read and change: users, tokens."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transfer.home import Home


class KeptFile:
    """A file that is whole or missing, mode 0600, and read again when it has changed."""

    def __init__(self, home: Home, name: str) -> None:
        self.home, self.path = home, home.root / name
        self._seen: tuple[int, int, int] | None = None
        self._entries: dict[str, dict[str, Any]] = {}

    def read(self) -> dict[str, dict[str, Any]]:
        """Return the entries by their key; none if there is no file.

        Raises:
            OSError: it can't be read, is damaged, or somebody else can read or change it.
        """
        try:
            info = self.path.lstat()
        except FileNotFoundError:
            return {}
        if info.st_uid != os.geteuid() or info.st_mode & 0o077 or not stat.S_ISREG(info.st_mode):
            raise PermissionError(errno.EPERM, "others can read or change it", str(self.path))
        mark = (info.st_ino, info.st_mtime_ns, info.st_size)
        if mark != self._seen:
            try:
                entries = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as exc:
                raise OSError(errno.EINVAL, f"damaged ({exc})", str(self.path)) from exc
            if not isinstance(entries, dict) or not all(isinstance(one, dict) for one in entries.values()):
                raise OSError(errno.EINVAL, "damaged (no objects by name)", str(self.path))
            self._entries, self._seen = entries, mark
        return self._entries

    @contextmanager
    def changing(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Yield the entries; write the block's changes at its end, if it ends without an error."""
        with self.home.exclusive(f"kept-{self.path.name}"):
            entries: dict[str, dict[str, Any]] = json.loads(json.dumps(self.read()))
            yield entries
            self._write(entries)

    def _write(self, entries: dict[str, dict[str, Any]]) -> None:
        fd, part = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.home.root)  # with mode 0600
        try:
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(entries, file, indent=1)
                file.flush()
                os.fsync(fd)
            Path(part).replace(self.path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
