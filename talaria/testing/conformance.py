"""The conformance suite: every case against every harness of a type of target.

A test file takes the whole suite over, and says which harnesses it is for (`harness.Harness`; one is one server):

    from talaria.testing.conformance import *
    from talaria_webdav.harness import HARNESSES

    pytest tests/conformance.py -k webdav            this type; `-k dicom-storescp` one server
    pytest --pyargs talaria.testing.conformance      every type that another package has installed here

What a type does differently is declared in its driver's Facts or its Harness, and asserted here; nothing is skipped.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pydicom
import pytest

from talaria.testing import studies
from talaria.testing.harness import Factory, Harness, Sent, attempt, of_extensions, sending
from tasks import DRIVERS
from transfer.errors import Cancelled, DispatchError, Retryable
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan, scan
from transfer.receipt import Level, State

MARKER = ".complete"
STOP_S = 5  # a cancelled push is over by then
LEVELS = tuple(Level)  # from the weakest to the strongest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each case for each harness of the file that has taken the suite over, else for those of other packages."""
    if "harness" in metafunc.fixturenames:
        harnesses: dict[str, Factory] = getattr(metafunc.module, "HARNESSES", None) or of_extensions()
        if not harnesses:
            raise pytest.UsageError("no harness to test: define HARNESSES, or install a package that adds a type")
        metafunc.parametrize("harness", [pytest.param(f, id=name) for name, f in harnesses.items()], indirect=True)


@pytest.fixture
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    server = tmp_path / "server"
    server.mkdir()
    with request.param(server) as made:
        yield made


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The folder that a test puts the files into that it sends."""
    folder = tmp_path / "study"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test a state directory of its own: what drivers keep there (known hosts, tokens) is not the user's."""
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "talaria"))


# ---- what is compared


def expected(harness: Harness, sent: Sent) -> dict[str, bytes]:
    """What the server must hold after a plan arrived whole, keyed as `read_back` keys it."""
    return {_key(harness, item): sent.plan.file(item).read_bytes() for item in sent.plan.items}


def _key(harness: Harness, item: Item) -> str:
    if harness.driver.facts.keeps_names:
        return item.path
    assert item.header, f"{item.shown} is not DICOM and must not reach this driver"
    return item.header.SOPInstanceUID


def assert_equal(harness: Harness, sent: Sent) -> None:
    """Assert that the server holds exactly what was sent."""
    assert_same(harness, expected(harness, sent), harness.read_back(sent.plan))


def assert_same(harness: Harness, wanted: dict[str, bytes], got: dict[str, bytes]) -> None:
    assert set(got) == set(wanted)
    for key, data in wanted.items():
        if harness.driver.facts.keeps_names:
            assert got[key] == data, f"{key!r} is not what was sent"
        else:
            _assert_same_instance(data, got[key])


def _assert_same_instance(sent: bytes, got: bytes) -> None:
    """A DICOM peer may write its own file meta information, never other content."""
    with studies.quiet():
        a, b = pydicom.dcmread(io.BytesIO(sent)), pydicom.dcmread(io.BytesIO(got))
        assert b.SOPInstanceUID == a.SOPInstanceUID
        assert b.file_meta.MediaStorageSOPInstanceUID == a.SOPInstanceUID
        assert b.StudyInstanceUID == a.StudyInstanceUID
        assert b.SOPClassUID == a.SOPClassUID
        assert ("PixelData" in b) == ("PixelData" in a)
        if "PixelData" not in a:
            return
        if a.file_meta.TransferSyntaxUID == b.file_meta.TransferSyntaxUID:
            assert b.PixelData.rstrip(b"\0") == a.PixelData.rstrip(b"\0")
        else:
            assert (b.pixel_array == a.pixel_array).all()


def assert_delivered(harness: Harness, sent: Sent) -> None:
    """Assert that every item has arrived, that the receipt says so, and that the bytes are there."""
    receipt = sent.require()
    pending = {item.path for item in sent.plan.pending}
    assert set(sent.outcomes) == pending
    assert sent.arrived == pending, sent.rejected
    # A file that is damaged isn't handed to the driver, and is missing all the same.
    damaged = any(outcome.kind is Kind.REJECTED for outcome in sent.refused.values())
    assert receipt.state is (State.PARTIAL if damaged else State.DELIVERED)
    assert receipt.unsent == 0
    assert receipt.target == harness.target.name
    assert len(receipt.items) == len(sent.plan.items) + len(sent.refused)
    assert receipt.verified in harness.driver.facts.verifies_by
    assert_equal(harness, sent)
    if harness.driver.facts.keeps_names:
        assert _markers(harness), "every file is there, but not the completion marker"


def _markers(harness: Harness) -> set[str]:
    return {name for name in harness.names() if name.rsplit("/", 1)[-1] == MARKER and harness.final(name)}


def send(harness: Harness, source: Path | Plan) -> Sent:
    """Push the whole and assert that it arrived."""
    sent = attempt(harness.target, source)
    assert_delivered(harness, sent)
    return sent


# ---- check


def test_check_ok(harness: Harness) -> None:
    health = harness.driver.check(harness.target)
    assert health.ok, health.to_json("x")
    assert health.error is None
    names = [probe.name for probe in health.probes]
    assert len(names) == len(set(names)) >= 1
    assert all(probe.result in ("ok", "skipped") or probe.informative for probe in health.probes)
    json.dumps(health.to_json(harness.target.name))


def test_check_no_server_is_Unreachable(harness: Harness) -> None:
    begun = time.monotonic()
    health = harness.driver.check(harness.dead)
    assert not health.ok
    assert type(health.error) is harness.dead_error
    failed = [probe for probe in health.probes if probe.result == "failed" and not probe.informative]
    assert failed
    assert all(probe.detail for probe in failed), "a failed probe gives the real reason"
    assert time.monotonic() - begun < 2 * harness.dead.connect_timeout_s + 5


def test_push_no_server_is_Unreachable(harness: Harness, study: Path) -> None:
    studies.ct(study, 2)
    sent = attempt(harness.dead, study)
    assert type(sent.error) is harness.dead_error
    assert not sent.outcomes
    assert sent.seconds < 2 * harness.dead.connect_timeout_s + 5


def test_check_leaves_nothing_behind(harness: Harness, study: Path) -> None:
    before = harness.names(), harness.leftovers()
    harness.driver.check(harness.target)
    harness.driver.check(harness.target)
    assert (harness.names(), harness.leftovers()) == before
    studies.ct(study, 2)
    sent = send(harness, study)
    before = harness.names(), harness.leftovers()
    assert harness.driver.check(harness.target).ok
    assert (harness.names(), harness.leftovers()) == before
    assert_equal(harness, sent)


# ---- push: what arrives


def test_push_then_read_back_equal(harness: Harness, study: Path) -> None:
    files = studies.sample(study)
    sent = send(harness, study)
    receipt = sent.require()
    assert receipt.bytes == sum(item.size for item in sent.plan.items)
    assert receipt.counts[Kind.DELIVERED] + receipt.counts[Kind.WARNING] == len(sent.plan.items)
    # Files that are no DICOM go along, or are left out with the reason: never silently.
    others = {"results/overlay.png", "results/result.json"}
    if harness.driver.facts.dicom_only:
        assert {item.path: outcome.kind for item, outcome in sent.refused.items()} == dict.fromkeys(
            others, Kind.SKIPPED
        )
    else:
        assert len(harness.read_back(sent.plan)) == len(files)


def test_push_empty_file(harness: Harness, study: Path) -> None:
    studies.ct(study, 2)
    studies.write(study / "empty.txt", b"")
    studies.write(study / "empty.dcm", b"")
    sent = send(harness, study)
    if harness.driver.facts.dicom_only:
        assert {item.path: outcome.kind for item, outcome in sent.refused.items()} == {
            "empty.txt": Kind.SKIPPED,
            "empty.dcm": Kind.REJECTED,
        }
    else:
        assert harness.read_back(sent.plan)["empty.txt"] == b""


def test_push_nested_dirs(harness: Harness, study: Path) -> None:
    folder = study
    for depth in range(8):
        studies.ct(folder, 1, first=depth)
        folder = folder / f"level {depth}"
    send(harness, study)


def test_push_same_name_in_two_dirs(harness: Harness, study: Path) -> None:
    for folder in ("a", "b", "a/a", "."):
        studies.ct(study / folder, 1)
    sent = send(harness, study)
    assert len(harness.read_back(sent.plan)) == 4


def test_push_unicode_and_spaces(harness: Harness, study: Path) -> None:
    studies.odd_names(study / "Prüfung  №1", studies.UNICODE_NAMES)
    send(harness, study)


def test_push_shell_metacharacters(harness: Harness, study: Path, tmp_path: Path) -> None:
    studies.odd_names(study, studies.SHELL_NAMES)
    studies.odd_names(study / "$(touch owned); `touch owned` 'a' \"b\"", studies.SHELL_NAMES[:4])
    send(harness, study)
    seen = {path.name for path in tmp_path.rglob("owned")} | {name for name in os.listdir() if name == "owned"}
    assert not seen, "a name was run by a shell"
    assert not any(name.rsplit("/", 1)[-1] == "owned" for name in harness.names())


def test_push_raw_names(harness: Harness, study: Path) -> None:
    """Names that are not UTF-8 arrive, under the same bytes or a printable form, or are rejected for that reason."""
    studies.odd_names(study, studies.RAW_NAMES)
    studies.ct(study, 1)
    sent = attempt(harness.target, study)
    sent.require()
    assert set(sent.outcomes) == {item.path for item in sent.plan.items}
    assert "CT0001.dcm" in sent.arrived
    got = harness.read_back(sent.plan)
    assert len(got) == len(sent.arrived)
    for item in sent.plan.items:
        data = sent.plan.file(item).read_bytes()
        if item.path in sent.rejected:
            assert sent.rejected[item.path]
        elif harness.driver.facts.keeps_names:
            assert data in (got.get(item.path), got.get(item.shown))


def test_push_excluded_files_absent(harness: Harness, study: Path) -> None:
    studies.sample(study)
    studies.ct(study / "private", 2)
    studies.ct(study / "CT", 1, first=77)
    harness.target.exclude = "*.png, *.json,, private ,CT0077.*"
    sent = send(harness, study)
    excluded = {item.path for item, outcome in sent.refused.items() if "excluded" in outcome.detail}
    assert excluded == {
        "results/overlay.png", "results/result.json", "private/CT0001.dcm", "private/CT0002.dcm", "CT/CT0077.dcm",
    }  # fmt: skip
    assert not any("CT0077" in name or "private" in name or name.endswith(".png") for name in harness.names())


# ---- push: again, interrupted, watched


def test_push_twice_is_idempotent(harness: Harness, study: Path) -> None:
    studies.sample(study)
    first = send(harness, study)
    names = harness.names()
    again = attempt(harness.target, first.plan)  # as after the loss of the ledger
    assert_delivered(harness, again)
    assert harness.names() == names, "a second copy, or a trace"
    # And with the ledger's knowledge: nothing to send, what comes last is completed.
    idle = attempt(harness.target, first.plan, done=[item.path for item in first.plan.items])
    receipt = idle.require()
    assert not idle.outcomes
    assert idle.moved == 0
    assert receipt.counts[Kind.ALREADY] == len(first.plan.items)
    assert receipt.state is State.DELIVERED
    assert harness.names() == names
    assert_equal(harness, first)


def test_push_link_cut_midway_is_Retryable_then_resumes(harness: Harness, study: Path) -> None:
    studies.ct(study, 24, side=64)  # 15 kB each
    plan = scan([study])
    with harness.cut(plan.size // 2) as target:
        first = attempt(target, plan)
        if harness.driver.facts.reconnects and first.error is None:
            assert_delivered(harness, first)
            assert first.moved <= plan.size * 1.3 + 65_536, "more was sent again than what was outstanding"
            return
        assert isinstance(first.error, Retryable), f"{first.error!r}, {len(first.outcomes)} outcomes"
        assert not first.rejected, "a lost link rejects nothing"
        assert len(first.arrived) < len(plan.items)
        got = harness.read_back(first.plan)
        confirmed = {_key(harness, item) for item in first.plan.items if item.path in first.arrived}
        assert confirmed <= set(got), "confirmed, but not there"
        if harness.driver.facts.keeps_names:
            assert got.items() <= expected(harness, first).items(), "something half is visible under a final name"
            assert not _markers(harness), "marked as complete, but it is not"
        second = attempt(target, plan, done=first.arrived)
    assert_delivered(harness, second)
    assert not set(second.outcomes) & first.arrived, "what was confirmed was sent again"
    pending = sum(item.size for item in second.plan.pending)
    assert second.moved <= pending * 1.3 + 65_536, "more was sent than what was missing"
    assert not {name for name in harness.names() if not harness.final(name)}, "traces of the first attempt stay"


@pytest.mark.parametrize("level", LEVELS)
def test_one_rejected_link_cut_retry(harness: Harness, study: Path, level: Level) -> None:
    """What one attempt rejects stays rejected, for its first reason, through all that follow; no marker is set."""
    studies.ct(study, 24, side=64)
    plan = scan([study])
    victim = plan.items[0]
    plan.file(victim).unlink()
    with harness.cut(plan.size // 2) as target:
        target.verify = level
        with sending(target, plan) as sender:
            first = sender.attempt()
            mended = harness.driver.facts.reconnects and first.error is None
            assert mended or isinstance(first.error, Retryable), f"{first.error!r}, {len(first.outcomes)} outcomes"
            if harness.driver.facts.keeps_names:
                assert not _markers(harness)
            second = sender.attempt()
    second.require()
    assert_one_rejected(harness, [first, second], victim)


def test_one_refused_by_the_peer_then_pushed_again(harness: Harness, study: Path) -> None:
    """The same where the peer refuses the item, if one of this type can, and the link goes with the last answer."""
    studies.ct(study, 6, side=64)
    plan = scan([study])
    victim = plan.items[0]
    with ExitStack() as stack:
        if harness.reject:
            target = stack.enter_context(harness.reject(plan, victim))
        else:
            plan.file(victim).unlink()
            target = harness.target
        target.verify = Level.LISTED
        with sending(target, plan) as sender:
            sent = [sender.attempt(), sender.attempt()]
    assert sent[1].moved == 0, "what was settled is sent again"
    assert not sent[1].arrived
    assert_one_rejected(harness, sent, victim)


def assert_one_rejected(harness: Harness, sent: list[Sent], victim: Item) -> None:
    """Assert that all but one item arrived, in several attempts, and that the first reason given is kept."""
    receipt = sent[-1].require()
    reasons = [one.rejected[victim.path] for one in sent if victim.path in one.rejected]
    assert receipt.state is State.PARTIAL
    assert receipt.attempts == len(sent)
    rejected = {item.path: item.detail for item in receipt.items if item.outcome is Kind.REJECTED}
    assert rejected == {victim.shown: reasons[0]}
    others = {_key(harness, item) for item in sent[-1].plan.items if item != victim}
    assert set(harness.read_back(sent[-1].plan)) == others
    if harness.driver.facts.keeps_names:
        assert not _markers(harness), "marked as complete, but a file is missing"


def test_push_partial_never_visible(harness: Harness, study: Path) -> None:
    """A reader that looks while the push stands still, and one that looks all the time."""
    studies.ct(study, 12, side=64)
    studies.multiframe(study / "large.dcm", 4, side=256)  # 0.5 MB: seen between its pieces
    plan = scan([study])
    harness.target.bandwidth_limit = plan.size  # a second and a bit
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
            told = {_key(harness, item) for item in sent.plan.items if item.path in sent.arrived}
            marked = bool(_markers(harness)) if facts.keeps_names else False
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
    assert set(got) == {_key(harness, item) for item in sent.plan.items if item is not victim}
    if harness.driver.facts.keeps_names:
        assert not _markers(harness), "marked as complete, but a file is missing"


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
            assert _key(harness, item) in got
    if harness.driver.facts.keeps_names:
        assert got.items() <= wanted.items(), "something short is visible under a final name"
        assert not _markers(harness)


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
            harness.target, plan, cancelled=cancelled, moved=lambda sent, _: cancel() if sent.moved > 200_000 else None
        )
    finally:
        timer.cancel()
    assert isinstance(sent.error, Cancelled), repr(sent.error)
    assert time.monotonic() - at[0] < STOP_S
    if harness.driver.facts.keeps_names:
        assert harness.read_back(sent.plan).items() <= expected(harness, sent).items()
        assert not _markers(harness)
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


@pytest.mark.parametrize("times", ["its new times", "its old times back"])
@pytest.mark.parametrize("when", ["before", "during"])
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
        harness.target.bandwidth_limit = 4 << 20
        sent = attempt(harness.target, plan, moved=moved)
    receipt = sent.require()
    assert set(sent.outcomes) == {item.path for item in sent.plan.items}
    got = harness.read_back(sent.plan)
    item = next(item for item in sent.plan.items if item.path == "victim.dcm")
    others = [other for other in sent.plan.items if other is not item]
    wanted = {_key(harness, other): sent.plan.file(other).read_bytes() for other in others}
    if when == "during" and item.path in sent.arrived:  # it had been read whole before it changed
        wanted[_key(harness, item)] = original
    else:
        assert set(sent.rejected) == {item.path}
        assert "chang" in sent.rejected[item.path]
        assert receipt.state is State.PARTIAL
    assert_same(harness, wanted, got)


@pytest.mark.parametrize("level", LEVELS)
def test_push_verify_levels(harness: Harness, study: Path, level: Level) -> None:
    """A level that the driver and the server can reach is reached; else the receipt says which was, and why."""
    studies.sample(study)
    harness.target.verify = level
    receipt = send(harness, study).require()
    assert set(harness.reaches or ()) <= set(harness.driver.facts.verifies_by)
    reached = harness.driver.facts.verifies_by if harness.reaches is None else harness.reaches
    best = max((one for one in reached if LEVELS.index(one) <= LEVELS.index(level)), key=LEVELS.index)
    if level in reached:
        assert receipt.verified is level
    else:
        assert receipt.verified is best
        assert receipt.notes, "a lower level than the one asked for needs its reason"


# ---- what is reported


def test_progress_once_per_item(harness: Harness, study: Path) -> None:
    studies.ct(study, 10, side=64)
    counts: list[int] = []
    told: list[str] = []
    sent = attempt(
        harness.target,
        study,
        told=lambda _, item, outcome: told.append(item.path),
        moved=lambda _, count: counts.append(count),
    )
    assert_delivered(harness, sent)
    assert sorted(told) == [item.path for item in sent.plan.items]
    assert all(count >= 0 for count in counts)
    assert 0.9 * sent.plan.size <= sent.moved <= 1.1 * sent.plan.size + 65_536


def test_secrets_absent_from_logs_and_errors(
    harness: Harness, study: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither what opens the target nor who the patient is shows in a log, an error, a receipt or an argument."""
    studies.ct(study, 24, side=64)
    plan = scan([study])
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    done = threading.Event()
    arguments: set[str] = set()

    def watch() -> None:
        while not done.wait(0.02):
            for child in psutil.Process().children(recursive=True):
                try:
                    arguments.add(" ".join(child.cmdline()))
                except psutil.Error:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for target in (harness.target, harness.dead):
            health = DRIVERS.of(target).check(target)
            texts += [json.dumps(health.to_json("x")), repr(health)]
        dead = attempt(harness.dead, plan)
        with harness.cut(plan.size // 2) as target:
            texts += [repr(target), str(target), target.model_dump_json()]
            broken = attempt(target, plan)
            whole = attempt(target, plan, done=broken.arrived)
    finally:
        done.set()
        watcher.join()
    assert dead.error is not None
    assert broken.error is not None or harness.driver.facts.reconnects
    for error in filter(None, (dead.error, broken.error)):
        texts += ["".join(traceback.format_exception(error)), repr(error), str(error)]
    texts += [json.dumps(whole.require().to_json(all_items=True)), repr(whole.receipt)]
    ours = ("transfer", "protocols", "blocks", "tasks", "flows", "talaria")
    for record in caplog.records:
        # What a library says to whoever debugs it is not ours to word.
        if record.levelno >= logging.INFO or record.name.split(".")[0] in ours:
            texts.append(caplog.handler.format(record))
    out, err = capfd.readouterr()
    texts += [out, err, *arguments]
    for secret in (*harness.secrets, *studies.PHI):
        for text in texts:
            assert secret not in text


def test_errors_survive_pickle(harness: Harness, study: Path) -> None:
    studies.ct(study, 24, side=64)
    plan = scan([study])
    with harness.cut(plan.size // 2) as target:
        errors = [attempt(harness.dead, plan).error, attempt(target, plan).error]
    if harness.driver.facts.reconnects:
        errors = errors[:1]
    errors.append(DRIVERS.of(harness.dead).check(harness.dead).error)
    for error in errors:
        assert isinstance(error, DispatchError)
        assert error.message
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (copy.message, copy.target, copy.item, str(copy)) == (
            error.message, error.target, error.item, str(error),
        )  # fmt: skip
        assert vars(copy) == vars(error)


__all__ = [  # what a test file takes over with `import *`: the cases, and the fixtures that they use
    *(name for name in globals() if name.startswith("test_")),
    "harness",
    "own_home",
    "pytest_generate_tests",
    "study",
]
