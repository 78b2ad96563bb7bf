"""What a worker loads while it has nothing to do: in a process of its own, which has loaded nothing yet."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)
LOADED = """
import asyncio, sys
from prefect.client.orchestration import get_client
from talaria.engine.ahead import load_ahead
busy = [True, False]
async def main():
    seen = []
    def is_busy():
        seen.append("tasks.dicom" in sys.modules or "tasks.sftp" in sys.modules)
        return busy.pop(0) if busy else False
    async with get_client() as client:
        await load_ahead(client, is_busy)
    print(seen[:2], *(name in sys.modules for name in ("tasks.dicom", "tasks.sftp", "tasks.s3")))
asyncio.run(main())
"""


def test_drivers_of_saved_targets_are_loaded_once_nothing_runs(up: Talaria) -> None:
    up.apply(ahead={"type": "sftp", "host": "127.0.0.1", "user": "nobody", "password": "secret", "folder": "/in"})
    password = (up.home / "api.auth").read_text().strip()
    env = up.env | {"PREFECT_API_URL": up.url, "PREFECT_API_AUTH_STRING": password}
    done = subprocess.run([sys.executable, "-c", LOADED], env=env, capture_output=True, text=True, timeout=120)
    up.told("target", "remove", "ahead")
    assert done.stdout.split("\n")[0].startswith("[False, False] True True"), done.stderr
