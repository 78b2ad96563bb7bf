"""What is handed over again: completed, verified, sent once more."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from protocols.files.tree import Tree
from talaria.testing import studies
from talaria.testing.harness import attempt, sending
from tests.targets.folder_push.pushing import delivered, target, tree
from transfer.errors import Interrupted
from transfer.outcome import Kind
from transfer.receipt import Level, State


def test_one_rejected_link_cut_retry(archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No marker, and the first true reason, also where everything is verified (T1)."""
    studies.ct(study, 3)
    (archive / "all").mkdir()
    (archive / "all" / "CT0002.dcm").mkdir()
    for level in Level:
        shutil.rmtree(archive / "all")
        (archive / "all" / "CT0002.dcm").mkdir(parents=True)
        with sending(target(archive, layout="all", verify=level), study) as sender:
            with monkeypatch.context() as patch:
                patch.setattr("tasks.folder._Push._verify", _interrupted)
                assert isinstance(sender.attempt().error, Interrupted)
            receipt = sender.attempt().require()
        assert receipt.state is State.PARTIAL
        assert {item.path: (item.outcome, item.detail) for item in receipt.items if item.outcome is Kind.REJECTED} == {
            "CT0002.dcm": (Kind.REJECTED, "there is a folder with its name")
        }
        assert not (archive / "all" / ".complete").exists()


def test_what_an_attempt_brought_before_it_broke_off_is_delivered_and_not_already_there(
    archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies.ct(study, 3)
    flush = Tree.flush

    def gone(tree: Tree, folder: str) -> None:
        if (archive / "all" / "CT0001.dcm").exists():
            raise OSError(errno.ESTALE, "Stale file handle")
        flush(tree, folder)

    with sending(target(archive, layout="all"), study) as sender:
        with monkeypatch.context() as patch:
            patch.setattr(Tree, "flush", gone)
            assert isinstance(sender.attempt().error, Interrupted)
        assert tree(archive / "all") == {"CT0001.dcm", "CT0002.dcm", "CT0003.dcm"}
        receipt = sender.attempt().require()
    assert receipt.counts[Kind.DELIVERED] == 3
    assert receipt.bytes == sum(path.stat().st_size for path in study.iterdir())


def _interrupted(*_: Any) -> None:
    raise Interrupted("the share went away")


def test_a_dispatch_that_was_moved_away_is_not_missed(archive: Path, study: Path) -> None:
    """Whoever works on what arrives may take it away; the ledger knows that it had come."""
    studies.ct(study, 2)
    first = delivered(attempt(target(archive), study))
    shutil.rmtree(archive / first.plan.dispatch_id)
    again = attempt(target(archive), first.plan, done=first.arrived)
    assert again.require().state is State.DELIVERED
    assert not list(archive.iterdir())


def test_a_marker_that_is_missing_is_completed(archive: Path, study: Path) -> None:
    """As after a kill between the last file and the marker."""
    studies.ct(study, 2)
    first = delivered(attempt(target(archive), study))
    marker = archive / first.plan.dispatch_id / ".complete"
    marker.unlink()
    delivered(attempt(target(archive), first.plan, done=first.arrived))
    assert marker.exists()
    marker.unlink()
    (archive / first.plan.dispatch_id / "CT0001.dcm").unlink()
    sent = attempt(target(archive), first.plan, done=first.arrived)
    assert any("1 files" in note for note in sent.require().notes)
    assert not marker.exists(), "marked as complete, but a file is missing"


def test_verification_finds_what_is_gone_or_damaged(archive: Path, study: Path) -> None:
    studies.ct(study, 4)
    first = delivered(attempt(target(archive), study))
    there = archive / first.plan.dispatch_id
    (there / "CT0001.dcm").unlink()
    os.truncate(there / "CT0002.dcm", 10)
    data = bytearray((there / "CT0003.dcm").read_bytes())
    data[-1] ^= 1
    (there / "CT0003.dcm").write_bytes(data)
    accepted = attempt(target(archive), first.plan, done=first.arrived)
    assert accepted.require().state is State.DELIVERED
    assert accepted.require().verified is Level.ACCEPTED
    listed = attempt(target(archive, verify="listed"), first.plan, done=first.arrived)
    assert set(listed.rejected) == {"CT0001.dcm", "CT0002.dcm"}
    proven = attempt(target(archive, verify="proven"), first.plan, done=first.arrived)
    assert set(proven.rejected) == {"CT0001.dcm", "CT0002.dcm", "CT0003.dcm"}
    assert proven.require().state is State.PARTIAL
    again = attempt(target(archive, verify="proven"), first.plan, done={"CT0004.dcm"})
    assert delivered(again).require().verified is Level.PROVEN


def test_what_cannot_be_read_again_is_not_called_proven(archive: Path, study: Path) -> None:
    files = studies.ct(study, 2)
    first = delivered(attempt(target(archive), study))
    files[0].unlink()
    sent = attempt(target(archive, verify="proven"), first.plan, done=first.arrived)
    assert sent.require().verified is Level.LISTED
    assert sent.require().notes
