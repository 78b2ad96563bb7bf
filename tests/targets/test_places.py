"""Confirmations belong to the place: what others brought there is not sent again, what they overwrote is."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.base import Target
from blocks.folder import FolderTarget
from talaria.testing import studies
from tasks import DRIVERS
from tasks.dispatch.delivery import Delivery
from tests.servers.scp import scp
from tests.targets.dicom import dicom_target
from tests.targets.test_hook import calls, install, study, target
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.outcome import Kind
from transfer.plan import Origin, scan
from transfer.receipt import Receipt, State

__all__ = ["study", "target"]  # fixtures


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as one:
        yield one


def delivery(
    target: Target, folder: Path, ledger: Ledger, *, force: bool = False, exclude: str = "", host: str = ""
) -> Delivery:
    home = Home(folder.parent / "home")
    home.root.mkdir(exist_ok=True)
    plan = scan([folder], (exclude,) if exclude else (), Origin(sender_host=host))
    return Delivery(DRIVERS.of(target), target, plan, ledger, home, threading.Event(), force=force)


def counts(receipt: Receipt) -> tuple[int, int]:
    return receipt.counts[Kind.DELIVERED], receipt.counts[Kind.ALREADY]


def test_two_senders_in_turn_send_nothing_twice(tmp_path: Path, ledger: Ledger) -> None:
    studies.ct(tmp_path / "study", 3)
    with scp() as one, scp(port=one.port, host="127.0.0.2") as other:
        target = dicom_target(one.port, host="sender")
        for host, wanted in (
            ("127.0.0.1", (3, 0)),
            ("127.0.0.2", (3, 0)),
            ("127.0.0.1", (0, 3)),
            ("127.0.0.2", (0, 3)),
        ):
            assert counts(delivery(target, tmp_path / "study", ledger, host=host).push()) == wanted
        assert (len(one.stores), len(other.stores)) == (3, 3)


@pytest.mark.parametrize("whole_seconds", [False, True])
def test_a_content_that_was_overwritten_is_sent_again(tmp_path: Path, ledger: Ledger, whole_seconds: bool) -> None:
    """A, then B with the same UIDs, then A: the peer holds what was sent last, and what is there is not sent."""
    series = [studies.uid(56), studies.uid(56)]
    first = studies.ct_bytes(study=series[0], series=series[1])
    changed = bytes([*first[:-2], first[-2] ^ 1, first[-1] ^ 1])  # other pixels, the same length
    for name, data in (("a", first), ("b", changed)):
        file = studies.write(tmp_path / name / "one.dcm", data)
        if whole_seconds:
            os.utime(file, (1_700_000_000, 1_700_000_000))  # as unpacked from an archive: same name, length and time
    with scp() as peer:
        target = dicom_target(peer.port, aet_target=peer.aet)
        for name, wanted in (("a", (1, 0)), ("b", (1, 0)), ("b", (0, 1)), ("a", (1, 0)), ("a", (0, 1)), ("b", (1, 0))):
            assert counts(delivery(target, tmp_path / name, ledger).push()) == wanted, name
        assert len(peer.stores) == 4


def test_the_same_study_under_another_exclude_sends_what_is_missing(tmp_path: Path, ledger: Ledger) -> None:
    studies.ct(tmp_path / "study", 4)
    with scp() as peer:
        target = dicom_target(peer.port, aet_target=peer.aet)
        assert counts(delivery(target, tmp_path / "study", ledger, exclude="CT0001*").push()) == (3, 0)
        assert counts(delivery(target, tmp_path / "study", ledger).push()) == (1, 3)
        assert counts(delivery(target, tmp_path / "study", ledger, exclude="CT0002*").push()) == (0, 3)
        target.exclude = "CT0003*"  # what the target is not to get says nothing about what it has
        assert counts(delivery(target, tmp_path / "study", ledger).push()) == (0, 3)
        target.exclude = ""
        assert counts(delivery(target, tmp_path / "study", ledger).push()) == (0, 4)
        assert counts(delivery(target, tmp_path / "study", ledger, force=True).push()) == (4, 0)


def test_a_layout_that_names_the_dispatch_makes_a_new_place_each_time(tmp_path: Path, ledger: Ledger) -> None:
    files = studies.ct(tmp_path / "study", 3)
    (tmp_path / "nas").mkdir()
    for layout, wanted in (("{dispatch_id}", (3, 0)), ("{StudyInstanceUID}", (0, 3))):
        target = FolderTarget(folder=str(tmp_path / "nas"), layout=layout).named("nas")
        delivery(target, tmp_path / "study", ledger).push()
        shutil.copytree(tmp_path / "study", tmp_path / layout, copy_function=shutil.copy)
        (tmp_path / layout / "CT0003.dcm").rename(tmp_path / layout / "CT0004.dcm")
        receipt = delivery(target, tmp_path / layout, ledger).push()
        assert receipt.state is State.DELIVERED
        # By study, two of three are at their paths, and the third is there under another.
        assert counts(receipt) == (wanted if wanted == (3, 0) else (1, 2))
    assert len(files) == 3


def test_another_dispatch_that_finds_everything_there_does_not_run_the_script_again(
    target: Target, study: Path, ledger: Ledger, tmp_path: Path
) -> None:
    install(target)  # type: ignore[arg-type]
    target.layout = "{StudyInstanceUID}"  # type: ignore[attr-defined]
    copy = tmp_path / "copy"

    def send(folder: Path, **how: bool) -> int:
        one = delivery(target, folder, ledger, **how)  # type: ignore[arg-type]
        one.push()
        if one.wants_hook:
            one.run_hook()
        assert one.receipt().state is State.DELIVERED
        assert one.receipt().hook == "done"
        return len(calls(target))  # type: ignore[arg-type]

    assert send(study) == 1
    shutil.copytree(study, copy, copy_function=shutil.copy)
    assert send(copy) == 1, "nothing new has come"
    shutil.copy(study / "CT0001.dcm", copy / "CT0003.dcm")
    assert send(copy) == 2
    assert send(copy) == 2
    assert send(copy, force=True) == 3
