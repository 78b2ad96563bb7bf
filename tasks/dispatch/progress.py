"""How far a run is, live: one small file for each run, which any process of this machine may read.

The process that runs a dispatch or a retrieval writes `TALARIA_HOME/progress/<flow run id>.json` four times a second,
as long as something changes. A file is replaced as a whole (a reader sees one look, never a half), costs no call of an
API, and stays for KEPT_S after the run has ended or come to rest, so that a reader sees the last look too. There is
none for a run that has not begun, or that a worker of another machine runs: then the progress artifacts are all there
is, once a minute. (Where everybody comes in on this machine, they are written when a run that took long rests or ends.)

    {"flow_run_id": "…", "time": 1764366000.25,     when this was, in seconds since the epoch
     "phase": "staging",                            then "sending" (of a retrieval "fetching"), at the end "ended"
     "parts": {                                     by target; of a retrieval by its source; {} while files are read
       "pacs": {"items": 500, "done": 120,          files, and those with an outcome; of a retrieval studies
                "bytes": 262144000, "moved": 62914560,   to move, and moved; 0 and 0 where nobody counts them
                "percent": 24.0,                    100 only when all is done
                "rate": 31457280.0,                 bytes a second over the last seconds
                "seconds_left": 6.3,                null: not known
                "words": "120 of 500 items to pacs",
                "failures": ["attempt 1 of 3 failed: …"]}}}      the last of them, oldest first

`read` returns it. To follow a run, read again each 0.2 s (a look at a file of some hundred bytes) until the run's state
says that it is at rest; `ended` comes a moment before that.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from transfer.home import Home
from transfer.live import replace

LOOK_S = 0.25  # between two looks at a run's progress
RATE_S = 4.0  # over which the rate is taken
KEPT_S = 600  # how long the last look of a run is kept


@dataclass(frozen=True)
class Part:
    """How far one part of a run is."""

    items: int
    done: int
    bytes: int
    moved: int
    percent: float
    words: str
    failures: tuple[str, ...] = ()


class Live:
    """The progress of a run, as its runner writes it.

    Attributes:
        phase: what the run does.
        parts: returns how far each part is.
    """

    def __init__(self, home: Home, flow_run_id: str) -> None:
        self.phase = "staging"
        self.parts: Callable[[], Mapping[str, Part]] = dict
        self._run_id, self._path = flow_run_id, _path(home, flow_run_id)
        self._moved: dict[str, deque[tuple[float, int]]] = {}
        self._shown: dict[str, Any] = {}
        self._written = 0.0

    def write(self) -> None:
        """Write the progress, if it has changed, or not for so long that it would be cleared as that of a dead run."""
        now = time.monotonic()
        parts = {name: asdict(part) | self._speed(name, part, now) for name, part in self.parts().items()}
        look = {"flow_run_id": self._run_id, "phase": self.phase, "parts": parts}
        if look == self._shown and now - self._written < KEPT_S / 2:
            return
        self._shown, self._written = look, now
        replace(self._path, look | {"time": time.time()})

    def _speed(self, name: str, part: Part, now: float) -> dict[str, float | None]:
        seen = self._moved.setdefault(name, deque())
        seen.append((now, part.moved))
        while len(seen) > 2 and seen[1][0] < now - RATE_S:
            seen.popleft()
        (since, before), moved = seen[0], part.moved
        rate = max(0.0, (moved - before) / (now - since)) if now > since else 0.0
        left = max(0, part.bytes - moved) / rate if rate > 0 else None
        return {"rate": round(rate, 1), "seconds_left": None if left is None else round(left, 1)}


@asynccontextmanager
async def live(home: Home, flow_run_id: str) -> AsyncIterator[Live]:
    """Write a run's progress again and again until the block ends."""
    one = Live(home, flow_run_id)

    async def keep() -> None:
        while True:
            with suppress(OSError):  # a full disk ends the run soon enough
                one.write()
            await asyncio.sleep(LOOK_S)

    keeper = asyncio.create_task(keep())
    try:
        yield one
    finally:
        keeper.cancel()
        one.phase = "ended"
        with suppress(OSError):
            one.write()


def read(home: Home, flow_run_id: str) -> dict[str, Any] | None:
    """Return a run's last progress; None if there is none on this machine.

    Raises:
        ValueError: it is not the id of a run.
    """
    UUID(flow_run_id)  # so that a request over the network can't read another file
    try:
        text = _path(home, flow_run_id).read_bytes()
    except FileNotFoundError:
        return None
    with suppress(ValueError):  # a power cut may leave it empty: it is not flushed
        look: dict[str, Any] = json.loads(text)
        return look
    return None


def clear(home: Home, running: Callable[[str], bool]) -> None:
    """Remove progress that is older than KEPT_S or of killed runs; `running` returns which of those still run."""
    before = time.time() - KEPT_S
    for path in (home.root / "progress").glob("*.*"):
        with suppress(FileNotFoundError):  # another process has removed or replaced it
            if path.stat().st_mtime < before and not running(path.stem):
                path.unlink()


def _path(home: Home, flow_run_id: str) -> Path:
    return home.root / "progress" / f"{flow_run_id}.json"
