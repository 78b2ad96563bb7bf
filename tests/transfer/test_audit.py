"""The audit trail: every entry is there, whole, chained; what somebody did to the file is found, and where."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfer import audit
from transfer.audit import AuditResult, Event, Trail, record, verify
from transfer.home import Home


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trail:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    return Trail(Home.current())


@pytest.fixture
def ten(trail: Trail) -> Trail:
    for count in range(10):
        assert record(Event.DELIVERY, "anna", count=count)
    return trail


def lines(trail: Trail) -> list[bytes]:
    return Path(trail.path).read_bytes().splitlines(keepends=True)


def faults(trail: Trail) -> list[tuple[int, str]]:
    return [(fault.line, fault.what) for fault in verify(trail)[2]]


def test_an_entry(trail: Trail) -> None:
    assert record(Event.LOGIN, "anna", AuditResult.SERIOUS, address="10.0.0.7", reason="wrong\npassword", nothing="")
    (entry,) = audit.entries(trail)
    assert (entry["n"], entry["prev"], entry["hash"]) == (1, audit.FIRST, audit.hash_of(entry))
    assert (entry["event"], entry["who"], entry["result"]) == ("login", "anna", "serious")
    assert (entry["source"], entry["details"]) == ("10.0.0.7", {"reason": "wrong password"})
    for path in (trail.path, trail.head_path):
        assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(trail.folder).st_mode & 0o777 == 0o700


def test_without_a_name_it_is_this_process_user(trail: Trail) -> None:
    record(Event.DISPATCH)
    (entry,) = audit.entries(trail)
    assert entry["who"].endswith(" (local)")


@pytest.mark.parametrize("block", [1, 7, 300, 1 << 16])
def test_it_is_read_from_its_end(ten: Trail, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(audit, "TAIL_BYTES", max(block, 200))
    every, wanted = list(audit.entries(ten))[::-1], lambda entry: entry["n"] % 2 == 0
    end, found = None, list[dict[str, Any]]()
    while end != 0:
        some, end = audit.latest(ten, wanted, 2, block, end)
        assert len(some) <= 2
        found += some
    assert found == [one for one in every if wanted(one)]
    assert audit.latest(ten, lambda _: True, 100, 1 << 20) == (every, 0)
    assert audit.latest(ten, lambda _: True, 100, 1 << 20, words=['"n":3', "anna"])[0] == [every[-3]]


def test_no_line_is_too_long_to_read_it_from_its_end(trail: Trail) -> None:
    assert audit.latest(trail, lambda _: True, 1, 1) == ([], 0)
    record(Event.QUERY, "anna")
    with open(trail.path, "ab") as file:
        file.write(b"x" * 1_000_000 + b"\n")
    record(Event.LOGIN, "anna")
    found, _ = audit.latest(trail, lambda _: True, 5, 2_000_000)
    assert [one["event"] for one in found] == ["login", "query"]


def test_a_whole_chain(ten: Trail) -> None:
    number, head, wrong = verify(ten)
    assert (number, wrong) == (10, [])
    assert verify(ten, head)[2] == []
    assert [entry["details"]["count"] for entry in audit.entries(ten)] == list(range(10))


def _altered(some: list[bytes]) -> list[bytes]:
    some[4] = some[4].replace(b"anna", b"otto")
    return some


def _altered_with_its_hash(some: list[bytes]) -> list[bytes]:
    document = json.loads(some[4]) | {"who": "otto"}
    document["hash"] = audit.hash_of(document)
    some[4] = json.dumps(document).encode() + b"\n"
    return some


def _removed(some: list[bytes]) -> list[bytes]:
    return some[:4] + some[5:]


def _inserted(some: list[bytes]) -> list[bytes]:
    return [*some[:4], some[2], *some[4:]]


def _reordered(some: list[bytes]) -> list[bytes]:
    some[4], some[5] = some[5], some[4]
    return some


def _first_removed(some: list[bytes]) -> list[bytes]:
    return some[1:]


def _garbage(some: list[bytes]) -> list[bytes]:
    return [*some[:4], b"nothing\n", *some[4:]]


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (_altered, 5, "entry 5 was altered"),
        (_altered_with_its_hash, 6, "entry 6 does not follow"),
        (_removed, 5, "entry 6 follows entry 4"),
        (_inserted, 5, "entry 3 follows entry 4"),
        (_reordered, 5, "entry 6 follows entry 4"),
        (_first_removed, 1, "entry 2 follows entry 0"),
        (_garbage, 5, "is no entry"),
    ],
)
def test_what_was_done_to_it_is_found(
    ten: Trail, change: Callable[[list[bytes]], list[bytes]], line: int, words: str
) -> None:
    Path(ten.path).write_bytes(b"".join(change(lines(ten))))
    found = faults(ten)
    assert found[0][0] == line
    assert words in found[0][1]


@pytest.mark.parametrize("left", [0, 3, 9])
def test_a_cut_tail_is_found(ten: Trail, left: int) -> None:
    _, head, _ = verify(ten)
    Path(ten.path).write_bytes(b"".join(lines(ten)[:left]))
    assert any("the end was cut off" in words for _, words in faults(ten))
    os.unlink(ten.head_path)
    assert bool(faults(ten)) == bool(left), "an empty trail without a head is a new one"
    assert any("is not there" in fault.what for fault in verify(ten, head)[2]), (
        "a head that was noted elsewhere shows it"
    )


def test_a_tail_cut_within_an_entry(ten: Trail) -> None:
    os.truncate(ten.path, os.stat(ten.path).st_size - 10)
    assert any("no whole entry" in words for _, words in faults(ten))


def test_a_killed_writer_leaves_no_fault(ten: Trail) -> None:
    """Half a line was written; the head is as old as the last whole one."""
    with open(ten.path, "ab") as file:
        file.write(b'{"n":11,"time":')
    assert record(Event.DELIVERY, "anna", count=10)
    assert faults(ten) == []
    assert [entry["n"] for entry in audit.entries(ten)] == list(range(1, 12))
    head = Path(ten.head_path).read_bytes()
    assert record(Event.DELIVERY, "anna", count=11)
    Path(ten.head_path).write_bytes(head)  # killed before it was noted
    assert faults(ten) == []


def test_entries_that_could_not_be_written_are_counted(ten: Trail, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def full(fd: int, data: Any) -> int:
        return real(fd, data[:20])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert not record(Event.DELIVERY, "anna", count=10)
        assert not record(Event.DELIVERY, "anna", count=11)
    assert faults(ten) == [], "what fitted of it is gone"
    assert record(Event.DELIVERY, "anna", count=12)
    assert [entry["details"]["count"] for entry in audit.entries(ten)][-2:] == [2, 12]
    assert faults(ten) == []


def test_a_link_in_its_place_is_not_written_through(trail: Trail, tmp_path: Path) -> None:
    record(Event.LOGIN, "anna")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    os.unlink(trail.path)
    os.symlink(victim, trail.path)
    assert not record(Event.LOGIN, "anna")
    assert victim.read_text() == "mine"


def _many(home: str, name: str) -> None:
    os.environ["TALARIA_HOME"] = home
    for count in range(20):
        record(Event.DELIVERY, name, count=count)


def test_several_processes_at_once(trail: Trail) -> None:
    context = multiprocessing.get_context("spawn")
    names = ["a", "b", "c"]
    others = [context.Process(target=_many, args=(str(trail.home.root), name)) for name in names]
    for other in others:
        other.start()
    for other in others:
        other.join(100)
    assert verify(trail)[0] == 60
    assert faults(trail) == []
    for name in names:
        counts = [entry["details"]["count"] for entry in audit.entries(trail) if entry["who"] == name]
        assert counts == list(range(20))
