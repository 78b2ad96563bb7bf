"""Finds the files of a source, by way of links that stay inside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from enum import Enum, auto

from transfer.beneath import FOLDER, resolved
from transfer.errors import Misconfigured
from transfer.source import LeadsOut, Sources

MAX_LINKED_FOLDERS = 10_000  # links to folders that hold links to folders multiply


def files(source: str, sources: Sources, check: Callable[[], None]) -> Iterator[tuple[str, int, str]]:
    """Yield every file below a source, in any order: its folder, that folder opened, and its name there.

    The descriptor, which is closed later, is -1 for what may be no plain file. A link to a folder inside the source is
    followed, unless it leads back to a folder that it is in. A link to one outside, and a folder that can't be listed,
    are yielded as files, so that they are refused by name.
    """
    if not os.path.isdir(source):
        yield _apart(source)
        return
    links, top = 0, source
    # A folder, where it really is, and the real folders on the way to it.
    stack: list[tuple[str, str, frozenset[str]]] = [(source, top, frozenset((top,)))]
    while stack:
        folder, place, above = stack.pop()
        check()
        try:
            fd = sources.open(folder, FOLDER)
        except (OSError, LeadsOut):
            yield _apart(folder)
            continue
        try:
            try:
                entries = _listed(fd)
            except OSError:
                yield _apart(folder)
                continue
            path = folder.rstrip("/")
            for name, kind in entries:
                if kind is _Kind.PLAIN:
                    yield path, fd, name
                    continue
                if kind is _Kind.OTHER:
                    yield path, -1, name
                    continue
                real = f"{place.rstrip('/')}/{name}"
                if kind is _Kind.LINKED:
                    real = _end_of(f"{path}/{name}")
                    if not sources.hold(real):
                        yield path, -1, name  # refused by name
                        continue
                    if any(one == real or one.startswith(f"{real}/") for one in above):
                        continue
                    links += 1
                    if links > MAX_LINKED_FOLDERS:
                        raise Misconfigured(
                            f"{source}: more than {MAX_LINKED_FOLDERS} links to folders, of one another"
                        )
                if sources.is_state(real):
                    yield path, -1, name
                    continue
                stack.append((f"{path}/{name}", real, above | {real}))
        finally:
            os.close(fd)


def _apart(path: str) -> tuple[str, int, str]:
    folder, _, name = path.rpartition("/")
    return folder, -1, name


def _end_of(path: str) -> str:
    """Return where a link leads; its own place if it is gone by now."""
    try:
        return resolved(path)
    except OSError:
        return path


class _Kind(Enum):
    PLAIN, FOLDER, LINKED, OTHER = auto(), auto(), auto(), auto()  # LINKED: a link to a folder


def _listed(fd: int) -> list[tuple[str, _Kind]]:
    """Return an opened folder's entries, and what they are."""
    found = []
    with os.scandir(fd) as listing:
        for entry in listing:
            try:
                is_folder = entry.is_dir()
                if is_folder:
                    kind = _Kind.LINKED if entry.is_symlink() else _Kind.FOLDER
                else:
                    kind = _Kind.PLAIN if entry.is_file(follow_symlinks=False) else _Kind.OTHER
            except OSError:  # a link in a circle, or to what may not be looked at
                kind = _Kind.OTHER
            found.append((entry.name, kind))
    return found
