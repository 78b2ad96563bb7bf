"""A scripted STOW server, and a plan to store at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from protocols.dicomweb import stow
from protocols.http import exchange as http
from talaria.testing import studies
from tests.servers.dicomweb import Scripted, scripted
from transfer.plan import Plan, scan


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted(only="POST") as running:
        yield running


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a process that has met no server yet."""
    monkeypatch.setattr(stow, "_suspected", {})
    monkeypatch.setattr(stow, "_stumbled", {})
    monkeypatch.setattr(http, "_without_continue", set())


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    studies.ct(tmp_path / "study", 8)
    return scan([tmp_path / "study"])
