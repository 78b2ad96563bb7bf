"""rsync targets: what fails alone costs itself alone, every attempt gets further; holes are kept."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocks.rsync import RsyncTarget
from protocols.ssh.client import SshClient
from protocols.ssh.rsync import Rsync
from talaria.testing import process, studies
from talaria.testing.harness import attempt
from tasks.ssh import login
from tests.servers.openssh import Server, inside, openssh, shared, small_disk
from tests.targets.remote_folder import content, ssh_target
from transfer.errors import Busy, Retryable
from transfer.plan import scan
from transfer.receipt import State

MEGABYTE = 1 << 20
# Kills the rsync that is its child as soon as the file A0.bin, or A1.bin, comes.
KILLS = """#!/bin/sh
case "$*" in *--server*) ;; *) exec {rsync} "$@" ;; esac
exec 3<&0
setsid {rsync} "$@" <&3 3<&- &
child=$!
while kill -0 $child 2>/dev/null; do
  for file in {folder}/.incoming-*/*/.talaria-temp/*A[0-9].bin*; do [ -e "$file" ] && kill -KILL -$child; done
  sleep 0.02
done
wait $child
"""


def target(folder: Path | str, server: Server, **more: object) -> RsyncTarget:
    return ssh_target(RsyncTarget, server, folder, **more)


def below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_without_room_costs_itself_alone(tmp_path: Path) -> None:
    study = tmp_path / "study"
    studies.ct(study, 10)
    (study / "A.bin").write_bytes(os.urandom(30 * MEGABYTE))
    plan = scan([study])
    with small_disk(tmp_path, "size=60m") as server:
        one = target("/mnt/in", server)
        inside(server, "head -c 42000000 /dev/zero >/mnt/ballast")
        sent = attempt(one, plan)
        assert isinstance(sent.error, Busy), repr(sent.error)
        assert "No space left" in sent.error.message and sent.error.item == "A.bin"
        assert len(sent.arrived) == 10 and not sent.rejected
        names = inside(server, f"ls -A /mnt/in/{plan.dispatch_id}").split()
        assert len(names) == 10 and ".complete" not in names
        inside(server, "rm /mnt/ballast")
        rest = attempt(one, plan, done=sent.arrived)
        assert rest.require().state is State.DELIVERED
        names = inside(server, f"ls -A /mnt/in /mnt/in/{plan.dispatch_id}").split()
        assert ".complete" in names and "A.bin" in names and not [name for name in names if ".incoming" in name]


def test_a_file_that_is_too_large_for_the_account_is_rejected_alone(tmp_path: Path) -> None:
    study = tmp_path / "study"
    studies.ct(study, 10, side=64)
    (study / "A.bin").write_bytes(os.urandom(3 * MEGABYTE))
    (tmp_path / "in").mkdir()
    more = 'ForceCommand trap "" XFSZ; ulimit -f 2048; sh -c "$SSH_ORIGINAL_COMMAND"'
    with openssh(tmp_path / "sshd", more=more) as server:
        sent = attempt(target(tmp_path / "in", server), study)
    assert set(sent.rejected) == {"A.bin"}, repr(sent.error)
    assert "File too large" in sent.rejected["A.bin"]
    assert len(sent.arrived) == 10


def test_files_that_are_too_large_are_found_out_together(tmp_path: Path) -> None:
    """Each would cost a login; and no run of rsync keeps descriptors that the next one could need."""
    study = tmp_path / "study"
    studies.ct(study, 3, side=64)
    for number in range(40):
        (study / f"A{number:02}.bin").write_bytes(bytes(2 * MEGABYTE + 1 + number))
    (tmp_path / "in").mkdir()
    more = 'ForceCommand trap "" XFSZ; ulimit -f 2048; sh -c "$SSH_ORIGINAL_COMMAND"'
    with openssh(tmp_path / "sshd", more=more) as server:
        sent = attempt(target(tmp_path / "in", server), study)
    assert len(sent.rejected) == 40, repr(sent.error)
    assert all("File too large" in reason for reason in sent.rejected.values())
    assert len(sent.arrived) == 3


def test_no_run_of_rsync_keeps_descriptors(tmp_path: Path) -> None:
    study, folder = tmp_path / "study", tmp_path / "in"
    studies.ct(study, 1)
    folder.mkdir()
    with SshClient(login(target(folder, shared()))) as client:
        rsync = Rsync(client)
        opened = []
        for _ in range(3):
            result, paths = rsync.differing(study, ["CT0001.dcm"], str(folder))
            assert result.code == 0
            assert paths == ["CT0001.dcm"]
            opened.append(process.open_descriptors())
        result, _ = rsync.differing(study, ["CT0001.dcm"], "/dev/null/nowhere")
        assert "/dev/null" in result.failure().message
    assert opened[1] <= opened[0]
    assert opened[2] <= opened[0]


@contextmanager
def killing(folder: Path) -> Iterator[Server]:
    tools = folder / "bin"
    tools.mkdir()
    script = tools / "rsync"
    script.write_text(KILLS.format(rsync=shutil.which("rsync"), folder=shlex.quote(str(folder / "in"))))
    script.chmod(0o755)
    with openssh(folder / "sshd", more=f'ForceCommand PATH={tools}:$PATH sh -c "$SSH_ORIGINAL_COMMAND"') as server:
        yield server


@pytest.mark.parametrize("bad", [1, 2])
def test_files_at_which_rsync_dies_hold_up_no_others(tmp_path: Path, bad: int) -> None:
    study = tmp_path / "study"
    studies.ct(study, 10, side=64)
    for number in range(bad):
        (study / f"A{number}.bin").write_bytes(os.urandom(4 * MEGABYTE))
    (tmp_path / "in").mkdir()
    plan = scan([study])
    arrived: set[str] = set()
    with killing(tmp_path) as server:
        one = target(tmp_path / "in", server, bandwidth_limit=2 * MEGABYTE)
        for _ in range(1 + bad):
            assert len(arrived) < 10
            sent = attempt(one, plan, done=arrived)
            assert isinstance(sent.error, Retryable), repr(sent.error)
            arrived |= sent.arrived
        assert len(arrived) == 10, "others were held up"
        assert (sent.error.item or "").startswith("A")
        assert not (tmp_path / "in" / plan.dispatch_id / ".complete").exists()
    one = target(tmp_path / "in", shared())
    assert attempt(one, plan, done=arrived).require().state is State.DELIVERED
    assert below(tmp_path / "in" / plan.dispatch_id) == content(sent) | {".complete": b""}


def test_holes_are_kept(tmp_path: Path) -> None:
    study = tmp_path / "study"
    studies.ct(study, 2)
    with open(study / "holes.bin", "wb") as file:
        file.seek(20 * MEGABYTE)
        file.write(b"data")
        file.truncate(40 * MEGABYTE)
    (tmp_path / "in").mkdir()
    sent = attempt(target(tmp_path / "in", shared()), study)
    assert sent.require().state is State.DELIVERED
    there = tmp_path / "in" / sent.plan.dispatch_id / "holes.bin"
    assert there.read_bytes() == (study / "holes.bin").read_bytes()
    assert there.stat().st_blocks * 512 < MEGABYTE
