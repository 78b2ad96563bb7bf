"""What is asked of a file system as a whole."""

from __future__ import annotations

import subprocess
from pathlib import Path

from protocols.files import filesystem as fs


def test_kinds_of_file_systems(tmp_path: Path) -> None:
    said = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", tmp_path], capture_output=True, text=True, check=True)
    assert fs.kind(tmp_path) == said.stdout.strip()
    assert fs.kind(Path("/dev/shm")) == "tmpfs"
    assert fs.kind(Path("/proc/self")) == "proc"


def test_a_flush_of_everything(tmp_path: Path) -> None:
    calls = 0

    def looked() -> None:
        nonlocal calls
        calls += 1

    assert fs.flush_all(tmp_path, looked)
    assert calls
