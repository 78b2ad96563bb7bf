"""Several processes at one index: stopped, killed, locked out; and a large one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from imaging.query import Query
from protocols.dicomfolder import folder as dicomfolder
from protocols.dicomfolder import scan as dicomscan
from protocols.dicomfolder.folder import DicomFolder
from protocols.dicomfolder.index import NAME
from talaria.testing.process import as_loaded
from tests.protocols.dicomfolder.looking import look, opened_files, series


def test_stopped_look_keeps_what_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomscan, "CHUNK", 16)
    series(tmp_path / "a", 60)
    stop = threading.Event()

    class Stop(Exception):
        pass

    def check() -> None:
        if stop.is_set():
            raise Stop
        if files:
            stop.set()

    with opened_files() as files, DicomFolder(tmp_path, check=check) as folder, pytest.raises(Stop):
        folder.refresh()
    read = len(files)
    assert 0 < read < 60
    assert look(tmp_path).read == 60 - read


CHILD = """
import sys
from pathlib import Path
from protocols.dicomfolder import folder as dicomfolder
from protocols.dicomfolder import scan as dicomscan
dicomfolder.SAVE_EVERY_S = 0.0
dicomscan.CHUNK = 16
really, saves = dicomfolder.DicomFolder._save, []
def save(self):
    really(self)
    saves.append(1)
    if len(saves) == 2 and "stops" in sys.argv:
        print("saved", flush=True)
        sys.stdin.read()
dicomfolder.DicomFolder._save = save
with dicomfolder.DicomFolder(Path(sys.argv[1])) as folder:
    from imaging.query import Query
    print(folder.refresh().read, sum(match.instances for match in folder.find(Query())))
"""


def child(root: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )


def test_killed_process_leaves_a_usable_index(tmp_path: Path) -> None:
    for number in range(4):
        series(tmp_path / str(number), 50)
    process = child(tmp_path, "stops")
    assert process.stdout and process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    report = look(tmp_path)
    assert 0 < report.read < 200, "what the killed process had read is lost"
    assert report.read + report.unchanged == 200
    with DicomFolder(tmp_path) as folder:
        assert [match.instances for match in folder.find(Query())] == [50] * 4
    assert look(tmp_path).unchanged == 200


def test_several_processes_at_once(tmp_path: Path) -> None:
    for number in range(4):
        series(tmp_path / str(number), 40)
    processes = [child(tmp_path) for _ in range(3)]
    with DicomFolder(tmp_path) as folder:
        while any(process.poll() is None for process in processes):
            assert sum(match.instances or 0 for match in folder.find(Query())) == 160
            time.sleep(0.05)
    results = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [counted for _, counted in results] == ["160"] * 3
    report = look(tmp_path)
    assert (report.read, report.unchanged) == (0, 160)
    assert not list(tmp_path.glob(f"{NAME}.*"))


def test_process_that_waited_uses_what_the_other_has_read(tmp_path: Path) -> None:
    for number in range(2):
        series(tmp_path / str(number), 40)
    processes = [child(tmp_path, "slow") for _ in range(2)]
    read = sorted(int(process.communicate()[0].split()[0]) for process in processes)
    assert sum(read) < 160, "both have read everything"


def test_no_locks_no_harm(tmp_path: Path) -> None:
    series(tmp_path, 3)
    with mock.patch.object(dicomfolder.fcntl, "flock", side_effect=OSError(95, "not supported")):
        assert look(tmp_path).read == 3
    assert look(tmp_path).read == 0


def test_lock_that_is_held_for_ever_only_delays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    series(tmp_path, 3)
    monkeypatch.setattr(dicomfolder, "LOCK_S", 0.3)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert look(tmp_path).read == 3
        assert look(tmp_path).read == 0
    finally:
        os.close(fd)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hundred_thousand_files(tmp_path: Path) -> None:
    from benchmarks.dicomfolder import make

    make(tmp_path / "data", 100_000)
    assert look(tmp_path / "data").read == 100_000
    begun = time.monotonic()
    with opened_files() as opened, DicomFolder(tmp_path / "data") as folder:
        found = list(folder.find(Query(StudyDescription=("Study 00007",), Modality="CT")))
    assert time.monotonic() - begun < as_loaded(2)
    assert not opened
    assert found
    shutil.rmtree(tmp_path / "data")
