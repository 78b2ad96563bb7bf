"""The server and worker that the tests of pages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.up import Talaria, talaria


@pytest.fixture(scope="package")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talaria]:
    with talaria(tmp_path_factory.mktemp("up")) as one:
        yield one


@pytest.fixture(scope="module")
def up(_running: Talaria) -> Talaria:
    """One `talaria up` for the files of this folder that ask for it; each finds it without targets, sources and rules.

    What a file sends must not wait for ever: a target that a dispatch is to go to can't be removed.
    """
    for kind, key in (("source", "sources"), ("notify", "rules"), ("target", "targets")):
        for one in _running.told(kind, "list")[key]:
            remove = (kind, "remove", one["name"])
            _running.until(lambda remove=remove: _running.here(*remove).returncode == 0)  # type: ignore[misc]
    return _running
