"""Who runs what, where several hosts share a ledger: one process at a time, and none that has been silent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import Abort

from talaria.testing.process import as_loaded, until
from tasks.dispatch import running
from tests.servers.postgresql import PostgreSql
from transfer import database
from transfer.home import Home
from transfer.lease import Lease, living, now
from transfer.ledger import Ledger
from transfer.runs import Runs

SECONDS = as_loaded(2)  # of a lease: what shares a processor may be late


@pytest.fixture
def url(postgres: PostgreSql, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    one = postgres.new()
    monkeypatch.setenv("TALARIA_LEDGER", one)
    yield one
    database._engine(one).dispose()


def host(folder: Path, name: str) -> Home:
    (folder / name).mkdir(mode=0o700)
    return Home(folder / name)


def leased(home: Home, seconds: float = 60.0) -> Lease:
    return Lease(home, "test", lambda moment: None, lambda: None, seconds=seconds)


def test_a_run_that_another_host_has_is_its_own_until_its_lease_ends(url: str, tmp_path: Path) -> None:
    first, second = host(tmp_path, "first"), host(tmp_path, "second")
    with Ledger(url) as ledger, leased(second) as ours:
        with leased(first) as theirs:
            alive = living(second, ledger)
            assert ledger.runs.claimed("r", theirs.owner, living(first, ledger))
            assert alive(theirs.owner) and not ledger.runs.claimed("r", ours.owner, alive)
            ledger.runs.ends("r", ours.owner)  # who has it not ends nothing
            assert ledger.runs.unfinished() == {"r": theirs.owner}
        assert not alive(theirs.owner)
        assert ledger.runs.claimed("r", ours.owner, alive)
        ledger.runs.ends("r", theirs.owner)
        assert ledger.runs.unfinished() == {"r": ours.owner}


def test_a_copy_of_a_state_directory_takes_nobody_for_dead(url: str, tmp_path: Path) -> None:
    """As of a machine that was cloned: its `up` took over what the workers of the first one had just begun."""
    first = host(tmp_path, "first")
    first.identity()
    with Ledger(url) as ledger, leased(first) as theirs:
        shutil.copytree(first.root, tmp_path / "copy")
        copy = Home(tmp_path / "copy")
        assert not copy.alive(theirs.owner)
        with leased(copy) as ours:
            assert ledger.runs.claimed("r", theirs.owner, living(first, ledger))
            assert living(copy, ledger)(theirs.owner)
            assert not ledger.runs.claimed("r", ours.owner, living(copy, ledger))


def test_a_lease_that_has_ended_never_comes_back(url: str) -> None:
    with Ledger(url) as ledger:
        ledger.runs.enroll("late", "home", "host", -1.0)
        ledger.runs.enroll("late", "home", "host", 60.0)
        assert not ledger.runs.renew("late", 60.0)
        ledger.runs.enroll("good", "home", "host", 60.0)
        assert ledger.runs.renew("good", 60.0)
        ledger.runs.resign("good")
        assert not ledger.runs.renew("good", 60.0)


def test_the_clock_of_the_database_decides(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = host(tmp_path, "first"), host(tmp_path, "second")
    with Ledger(url) as ledger, leased(first) as theirs:
        assert ledger.runs.claimed("r", theirs.owner, living(first, ledger))
        true = ledger.now()
        for minutes in (-60, 60):
            with monkeypatch.context() as off:
                off.setattr(time, "time", lambda minutes=minutes: true + 60 * minutes)
                assert abs(ledger.now() - true) < 60
                with leased(second) as ours:
                    assert not ledger.runs.claimed("r", ours.owner, living(second, ledger))


def test_of_many_who_take_over_one_does(url: str, tmp_path: Path) -> None:
    homes = [host(tmp_path, f"host-{number}") for number in range(4)]
    with Ledger(url) as ledger:
        ledger.runs.enroll("gone", "another", "host", -1.0)
        for number in range(10):
            ledger.runs.begins(f"r{number}", "gone")
    ready, taken = threading.Barrier(len(homes)), list[str]()

    def take(home: Home) -> None:
        with Ledger(url) as ledger, leased(home) as lease:
            alive = living(home, ledger)
            ready.wait()
            taken.extend(f"r{number}" for number in range(10) if ledger.runs.claimed(f"r{number}", lease.owner, alive))
            ready.wait()

    threads = [threading.Thread(target=take, args=(home,)) for home in homes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [f"r{number}" for number in range(10)]


def test_no_error_ends_the_renewals(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [OSError("no descriptor left"), RuntimeError("a bug"), RuntimeError("another")]
    enroll = Runs.enroll

    def fails(*_: object) -> bool:
        if len(errors) > 1:
            raise errors.pop()
        return False

    def fails_once(runs: Runs, *what: Any) -> None:
        if errors:
            raise errors.pop()
        enroll(runs, *what)

    with leased(host(tmp_path, "first"), seconds=0.6) as lease, Ledger(url) as ledger:
        first = lease.owner
        with monkeypatch.context() as broken:
            broken.setattr(Runs, "renew", fails)
            broken.setattr(Runs, "enroll", fails_once)
            until(lambda: lease.owner != first, as_loaded(30))
        assert not errors
        until(lambda: (former := ledger.runs.holder(first)) is not None and not former.live, as_loaded(30))


@pytest.fixture
def flag() -> Iterator[threading.Event]:
    """That of a run of this process."""
    yield running.flag("r")
    running.lose_all()
    running.regained("r")
    running.forget("r")


def test_a_run_that_has_been_stopped_is_not_ours_again(flag: threading.Event) -> None:
    """A driver that found the flag set once ended its run as Cancelled, for at the end it was this process's again."""
    running.hold_until(now() - 0.001)
    assert flag.is_set()
    running.hold_until(now() + 60)  # the answer to a renewal came late
    assert flag.is_set() and running.lost("r") and running.asked("r")
    with pytest.raises(Abort):
        running.still_ours("r")
    assert not running.flag("begun since").is_set() and not running.lost("begun since")
    running.forget("begun since")


def test_a_renewal_that_is_answered_too_late_ends_the_lease(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the connection broke without a word, and the database was asked again on another one."""
    late, lost, renew = threading.Event(), list[str](), Runs.renew
    deadline = list[float]()

    def renewed(runs: Runs, owner: str, seconds: float) -> bool:
        kept = renew(runs, owner, seconds)
        if not late.is_set():
            late.set()
            until(lambda: now() > deadline[-1], as_loaded(30))
        return kept

    monkeypatch.setattr(Runs, "renew", renewed)
    home = host(tmp_path, "first")
    with Lease(home, "test", deadline.append, lambda: lost.append(lease.owner), seconds=1.0) as lease:
        first = lease.owner
        until(lambda: lease.owner != first, as_loaded(60))
        # Before another one is begun, and again for what has begun since then.
        until(lambda: len(lost) > 1, as_loaded(30))
        assert lost[0] == first and lost[1] == lease.owner
        with Ledger(url) as ledger:
            until(lambda: not living(home, ledger)(first), as_loaded(30))


PUSHER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from tasks.dispatch import running
    from transfer.home import Home
    from transfer.lease import Lease, living
    from transfer.ledger import Ledger

    home = Home(Path(sys.argv[1]))
    with Lease(home, "pusher", running.hold_until, running.lose_all, seconds=float(sys.argv[2])) as lease:
        with Ledger(home.ledger) as ledger:
            first = lease.owner
            flag = running.flag("r")
            assert ledger.runs.claimed("r", first, living(home, ledger))
            print(first, flush=True)
            while not flag.is_set():
                print("sent", flush=True)
                time.sleep(0.01)
            print("stopped", running.lost("r"), flush=True)
            while lease.owner == first:
                time.sleep(0.01)
            print(lease.owner, living(home, ledger)(lease.owner), flush=True)
""")


@pytest.fixture
def pusher(url: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    home = host(tmp_path, "pusher")
    process = subprocess.Popen(
        [sys.executable, "-c", PUSHER, str(home.root), str(SECONDS)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TALARIA_LEDGER": url},
    )
    yield process
    process.kill()
    process.communicate()


def test_a_process_that_was_paused_sends_nothing_more_and_becomes_another_owner(
    url: str, tmp_path: Path, pusher: subprocess.Popen[str]
) -> None:
    assert pusher.stdout
    owner, home = pusher.stdout.readline().strip(), host(tmp_path, "other")
    assert pusher.stdout.readline() == "sent\n"
    with Ledger(url) as ledger, leased(home) as ours:
        alive = living(home, ledger)
        assert not ledger.runs.claimed("r", ours.owner, alive)
        pusher.send_signal(signal.SIGSTOP)
        until(lambda: ledger.runs.claimed("r", ours.owner, alive), as_loaded(SECONDS + 10))
        pusher.send_signal(signal.SIGCONT)
        said = [line for line in pusher.stdout if line != "sent\n"]
        stopped, another = said
        assert stopped == "stopped True\n"
        assert another.split()[0] != owner and another.split()[1] == "True"
        assert ledger.runs.unfinished() == {"r": ours.owner}


def test_a_killed_host_s_runs_are_free_when_its_lease_ends(
    url: str, tmp_path: Path, pusher: subprocess.Popen[str]
) -> None:
    assert pusher.stdout
    owner, home = pusher.stdout.readline().strip(), host(tmp_path, "other")
    with Ledger(url) as ledger, leased(home) as ours:
        alive = living(home, ledger)
        assert alive(owner)
        pusher.kill()
        # Its own state directory knows at once; another one when the lease has ended.
        until(lambda: not living(Home(tmp_path / "pusher"), ledger)(owner), as_loaded(5))
        until(lambda: ledger.runs.claimed("r", ours.owner, alive), as_loaded(SECONDS + 10))
