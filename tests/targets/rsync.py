"""Harness of rsync targets: OpenSSH and rsync on this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from blocks.rsync import RsyncTarget
from talaria.testing.harness import Harness
from tests.targets.remote_folder import over_openssh

HARNESSES: dict[str, Callable[[Path], AbstractContextManager[Harness]]] = {
    "rsync-openssh": partial(over_openssh, RsyncTarget)
}
NEEDED = {
    "host": "files.example.org",
    "user": "talaria",
    "folder": "/data",
}
