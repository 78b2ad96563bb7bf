"""Broken links, shared folders: what rsync and SFTP have in common, against OpenSSH."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import Harness, attempt
from talaria.testing.relay import relay
from tests.targets import rsync, sftp
from tests.watching import watched
from transfer.errors import Retryable
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import State

MEGABYTE = 1 << 20
HARNESSES = rsync.HARNESSES | {"sftp-openssh": sftp.HARNESSES["sftp-openssh"]}
# Sent again after a break: what SFTP had on the way, and as much before that; what rsync says of blocks that are there.
SLACK_BYTES = 9 * MEGABYTE


@pytest.fixture(params=HARNESSES)
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    folder = tmp_path / "server"
    folder.mkdir()
    with HARNESSES[request.param](folder) as made:
        yield made


def large(path: Path, size: int) -> Path:
    """Write a file of bytes that repeat nowhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for _ in range(0, size, MEGABYTE):
            file.write(os.urandom(min(MEGABYTE, size - file.tell())))
    return path


def resume(harness: Harness, study: Path, cut_after: int) -> tuple[int, int]:
    """Send over a link that breaks once; return the bytes that went before the break, and after it."""
    plan = scan([study])
    folder = Path(harness.target.folder)  # type: ignore[attr-defined]
    with (
        relay(harness.target.port, cut_after=cut_after) as link,  # type: ignore[attr-defined]
        watched(folder, study, [item.path for item in plan.items], plan.dispatch_id) as seen,
    ):
        target = harness.target.model_copy(update={"port": link.port})
        first = attempt(target, plan)
        assert link.cuts == 1
        before = link.sent
        if first.error is None:  # it went on over another connection
            assert harness.driver.facts.reconnects
            receipt, before = first.require(), cut_after
        else:
            assert isinstance(first.error, Retryable), repr(first.error)
            receipt = attempt(target, plan, done=first.arrived).require()
        after = link.sent - before
    assert not seen.wrong
    assert seen.looks > 1
    if harness.driver.facts.atomic_replace:
        assert not seen.partly
    assert not receipt.unsent
    assert harness.read_back(plan) == {item.path: plan.file(item).read_bytes() for item in plan.items}
    assert not {name for name in harness.names() if not harness.final(name)}
    return before, after


@pytest.mark.parametrize("percent", [10, 50, 90])
def test_a_large_file_goes_on_where_the_link_broke(harness: Harness, tmp_path: Path, percent: int) -> None:
    size = 100 * MEGABYTE
    large(tmp_path / "study" / "large.dcm", size)
    before, after = resume(harness, tmp_path / "study", size * percent // 100)
    assert after < size - before + SLACK_BYTES


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("percent", [10, 50, 90])
def test_a_file_of_a_gigabyte_goes_on_where_the_link_broke(harness: Harness, tmp_path: Path, percent: int) -> None:
    size = 1024 * MEGABYTE
    large(tmp_path / "study" / "large.dcm", size)
    before, after = resume(harness, tmp_path / "study", size * percent // 100)
    assert after < size - before + 2 * SLACK_BYTES


def test_between_files_what_has_come_is_not_sent_again(harness: Harness, tmp_path: Path) -> None:
    size = 8 * MEGABYTE
    for number in range(6):
        large(tmp_path / "study" / f"series {number % 2}" / f"{number}.dcm", size)
    before, after = resume(harness, tmp_path / "study", 3 * size)
    assert after < 6 * size - before + SLACK_BYTES + size


def test_a_link_that_breaks_three_times(harness: Harness, tmp_path: Path) -> None:
    size = 24 * MEGABYTE
    large(tmp_path / "study" / "large.dcm", size)
    studies.ct(tmp_path / "study", 20)
    plan = scan([tmp_path / "study"])
    with relay(harness.target.port) as link:  # type: ignore[attr-defined]
        target = harness.target.model_copy(update={"port": link.port})
        done: set[str] = set()
        for _ in range(3):
            link.cut_after = link.sent + 10 * MEGABYTE
            sent = attempt(target, plan, done=done)
            done |= sent.arrived
            if sent.receipt:
                break
        link.cut_after = None
        attempt(target, plan, done=done).require()
    assert harness.read_back(plan) == {item.path: plan.file(item).read_bytes() for item in plan.items}


def test_a_file_that_changed_before_the_next_attempt_arrives_as_it_is_now(harness: Harness, tmp_path: Path) -> None:
    """In its middle, where no sample is taken; a run that is retried keeps its dispatch id."""
    size = 32 * MEGABYTE
    file = large(tmp_path / "study" / "a" / "large.dcm", size)
    gone = large(tmp_path / "study" / "b" / "gone.dcm", size)
    plan = scan([tmp_path / "study"])
    with relay(harness.target.port, cut_after=24 * MEGABYTE) as link:  # type: ignore[attr-defined]
        first = attempt(harness.target.model_copy(update={"port": link.port}), plan)
    assert isinstance(first.error, Retryable) and "a/large.dcm" not in first.arrived
    before = {path: (tmp_path / "study" / path).read_bytes() for path in first.arrived}  # where it went on at once
    with open(file, "r+b") as writer:
        writer.seek(2 * MEGABYTE)
        writer.write(os.urandom(MEGABYTE))
    gone.unlink()
    again = replace(scan([tmp_path / "study"]), dispatch_id=plan.dispatch_id)
    attempt(harness.target, again).require()
    assert harness.read_back(again) == before | {"a/large.dcm": file.read_bytes()}
    assert not {name for name in harness.names() if not harness.final(name)}


def test_a_file_in_whose_place_another_was_is_told(harness: Harness, tmp_path: Path) -> None:
    """Of two dispatches into one folder the later one wins; who reads its receipt must know."""
    studies.ct(tmp_path / "study", 3)
    (tmp_path / "other").mkdir()
    for name in ("CT0001.dcm", "CT0002.dcm"):  # the same instances, with other pixels
        data = bytearray((tmp_path / "study" / name).read_bytes())
        data[-2] ^= 1
        (tmp_path / "other" / name).write_bytes(data)
    other = sorted((tmp_path / "other").iterdir())
    shutil.copy2(tmp_path / "study" / "CT0003.dcm", tmp_path / "other")  # the same file is nothing to tell of
    (tmp_path / "other" / "new $(x)\n.txt").write_text("new")
    one = harness.target.model_copy(update={"layout": "all"})
    assert {row.outcome for row in attempt(one, tmp_path / "study").require().items} == {Kind.DELIVERED}
    receipt = attempt(one, tmp_path / "other").require()
    assert receipt.state is State.DELIVERED
    told = {row.path: row.detail for row in receipt.items if row.outcome is Kind.WARNING}
    assert told == {path.name: "replaced another file of this name" for path in other}
    there = Path(harness.target.folder) / "all" / other[0].name  # type: ignore[attr-defined]
    assert there.read_bytes() == other[0].read_bytes()
    # Another study under the same names would be the end of this one.
    strange = tmp_path / "strange"
    studies.ct(strange, 4)
    refused = attempt(one, strange)
    reason = "another instance has its name there: use a finer layout"
    assert refused.rejected == dict.fromkeys(("CT0001.dcm", "CT0002.dcm", "CT0003.dcm"), reason)
    assert there.read_bytes() == other[0].read_bytes()
    assert not there.with_name(".complete").exists()
    again = attempt(one, tmp_path / "other").require()
    assert Kind.WARNING not in {row.outcome for row in again.items}
