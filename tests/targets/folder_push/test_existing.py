"""Into a folder that is there already: shared, replaced, completed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from tests.targets.folder_push.pushing import delivered, target, tree
from transfer.outcome import Kind
from transfer.receipt import Level, State

SAME = {"layout": "{PatientID}"}


def test_two_dispatches_share_a_folder(archive: Path, study: Path) -> None:
    studies.dicom(study / "one" / "1.dcm")
    studies.dicom(study / "two" / "2.dcm")
    delivered(attempt(target(archive, **SAME), study / "one"))
    marker = archive / studies.PATIENT_ID / ".complete"
    os.utime(marker, (0, 0))
    delivered(attempt(target(archive, **SAME), study / "two"))
    assert tree(archive) == {f"{studies.PATIENT_ID}/{name}" for name in ("1.dcm", "2.dcm", ".complete")}
    assert marker.stat().st_mtime > 0, "whoever watches the marker learns of the second"
    assert os.listdir(archive) == [studies.PATIENT_ID]


def test_a_folder_is_not_marked_while_another_dispatch_comes_into_it(archive: Path, study: Path) -> None:
    for number in range(1, 4):
        studies.dicom(study / ("one" if number == 1 else "two") / f"{number}.dcm")
    delivered(attempt(target(archive, **SAME), study / "one"))
    marker = archive / studies.PATIENT_ID / ".complete"
    assert marker.exists()
    obstacle = marker.with_name("3.dcm")
    obstacle.mkdir()
    seen = []
    sent = attempt(target(archive, **SAME), study / "two", told=lambda *_: seen.append(marker.exists()))
    assert set(sent.rejected) == {"3.dcm"}
    assert seen == [False, False]
    assert not marker.exists(), "marked as complete, but a file is missing"
    obstacle.rmdir()
    delivered(attempt(target(archive, **SAME), sent.plan, done=sent.arrived))
    assert marker.exists()


def test_many_dispatches_into_one_folder_at_once(archive: Path, study: Path) -> None:
    wanted = {}
    for number in range(6):
        for path in studies.ct(study / str(number) / f"series{number}", 12):
            wanted[str(path.relative_to(study / str(number)))] = path.read_bytes()
        studies.write(study / str(number) / "shared" / f"{number}.txt", str(number).encode())
        wanted[f"shared/{number}.txt"] = str(number).encode()
    sent: list[Sent] = []
    gate = threading.Barrier(6)

    def work(number: int) -> None:
        gate.wait()
        sent.append(attempt(target(archive, layout="all"), study / str(number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == 6
    for one in sent:
        delivered(one)
    got = {str(p.relative_to(archive / "all")): p.read_bytes() for p in (archive / "all").rglob("*") if p.is_file()}
    assert got.pop(".complete") == b""
    assert got == wanted
    assert os.listdir(archive) == ["all"]


def test_another_instance_of_the_same_name_is_not_lost(archive: Path, study: Path) -> None:
    (first,) = studies.ct(study / "one", 1)
    studies.ct(study / "two", 2)
    delivered(attempt(target(archive, layout="all"), study / "one"))
    sent = attempt(target(archive, layout="all"), study / "two")
    assert sent.require().state is State.PARTIAL
    assert set(sent.rejected) == {"CT0001.dcm"}
    assert "another instance" in sent.rejected["CT0001.dcm"]
    assert "layout" in sent.rejected["CT0001.dcm"]
    assert (archive / "all" / "CT0001.dcm").read_bytes() == first.read_bytes()
    assert tree(archive) == {"all/CT0001.dcm", "all/CT0002.dcm"}, "not complete: one of the second dispatch is missing"


def test_another_instance_of_the_same_length_and_time_is_not_taken_for_it(archive: Path, study: Path) -> None:
    """What unpacks archives may give every file the same time."""
    for name in ("one", "two"):
        (file,) = studies.ct(study / name, 1)
        os.utime(file, (1e9, 1e9))
    assert len({file.stat().st_size for file in study.rglob("*.dcm")}) == 1
    delivered(attempt(target(archive, layout="all"), study / "one"))
    sent = attempt(target(archive, layout="all"), study / "two")
    assert "another instance" in sent.rejected["CT0001.dcm"]


@pytest.mark.parametrize("level", Level)
def test_a_file_that_has_been_damaged_is_sent_again(archive: Path, study: Path, level: Level) -> None:
    (file,) = studies.ct(study, 1)
    first = delivered(attempt(target(archive), study))
    there = archive / first.plan.dispatch_id / "CT0001.dcm"
    data, times = bytearray(there.read_bytes()), there.stat()
    data[-1] ^= 1
    there.write_bytes(data)
    os.utime(there, ns=(times.st_atime_ns, times.st_mtime_ns))
    if level is Level.PROVEN:
        assert set(attempt(target(archive, verify=level), first.plan, done=first.arrived).rejected) == {"CT0001.dcm"}
        assert not there.with_name(".complete").exists(), "not complete: one is not what was sent"
    again = delivered(attempt(target(archive, verify=level), first.plan))
    assert again.outcomes["CT0001.dcm"].kind is Kind.WARNING
    assert there.read_bytes() == file.read_bytes()
    assert there.with_name(".complete").exists()


def test_a_newer_version_replaces_an_older_one_with_a_warning(archive: Path, study: Path) -> None:
    note = studies.note(study / "result.json")
    delivered(attempt(target(archive, layout="all"), study))
    new = studies.note(note).read_bytes()
    sent = delivered(attempt(target(archive, layout="all"), study))
    assert sent.outcomes["result.json"].kind is Kind.WARNING
    assert (archive / "all" / "result.json").read_bytes() == new


def test_the_same_content_with_another_time_is_already_there(archive: Path, study: Path) -> None:
    """As on file systems that keep coarser times."""
    studies.ct(study, 1)
    first = delivered(attempt(target(archive), study))
    there = archive / first.plan.dispatch_id / "CT0001.dcm"
    os.utime(there, (0, 0))
    inode = there.stat().st_ino
    again = delivered(attempt(target(archive), first.plan))
    assert again.outcomes["CT0001.dcm"].kind is Kind.ALREADY
    assert again.moved == 0
    assert there.stat().st_ino == inode
