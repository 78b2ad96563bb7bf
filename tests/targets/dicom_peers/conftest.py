"""A study to send to DICOM peers."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    return folder
