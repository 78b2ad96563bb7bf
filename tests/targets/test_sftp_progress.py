"""SFTP targets: what fails alone costs itself alone, every attempt gets further; times and holes are kept."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from blocks.sftp import SftpTarget
from protocols.ssh.packets import Space, space_of
from talaria.testing import studies
from talaria.testing.harness import Sent, attempt, sending
from talaria.testing.relay import relay
from tests.servers.openssh import shared
from tests.servers.sftp_odd import Odd, odd
from tests.targets.remote_folder import RemoteFolder, content
from tests.targets.sftp import odd_target
from transfer.content import data_before, data_parts, is_sparse
from transfer.errors import Busy, Interrupted, TimedOut
from transfer.plan import scan
from transfer.receipt import State

SMALL = 20_000  # bytes; the files of `studies.ct` are smaller
LARGE = 300_000


@pytest.fixture
def strange(tmp_path: Path) -> Iterator[tuple[Odd, RemoteFolder]]:
    with odd(tmp_path / "odd", tmp_path / "root") as server:
        yield server, RemoteFolder(tmp_path / "root" / "in", odd_target(server, "/in"))


def study(tmp_path: Path, large: int) -> Path:
    """Make 30 small files, and large ones whose names come first."""
    studies.ct(tmp_path / "study", 30, side=64)
    for number in range(large):
        (tmp_path / "study" / f"A{number}.bin").write_bytes(os.urandom(LARGE))
    assert all(path.stat().st_size < SMALL for path in (tmp_path / "study").glob("*.dcm"))
    return tmp_path / "study"


@pytest.mark.parametrize("large", [1, 6])
def test_files_without_room_cost_themselves_alone(
    tmp_path: Path, strange: tuple[Odd, RemoteFolder], large: int
) -> None:
    server, remote = strange
    plan = scan([study(tmp_path, large)])
    with server.doing(f"full {SMALL}"):
        sent = attempt(remote.target, plan)
    assert isinstance(sent.error, Busy), repr(sent.error)
    assert "No space left" in sent.error.message
    assert (sent.error.item or "").startswith("A")
    assert len(sent.arrived) == 30 and not sent.rejected
    assert not remote.leftovers(), "what has no room takes that of others"
    assert ".complete" not in {name.rsplit("/", 1)[-1] for name in remote.names()}
    rest = attempt(remote.target, plan, done=sent.arrived)
    assert rest.require().state is State.DELIVERED
    assert remote.read_back(plan) == content(rest)


def test_what_fails_without_a_reason_while_others_have_no_room_is_not_rejected(
    tmp_path: Path, strange: tuple[Odd, RemoteFolder]
) -> None:
    """Others' temporary files are gone, and there is room again, when the server is asked how much there is."""
    server, remote = strange
    plan = scan([study(tmp_path, 2)])
    with server.doing(f"crowded {SMALL}"):
        sent = attempt(remote.target, plan)
    assert isinstance(sent.error, Busy), repr(sent.error)
    assert (sent.error.item or "").startswith("A")
    assert not sent.rejected
    assert len(sent.arrived) == 30
    assert not remote.leftovers()
    assert attempt(remote.target, plan, done=sent.arrived).require().state is State.DELIVERED
    assert remote.read_back(plan) == content(sent)


def test_a_disk_that_is_full_for_all_is_left_in_peace(tmp_path: Path, strange: tuple[Odd, RemoteFolder]) -> None:
    server, remote = strange
    studies.ct(tmp_path / "study", 200)
    moved: list[int] = []
    with server.doing("full"):
        sent = attempt(remote.target, tmp_path / "study", moved=lambda sent, count: moved.append(count))
    assert isinstance(sent.error, Busy), repr(sent.error)
    assert not sent.arrived and not moved


@pytest.mark.parametrize("large", [1, 6])
def test_files_at_which_the_server_hangs_up_cost_themselves_alone(
    tmp_path: Path, strange: tuple[Odd, RemoteFolder], large: int
) -> None:
    """In the first attempt; each is sent twice at most, and named."""
    server, remote = strange
    plan = scan([study(tmp_path, large)])
    with server.doing(f"hang up {SMALL}"), sending(remote.target, plan) as sender:
        first = sender.attempt()
        assert isinstance(first.error, Interrupted), repr(first.error)
        assert (first.error.item or "").startswith("A") and "sent alone" in str(first.error)
        assert len(first.arrived) == 30 and not first.rejected, "others were held up"
        assert first.moved <= 2 * plan.size
        left = {item.path: item.detail for item in sender.receipt().items if item.path not in first.arrived}
        assert len(left) == large and all("sent alone" in detail for detail in left.values()), left
        if large == 1:
            assert isinstance(sender.attempt().error, Interrupted)
            third = sender.attempt()
            assert third.require().state is State.PARTIAL
            assert ["alone, 3 times" in reason for reason in third.rejected.values()] == [True]
    assert attempt(remote.target, plan, done=first.arrived).require().state is State.DELIVERED
    assert remote.read_back(plan) == content(first)
    assert not remote.leftovers()


def test_a_file_that_is_never_confirmed_costs_itself_alone(tmp_path: Path, strange: tuple[Odd, RemoteFolder]) -> None:
    server, remote = strange
    plan = scan([study(tmp_path, 1)])
    with server.doing(f"stall {SMALL}"):
        sent = attempt(remote.target.model_copy(update={"idle_timeout_s": 2}), plan)
    assert isinstance(sent.error, TimedOut), repr(sent.error)
    assert sent.error.item == "A0.bin" and len(sent.arrived) == 30
    assert attempt(remote.target, plan, done=sent.arrived).require().state is State.DELIVERED


def test_a_server_that_ends_each_session_after_some_files_gets_all(
    tmp_path: Path, strange: tuple[Odd, RemoteFolder]
) -> None:
    server, remote = strange
    plan = scan([study(tmp_path, 0)])
    with server.doing("tire 8"):
        first = attempt(remote.target, plan)
        assert len(first.arrived) >= 24, "only those that were sent alone at a session's end are left"
        assert attempt(remote.target, plan, done=first.arrived).require().state is State.DELIVERED
    assert remote.read_back(plan) == content(first)


def test_a_server_that_hangs_up_at_every_file_is_left_in_peace(
    tmp_path: Path, strange: tuple[Odd, RemoteFolder]
) -> None:
    server, remote = strange
    studies.ct(tmp_path / "study", 200)
    with server.doing("hang up 0"), relay(server.port) as link:
        sent = attempt(remote.target.model_copy(update={"port": link.port}), tmp_path / "study")
    assert isinstance(sent.error, Interrupted), repr(sent.error)
    assert not sent.arrived
    assert link.connections <= 12


@pytest.mark.parametrize(
    ("numbers", "space"),
    [
        ((4096, 4096, 100, 50, 40, 10, 5, 4, 0, 1, 255), Space(40 * 4096, 4, read_only=True)),
        ((4096, 4096, 100, 50, 40, 0, 0, 0, 0, 0, 255), Space(40 * 4096, sys.maxsize, read_only=False)),  # Btrfs
        ((0,) * 11, Space(sys.maxsize, sys.maxsize, read_only=False)),  # a file system in user space that says nothing
    ],
)
def test_a_figure_of_an_unknown_whole_is_no_want_of_room(numbers: tuple[int, ...], space: Space) -> None:
    assert space_of(struct.pack(">11Q", *numbers)) == space
    assert space_of(b"short") is None


def target(folder: Path) -> SftpTarget:
    server = shared()
    return SftpTarget(
        host="127.0.0.1", port=server.port, user=server.user, folder=str(folder), host_key=server.host_keys[0],
        private_key=SecretStr(str(server.key)), connect_timeout_s=5, idle_timeout_s=10,
    )  # fmt: skip


def test_times_of_files_are_kept(tmp_path: Path) -> None:
    for number, path in enumerate(studies.ct(tmp_path / "study" / "a", 3)):
        os.utime(path, (1, (0, 1_234_567_890, 2**32 - 1)[number]))
    sent = attempt(target(tmp_path / "in"), tmp_path / "study")
    assert not sent.require().notes
    for item in sent.plan.items:
        there = tmp_path / "in" / sent.plan.dispatch_id / item.path
        assert int(there.stat().st_mtime) == int(sent.plan.file(item).stat().st_mtime)


def holes(path: Path, parts: dict[int, bytes], size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for offset, data in parts.items():
            file.seek(offset)
            file.write(data)
        file.truncate(size)


def test_holes_of_files_are_kept_and_not_sent(tmp_path: Path) -> None:
    data = os.urandom(70_000)
    forms = {
        "begin": ({40_000_000: data}, 40_070_000),
        "end": ({0: data}, 40_000_000),
        "both": ({20_000_000: data, 30_000_000: data}, 60_000_000),
        "none": ({}, 10_000_000),
    }
    for name, (parts, size) in forms.items():
        holes(tmp_path / "study" / f"{name}.bin", parts, size)
    sent = attempt(target(tmp_path / "in"), tmp_path / "study")
    assert sent.require().state is State.DELIVERED
    for item in sent.plan.items:
        there = tmp_path / "in" / sent.plan.dispatch_id / item.path
        assert there.read_bytes() == sent.plan.file(item).read_bytes()
        assert there.stat().st_blocks * 512 < 1_000_000, f"{item.path} has become full"


def test_where_data_lies_in_a_file(tmp_path: Path) -> None:
    holes(tmp_path / "file", {1 << 20: b"x" * (1 << 20), 8 << 20: b"y" * (1 << 20)}, 16 << 20)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        assert is_sparse(os.fstat(fd))
        assert list(data_parts(fd, 0, 16 << 20)) == [(1 << 20, 2 << 20), (8 << 20, 9 << 20)]
        assert list(data_parts(fd, (8 << 20) + 5, 16 << 20)) == [((8 << 20) + 5, 9 << 20)]
        assert data_before(fd, 9 << 20, 1 << 19) == (9 << 20) - (1 << 19)
        assert data_before(fd, 9 << 20, 3 << 19) == (2 << 20) - (1 << 19)
        assert data_before(fd, 16 << 20, 4 << 20) < 0
    finally:
        os.close(fd)


def test_an_interrupted_file_with_holes_goes_on_where_its_data_is_safe(tmp_path: Path) -> None:
    parts = {number * (4 << 20): os.urandom(1 << 20) for number in range(12)}
    holes(tmp_path / "study" / "holes.bin", parts, 50 << 20)
    one = target(tmp_path / "in")
    plan = scan([tmp_path / "study"])
    one.bandwidth_limit = 4 << 20

    class Stop(Exception):
        pass

    moved = 0

    def told(sent: Sent, count: int) -> None:
        nonlocal moved
        moved += count
        if moved > 30 << 20:
            raise Interrupted("as if the link had broken")

    first = attempt(one, plan, moved=told)
    assert first.error is not None
    one.bandwidth_limit = None
    assert attempt(one, plan).require().state is State.DELIVERED
    there = tmp_path / "in" / plan.dispatch_id / "holes.bin"
    assert there.read_bytes() == (tmp_path / "study" / "holes.bin").read_bytes()
