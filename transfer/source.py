"""The files and folders that a dispatch was asked to send: what lies in them can be opened here, and nothing else."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transfer import roots
from transfer.beneath import WAY, above, is_link_error, open_beneath, resolved
from transfer.roots import Roots


class LeadsOut(Exception):
    """A path leads out of what was asked for, by a symbolic link."""


class Sources:
    """Files and folders, each with all that is in it. A context manager; safe to use from several threads.

    Closed at the latest when it is garbage collected.

    Args:
        paths: absolute, without links on the way.
        allowed: below which folders they must lie.

    Raises:
        Denied: one lies elsewhere, or in the state directory.
    """

    def __init__(self, paths: Iterable[str], allowed: Roots | None = None) -> None:
        allowed = allowed or roots.sources()
        self.paths = tuple(paths)
        self._paths = frozenset(self.paths)
        self._state = roots.state_folder()
        for path in self.paths:
            allowed.check(path)
        self._roots: list[tuple[str, int]] = []
        self.close = weakref.finalize(self, _close, self._roots)
        try:
            for root in map(roots.base_of, allowed.folders):
                if any(roots.is_in(path, root) for path in self.paths):
                    self._roots.append((root, os.open(root, WAY)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def hold(self, real: str) -> bool:
        """Return True if a path without links lies in one of the sources, and not in the state directory."""
        if roots.is_in(real, self._state) and roots.is_private(real):
            return False
        while True:
            if real in self._paths:
                return True
            higher = real.rpartition("/")[0] or "/"
            if higher == real:
                return False
            real = higher

    def is_state(self, real: str) -> bool:
        """Return True if a path without links is the state directory."""
        return real == self._state

    def open(self, path: str, flags: int = os.O_RDONLY | os.O_NONBLOCK) -> int:
        """Open what lies in a source, links on the way followed once as long as they stay inside.

        Raises:
            LeadsOut: they don't. OSError: it can't be opened; ELOOP if somebody puts links there meanwhile.
        """
        try:
            return open_beneath(*self._way(path), flags)
        except OSError as exc:
            if not is_link_error(exc):
                raise
        return open_beneath(*self._way(resolved(path, strict=True)), flags)

    @contextmanager
    def above(self, path: str) -> Iterator[tuple[int, str]]:
        """Yield the opened folder that holds what a path leads to, and its name there; raises as `open`.

        The name itself must be opened with O_NOFOLLOW.
        """
        with above(*self._way(resolved(path, strict=True))) as found:
            yield found

    def _way(self, path: str) -> tuple[int, str]:
        if self.hold(path):
            for root, fd in self._roots:
                if roots.is_in(path, root):
                    return fd, path[len(root.rstrip("/")) + 1 :] or "."
        raise LeadsOut(path)


def _close(opened: list[tuple[str, int]]) -> None:
    while opened:
        os.close(opened.pop()[1])


@dataclass(frozen=True)
class InPlace:
    """The files that a staged plan reads where they lie: below `root`, and within the sources.

    Attributes:
        untouched: whether nothing of theirs may change, their number of links neither.
    """

    root: Path
    sources: Sources
    untouched: bool = False

    def open(self, path: str, flags: int = os.O_RDONLY | os.O_NONBLOCK) -> int:
        """Open a file by its path relative to the root; OSError with ELOOP if it leads out of the sources."""
        try:
            return self.sources.open(f"{str(self.root).rstrip('/')}/{path}", flags)
        except LeadsOut as exc:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from exc
