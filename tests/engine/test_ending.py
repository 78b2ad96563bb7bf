"""A process ends when its work is done, though a thread of it hangs in a share that is away."""

from __future__ import annotations

import subprocess
import sys

import pytest

from talaria import ending
from talaria.engine import worker

HANGS = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from talaria import ending
ending.ENDS_S = 0.1
ThreadPoolExecutor(1).submit(threading.Event().wait)
ending.end_soon(3)
print("done")
"""


def test_a_process_whose_thread_hangs_ends_with_its_exit_code() -> None:
    """Seen: SIGTERM ended no worker that had left a run in such a thread, and `up` waited for it."""
    ran = subprocess.run([sys.executable, "-P", "-c", HANGS], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, "done\n", "")


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_ends_soon_when_its_work_is_over(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []

    async def work(*_: object) -> None:
        if fails:
            raise RuntimeError

    monkeypatch.setattr(worker, "work", work)
    monkeypatch.setattr(ending, "end_soon", ends.append)
    monkeypatch.setattr(worker.logs, "set_up", lambda: None)
    if fails:
        with pytest.raises(RuntimeError):
            worker.main()
    else:
        worker.main()
    assert ends == [int(fails)]
