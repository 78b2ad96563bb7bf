"""Watching files: what is written to is a change, a link that comes and goes is none."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from transfer import inotify, watch
from transfer.errors import Rejected
from transfer.plan import Plan, scan
from transfer.staging import discard
from transfer.watch import Watch


def come_and_go(file: Path, name: str = "link") -> None:
    """Make a link to a file and remove it, as a dispatch of it does; its time of change is another one then."""
    before = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == before:  # the clock of a file system stands still for some milliseconds
        os.link(file, file.parent.parent / name)
        os.unlink(file.parent.parent / name)


def write(file: Path) -> None:
    """Write to a file, and give it its old times."""
    info = file.stat()
    while file.stat().st_ctime_ns == info.st_ctime_ns:
        with open(file, "r+b") as opened:
            opened.write(b"x")
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return studies.ct(tmp_path / "study", 3)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan of another test is there."""
    monkeypatch.setattr(watch._Instance, "_current", None)


def watched() -> int:
    """Return how many files the system watches for the plans of this test; -1 if it keeps nothing for them."""
    one = watch._Instance._current
    assert one
    return Path(f"/proc/self/fdinfo/{one._fd}").read_text().count("inotify wd:") if one._fd >= 0 else -1


def assert_changed(plan: Plan, number: int = 0) -> None:
    with pytest.raises(Rejected, match="changed"):
        plan.check(plan.items[number])


def test_a_watch_that_lives_until_the_interpreter_ends_says_nothing() -> None:
    script = "import os\nfrom transfer.watch import Watch\nos.environ.__dict__['kept'] = Watch()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_plans_need_no_more_than_one_of_the_instances_that_a_user_may_have(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a dispatch beside many others would take a link that came and went for a change."""
    first = Watch()  # of a plan that goes on
    monkeypatch.setattr(inotify, "_init", lambda flags: -1)
    plans = [scan([files[0].parent]) for _ in range(3)]
    come_and_go(files[0])
    write(files[1])
    for plan in plans:
        plan.check(plan.items[0])
        assert_changed(plan, 1)
        plan.check(plan.items[2])
    first.close()


def test_more_happens_than_the_system_keeps(files: list[Path]) -> None:
    """To other files, as other dispatches of the same study link them and clear up: it is taken in on the way."""
    plan = scan([files[0].parent])
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for _ in range(most // 4 + 1000):
        for name in ("a", "b"):  # in turn: what happens twice in a row is reported once
            os.link(files[name == "b"], files[0].parent.parent / name)
        for name in ("a", "b"):
            os.unlink(files[0].parent.parent / name)
        plan.check(plan.items[2])
    plan.check(plan.items[0])


def test_what_happened_may_be_reported_a_moment_after_it_shows(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """link(2) sets the time of change first; its process may be stopped before it reports what it has done."""
    plan, asked, really = scan([files[0].parent]), [], watch.events

    def late(fd: int) -> Any:
        asked.append(fd)
        return really(fd) if len(asked) > 3 else iter(())

    monkeypatch.setattr(watch, "events", late)
    come_and_go(files[0])
    plan.check(plan.items[0])
    assert len(asked) > 3


def test_what_nothing_is_reported_of_is_a_change(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As what another host does to a file of a share."""
    plan = scan([files[0].parent])
    monkeypatch.setattr(watch, "events", lambda fd: iter(()))
    monkeypatch.setattr(watch, "LATE_S", 0.01)
    come_and_go(files[0])
    assert_changed(plan)


def test_what_was_written_before_a_plan_was_made_is_no_change_to_it(files: list[Path]) -> None:
    earlier = scan([files[0].parent])
    write(files[0])
    plan = scan([files[0].parent])
    come_and_go(files[0])
    assert_changed(earlier)
    plan.check(plan.items[0])
    write(files[0])
    assert_changed(plan)


@pytest.mark.usefixtures("alone")
def test_a_plan_that_ends_leaves_the_others_their_watches(files: list[Path]) -> None:
    plans = [scan([files[0].parent]) for _ in range(2)]
    first = scan([files[0]])
    assert watched() == 3
    for plan in plans:
        discard(files[0].parent.parent / "run", plan)
    assert watched() == 1
    come_and_go(files[0])
    first.check(first.items[0])
    write(files[0])
    assert_changed(first)
    assert plans[0].watch
    assert plans[0].watch.is_written(plans[0].items[0].watch) is None, "nobody knows any more"


@pytest.mark.usefixtures("alone")
def test_nothing_stays_open_after_the_last_plan(files: list[Path]) -> None:
    plan, garbage = scan([files[0].parent]), scan([files[1]])
    del garbage
    gc.collect()
    assert plan.watch
    plan.watch.close()
    plan.watch.close()
    assert watched() == -1
    again = scan([files[0].parent])
    write(files[0])
    assert_changed(again)


def test_a_file_under_two_names_is_watched_once_and_for_both(files: list[Path]) -> None:
    os.link(files[0], files[0].parent / "other.dcm")
    plan = scan([files[0].parent])
    come_and_go(files[0])
    for item in plan.items:
        plan.check(item)
    write(files[0])
    changed = [number for number, item in enumerate(plan.items) if item.path in ("CT0001.dcm", "other.dcm")]
    for number in changed:
        assert_changed(plan, number)
    assert len(changed) == 2
