"""The clock of a file system stands still for milliseconds: what changes within them keeps its times."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path


def tick(folder: Path) -> None:
    """Wait until what is written in this folder's file system gets a later time than all that is there."""
    with tempfile.TemporaryFile(dir=folder) as probe:

        def written() -> int:
            probe.truncate(0)
            probe.write(b"x")
            probe.flush()
            return Path(f"/proc/self/fd/{probe.fileno()}").stat().st_mtime_ns

        begun = written()
        while written() == begun:
            time.sleep(0.001)
