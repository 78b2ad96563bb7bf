"""How far a run is, live: what other processes of this machine read of it."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from pathlib import Path
from uuid import uuid4

import pytest

from tasks.dispatch import progress, report
from tasks.dispatch.progress import Live, Part, live, read
from transfer import live as shown
from transfer.home import Home

RUN = str(uuid4())


def part(done: int, moved: int, *failures: str) -> Part:
    return Part(10, done, 1000, moved, moved / 10, f"{done} of 10 items to pacs", failures)


def test_a_look_is_written_whole_and_read_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    home, one = Home(tmp_path), Live(Home(tmp_path), RUN)
    assert read(home, RUN) is None
    one.write()
    look = read(home, RUN)
    assert look and (look["flow_run_id"], look["phase"], look["parts"]) == (RUN, "staging", {})
    assert abs(look["time"] - time.time()) < 60
    one.phase, one.parts = "sending", lambda: {"pacs": part(0, 0)}
    one.write()
    one.parts, now = lambda: {"pacs": part(4, 400, "attempt 1 of 3 failed: gone")}, 102.0
    one.write()
    look = read(home, RUN)
    assert look and look["phase"] == "sending"
    assert look["parts"]["pacs"] == {
        "items": 10,
        "done": 4,
        "bytes": 1000,
        "moved": 400,
        "percent": 40.0,
        "words": "4 of 10 items to pacs",
        "failures": ["attempt 1 of 3 failed: gone"],
        "rate": 200.0,
        "seconds_left": 3.0,
    }
    (path,) = (tmp_path / "progress").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # It stands still: the rate falls, and nothing is left to be written then.
    now = 110.0
    one.write()
    before = path.stat().st_mtime_ns
    one.write()
    assert path.stat().st_mtime_ns == before
    now += progress.KEPT_S / 2  # else who clears what has ended would take it for that
    path.unlink()
    one.write()
    assert path.exists()
    look = read(home, RUN)
    assert look and (look["parts"]["pacs"]["rate"], look["parts"]["pacs"]["seconds_left"]) == (0.0, None)


def test_the_last_look_is_kept_for_those_who_follow_and_not_for_ever(tmp_path: Path) -> None:
    home = Home(tmp_path)

    async def run() -> None:
        async with live(home, RUN) as one:
            one.parts = lambda: {"pacs": part(10, 1000)}

    asyncio.run(run())
    look = read(home, RUN)
    assert look and look["phase"] == "ended" and look["parts"]["pacs"]["percent"] == 100.0
    progress.clear(home, lambda run_id: False)
    assert read(home, RUN)
    (path,) = (tmp_path / "progress").iterdir()
    old = time.time() - progress.KEPT_S - 1
    os.utime(path, (old, old))
    progress.clear(home, lambda run_id: True)
    assert read(home, RUN)
    progress.clear(home, lambda run_id: False)
    assert read(home, RUN) is None


def test_a_look_that_a_power_cut_has_emptied_is_none(tmp_path: Path) -> None:
    home = Home(tmp_path)
    Live(home, RUN).write()
    (path,) = (tmp_path / "progress").iterdir()
    path.write_bytes(b"")
    assert read(home, RUN) is None


@pytest.mark.parametrize("here", [True, False])
def test_the_server_has_how_far_a_run_is_at_its_rest(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update costs it a call; meanwhile it has them only for those who may follow on another machine."""
    monkeypatch.setenv(shown.FOLLOWED_HERE, "1" if here else "")
    monkeypatch.setattr(report, "PROGRESS_S", 0.0)
    monkeypatch.setattr(report, "FAR_S", 0.0)
    updates: list[bool] = []
    enough = asyncio.Event()

    async def update() -> None:
        updates.append(True)
        if len(updates) > 2:
            enough.set()

    async def run(*, known: bool) -> int:
        """Return how many updates there were while it ran."""
        async with report.updated(update, known=known):
            for _ in range(20):
                await asyncio.sleep(0)
            if not here:
                await asyncio.wait_for(enough.wait(), 60)
            return len(updates)

    meanwhile = asyncio.run(run(known=False))
    assert meanwhile == 0 if here else meanwhile > 2
    assert len(updates) > meanwhile
    updates.clear()
    monkeypatch.setattr(report, "PROGRESS_S", 3600.0)  # what is short has none, unless an earlier part had
    here = True
    assert asyncio.run(run(known=False)) == 0 == len(updates)
    assert asyncio.run(run(known=True)) == 0 and len(updates) == 1


@pytest.mark.parametrize("name", ["../ledger", "..", "/etc/passwd", "", "a" * 40])
def test_only_a_run_can_be_asked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError):
        read(Home(tmp_path), name)
