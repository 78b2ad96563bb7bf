"""The server and worker that the tests of sources share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.up import Talaria, talaria


@pytest.fixture(scope="package")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talaria]:
    """One `talaria up` for all tests of this folder, as far as one process runs them."""
    with talaria(tmp_path_factory.mktemp("up")) as one:
        yield one
