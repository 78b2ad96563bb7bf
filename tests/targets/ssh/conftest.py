"""Both types of target that log in by SSH, and an account that has met no host."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks.rsync import RsyncTarget
from blocks.sftp import SftpTarget
from blocks.ssh import SshTarget
from protocols.ssh import hostkeys


@pytest.fixture(params=[RsyncTarget, SftpTarget], ids=lambda kind: kind.type_name)
def kind(request: pytest.FixtureRequest) -> type[SshTarget]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def empty_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let nothing have been learned yet, and the account know no host; the path is one that needs quoting."""
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / 'state, with 100% of it\'s "signs"'))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    hostkeys._resolved.clear()
