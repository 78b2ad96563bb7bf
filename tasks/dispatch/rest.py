"""What a dispatch that waits leaves behind for its next part, so that it holds nothing meanwhile.

A run that can't go on for a while ends its part: no thread, no slot of a target, no staged file is kept.
`TALARIA_HOME/waiting/<flow run id>.json` says what it has achieved; names of files
stand in it, as in a receipt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transfer.home import Home
from transfer.live import replace

TRIES_AGAIN = "tries again"  # begins the message of a run that waits for something that may come soon
WAITS = "waits"  # and of one that waits for a time that people have set


@dataclass
class Wait:
    """What a run waits for.

    Attributes:
        until: when it looks again.
        what: what for, as in "a slot at pacs".
        soon: whether nobody has to do anything for it to come.
    """

    until: datetime
    what: str
    soon: bool = True


def next_attempt(target: str, again: float, script: int = 0) -> Wait:
    """Return the wait for a target's next attempt, or the next run of its script, at a time since the epoch."""
    what = "run of the script" if script else "attempt"
    return Wait(datetime.fromtimestamp(again, UTC), f"the next {what} at {target}")


@dataclass
class Left:
    """What a run has achieved at one target, and what it knows of the rest.

    Attributes:
        begun: when its first attempt began, in seconds since the epoch; 0 before it.
        since: when it began to wait for a slot; 0 if it doesn't.
        again: when its next attempt may begin.
        error: the name of the class of its last error.
        ended: whether nothing is left to do.
        hook_tries: how often the target's script has failed; then everything has arrived, `verified` says how surely.
    """

    attempts: int = 0
    futile: int = 0
    failures: list[str] = field(default_factory=list)
    begun: float = 0.0
    tried: float = 0.0
    since: float = 0.0
    again: float = 0.0
    error: str = ""
    ended: bool = False
    stumbled: list[str] = field(default_factory=list)
    unanswered: dict[str, int] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    put_off: dict[str, str] = field(default_factory=dict)
    hook_tries: int = 0
    verified: str = "accepted"
    notes: list[str] = field(default_factory=list)


@dataclass
class Rest:
    """What a run has left behind.

    Attributes:
        document: its receipts so far; {} for a run that has not rested, or has read no files.
        left: by target.
        artifacts: ids of its progress artifacts, by target.
        unread: whether it has read no files yet, so that it has no receipts.
    """

    document: dict[str, Any] = field(default_factory=dict)
    left: dict[str, Left] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    unread: bool = False

    def studies(self, target: str) -> Sequence[dict[str, Any]]:
        """Return the rows of a flood's studies, if it has begun at a target; where it is retried, it begins anew."""
        return self.document.get("studies", ()) if target in self.left and self.left[target].begun else ()


def load(home: Home, run_id: str) -> Rest:
    """Return what a run has left behind; an empty one if it is not known, and then the ledger knows what arrived."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(_path(home, run_id).read_bytes())
        left = {name: Left(**one) for name, one in kept["left"].items()}
        if kept.get("unread"):
            return Rest(left=left, unread=True)
        return Rest(json.loads(home.receipt(run_id).read_bytes()), left, kept["artifacts"])
    return Rest()


def save(home: Home, run_id: str, rest: Rest) -> None:
    """Keep what a run leaves behind; its receipts are a file of their own."""
    left = {name: asdict(one) for name, one in rest.left.items()}
    replace(_path(home, run_id), {"left": left, "artifacts": rest.artifacts, "unread": rest.unread})


def rests(home: Home, run_id: str) -> bool:
    """Return True if a run has ended a part of it only."""
    return _path(home, run_id).exists()


def forget(home: Home, run_id: str) -> None:
    """Remove what a run has left behind: it is over, or begins anew."""
    with suppress(OSError):
        _path(home, run_id).unlink()


def leave_out(home: Home, run_id: str, targets: Iterable[str]) -> bool:
    """Let a run that has ended do no more for some targets when it runs again; return False if it left no receipts."""
    if not home.receipt(run_id).exists():
        return False
    save(home, run_id, Rest(left={name: Left(ended=True) for name in targets}))
    return True


def message(waits: Iterable[Wait], receipts: str) -> str:
    """Return the message of a run that waits: until when, for what, and how far it is."""
    found = sorted(waits, key=lambda one: one.until)
    how, at = (TRIES_AGAIN, "at") if any(one.soon for one in found) else (WAITS, "until")
    first = found[0].until.astimezone(UTC)
    day = "" if first.date() == datetime.now(UTC).date() else f"{first:%Y-%m-%d} "
    return f"{how} {at} {day}{first:%H:%M:%S} UTC: {', '.join(one.what for one in found)}; {receipts}"


def awaited(said: str) -> str:
    """Return what a run waits for, by such a message; "" if it is none."""
    if not said.startswith((TRIES_AGAIN, WAITS)):
        return ""
    return said.partition(" UTC: ")[2].partition("; ")[0]


def _path(home: Home, run_id: str) -> Path:
    return home.waiting / f"{run_id}.json"
