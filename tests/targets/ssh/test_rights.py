"""Folders that may not be written to: by their rights, or because their file system is read-only."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from blocks.rsync import RsyncTarget
from blocks.sftp import SftpTarget
from blocks.ssh import SshTarget
from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks import DRIVERS
from tests.servers.openssh import IS_ROOT, ordinary, small_disk
from tests.targets.remote_folder import ssh_target
from transfer.errors import Denied
from transfer.plan import scan
from transfer.receipt import State


def test_a_read_only_file_system_is_denied(kind: type[SshTarget], tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    with small_disk(tmp_path, "ro") as server:
        one = ssh_target(kind, server, "/mnt/in")
        error = attempt(one, tmp_path / "study").error
        assert isinstance(error, Denied), repr(error)
        assert "Read-only" in error.message or kind is not RsyncTarget  # SFTP has no word for it
        assert isinstance(DRIVERS.of(one).check(one).error, Denied)


@pytest.mark.parametrize("what", ["folder", "its dispatch", "a folder below"])
def test_a_folder_without_the_right_to_write_is_denied(kind: type[SshTarget], tmp_path: Path, what: str) -> None:
    study = tmp_path / "study"
    studies.ct(study / "a", 2)
    studies.ct(study / "b", 2)
    plan = scan([study])
    with ordinary(tmp_path) as (server, home):
        one = ssh_target(kind, server, home / "in")
        closed = {"folder": home / "in", "its dispatch": home / "in" / plan.dispatch_id,
                  "a folder below": home / "in" / plan.dispatch_id / "a"}[what]  # fmt: skip
        closed.mkdir(parents=True)
        if IS_ROOT:
            subprocess.run(["chown", "-R", f"{server.user}:", str(home)], check=True)
        closed.chmod(0o555)
        sent = attempt(one, plan)
        if what == "a folder below":
            assert set(sent.rejected) == {"a/CT0001.dcm", "a/CT0002.dcm"}, repr(sent.error)
            assert len(sent.arrived) == 2
        else:
            assert isinstance(sent.error, Denied), repr(sent.error)
            assert not sent.outcomes
        if kind is SftpTarget:
            [probe] = [probe for probe in DRIVERS.of(one).check(one).probes if probe.name == "authorize"]
            assert probe.result == ("failed" if what == "folder" else "ok")
        closed.chmod(0o755)
        assert attempt(one, plan, done=sent.arrived).require().state is State.DELIVERED
