"""What tests of the core share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.postgresql import PostgreSql, postgresql
from transfer import database


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgreSql]:
    with postgresql() as one:
        yield one


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, path: Path) -> Iterator[Path | str]:
    """Both homes of a ledger."""
    if request.param == "sqlite":
        yield path
        return
    url: str = request.getfixturevalue("postgres").new()
    yield url
    database._engine(url).dispose()
