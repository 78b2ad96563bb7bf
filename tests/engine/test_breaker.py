"""Targets that are down, and who waits at them: all hosts of a ledger see the same, whichever host noticed it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blocks.base import Target
from blocks.dicom import DicomTarget
from blocks.folder import FolderTarget
from tasks.dispatch import breaker, line, waiting
from tasks.dispatch.rest import Left
from tests.servers.postgresql import postgresql
from transfer.errors import Denied, LedgerAway, TimedOut, Unreachable
from transfer.happenings import Happenings
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.plan import Origin
from transfer.waits import LATE_S


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgresql() as server:
        yield server.new()


@pytest.fixture(params=["one host", "two hosts"])
def hosts(
    request: pytest.FixtureRequest, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[tuple[Home, Ledger], tuple[Home, Ledger]]]:
    """Two processes, with their state directory and their ledger: of one host, or of two that share a database."""
    monkeypatch.setattr("tasks.happened.emit_event", lambda *_, **__: None)
    shared = request.param == "two hosts"
    homes = [Home(tmp_path / "one"), Home(tmp_path / ("other" if shared else "one"))]
    for home in homes:
        home.root.mkdir(exist_ok=True)
    where: list[Any] = [database if shared else home.root / "ledger.sqlite" for home in homes]
    with Ledger(where[0]) as one, Ledger(where[1]) as other:
        yield (homes[0], one), (homes[1], other)


@pytest.fixture
def target(tmp_path: Path, request: pytest.FixtureRequest) -> FolderTarget:
    return FolderTarget(folder=str(tmp_path), max_dispatches=3).named(f"shelf-{abs(hash(request.node.name))}")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that a worker has been told to bring forward."""
    found: list[str] = []
    monkeypatch.setattr(line, "_waker", found.append)
    return found


def said(ledger: Ledger, target: Target) -> list[str]:
    return [one.event for one in ledger.happenings.waiting(100) if one.about["target"] == target.name]


def test_failures_count_wherever_they_are_seen_and_the_first_answer_ends_it(hosts: Any, target: FolderTarget) -> None:
    (_, one), (_, other) = hosts
    for number in range(breaker.LIMIT):
        assert not breaker.read(one, target).opened and not breaker.read(other, target).opened
        breaker.failed((one, other)[number % 2], target, Unreachable("no route"), "no route")
        breaker.failed(one, target, Denied("wrong password"), "wrong password")  # it does answer
        breaker.failed(one, target, LedgerAway("no ledger"), "no ledger")  # which says nothing of it
    for ledger in (one, other):
        found = breaker.read(ledger, target)
        assert (found.failures, found.reason) == (breaker.LIMIT, "no route") and found.opened and found.until
        assert breaker.every(ledger, [target])[target.name] == found
    assert said(one, target) == ["target.down"]
    for _ in range(3):
        breaker.answered(other, target)
    assert not breaker.read(one, target).failures and said(one, target) == ["target.down", "target.up"]
    for _ in range(breaker.LIMIT):
        breaker.failed(other, target, TimedOut("silent"), "silent")
    assert said(one, target) == ["target.down", "target.up", "target.down"]


def test_what_could_not_be_said_of_a_target_is_said_later(
    hosts: Any, target: FolderTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the ledger was lost between two commits, nobody heard that it was down; or, later, that it was so again."""
    (_, ledger), _ = hosts
    said_so = Happenings.stands

    def lost(*_: Any, **__: Any) -> bool:
        raise LedgerAway("the connection to the ledger's database broke")

    for fails, say in ((True, "target.down"), (False, "target.up"), (True, "target.down")):
        tell = partial(breaker.failed, ledger, target, Unreachable("no route"), "no route")
        tell = tell if fails else partial(breaker.answered, ledger, target)
        for _ in range(breaker.LIMIT - 1 if fails else 0):
            tell()
        before = said(ledger, target)
        monkeypatch.setattr(Happenings, "stands", lost)
        tell()
        assert said(ledger, target) == before
        monkeypatch.setattr(Happenings, "stands", said_so)
        tell()
        assert said(ledger, target) == [*before, say]


def test_a_clock_that_is_set_back_keeps_nobody_from_a_test(
    tmp_path: Path, target: FolderTarget, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was sent to the target for as long as the clock had been ahead."""
    monkeypatch.setattr("tasks.happened.emit_event", lambda *_, **__: None)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for _ in range(breaker.LIMIT):
            breaker.failed(ledger, target, Unreachable("no route"), "no route")
        found = breaker.read(ledger, target)
        assert found.opened and found.until > ledger.now()
        now = ledger.now() - 86_400
        monkeypatch.setattr(ledger, "now", lambda: now)
        for again in (breaker.read(ledger, target), breaker.every(ledger, [target])[target.name]):
            assert again.opened and again.until <= now


def test_where_a_push_hung_an_answer_to_a_check_lets_one_run_push(
    hosts: Any, target: FolderTarget, called: list[str]
) -> None:
    (_, one), (_, other) = hosts
    for _ in range(breaker.LIMIT - 1):
        breaker.failed(one, target, TimedOut("silent"), "silent", pushed=True)
        breaker.reached(other, target, "run")  # it answers checks, which says nothing of pushes
    breaker.failed(one, target, TimedOut("silent"), "silent", pushed=True)
    assert breaker.read(one, target).opened
    for number in range(2):
        one.waits.join(breaker.queue(target), f"{target.name}{number}", number, one.now() + 600)
    breaker.reached(other, target, "run")
    found = breaker.read(one, target)
    assert found.opened and found.trial == "run" and found.until > one.now() + target.idle_timeout_s
    breaker.failed(one, target, TimedOut("silent"), "silent", pushed=True)
    assert breaker.read(one, target).trial == "" and not called
    breaker.reached(one, target)  # somebody tests it: the first that waits pushes at once
    found = breaker.read(other, target)
    assert found.opened and found.until <= one.now() and called == [f"{target.name}0"]
    assert said(one, target) == ["target.down"]
    breaker.answered(other, target)
    assert breaker.read(one, target).trial is None and said(one, target) == ["target.down", "target.up"]
    for pushed, error in ((True, Unreachable("no route")), (False, TimedOut("silent"))):
        for _ in range(breaker.LIMIT):  # its check sees that, too, and says when it is over
            breaker.failed(one, target, TimedOut("silent"), "silent", pushed=True)
        breaker.failed(one, target, error, "away", pushed=pushed)
        breaker.reached(other, target, "run")
        assert not breaker.read(one, target).failures


def test_what_is_known_of_a_target_goes_with_it_or_with_time(hosts: Any, target: FolderTarget) -> None:
    (_, one), (_, other) = hosts
    old = f"{target.name}-old"
    for name in (target.name, old):
        with one.together():
            one.waits.count(name, "its settings", "no route")
    other.waits.forget(target.name)
    assert one.waits.breaker(target.name) is None and one.waits.breaker(old)
    one.prune(one.now() - 60)
    assert other.waits.breaker(old)
    one.prune(one.now() + 1)
    assert other.waits.breaker(old) is None


def test_a_target_whose_settings_have_changed_begins_anew(hosts: Any, target: FolderTarget) -> None:
    (_, one), (_, other) = hosts
    for _ in range(breaker.LIMIT + 1):
        breaker.failed(one, target, Unreachable("no route"), "no route")
    changed = target.model_copy(update={"max_attempts": 77}).named(target.name)
    assert not breaker.read(other, changed).opened
    breaker.failed(other, changed, Unreachable("no route"), "no route")
    found = breaker.read(one, changed)
    assert (found.failures, found.opened, found.until) == (1, 0, 0)


def test_each_node_that_a_target_sends_back_to_has_a_breaker_of_its_own(hosts: Any, request: Any) -> None:
    """One workstation that was off kept dispatches from all others, and each answer of these let it be tried again."""
    (_, one), (_, other) = hosts
    back = DicomTarget(host="sender", port=104, aet_target="WS").named(f"back-{abs(hash(request.node.name))}")
    off, on = (back.at(Origin("", "", host)) for host in ("10.0.0.1", " WS-2.example "))
    assert (off.node_of, off.host, on.node_of, off.name) == ("10.0.0.1", "10.0.0.1", "ws-2.example", back.name)
    assert back.at(Origin("", "", "")) is back and on.endpoint_for() != off.endpoint_for()
    for number in range(breaker.LIMIT):
        breaker.failed((one, other)[number % 2], off, Unreachable("no route"), "no route")
        breaker.answered(one, on)
        breaker.answered(one, back)  # a test of the target reaches nobody
    assert breaker.read(other, off).opened and not breaker.read(other, on).opened
    assert breaker.queue(off) != breaker.queue(on) and not breaker.every(one, [back])[back.name].opened
    found = [happened for happened in one.happenings.waiting(100) if happened.about["target"] == back.name]
    assert [(happened.event, happened.about["node"]) for happened in found] == [("target.down", "10.0.0.1")]
    breaker.answered(other, off)
    assert not breaker.read(one, off).opened and said(one, back)[-1] == "target.up"
    breaker.failed(one, off, Unreachable("no route"), "no route")
    other.waits.forget(back.name)
    assert not breaker.read(one, off).failures


def test_who_has_a_dispatch_retried_has_its_targets_tested_at_once(hosts: Any, request: Any) -> None:
    (_, one), (_, other) = hosts
    slow = {"host": "sender", "port": 104, "aet_target": "WS", "retry_delay_s": 200, "retry_max_delay_s": 300}
    back = DicomTarget(**slow).named(f"again-{abs(hash(request.node.name))}")
    node, beside = back.at(Origin("", "", "10.0.0.1")), back.model_copy().named(f"{back.name}x")
    for target in (back, node, beside):
        for _ in range(breaker.LIMIT):
            breaker.failed(one, target, Unreachable("no route"), "no route")
        assert breaker.read(one, target).until > one.now() + 100
    breaker.look_now(other, [f"dicom/{back.name}"])
    for target in (back, node):
        found = breaker.read(one, target)
        assert found.opened and found.until <= one.now(), "it is open, and to be tested"
    assert breaker.read(one, beside).until > one.now() + 100
    breaker.failed(one, back, TimedOut("silent"), "silent", pushed=True)
    breaker.reached(one, back, "run")  # it is just pushed to, which others wait for
    until = breaker.read(one, back).until
    breaker.look_now(other, [back.name])
    assert breaker.read(one, back).until == until > one.now()


def test_failures_at_the_same_moment_all_count_and_one_of_them_opens_it(hosts: Any, target: FolderTarget) -> None:
    (_, one), (_, other) = hosts
    with ThreadPoolExecutor(8) as pool:
        for number in range(24):
            pool.submit(breaker.failed, (one, other)[number % 2], target, Unreachable("no route"), "no route")
    assert breaker.read(one, target).failures == 24
    assert said(other, target) == ["target.down"]


def test_one_run_at_a_time_tests_a_target_wherever_it_runs(hosts: Any, target: FolderTarget) -> None:
    (home, one), (second, other) = hosts
    with breaker.testing(home, one, target) as mine:
        assert mine
        with breaker.testing(second, other, target) as too:
            assert not too
        with breaker.testing(second, other, target.named("another")) as too:
            assert too
    with breaker.testing(second, other, target) as mine:
        assert mine


def test_who_waits_is_called_in_turn_by_whoever_frees_a_slot(
    hosts: Any, target: FolderTarget, called: list[str]
) -> None:
    (_, one), (_, other) = hosts
    name, later = target.name, one.now() + 600
    one.waits.join(name, "normal", line.turn(1000.0, "normal"), later)
    other.waits.join(name, "offpeak", line.turn(990.0, "offpeak"), later)
    other.waits.join(name, "urgent", line.turn(1500.0, "urgent"), later)
    assert [one.waits.before(name, run, turn) for run, turn in (("urgent", 900), ("normal", 1000), ("new", 1600))] == [
        0,
        1,
        3,
    ]
    line.wake(one, name)
    assert called == ["urgent"]
    line.wake(other, name)  # a second slot is free before the first has come
    assert called == ["urgent", "normal"]
    assert one.waits.before(name, "offpeak", 1590) == 2  # they have not come yet
    for run in ("urgent", "normal"):
        other.waits.leave(name, run)
    assert one.waits.before(name, "offpeak", 1590) == 0
    one.waits.join(name, "gone", 2000.0, later)
    line.gone(other, "offpeak")  # it was cancelled: whoever stands behind it is called instead
    assert called[2:] == ["gone"]
    line.wake(one, name)
    assert len(called) == 3


def test_a_call_that_nobody_passed_on_is_found_by_any_worker(hosts: Any, target: FolderTarget) -> None:
    (_, one), (_, other) = hosts
    one.waits.join(target.name, "run", 1.0, one.now() + 600)
    assert not other.waits.heard("run") and "run" not in other.waits.unheard(0.0)
    line.wake(other, target.name)  # a process without a worker
    until = threading.Event()
    while "run" not in one.waits.unheard(0.0):
        until.wait(0.01)
    assert "run" not in one.waits.unheard(3600.0)
    assert one.waits.heard("run") and not other.waits.heard("run")
    one.waits.join(target.name, "run", 1.0, one.now() + 600)  # it came, and got nothing
    assert "run" not in one.waits.unheard(-1.0)
    line.gone(one, "run")


def test_who_should_have_come_long_ago_keeps_nobody_waiting(
    hosts: Any, target: FolderTarget, called: list[str]
) -> None:
    (_, one), (_, other) = hosts
    one.waits.join(target.name, "lost", 1.0, one.now() - LATE_S - 1)
    one.waits.join(target.name, "run", 2.0, one.now() + 600)
    assert other.waits.before(target.name, "run", 2.0) == 0
    line.wake(other, target.name, target.max_dispatches)
    assert called == ["run"]
    other.prune(one.now() - 1)
    assert one.waits.gone("lost") == [] and one.waits.gone("run") == [target.name]


def test_an_answer_calls_as_many_as_the_target_takes(hosts: Any, target: FolderTarget, called: list[str]) -> None:
    (_, one), (_, other) = hosts
    for number in range(5):
        one.waits.join(breaker.queue(target), f"{target.name}{number}", number, one.now() + 600)
    for _ in range(breaker.LIMIT):
        breaker.failed(one, target, Unreachable("no route"), "no route")
    breaker.answered(other, target)
    assert called == [f"{target.name}{number}" for number in range(3)]
    breaker.answered(other, target)  # the next push that succeeds calls one more
    assert len(called) == 4


def test_a_slot_is_its_run_s_until_that_is_over_or_another_process_has_it(hosts: Any, target: FolderTarget) -> None:
    (_, one), (_, other) = hosts

    def held() -> dict[str, bool]:
        return {slot.lease: slot.at_work for slot in other.held.all() if slot.target == target.name}

    runs = [f"{target.name}{number}" for number in range(3)]
    for run in runs:
        one.runs.begins(run, "owner")
        for _ in range(2):  # when it is taken, and when its lease is renewed
            one.held.note(f"lease of {run}", target.name, run, 2)
    one.held.note("lease of nobody", target.name, "a run that nobody has", 2)
    assert held() == {f"lease of {run}": True for run in runs}
    one.runs.ends(runs[0], goes_on=True)
    one.runs.begins(runs[1], "another")
    assert held() == {f"lease of {run}": run == runs[2] for run in runs}
    assert [ledger.held.forget(f"lease of {runs[0]}") for ledger in (one, other)] == [True, False]
    for run in runs[1:]:
        assert other.held.forget(f"lease of {run}")
    assert held() == {}


def test_what_waits_for_a_target_to_be_enabled_comes_seldom_and_is_called_in_turn(
    hosts: Any, target: FolderTarget, called: list[str]
) -> None:
    """Seen: each of hundreds came back every minute, for nothing, in a place of the worker."""
    (_, one), (_, other) = hosts
    runs, lefts = [f"{target.name}{number}" for number in range(3)], [Left() for _ in range(3)]
    now = one.now()
    waits = [
        waiting.to_be_enabled(ledger, target, run, "normal", left).until.timestamp() - now
        for ledger, run, left in zip((one, other, one), runs, lefts, strict=True)
    ]
    assert waits == sorted(waits) and waits[0] >= waiting.DISABLED_S and waits[2] >= waits[0] + 2 * waiting.AFTER_S
    again = waiting.to_be_enabled(other, target, runs[0], "normal", lefts[0]).until.timestamp() - now
    assert waits[0] <= again < waits[1]  # it keeps its turn
    assert target.name in line.disabled(one.waits.lines()) and target.name not in one.waits.lines()
    line.wake(other, line.to_be_enabled(target.name))
    assert called == runs[:1]
    for number, ledger in enumerate((one, other, one)):  # each that finds it enabled calls the next one
        waiting.is_enabled(ledger, target, runs[number])
        waiting.is_enabled(ledger, target, runs[number])
    assert called == runs and target.name not in line.disabled(one.waits.lines())


def test_no_dispatch_fails_since_the_database_can_t_be_asked(tmp_path: Path, target: FolderTarget) -> None:
    home = Home(tmp_path)
    ledger = Ledger(home.root / "ledger.sqlite")
    ledger.close()
    breaker.failed(ledger, target, Unreachable("no route"), "no route")
    breaker.answered(ledger, target)
    assert not breaker.read(ledger, target).opened and not breaker.every(ledger, [target])[target.name].opened


def test_a_ledger_that_can_t_be_opened_keeps_no_list_and_no_check_from_its_end(
    tmp_path: Path, target: FolderTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALARIA_LEDGER", "postgresql://nobody@127.0.0.1:1/none")
    home = Home(tmp_path)
    with pytest.raises(LedgerAway):
        Ledger(home.ledger)
    assert not breaker.every_of(home, [target])[target.name].opened
    breaker.has_answered(home, target)
