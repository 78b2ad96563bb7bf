"""A scripted DICOMweb server, and a plan to store at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from talaria.testing import studies
from tasks.dicomweb import _credentials
from tests.servers.dicomweb import Scripted, scripted
from transfer.plan import Plan, scan


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted() as running:
        yield running


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    studies.ct(tmp_path / "study", 3)
    return scan([tmp_path / "study"])


@pytest.fixture(autouse=True)
def no_tokens() -> None:
    _credentials.cache_clear()
