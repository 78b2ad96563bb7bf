"""A folder to deliver to, and one to deliver from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tmp_path / "study"
