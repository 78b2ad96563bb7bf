"""What is asked of a file system as a whole."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from protocols.files import filesystem as fs


def test_kinds_of_file_systems(tmp_path: Path) -> None:
    said = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", tmp_path], capture_output=True, text=True, check=True)
    assert fs.kind(tmp_path) == said.stdout.strip()
    assert fs.kind(Path("/dev/shm")) == "tmpfs"
    assert fs.kind(Path("/proc/self")) == "proc"


def test_of_a_folder_that_does_not_answer_one_thread_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a share by NFS whose server is gone: each test of the target, for days, left a thread behind."""
    ask: Callable[[str], os.statvfs_result] = os.statvfs
    back, asked, other = threading.Event(), list[str](), tmp_path / "other"

    def silent(folder: str) -> os.statvfs_result:
        asked.append(folder)
        back.wait(60)
        return ask(folder)

    monkeypatch.setattr(os, "statvfs", silent)
    for folder in (tmp_path, tmp_path, other, tmp_path, other):
        with pytest.raises(fs.Silent):
            fs.within(0.01, folder)
    assert asked == [str(tmp_path), str(other)]
    back.set()
    assert fs.within(60, tmp_path).st_ino == tmp_path.stat().st_ino
    with pytest.raises(FileNotFoundError):
        fs.within(60, other)
    other.mkdir()
    assert fs.within(60, other).st_ino == other.stat().st_ino, "it is asked anew"


def test_a_flush_of_everything(tmp_path: Path) -> None:
    calls = 0

    def looked() -> None:
        nonlocal calls
        calls += 1

    assert fs.flush_all(tmp_path, looked)
    assert calls
