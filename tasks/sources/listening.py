"""What the process that listens for modalities says of itself, in a file of the state directory that it keeps true.

`listening.json` holds `pid`, `time` (seconds since the epoch) and `sources`. Each source, by name: `port`, `aet`,
`state` (listening, paused, failed), `error`, `associations` (open now), `receiving` (units that are not complete),
`full` (whether the disk is), and `totals` since the process began: associations, instances, bytes, duplicates,
versions, failed, refused (by reason).
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from transfer.home import Home
from transfer.ledger import write_json

FILE = "listening.json"


def status(home: Home) -> dict[str, Any]:
    """Return what is known of each source that a process listens for; nothing if none does."""
    with suppress(OSError, ValueError, KeyError, AttributeError):
        return dict(json.loads((home.root / FILE).read_text(encoding="utf-8"))["sources"])
    return {}


def trouble(home: Home, name: str) -> str:
    """Return why a source does not listen, in a sentence; "" if it does."""
    there = status(home)
    if not there:
        return "nobody listens: `talaria up` does not run, or has not begun to"
    return str(there[name].get("error", "")) if name in there else "it does not listen yet"


def write(home: Home, about: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    write_json(home.root / FILE, about)


def clear(home: Home) -> None:
    """Remove the file: nobody listens any more."""
    (home.root / FILE).unlink(missing_ok=True)
