"""What rsync reads in place: what was opened for it, whatever becomes of the names."""

from __future__ import annotations

import errno
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from talaria.testing.harness import attempt
from tasks.rsync import names as module
from tasks.rsync.names import AT_ONCE, NamedFiles
from tests.targets.rsync import HARNESSES
from transfer.errors import Busy
from transfer.plan import Item, Plan, scan
from transfer.staging import Way, stage


def in_place(tmp_path: Path, count: int = 3) -> Plan:
    """A plan of files in two folders that are read in their place, and one that is staged."""
    for number in range(count):
        path = tmp_path / "study" / ("deeper/down" if number % 2 else "") / f"{number:03}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    plan = stage(scan([tmp_path / "study"]), tmp_path / "staged", way=Way.PLACE)
    copied = plan.items[0]
    (tmp_path / "staged" / copied.path).write_bytes(b"0")
    info = (tmp_path / "staged" / copied.path).stat()
    return replace(plan, items=(copied.but(mtime_ns=info.st_mtime_ns, in_place=False), *plan.items[1:]))


def read(folder: Path, items: Any) -> dict[str, bytes]:
    return {item.path: (folder / item.path).read_bytes() for item in items if (folder / item.path).exists()}


def holders() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [one for one in found if one.is_running() and module.HOLDER in one.cmdline()]


def test_it_reads_what_was_opened_although_another_file_or_a_link_has_its_name_now(tmp_path: Path) -> None:
    plan = in_place(tmp_path, 6)
    (tmp_path / "secret").write_bytes(b"not ours")
    here = len(os.listdir("/proc/self/fd"))
    with NamedFiles(plan) as names:
        folder = names.folder(plan.items)
        assert folder != plan.root and plan.root in folder.parents
        assert len(os.listdir("/proc/self/fd")) < here + 6  # they are open elsewhere
        study = tmp_path / "study"
        (study / "002.bin").unlink()
        (study / "002.bin").symlink_to(tmp_path / "secret")
        (study / "004.bin").unlink()
        (study / "deeper").rename(tmp_path / "away")
        (study / "deeper").symlink_to(tmp_path)
        assert read(folder, plan.items) == {item.path: b"%d" % int(Path(item.path).stem) for item in plan.items}
    assert not holders() and not folder.exists() and list(plan.root.iterdir())


def test_what_has_changed_before_it_was_opened_has_no_name(tmp_path: Path) -> None:
    plan = in_place(tmp_path)
    (tmp_path / "study/002.bin").write_bytes(b"longer than before")
    (tmp_path / "study/deeper/down/001.bin").unlink()
    (tmp_path / "study/deeper/down/001.bin").symlink_to("/etc/passwd")
    with NamedFiles(plan) as names:
        assert read(names.folder(plan.items), plan.items) == {"000.bin": b"0"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_can_not_be_opened_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, "002.bin", number)
    plan = in_place(tmp_path)
    with NamedFiles(plan) as names:
        assert set(read(names.folder(plan.items), plan.items)) == {"000.bin", "deeper/down/001.bin"}
        assert names.lacking == {"002.bin": f"can't be read: {os.strerror(number)}"}
        monkeypatch.undo()
        assert set(read(names.folder(plan.items), plan.items)) == {item.path for item in plan.items}
        assert not names.lacking


def test_no_file_is_passed_over_because_too_many_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "002.bin", errno.EMFILE)
    with pytest.raises(Busy, match="open files"), NamedFiles(in_place(tmp_path)) as names:
        names.folder(names._plan.items)


def test_names_are_given_anew_when_who_kept_them_was_killed(tmp_path: Path) -> None:
    plan = in_place(tmp_path)
    with NamedFiles(plan) as names:
        names.folder(plan.items)
        for one in holders():
            one.kill()
            psutil.wait_procs([one], 60)
        assert len(read(names.folder(plan.items), plan.items)) == 3
    assert not holders()


@pytest.mark.parametrize("earlier", [False, True])
def test_a_file_that_can_not_be_opened_is_never_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    """In a new folder, and in one that an earlier attempt has placed, whose files are not counted."""
    plan = in_place(tmp_path, 4)
    plan = plan.narrowed([item for item in plan.items if item.in_place])
    last = plan.items[-1]
    with HARNESSES["rsync-openssh"](tmp_path) as harness:
        done: list[str] = []
        if earlier:
            first = plan.narrowed(plan.items[:-1], lacks=1)
            attempt(harness.target, first).require()
            done = [item.path for item in first.items]
        refuse(monkeypatch, last.path, errno.EACCES)
        sent = attempt(harness.target, plan, done=done)
        monkeypatch.undo()
        assert set(sent.rejected) == {last.path}
        assert set(harness.read_back(plan)) == {item.path for item in plan.items} - {last.path}


def refuse(monkeypatch: pytest.MonkeyPatch, path: str, number: int) -> None:
    """Let one file not be opened; what looks at it without opening it sees nothing of that."""
    real = Plan.descriptor

    def descriptor(self: Plan, item: Item, flags: int = os.O_RDONLY | os.O_NONBLOCK) -> int:
        if item.path == path and not flags & os.O_PATH:
            raise OSError(number, os.strerror(number))
        return real(self, item, flags)

    monkeypatch.setattr(Plan, "descriptor", descriptor)


def test_what_is_staged_needs_no_links(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study/one.bin").write_bytes(b"1")
    plan = stage(scan([tmp_path / "study"]), tmp_path / "staged")
    with NamedFiles(plan) as names:
        assert names.folder(plan.items) == plan.root and not holders()


def test_more_files_than_one_process_may_have_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = "resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))"
    monkeypatch.setattr(module, "HOLDER", module.HOLDER.replace("(most, most)", "(16, 16)"))
    assert "(16, 16)" in module.HOLDER and few in module.HOLDER
    plan = in_place(tmp_path, 40)
    with NamedFiles(plan) as names:
        some: list[Item] = [item for item in plan.items if item.path < "030"]
        first = names.folder(some)
        assert names.folder(plan.items) == first  # the others' names come to it
        assert len(read(first, plan.items)) == 40 and len(holders()) >= 3
    assert not holders()


def test_none_may_be_open_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOLDER", module.HOLDER.replace("(most, most)", "(3, 3)"))
    with pytest.raises(Busy, match="open files"), NamedFiles(in_place(tmp_path)) as names:
        names.folder(names._plan.items)
    assert not holders()


def test_who_keeps_them_open_ends_with_us(tmp_path: Path) -> None:
    plan = in_place(tmp_path, AT_ONCE + 50)
    assert len(plan.items) > AT_ONCE
    script = f"""
        import os
        from pathlib import Path
        from tasks.rsync.names import NamedFiles
        from transfer.plan import scan
        from transfer.staging import Way, stage
        plan = stage(scan([{str(tmp_path / "study")!r}]), Path({str(tmp_path / "again")!r}), way=Way.PLACE)
        names = NamedFiles(plan)
        names.folder(plan.items)
        print(names._holders[-1].pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    with psutil.Popen([sys.executable, "-P", "-c", textwrap.dedent(script)], stdout=-1, text=True) as process:
        pid = int(process.communicate()[0])
    try:
        psutil.Process(pid).wait(60)
    except psutil.NoSuchProcess:
        return
