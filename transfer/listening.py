"""How listeners for modalities are doing, for whoever looks at this machine: one small file for each, replaced whole.

TALARIA_HOME/listening/
├── <port>.json       counts since the listener began
└── sources.json      of each DICOM source: its port, AE title, state, and why it does not listen
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from transfer.home import Home
from transfer.live import replace

FULL = "accepts nothing: the disk of the state directory has too little room, or can't be used"
STALE_S = 60.0  # after which a listener that has not written its file counts as gone; it writes each few seconds


@dataclass(frozen=True)
class ListenerStatus:
    """What a listener has done since it began.

    Attributes:
        associations: those that are open now.
        accepted, refused: associations.
        unsecured: connections on which no association was asked for, as their TLS came to nothing.
        instances, bytes: that were answered with success.
        time: when this was written, in seconds since the epoch.
    """

    port: int
    associations: int = 0
    accepted: int = 0
    refused: int = 0
    instances: int = 0
    bytes: int = 0
    time: float = 0.0
    unsecured: int = 0


def write(home: Home, status: ListenerStatus) -> None:
    """Replace what is known of a listener. A disk that is full costs the sight of it, nothing else."""
    with suppress(OSError):
        replace(home.root / "listening" / f"{status.port}.json", asdict(status))


def forget(home: Home, port: int) -> None:
    """Remove what is known of a listener that has ended."""
    with suppress(OSError):
        (home.root / "listening" / f"{port}.json").unlink()


def listeners(home: Home) -> list[ListenerStatus]:
    """Return what is known of the listeners that are at work, by port."""
    found = []
    for path in sorted((home.root / "listening").glob("[0-9]*.json")):
        with suppress(OSError, ValueError, TypeError):
            one = ListenerStatus(**json.loads(path.read_bytes()))
            if one.time > time.time() - STALE_S:
                found.append(one)
    return sorted(found, key=lambda one: one.port)


def write_sources(home: Home, pid: int, sources: Mapping[str, Any]) -> None:
    """Replace what is known of the sources that a process listens for, by name."""
    with suppress(OSError):
        replace(home.root / "listening" / "sources.json", {"pid": pid, "sources": dict(sources)})


def sources(home: Home) -> dict[str, Any] | None:
    """Return what a process says of the sources that it listens for, by name; None if none does.

    Of each: `port`, `aet`, `state` (listening, paused, failed), `error`, `associations` (open now), `receiving` (units
    that are not complete), `full` (whether the disk is), and `totals` since the process began.
    """
    try:
        return dict(json.loads((home.root / "listening" / "sources.json").read_bytes())["sources"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def trouble(home: Home, name: str) -> str:
    """Return why a source does not listen, or accepts nothing, in a sentence; "" if it does."""
    there = sources(home)
    if there is None:
        return "nobody listens: `talaria up` does not run, or has not begun to"
    if name not in there:
        return "it does not listen yet"
    return str(there[name].get("error", "")) or (FULL if there[name].get("full") else "")


def clear(home: Home) -> None:
    """Remove all of it: nobody listens any more."""
    for path in (home.root / "listening").glob("*.json"):
        path.unlink(missing_ok=True)
