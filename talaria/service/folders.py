"""What lies in a folder of this machine, for whoever chooses what to send, or where to: below allowed roots only."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from transfer.errors import Denied, NotFound
from transfer.roots import Roots, base_of, is_in, is_silent, state_folder

MOST = 500  # names of a folder that are listed


@dataclass(frozen=True)
class Entry:
    """One name in a folder. `size` is in bytes; of a folder 0."""

    path: str
    name: str
    folder: bool
    size: int = 0


@dataclass
class Listing:
    """A folder, or (with the path "") the roots themselves.

    Attributes:
        up: path of the folder above, "" for the roots; None where there is nothing above.
        left_out: how many more names there are, and those that no page can show.
    """

    path: str
    up: str | None = None
    entries: list[Entry] = field(default_factory=list)
    left_out: int = 0


def listing(roots: Roots, path: str) -> Listing:
    """List a folder: its folders first, by name.

    Args:
        path: absolute; "" for the roots, or the only root.

    Raises:
        Denied, NotFound: it lies below no root, is not there, or can't be read.
    """
    tops = [one for one in roots.folders if not is_in(base_of(one), state_folder())]
    if not path:
        if len(tops) > 1:
            there = [one for one in tops if not is_silent(one) and Path(one).is_dir()]
            return Listing("", entries=[Entry(one, one, folder=True) for one in there])
        if not tops:
            raise Denied(f"{roots.setting} names no folder that can be looked into")
        path = tops[0]
    path = os.path.normpath(path)
    try:
        fd = roots.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except NotADirectoryError as exc:
        raise NotFound(f"{path} is not a folder") from exc
    except OSError as exc:
        raise Denied(f"{path}: {exc.strerror}") from exc
    try:
        found, hidden = _entries(fd, path)
    finally:
        os.close(fd)
    found.sort(key=lambda one: (not one.folder, one.name.casefold()))
    above = str(Path(path).parent)
    up = above if path not in tops else "" if len(tops) > 1 else None
    return Listing(path, up, found[:MOST], hidden + max(0, len(found) - MOST))


def _entries(fd: int, path: str) -> tuple[list[Entry], int]:
    found, hidden = [], 0
    with os.scandir(fd) as names:
        for one in names:
            if not one.name.isprintable():
                hidden += 1
                continue
            try:
                folder = one.is_dir()
                size = 0 if folder else one.stat().st_size
            except OSError:  # a link that leads nowhere, or it has gone
                hidden += 1
                continue
            found.append(Entry(os.path.join(path, one.name), one.name, folder, size))
    return found, hidden
