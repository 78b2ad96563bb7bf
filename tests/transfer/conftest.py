"""What tests of the core share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.postgresql import PostgreSql, postgresql


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgreSql]:
    with postgresql() as one:
        yield one
