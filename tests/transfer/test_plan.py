"""Planning: everything below the source is in the plan once, or refused by name; same files, same dispatch."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imaging.header import Header, read_header
from talaria.testing import process, studies
from talaria.testing.process import as_loaded
from tests.clock import tick
from transfer.errors import Cancelled, Misconfigured, NotFound, Rejected
from transfer.plan import Item, Plan, look, scan


def paths(plan: Plan) -> set[str]:
    return {item.path for item in plan.items}


def problems(plan: Plan) -> dict[str, str]:
    return {item.path: item.problem for item in plan.items if item.problem}


def one(plan: Plan, path: str) -> Item:
    return next(item for item in plan.items if item.path == path)


# ---- what is in it


def test_a_study(tmp_path: Path) -> None:
    files = studies.sample(tmp_path)
    plan = scan([tmp_path])
    assert plan.root == tmp_path
    assert paths(plan) == {str(path.relative_to(tmp_path)) for path in files}
    assert [item.path for item in plan.items] == sorted(paths(plan))
    assert plan.size == sum(path.stat().st_size for path in files)
    assert plan.pending == plan.items
    for item in plan.items:
        assert (item.header is None) == (Path(item.path).suffix != ".dcm")
        assert bool(item.not_sent) == (item.header is None)
        assert not item.damaged
    assert len({item.header.StudyInstanceUID for item in plan.items if item.header}) == 1


def test_one_file(tmp_path: Path) -> None:
    (file,) = studies.ct(tmp_path, 1)
    studies.ct(tmp_path, 1, first=2)
    plan = scan([file])
    assert plan.root == tmp_path
    assert paths(plan) == {"CT0001.dcm"}


def test_several_paths(tmp_path: Path) -> None:
    studies.ct(tmp_path / "a" / "x", 2)
    studies.ct(tmp_path / "b", 1)
    (file,) = studies.ct(tmp_path / "c", 1, first=7)
    plan = scan([tmp_path / "a", str(tmp_path / "b"), file])
    assert plan.root == tmp_path
    assert paths(plan) == {"a/x/CT0001.dcm", "a/x/CT0002.dcm", "b/CT0001.dcm", "c/CT0007.dcm"}


def test_paths_that_overlap_count_once(tmp_path: Path) -> None:
    studies.ct(tmp_path / "a" / "b", 2)
    plan = scan(
        [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "CT0001.dcm", tmp_path / "a" / ".." / "a"]
    )
    assert plan.root == tmp_path / "a"
    assert paths(plan) == {"b/CT0001.dcm", "b/CT0002.dcm"}


def test_same_name_in_two_sources(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        studies.ct(tmp_path / folder, 1)
    assert paths(scan([tmp_path / "a", tmp_path / "b"])) == {"a/CT0001.dcm", "b/CT0001.dcm"}


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.ct(tmp_path / "a", 1)
    monkeypatch.chdir(tmp_path)
    assert scan(["a"]).root == tmp_path / "a"
    assert paths(scan(["."])) == {"a/CT0001.dcm"}


def test_excluded_and_own_names_are_never_in_it(tmp_path: Path) -> None:
    studies.ct(tmp_path, 1)
    studies.png(tmp_path / "a.png")
    studies.note(tmp_path / "private" / "a.json")
    studies.write(tmp_path / ".complete", b"")
    studies.ct(tmp_path / ".incoming-0123" / "x", 1)
    studies.write(tmp_path / "sub" / ".talaria-probe", b"")
    plan = scan([tmp_path], ("*.png", "private"))
    assert paths(plan) == {"CT0001.dcm"}
    own = "a name that Talaria keeps for itself"
    assert {item.path: item.not_sent for item in plan.left_out} == {
        "a.png": "excluded by *.png,private",
        "private/a.json": "excluded by *.png,private",
        ".complete": own,
        ".incoming-0123/x/CT0001.dcm": own,
        "sub/.talaria-probe": own,
    }


def test_odd_names(tmp_path: Path) -> None:
    studies.odd_names(tmp_path)
    plan = scan([tmp_path])
    assert paths(plan) == set(studies.UNICODE_NAMES + studies.SHELL_NAMES + studies.RAW_NAMES)
    for item in plan.items:
        item.shown.encode()
        assert item.shown.isprintable()
        with plan.open(item) as fd:
            assert os.fstat(fd).st_size == item.size


@example(["\xa0", "\udca0", "\\xa0", "\\u00a0", "\x85", "\udc85"])  # what can't be shown, and bytes that are not UTF-8
@given(st.lists(st.text(alphabet="ab\\\n\x01\u202e\udce9ü", min_size=1, max_size=6), unique=True, max_size=8))
def test_shown_tells_paths_apart(names: list[str]) -> None:
    """The ledger keys its rows by what is shown."""
    shown = [Item(name, 0, 0).shown for name in names]
    assert len(set(shown)) == len(names)
    assert all(text.isprintable() for text in shown)


def test_damaged_files_keep_their_reason(tmp_path: Path) -> None:
    studies.damaged(tmp_path)
    studies.write(tmp_path / "empty.txt", b"")
    plan = scan([tmp_path])
    for item in plan.items:
        assert item.header is None
        assert item.not_sent
        assert not item.problem, "targets that carry anything take it"
        assert item.damaged == (item.path != "empty.txt")


# ---- what is refused


def test_a_time_that_the_ledger_can_not_keep(tmp_path: Path) -> None:
    first, second = studies.ct(tmp_path, 2)
    os.utime(first, ns=(0, 2**63 + 10**18))
    os.utime(second, ns=(0, -(10**18)))
    assert first.stat().st_mtime_ns > 2**63, "the file system keeps it"
    late, early = scan([tmp_path]).items
    assert late.problem == "its time of modification lies after the year 2262"
    assert (early.problem, early.mtime_ns) == ("", -(10**18))
    assert Item("a", 1, 2**64).mtime_ns == 2**63 - 1


@pytest.mark.parametrize("path", ["/nowhere/at/all", "x\0y", "/etc/passwd/x", "n" * 300])
def test_a_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(NotFound):
        scan([path])


def test_no_path_or_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    studies.ct(tmp_path, 1)
    for sources in ([], [""]):
        with pytest.raises(Misconfigured):
            scan(sources)


def test_nothing_to_send(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(Misconfigured, match="nothing to send"):
        scan([tmp_path])
    studies.png(tmp_path / "a.png")
    with pytest.raises(Misconfigured, match="nothing to send"):
        scan([tmp_path], ("*.png",))
    with pytest.raises(Misconfigured, match=r"\*\.png,\*\.json leaves out all that is there"):
        look([tmp_path], ("*.png", "*.json"))
    with pytest.raises(Misconfigured, match=r"nothing to send in [^:]*$"):
        look([tmp_path / "empty"], ("*.png",))


def test_links_out_of_the_source(tmp_path: Path) -> None:
    outside, source = tmp_path / "outside", tmp_path / "source"
    studies.ct(outside, 2)
    studies.ct(source, 1)
    (source / "file.dcm").symlink_to(outside / "CT0001.dcm")
    (source / "relative.dcm").symlink_to("../outside/CT0001.dcm")
    (source / "folder").symlink_to(outside)
    (source / "up").symlink_to("..")
    (source / "sibling").symlink_to("../source-2")  # a name that begins like the source's
    studies.ct(tmp_path / "source-2", 1)
    (source / "chain").symlink_to("file.dcm")
    plan = scan([source])
    out = "a symbolic link that leads out of the source"
    assert problems(plan) == dict.fromkeys(("file.dcm", "relative.dcm", "folder", "up", "sibling", "chain"), out)
    assert paths(plan) - set(problems(plan)) == {"CT0001.dcm"}


def test_links_inside_the_source(tmp_path: Path) -> None:
    studies.ct(tmp_path / "a", 2)
    (tmp_path / "link.dcm").symlink_to("a/CT0001.dcm")
    (tmp_path / "x").symlink_to("a")
    (tmp_path / "y").symlink_to(tmp_path / "a")
    plan = scan([tmp_path])
    assert not problems(plan)
    assert paths(plan) == {f"{folder}/CT000{n}.dcm" for folder in "axy" for n in (1, 2)} | {"link.dcm"}


def test_a_source_that_is_a_link(tmp_path: Path) -> None:
    studies.ct(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to("real")
    plan = scan([tmp_path / "link"])
    assert paths(plan) == {"CT0001.dcm"}
    assert not problems(plan)


def test_a_link_to_a_folder_whose_name_begins_like_its_own(tmp_path: Path) -> None:
    studies.ct(tmp_path / "a", 1)
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "link").symlink_to("../a")
    assert paths(scan([tmp_path])) == {"a/CT0001.dcm", "ab/link/CT0001.dcm"}


def test_links_in_circles(tmp_path: Path) -> None:
    studies.ct(tmp_path / "a" / "deep", 1)
    studies.ct(tmp_path / "b", 1)
    (tmp_path / "a" / "deep" / "up").symlink_to("../..")
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "a" / "to-b").symlink_to("../b")
    (tmp_path / "b" / "to-a").symlink_to("../a")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "there").symlink_to("back")
    (tmp_path / "back").symlink_to("there")
    plan = scan([tmp_path])
    assert set(problems(plan)) == {"itself", "there", "back"}
    assert paths(plan) - set(problems(plan)) == {
        "a/deep/CT0001.dcm", "b/CT0001.dcm", "a/to-b/CT0001.dcm", "b/to-a/deep/CT0001.dcm",
    }  # fmt: skip


def test_links_that_multiply_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfer.walk.MAX_LINKED_FOLDERS", 200)
    for name in range(8):
        studies.write(tmp_path / str(name) / "x", b"x")
        for other in range(8):
            if other != name:
                (tmp_path / str(name) / f"to{other}").symlink_to(f"../{other}")
    with pytest.raises(Misconfigured, match="links to folders"):
        scan([tmp_path])


def test_what_is_no_file(tmp_path: Path) -> None:
    studies.ct(tmp_path, 1)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "broken").symlink_to("nothing-there")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        begun = time.monotonic()
        plan = scan([tmp_path])
        assert time.monotonic() - begun < as_loaded(5), "a pipe without a writer must not be waited for"
    assert set(problems(plan)) == {"fifo", "broken", "socket"}
    assert problems(plan)["fifo"] == "not a regular file"
    assert "No such file" in problems(plan)["broken"]


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_a_device(path: str) -> None:
    assert problems(scan([path]))


def test_unreadable(open_folder: Path, as_nobody: Callable[[], AbstractContextManager[None]]) -> None:
    studies.ct(open_folder, 2)
    studies.ct(open_folder / "closed", 1)
    (open_folder / "link").symlink_to("closed/CT0001.dcm")
    (open_folder / "CT0001.dcm").chmod(0)
    (open_folder / "closed").chmod(0)
    with as_nobody():
        plan = scan([open_folder])
        assert problems(plan) == {
            "CT0001.dcm": "can't be read: Permission denied",
            "link": "can't be read: Permission denied",
            "closed": "can't be listed",
        }
        with pytest.raises(NotFound, match="Permission denied"):
            scan([open_folder / "closed" / "CT0001.dcm"])


# ---- the dispatch's id


def test_same_files_same_dispatch(tmp_path: Path) -> None:
    studies.sample(tmp_path / "here")
    studies.odd_names(tmp_path / "here" / "odd")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copy2)
    here = scan([tmp_path / "here"])
    assert scan([tmp_path / "here"]).dispatch_id == here.dispatch_id
    assert scan([tmp_path / "there"]).dispatch_id == here.dispatch_id
    assert len(here.dispatch_id) == 20
    assert int(here.dispatch_id, 16)


@pytest.mark.parametrize("what", ["time", "name", "more", "less", "content", "instance"])
def test_other_files_other_dispatch(tmp_path: Path, what: str) -> None:
    studies.ct(tmp_path, 2)
    note = studies.note(tmp_path / "note.json")
    before = scan([tmp_path]).dispatch_id
    file = tmp_path / "CT0001.dcm"
    info = file.stat()
    if what == "time":
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    elif what == "name":
        file.rename(tmp_path / "CT0003.dcm")
    elif what == "more":
        studies.ct(tmp_path, 1, first=3)
    elif what == "less":
        file.unlink()
    elif what == "content":  # same name, length and time
        info = note.stat()
        note.write_bytes(b"#" * info.st_size)
        os.utime(note, ns=(info.st_atime_ns, info.st_mtime_ns))
    else:
        file.write_bytes(studies.ct_bytes())
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert scan([tmp_path]).dispatch_id != before


def test_what_a_refused_link_leads_to_does_not_matter(tmp_path: Path) -> None:
    """It is not even read."""
    studies.ct(tmp_path / "source", 1)
    outside = studies.note(tmp_path / "outside.json")
    (tmp_path / "source" / "link").symlink_to(outside)
    before = scan([tmp_path / "source"]).dispatch_id
    studies.note(outside)
    assert scan([tmp_path / "source"]).dispatch_id == before


# ---- what is handed out


def test_open_refuses_what_changed(tmp_path: Path) -> None:
    files = studies.ct(tmp_path, 4)
    plan = scan([tmp_path])
    longer, touched, gone, replaced = plan.items
    with open(files[0], "ab") as file:
        file.write(b"\0\0")
    os.utime(files[1])
    files[2].unlink()
    files[3].unlink()
    files[3].symlink_to(files[0])
    for item, words in ((longer, "changed"), (touched, "changed"), (gone, "No such file"), (replaced, "can't be read")):
        with pytest.raises(Rejected, match=words) as caught, plan.open(item):
            pass
        assert caught.value.item == item.path


def test_check_notices_a_change_while_it_is_read(tmp_path: Path) -> None:
    (file,) = studies.ct(tmp_path, 1)
    plan = scan([tmp_path])
    item = plan.items[0]
    with plan.open(item) as fd:
        os.read(fd, 100)
        plan.check(item, fd)
        tick(tmp_path)
        with open(file, "r+b") as other:
            other.write(b"x")
        with pytest.raises(Rejected, match="changed"):
            plan.check(item, fd)


def test_descriptors_are_closed(tmp_path: Path) -> None:
    studies.ct(tmp_path, 20)
    plan = scan([tmp_path])
    before = process.open_descriptors()
    scan([tmp_path])
    for item in plan.items:
        with plan.open(item):
            pass
    assert process.open_descriptors() <= before


def test_narrowed(tmp_path: Path) -> None:
    studies.ct(tmp_path, 3)
    plan = scan([tmp_path])
    narrow = plan.narrowed(plan.items[:2], done=["CT0001.dcm"])
    assert narrow.dispatch_id == plan.dispatch_id
    assert [item.path for item in narrow.items] == ["CT0001.dcm", "CT0002.dcm"]
    assert [item.path for item in narrow.pending] == ["CT0002.dcm"]


def test_repr_shows_nothing_of_the_patient(tmp_path: Path) -> None:
    studies.sample(tmp_path)
    plan = scan([tmp_path])
    for text in (repr(plan), repr(plan.items)):
        assert not any(word in text for word in studies.PHI)


def test_thousands_of_files_are_read_quickly(tmp_path: Path) -> None:
    studies.ct(tmp_path, 2000)
    begun = time.monotonic()
    assert len(scan([tmp_path]).items) == 2000
    assert time.monotonic() - begun < as_loaded(10)  # half a second on an idle machine


def test_a_slow_share_is_read_in_threads_and_the_order_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.ct(tmp_path, 200)
    at_once, most, really = 0, 0, read_header

    def slow(fd: int, size: int) -> Header:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        at_once -= 1
        return really(fd, size)

    monkeypatch.setattr("transfer.plan.read_header", slow)
    items = scan([tmp_path]).items
    assert [item.path for item in items] == sorted(path.name for path in tmp_path.iterdir())
    assert all(item.header for item in items)
    assert most > 1


def test_planning_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.ct(tmp_path, 200)
    read, really = 0, read_header

    def counted(fd: int, size: int) -> Header:
        nonlocal read
        read += 1
        return really(fd, size)

    def check() -> None:
        if read:
            raise Cancelled("the dispatch was cancelled")

    monkeypatch.setattr("transfer.plan.read_header", counted)
    with pytest.raises(Cancelled):
        scan([tmp_path], check=check)
    assert read < 100
