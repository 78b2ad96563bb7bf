"""The server and worker that the tests of pages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

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
    for kind, key in (("source", "sources"), ("notify", "rules")):
        for one in _running.told(kind, "list")[key]:
            assert _running.here(kind, "remove", one["name"]).returncode == 0
    if _running.told("target", "list")["targets"]:  # all of them by one command: there may be dozens
        path = _running.folder / "none.yaml"
        path.write_text(yaml.safe_dump({"targets": {"none": {"type": "folder", "folder": str(_running.folder)}}}))
        for command in (("apply", str(path), "--prune"), ("remove", "none")):
            _running.until(lambda command=command: _running.here("target", *command).returncode == 0)  # type: ignore[misc]
    return _running
