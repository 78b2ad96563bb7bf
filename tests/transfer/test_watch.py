"""Watching files."""

from __future__ import annotations

import subprocess
import sys


def test_a_watch_that_lives_until_the_interpreter_ends_says_nothing() -> None:
    script = "import os\nfrom transfer.watch import Watch\nos.environ.__dict__['kept'] = Watch()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
