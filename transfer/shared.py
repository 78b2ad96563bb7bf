"""What several hosts that share a ledger have in common: folders that each has at the same path with the same files.

TALARIA_SHARED_SOURCES    what is sent from there may be sent by any of them
TALARIA_SHARED_PLACES     what one of them writes there, all have

Every other folder is one host's own, whatever lies at its path on another.
"""

from __future__ import annotations

import os
from pathlib import Path

from transfer import roots
from transfer.home import host_name

AT = "@"  # between a queue's name and its host's
HOST = "talaria.host"  # label of a run: where its files are, whatever its queue
KEPT = "talaria.kept"  # and where on that host those are that were kept of it when it was given up
SOURCES, PLACES = "TALARIA_SHARED_SOURCES", "TALARIA_SHARED_PLACES"


def several() -> bool:
    """Return True if several hosts share a ledger."""
    return bool(os.environ.get("TALARIA_LEDGER"))


def of_queue(queue: str | None) -> str:
    """Return the host whose queue it is; "" for a queue of all."""
    return (queue or "").rpartition(AT)[2] if AT in (queue or "") else ""


def host_of(folder: str | Path) -> str:
    """Return the host whose disk a folder to write to is on: this one; "" if all have it, or there is but one.

    Goes by the folder's name alone, as its file system may be silent.
    """
    if not several():
        return ""
    named = [one for name in (PLACES, SOURCES) for one in roots.parse(name, os.environ.get(name, ""))]
    return "" if any(roots.is_in(os.path.normpath(folder), one) for one in named) else host_name()
