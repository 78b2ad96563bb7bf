"""Ends a process whose work is done, whatever hangs in it.

A thread in a share that is away comes back when that does; Python waits for it before it lets its process end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Coroutine
from typing import Any

ENDS_S = 10.0  # for what is sent at the end, as the last lines of a run's log


def end_soon(code: int = 0) -> None:
    """Let this process end by itself, or in some seconds with an exit code."""
    timer = threading.Timer(ENDS_S, os._exit, (code,))
    timer.daemon = True
    timer.start()


def run_to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Run what a process is for; when it is over, end the process soon."""
    import asyncio  # which a command that ends soon may not need

    async def worked() -> None:
        code = 1
        try:
            await work
            code = 0
        finally:
            end_soon(code)

    asyncio.run(worked())
