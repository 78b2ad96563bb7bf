"""An S3 store, and a study to send to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.s3.support import forget
from tests.servers.s3_stub import Stub, stub


@pytest.fixture(autouse=True)
def _nothing_known() -> None:
    forget()  # another store had this port before


@pytest.fixture
def store() -> Iterator[Stub]:
    with stub(buckets={"lab": {}}) as made:
        yield made


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    return folder
