"""Pushes that go wrong, or are watched or stopped while they run."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.cases.compare import assert_delivered, assert_same, expected, key, markers, send
from talaria.testing.harness import Harness, Sent, attempt
from talaria.testing.process import as_loaded
from transfer.errors import Cancelled
from transfer.outcome import Outcome
from transfer.plan import Item, scan
from transfer.receipt import State
from transfer.source import InPlace, Sources

STOP_S = 5  # a cancelled push is over by then


def test_push_partial_never_visible(harness: Harness, study: Path) -> None:
    """A reader that looks while the push stands still, and one that looks all the time."""
    studies.ct(study, 12, side=64)
    studies.multiframe(study / "large.dcm", 4, side=256)  # 0.5 MB: seen between its pieces
    plan = scan([study])
    harness.target.bandwidth_limit = 2 * plan.size  # half a second and a bit
    facts = harness.driver.facts
    wanted: dict[str, bytes] = {}
    wrong: list[str] = []
    looking = threading.Lock()
    looks = 0

    def look(sent: Sent) -> None:
        nonlocal looks
        with looking:
            looks += 1
            if not wanted:
                wanted.update(expected(harness, sent))
            told = {key(harness, item) for item in sent.plan.items if item.path in sent.arrived}
            marked = bool(markers(harness)) if facts.keeps_names else False
            got = harness.read_back(sent.plan)  # after the marker was looked for: what it promises must be there
            if facts.keeps_names:
                wrong.extend(f"{key!r} is half there" for key in got if got[key] != wanted.get(key))
            if marked and set(got) != set(wanted):
                wrong.append(f"marked as complete with {len(got)} of {len(wanted)}")
            if facts.atomic_replace and got and set(got) != set(wanted):
                wrong.append(f"{len(got)} of {len(wanted)} are visible")
            if not told <= set(got):
                wrong.append("reported as delivered, but not there")

    def moved(sent: Sent, count: int) -> None:
        if looks < 20:
            look(sent)

    state: list[Sent] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            if state:
                look(state[0])

    def told(sent: Sent, item: Item, outcome: Outcome) -> None:
        state[:] = [sent]

    def first_moved(sent: Sent, count: int) -> None:
        state[:] = [sent]
        moved(sent, count)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        sent = attempt(harness.target, plan, moved=first_moved, told=told)
    finally:
        done.set()
        watcher.join()
    assert not wrong, wrong[:5]
    assert looks, "nobody looked: the driver reports no bytes"
    assert_delivered(harness, sent)


def test_push_one_rejected_others_delivered(harness: Harness, study: Path) -> None:
    studies.ct(study, 6)
    plan = scan([study])
    victim = plan.items[2]
    if harness.reject:
        with harness.reject(plan, victim) as target:
            sent = attempt(target, plan)
    else:  # no server of this type can; a file that can't be read any more does
        plan.file(victim).unlink()
        sent = attempt(harness.target, plan)
    receipt = sent.require()
    assert set(sent.rejected) == {victim.path}
    assert sent.rejected[victim.path], "a rejection has a reason"
    assert len(sent.arrived) == 5
    assert receipt.state is State.PARTIAL
    got = harness.read_back(sent.plan)
    assert set(got) == {key(harness, item) for item in sent.plan.items if item is not victim}
    if harness.driver.facts.keeps_names:
        assert not markers(harness), "marked as complete, but a file is missing"


def test_push_short_write_detected(harness: Harness, study: Path) -> None:
    studies.ct(study, 4)
    plan = scan([study])
    if harness.shorten is None:  # the protocol frames every file: the plain case must still count its bytes
        sent = send(harness, plan)
        assert sent.require().bytes == sum(len(data) for data in expected(harness, sent).values())
        return
    with harness.shorten() as target:
        sent = attempt(target, plan)
    assert sent.error or sent.rejected, "a short write was reported as delivered"
    got, wanted = harness.read_back(sent.plan), expected(harness, sent)
    for item in sent.plan.items:
        if item.path in sent.arrived:
            assert key(harness, item) in got
    if harness.driver.facts.keeps_names:
        assert got.items() <= wanted.items(), "something short is visible under a final name"
        assert not markers(harness)


def test_push_cancelled_stops_soon(harness: Harness, study: Path) -> None:
    studies.ct(study, 10)
    studies.multiframe(study / "large.dcm", 4)  # 2 MB
    plan = scan([study])
    cancelled = threading.Event()
    at: list[float] = []

    def cancel() -> None:
        if not at:
            at.append(time.monotonic())
            cancelled.set()

    harness.target.bandwidth_limit = 128 * 1024  # 16 seconds
    timer = threading.Timer(3, cancel)
    timer.start()
    try:
        sent = attempt(
            harness.target, plan, cancelled=cancelled, moved=lambda sent, _: cancel() if sent.moved > 100_000 else None
        )
    finally:
        timer.cancel()
    assert isinstance(sent.error, Cancelled), repr(sent.error)
    assert time.monotonic() - at[0] < as_loaded(STOP_S)
    if harness.driver.facts.keeps_names:
        assert harness.read_back(sent.plan).items() <= expected(harness, sent).items()
        assert not markers(harness)
    harness.target.bandwidth_limit = None
    rest = attempt(harness.target, plan, done=sent.arrived)
    assert_delivered(harness, rest)


def test_push_cancelled_before_it_begins(harness: Harness, study: Path) -> None:
    studies.ct(study, 2)
    cancelled = threading.Event()
    cancelled.set()
    sent = attempt(harness.target, study, cancelled=cancelled)
    assert isinstance(sent.error, Cancelled), repr(sent.error)
    assert not sent.outcomes
    assert not harness.read_back(sent.plan)


@pytest.mark.parametrize(
    ("when", "times"),
    [("before", "its new times"), ("before", "its old times back"), ("during", "its old times back")],
)
def test_push_changed_file_is_rejected_and_never_arrives(harness: Harness, study: Path, when: str, times: str) -> None:
    studies.ct(study, 3)
    victim = studies.multiframe(study / "victim.dcm", 8)  # 4 MB
    plan = scan([study])
    original = victim.read_bytes()
    changed = threading.Event()

    def change() -> None:
        if not changed.is_set():
            changed.set()
            info = victim.stat()
            with open(victim, "r+b") as file:  # same length, other pixels
                file.seek(len(original) // 2)
                file.write(b"\xff" * (len(original) // 2))
            if times == "its old times back":
                os.utime(victim, ns=(info.st_atime_ns, info.st_mtime_ns))

    def moved(sent: Sent, count: int) -> None:
        if sent.moved > 200_000:
            change()

    if when == "before":
        time.sleep(0.01)
        change()
        sent = attempt(harness.target, plan)
    else:
        harness.target.bandwidth_limit = 12 << 20
        sent = attempt(harness.target, plan, moved=moved)
    receipt = sent.require()
    assert set(sent.outcomes) == {item.path for item in sent.plan.items}
    got = harness.read_back(sent.plan)
    item = next(item for item in sent.plan.items if item.path == "victim.dcm")
    others = [other for other in sent.plan.items if other is not item]
    wanted = {key(harness, other): sent.plan.file(other).read_bytes() for other in others}
    if when == "during" and item.path in sent.arrived:  # it had been read whole before it changed
        wanted[key(harness, item)] = original
    else:
        assert set(sent.rejected) == {item.path}
        assert "chang" in sent.rejected[item.path]
        assert receipt.state is State.PARTIAL
    assert_same(harness, wanted, got)


def test_push_reads_in_place_and_rejects_what_changed(harness: Harness, study: Path) -> None:
    """Files that could not be linked: one is rewritten, one replaced, both with their old times, one removed."""
    if harness.driver.facts.by_name:  # a program opens them: they are linked or copied for it, never read in place
        studies.ct(study, 1)
        assert_delivered(harness, attempt(harness.target, scan([study])))
        return
    files = studies.ct(study, 5)
    original = scan([study])
    plan = replace(
        original,
        root=study / "nothing is there",
        items=tuple(item.but(in_place=True) for item in original.items),
        in_place=InPlace(study, Sources(original.sources)),
    )
    wanted = {key(harness, item): plan.file(item).read_bytes() for item in plan.items[3:]}
    time.sleep(0.01)  # longer than the clock of a file system stands still
    info = files[0].stat()
    files[0].write_bytes(bytes(info.st_size))
    os.utime(files[0], ns=(info.st_atime_ns, info.st_mtime_ns))
    info, other = files[1].stat(), study.parent / "other.dcm"
    other.write_bytes(studies.ct_bytes()[: info.st_size].ljust(info.st_size))
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    other.replace(files[1])
    files[2].unlink()
    sent = attempt(harness.target, plan)
    assert sent.require().state is State.PARTIAL
    assert {path: reason[:5] for path, reason in sent.rejected.items()} == {
        "CT0001.dcm": "chang",
        "CT0002.dcm": "chang",
        "CT0003.dcm": "can't",
    }
    assert_same(harness, wanted, harness.read_back(sent.plan))
