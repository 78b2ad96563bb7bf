"""DICOMweb servers to search."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protocols.dicomweb import readback
from tests.servers.dicomweb import Scripted, scripted
from tests.servers.orthanc import Orthanc, shared_orthanc


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted() as running:
        yield running


@pytest.fixture
def orthanc() -> Orthanc:
    return shared_orthanc()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback, "LISTED_WAIT_S", 0.3)
