"""Folder targets when the disk fills up, is read-only or is another one; when the process is killed or cancelled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from tasks.folder import check
from tests.clock import tick
from tests.targets.folder_push.pushing import delivered, target
from transfer.errors import Busy, Cancelled, Denied
from transfer.outcome import Kind
from transfer.plan import scan


def visible(folder: Path) -> set[str]:
    return {name for path in folder.rglob("*") if not (name := str(path.relative_to(folder))).startswith(".incoming-")}


# ---- a disk that fills up


@pytest.mark.mounts
def test_room_is_looked_for_first(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    small = disk("size=1m")
    studies.ct(tmp_path / "study", 10, side=256)  # 137 kB each
    sent = attempt(target(small), tmp_path / "study")
    assert isinstance(sent.error, Busy)
    assert "1.39 MB are needed" in str(sent.error)
    assert "1.05 MB are free" in str(sent.error)
    assert sent.moved == 0
    assert not list(small.iterdir()), "nothing was begun"


@pytest.mark.mounts
def test_inodes_are_room_too(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    small = disk("size=10m,nr_inodes=12")
    studies.ct(tmp_path / "study", 30)
    sent = attempt(target(small), tmp_path / "study")
    assert isinstance(sent.error, Busy)
    assert "30 files" in str(sent.error)
    assert not list(small.iterdir())


@pytest.mark.mounts
@pytest.mark.parametrize("source", ["study", "disk/study"])  # read and written, and copied by the kernel
def test_a_disk_that_fills_up_midway(tmp_path: Path, disk: Callable[[str], Path], source: str) -> None:
    """Somebody else takes the room: Busy, nothing visible; once there is room again, it goes on."""
    small = disk("size=6m")
    study = tmp_path / source
    studies.ct(study, 10, side=256)
    plan = scan([study])
    folder = small / "archive"
    folder.mkdir()

    def moved(sent: Sent, count: int) -> None:
        if sent.moved > 400_000 and not (small / "other").exists():
            with open(small / "other", "wb") as other:
                try:
                    while True:
                        other.write(bytes(4096))
                        other.flush()
                except OSError:
                    pass

    first = attempt(target(folder, concurrency=1), plan, moved=moved)
    assert isinstance(first.error, Busy), repr(first.error)
    assert "make room; " in str(first.error)
    assert "are free" in str(first.error)
    assert not first.outcomes
    assert not visible(folder)
    os.unlink(small / "other")
    second = attempt(target(folder, concurrency=1), plan)
    delivered(second)
    assert second.moved < plan.size, "what was whole is not copied again"
    assert visible(folder) == {plan.dispatch_id} | {
        f"{plan.dispatch_id}/{name}" for name in (".complete", *(item.path for item in plan.items))
    }
    assert {path.name for path in folder.iterdir()} == {plan.dispatch_id}


@pytest.mark.mounts
def test_a_full_disk_fails_the_check(disk: Callable[[str], Path]) -> None:
    small = disk("size=64k")
    (small / "other").write_bytes(bytes(64 << 10))
    health = check(target(small))
    assert isinstance(health.error, Busy)
    assert [path.name for path in small.iterdir()] == ["other"]


# ---- another disk


@pytest.mark.mounts
@pytest.mark.parametrize("count", [1, 5], ids=["small", "larger than the disk"])
def test_a_disk_that_is_read_only(tmp_path: Path, disk: Callable[[str], Path], count: int) -> None:
    studies.ct(tmp_path / "study", count)
    folder = disk("size=1m")
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    sent = attempt(target(folder), tmp_path / "study")
    assert isinstance(sent.error, Denied)
    assert "Read-only" in str(sent.error)
    assert isinstance(check(target(folder)).error, Denied)


@pytest.mark.mounts
@pytest.mark.parametrize("layout", ["disk/{StudyDate}", "disk"])
def test_a_folder_that_is_a_disk_of_its_own(tmp_path: Path, disk: Callable[[str], Path], layout: str) -> None:
    """A rename can't lead from one file system to another: what is written lies on the one where it shall be."""
    studies.ct(tmp_path / "study", 3)
    other = disk("size=1m")
    plan = scan([tmp_path / "study"])
    before = {path.name for path in tmp_path.iterdir()}
    delivered(attempt(target(tmp_path, layout=layout), plan))
    assert {path.name for path in tmp_path.iterdir()} == before
    assert len(list(other.rglob("*.dcm"))) == 3
    assert not list(other.rglob(".incoming*"))


# ---- killed


PUSH = textwrap.dedent("""
    import sys
    from pathlib import Path
    from talaria.testing.harness import attempt
    from blocks.folder import FolderTarget

    folder, study, limit, layout = sys.argv[1:]
    target = FolderTarget(folder=folder, bandwidth_limit=int(limit), layout=layout)
    target.named("archive")
    print("ready", flush=True)
    sent = attempt(target, Path(study), moved=lambda sent, count: print(sent.moved, flush=True))
    sent.require()
    print("done", flush=True)
""")


def start(folder: Path, study: Path, limit: int, layout: str = "{dispatch_id}") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PUSH, str(folder), str(study), str(limit), layout],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_killed_midway_it_goes_on_where_it_was(tmp_path: Path, share: float) -> None:
    folder, study = tmp_path / "archive", tmp_path / "study"
    folder.mkdir()
    studies.ct(study, 60, side=128)  # 39 kB each
    plan = scan([study])
    process = start(folder, study, plan.size)  # a second and a bit
    assert process.stdout is not None
    for line in process.stdout:
        assert line != "done\n", "it ended before it could be killed"
        if line != "ready\n" and int(line) > share * plan.size:
            break
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    assert not visible(folder), "nothing is visible of a dispatch that isn't whole"
    kept = {path.name: path.stat().st_ino for path in folder.rglob("*.dcm")}
    assert len(kept) >= 60 * share - 6
    second = attempt(target(folder), plan)
    delivered(second)
    assert second.moved == sum(item.size for item in plan.items if item.path not in kept)
    there = folder / plan.dispatch_id
    assert {name: (there / name).stat().st_ino for name in kept} == kept
    assert all((there / item.path).read_bytes() == plan.file(item).read_bytes() for item in plan.items)
    assert os.listdir(folder) == [plan.dispatch_id]


def test_what_was_written_before_a_file_changed_is_not_taken(tmp_path: Path) -> None:
    """A run that is taken up again keeps its dispatch's id, also if a file has changed since."""
    folder, study = tmp_path / "archive", tmp_path / "study"
    folder.mkdir()
    studies.ct(study, 3)
    plan = scan([study])
    kept = folder / f".incoming-{plan.dispatch_id}" / "archive" / "files" / plan.dispatch_id
    for item in plan.items:
        studies.write(kept / item.path, plan.file(item).read_bytes())
        os.utime(kept / item.path, ns=(item.mtime_ns, item.mtime_ns))
    tick(tmp_path)
    (study / "CT0002.dcm").write_bytes(studies.ct_bytes())
    now = scan([study])
    renewed = type(plan)(plan.dispatch_id, now.root, now.items)
    sent = attempt(target(folder), renewed)
    delivered(sent)
    assert sent.moved == now.items[1].size
    there = folder / plan.dispatch_id
    assert all((there / item.path).read_bytes() == now.file(item).read_bytes() for item in now.items)


def test_what_an_earlier_attempt_left_and_is_no_longer_wanted_never_arrives(tmp_path: Path) -> None:
    folder, study = tmp_path / "archive", tmp_path / "study"
    folder.mkdir()
    studies.ct(study, 2)
    studies.note(study / "note.json")
    plan = scan([study])
    base = folder / f".incoming-{plan.dispatch_id}" / "archive"
    kept = base / "files" / plan.dispatch_id
    studies.write(kept / "note.json", plan.file(plan.items[2]).read_bytes())  # excluded by now
    studies.write(kept / "CT0001.dcm", b"half")
    studies.write(base / "parts" / "whatever", b"half")
    delivered(attempt(target(folder, exclude="*.json"), plan))
    assert visible(folder) == {
        plan.dispatch_id, *(f"{plan.dispatch_id}/{n}" for n in (".complete", "CT0001.dcm", "CT0002.dcm")),
    }  # fmt: skip
    assert os.listdir(folder) == [plan.dispatch_id]


# ---- cancelled, watched, at once


def test_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    folder, study = tmp_path / "archive", tmp_path / "study"
    folder.mkdir()
    studies.ct(study, 20)
    cancelled = threading.Event()
    sent = attempt(target(folder), study, cancelled=cancelled, moved=lambda sent, count: cancelled.set())
    assert isinstance(sent.error, Cancelled)
    assert not list(folder.iterdir())


def test_two_targets_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    """The same dispatch, at the same time, one without the notes."""
    folder, study = tmp_path / "archive", tmp_path / "study"
    folder.mkdir()
    studies.ct(study, 30, side=64)
    studies.note(study / "note.json")
    plan = scan([study])
    one, two = target(folder, layout="one"), target(folder, layout="two", exclude="*.json")
    two.named("other")
    sent: list[Sent] = []
    threads = [threading.Thread(target=lambda t=t: sent.append(attempt(t, plan))) for t in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in sent:
        delivered(each)
    assert len(list((folder / "one").iterdir())) == 32
    assert len(list((folder / "two").iterdir())) == 31
    assert {path.name for path in folder.iterdir()} == {"one", "two"}


def test_the_same_dispatch_from_two_machines_at_once(tmp_path: Path) -> None:
    """No lock reaches from one to the other: one of them may have to try again, and then finds all of it there."""
    folder, study = tmp_path / "archive", tmp_path / "study"
    folder.mkdir()
    studies.ct(study, 40, side=64)
    plan = scan([study])
    processes = [start(folder, study, plan.size * 2) for _ in range(2)]
    for process in processes:
        process.communicate(timeout=300)
    assert any(process.returncode == 0 for process in processes)
    last = attempt(target(folder), plan)
    delivered(last)
    assert {outcome.kind for outcome in last.outcomes.values()} == {Kind.ALREADY}
    there = folder / plan.dispatch_id
    assert all((there / item.path).read_bytes() == plan.file(item).read_bytes() for item in plan.items)
    assert os.listdir(folder) == [plan.dispatch_id]


def test_a_reader_sees_the_whole_or_nothing(tmp_path: Path) -> None:
    """Another process's view, sampled all the time, over several dispatches."""
    folder = tmp_path / "archive"
    folder.mkdir()
    wrong: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for name in os.listdir(folder):
                if not name.startswith("."):
                    files = set(os.listdir(folder / name))
                    if len(files - {".complete"}) != 25:
                        wrong.append(f"{name}: {len(files)} of 25")

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for number in range(5):
            studies.ct(tmp_path / str(number), 25, side=64)
            delivered(attempt(target(folder), tmp_path / str(number)))
    finally:
        over.set()
        watcher.join()
    assert not wrong


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A large file never passes through the process's memory, on its own disk or another."""
    large = tmp_path / "study" / "large.bin"
    large.parent.mkdir()
    with open(large, "wb") as file:
        file.truncate(200 << 20)  # sparse: costs no room here
    (tmp_path / "archive").mkdir()
    script = textwrap.dedent(f"""
        import resource
        from pathlib import Path
        from talaria.testing.harness import attempt
        from blocks.folder import FolderTarget
        from transfer.plan import scan
        plan = scan([Path({str(large)!r})])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attempt(FolderTarget(folder={str(tmp_path / "archive")!r}, verify="proven"), plan).require()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 40_000, "kB"
