"""Files of dispatches that were given up: kept as links, used where the source lacks some, and cleared."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from talaria.testing import studies
from transfer import deadletters
from transfer.deadstudies import STUDIES, Letters
from transfer.errors import Denied, NotFound
from transfer.home import Home
from transfer.plan import Plan, scan
from transfer.staging import stage

RUN = "7d0a2b66-1111-4222-8333-123456789abc"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    home = Home(tmp_path / "home")
    home.root.mkdir(mode=0o700)
    return home


def given_up(home: Home, source: Path) -> Plan:
    plan = scan([str(source)])
    staged = stage(plan, home.staging / RUN)
    assert deadletters.keep(home, RUN, staged, plan.root)
    return plan


def test_where_kept_files_came_from_is_on_the_disk(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut nobody would look for them: a file without that counts as none, and a study as not kept."""
    flush, flushed = os.fsync, set[int]()

    def noted(fd: int) -> None:
        flushed.add(os.fstat(fd).st_ino)
        flush(fd)

    monkeypatch.setattr(os, "fsync", noted)
    studies.ct(tmp_path / "study", 1)
    given_up(home, tmp_path / "study")
    letters = Letters(home, "flood")
    letters.keep("CT-1", stage(scan([str(tmp_path / "study")]), home.staging / "flood").root, tmp_path / "study")
    assert letters.save({"CT-1"})
    for path in (deadletters.folder_of(home, RUN) / deadletters.SOURCE, letters.folder / STUDIES):
        assert path.stat().st_ino in flushed


def test_what_was_kept_is_read_as_the_dispatch_that_it_was(home: Home, tmp_path: Path) -> None:
    source = tmp_path / "study"
    studies.ct(source / "a", 2)
    studies.ct(source / "b" / "c", 1)
    plan = given_up(home, source)
    assert not (home.staging / RUN).exists()
    assert deadletters.instead(home, RUN, [str(source)]) == [str(source)]
    (source / "b" / "c" / "CT0001.dcm").unlink()
    (kept,) = deadletters.instead(home, RUN, [str(source)])
    again = scan([kept])
    assert again.items == plan.items and again.dispatch_id == plan.dispatch_id
    shutil.rmtree(source)
    assert scan(deadletters.instead(home, RUN, [str(source)])).dispatch_id == plan.dispatch_id
    deadletters.forget(home, RUN)
    assert deadletters.instead(home, RUN, [str(source)]) == [str(source)]


def test_another_study_in_the_place_of_what_was_given_up_is_not_sent_for_it(home: Home, tmp_path: Path) -> None:
    """A sender may give each study the same names; a file that was mended meanwhile is still the one."""
    files = studies.ct(tmp_path / "study", 2)
    plan, asked = given_up(home, tmp_path / "study"), [str(tmp_path / "study")]
    mended = files[0].with_suffix(".new")
    mended.write_bytes(files[0].read_bytes()[:-2] + b"xx")
    mended.replace(files[0])
    assert deadletters.instead(home, RUN, asked) == asked
    files[1].unlink()
    studies.ct(tmp_path / "study", 1, first=2)
    assert scan(deadletters.instead(home, RUN, asked)).items == plan.items
    files[1].unlink()
    os.mkfifo(files[1])
    assert scan(deadletters.instead(home, RUN, asked)).items == plan.items


def test_what_fails_again_from_what_was_kept_stays_kept(home: Home, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    given_up(home, tmp_path / "study")
    shutil.rmtree(tmp_path / "study")
    paths = deadletters.instead(home, RUN, [str(tmp_path / "study")])
    plan = scan(paths)
    assert deadletters.keep(home, RUN, stage(plan, home.staging / RUN), plan.root)
    assert deadletters.instead(home, RUN, [str(tmp_path / "study")]) == paths
    assert len(scan(paths).items) == 2


def test_a_file_is_kept_by_its_name_alone(home: Home, tmp_path: Path) -> None:
    one, _ = studies.ct(tmp_path / os.fsdecode(b"stud\xff"), 2)
    plan = given_up(home, one)
    assert deadletters.instead(home, RUN, [str(one)]) == [str(one)]
    one.unlink()
    assert scan(deadletters.instead(home, RUN, [str(one)])).items == plan.items


def test_what_can_not_be_kept_whole_is_not_kept(home: Home, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    plan = scan([str(tmp_path / "study")])
    staged = stage(plan, home.staging / RUN)
    first, second = staged.items
    for bad in (second.but(problem="can't be read"), second.but(in_place=True)):
        assert not deadletters.keep(home, RUN, replace(staged, items=(first, bad)), plan.root)
    assert not (home.root / "failed").exists()


def test_what_is_kept_goes_with_its_time_and_counts_what_it_takes(home: Home, tmp_path: Path) -> None:
    files = studies.ct(tmp_path / "study", 2)
    size = sum(path.stat().st_size for path in files)
    given_up(home, tmp_path / "study")
    mark = (home.root / "failed" / RUN / "source.json").stat().st_size
    assert deadletters.used(home) == mark
    shutil.rmtree(tmp_path / "study")
    assert deadletters.used(home) == mark + size
    assert deadletters.clear(home, time.time() - 60) == 0
    os.utime(home.root / "failed" / RUN, (1, 1))
    assert deadletters.clear(home, time.time() - 60, {RUN}) == 0
    assert deadletters.clear(home, time.time() - 60) == 1
    assert not (home.root / "failed" / RUN).exists() and deadletters.used(home) == 0


def test_nothing_else_of_the_state_directory_is_sent(home: Home, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    given_up(home, tmp_path / "study")
    for path in (home.root / "failed", home.root / "failed" / RUN, home.root / "failed" / RUN / "source.json"):
        with pytest.raises(Denied, match="state directory"):
            scan([str(path)])


@pytest.mark.parametrize(
    "spool", [f"failed/{RUN}/files", "uploads/1a2b/files", f"retrievals/{RUN}/spool/1.2.3", "received/ct/1.2.3"]
)
def test_what_another_dispatch_is_to_send_stays_when_its_own_is_delivered(home: Home, spool: str) -> None:
    """It waited for the night, and at noon the first one was delivered, which took the last copy away."""
    studies.ct(home.root / spool / "a", 2)
    of_first = scan([str(home.root / spool)]).dispatch_id
    paths = deadletters.lend(home, RUN, [str(home.root / spool)])
    shutil.rmtree(home.root / spool.partition("/")[0] / spool.split("/")[1])
    assert scan(paths).dispatch_id == of_first
    (name,) = deadletters.read_by([*paths, str(home.root / "study"), "/", "files"])
    assert deadletters.clear(home, time.time() + 9, {name}) == 0  # it still waits
    again = deadletters.lend(home, name, paths)
    deadletters.forget(home, RUN, paths)
    assert scan(again).dispatch_id == of_first and not Path(paths[0]).exists()
    assert deadletters.clear(home, time.time() + 9) == 1


@pytest.mark.parametrize("way", ["..", ".", "../..", "{run}/../..", "no-run", "{lent}"])
def test_what_a_path_of_somebody_elses_looks_like_is_not_removed(home: Home, tmp_path: Path, way: str) -> None:
    """Of a delivered dispatch of `/data/failed/../files`, all of the state directory was removed."""
    lent = home.root / "failed" / RUN.replace("7", "8")
    studies.ct(lent / "files", 1)
    (home.root / "ledger.sqlite").write_bytes(b"kept")
    before = sorted(home.root.rglob("*"))
    path = f"{tmp_path}/data/failed/{way.format(run=RUN, lent=lent.name)}/files"
    deadletters.forget(home, RUN, [path, path + "/"])
    assert sorted(home.root.rglob("*")) == before
    assert deadletters.read_by([1, None, {}]) == set(), "a run of another flow may have anything there"


def test_single_files_and_several_paths_are_kept_for_another_dispatch(home: Home, tmp_path: Path) -> None:
    studies.ct(tmp_path / "outside", 1)
    studies.ct(home.root / "uploads" / "1a2b" / "files", 2)
    one, other = sorted((home.root / "uploads" / "1a2b" / "files").iterdir())
    (alone,) = deadletters.lend(home, RUN, [str(one)])
    paths = deadletters.lend(home, RUN, [str(tmp_path / "outside"), str(one.parent), str(other)])
    assert paths[0] == str(tmp_path / "outside") and len(set(paths)) == 3
    content = one.read_bytes(), other.read_bytes()
    shutil.rmtree(home.root / "uploads")
    assert Path(alone).read_bytes() == content[0] and Path(paths[2]).read_bytes() == content[1]
    assert Path(alone).name == one.name and sorted(os.listdir(paths[1])) == sorted((one.name, other.name))
    kept = deadletters.kept(home)
    with pytest.raises(NotFound):
        deadletters.lend(home, RUN, [alone, str(one)])
    assert deadletters.kept(home) == kept, "nothing is left of what could not be lent"


def test_a_dispatch_that_was_given_up_keeps_its_files_while_another_is_delivered(home: Home, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    given_up(home, tmp_path / "study")
    deadletters.forget(home, "another", [str(home.root / "failed" / RUN / "files")])
    assert deadletters.kept(home) == {RUN}
    assert deadletters.lend(home, RUN, [str(tmp_path / "study")]) == [str(tmp_path / "study")]
    assert deadletters.kept(home) == {RUN}, "its source is there"
