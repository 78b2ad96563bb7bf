"""The state directory's locks: one holder at a time over threads and processes, and nothing stays behind."""

from __future__ import annotations

import fcntl
import shutil
import threading
import time
from pathlib import Path

import pytest

from transfer.errors import Cancelled
from transfer.home import Home


def test_one_holder_at_a_time_and_no_file_left(tmp_path: Path) -> None:
    home, inside, most = Home(tmp_path), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with home.exclusive("dispatch"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list((tmp_path / "locks").iterdir()) == []


def test_who_waits_for_a_lock_can_give_up(tmp_path: Path) -> None:
    def check() -> None:
        raise Cancelled("the dispatch was cancelled")

    home = Home(tmp_path)
    with home.exclusive("dispatch"):
        with pytest.raises(Cancelled), home.exclusive("dispatch", check):
            raise AssertionError("two hold it")
        assert [path.name for path in (tmp_path / "locks").iterdir()] == ["dispatch"]


def test_a_lock_is_free_after_an_error(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(OSError, match="disk"), home.exclusive("dispatch"):
        raise OSError("disk")
    with home.exclusive("dispatch"):
        pass


def test_of_two_who_look_whether_an_owner_lives_neither_is_taken_for_it(tmp_path: Path) -> None:
    """Where one took a dead owner for alive, a run of its was not taken up."""
    home = Home(tmp_path)
    with home.owner("worker") as living:
        dead = tmp_path / "owners" / "dead"
        dead.touch()  # as a kill leaves it
        with dead.open() as looks:
            fcntl.flock(looks, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as another process does, just now
            assert home.alive(living) and not home.alive("dead")
    assert not home.alive(living)


def test_a_copy_of_a_state_directory_gets_a_name_of_its_own(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.root.mkdir()
    name = home.identity()
    assert home.identity() == name
    shutil.copytree(home.root, tmp_path / "copy")
    copy = Home(tmp_path / "copy")
    assert copy.identity() == copy.identity() != name and copy.kernel() != home.kernel()
    (home.root / "identity").write_text("0" * 32, encoding="ascii")  # as of an earlier Talaria
    assert home.identity() == "0" * 32 == home.identity()
    shutil.copytree(home.root, tmp_path / "late")
    assert Home(tmp_path / "late").identity() != "0" * 32
