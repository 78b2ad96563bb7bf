"""How full the disks are that Talaria writes to: that of the state directory, and those of folder targets here.

A share whose server is gone never answers. Each place is asked in a thread of its own, which is waited for a moment;
as long as it hangs, nobody asks there again.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blocks.base import Target
from transfer.home import Home

STATE = "state directory"
WAIT_S = 2.0  # for an answer of a file system


@dataclass(frozen=True)
class DiskSpace:
    """The space where something is written to.

    Attributes:
        of: STATE, or a target's name.
        free, size: bytes; what is free is what this user may have.
    """

    of: str
    free: int
    size: int

    @property
    def percent(self) -> float:
        """What is free of it."""
        return 100.0 * self.free / self.size if self.size else 100.0


_hung: dict[str, threading.Thread] = {}
_turn = threading.Lock()


def spaces(home: Home, targets: Iterable[Target]) -> list[DiskSpace]:
    """Return the space in each place that answers."""
    places = {STATE: str(home.root)}
    for target in targets:
        folder = "" if target.node else str(getattr(target, "folder", "") or "")
        if target.enabled and target.stores and Path(folder).is_absolute():
            places[target.name] = folder
    with _turn:
        return [found for of, path in places.items() if (found := _asked(of, path))]


def _asked(of: str, path: str) -> DiskSpace | None:
    if path in _hung and _hung[path].is_alive():
        return None
    found: list[DiskSpace] = []

    def ask() -> None:
        try:
            usage = shutil.disk_usage(path)
        except OSError:
            return
        found.append(DiskSpace(of, usage.free, usage.total))

    thread = threading.Thread(target=ask, name="disk", daemon=True)
    thread.start()
    thread.join(WAIT_S)
    if thread.is_alive():
        _hung[path] = thread
    return found[0] if found else None
