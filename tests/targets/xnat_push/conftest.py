"""An XNAT server, and a study to send to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.xnat import Xnat
from tests.targets.xnat import serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Xnat]:
    with serving(tmp_path / "xnat") as running:
        yield running
        assert not running.store.logins, "a session at XNAT was not ended"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    return folder
