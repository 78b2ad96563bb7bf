"""What is wrong with a source is said in a sentence, before anything of it is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blocks import Source, Target
from blocks.dicom import DicomTarget
from blocks.dicomweb import DicomWebTarget
from blocks.folder import FolderTarget
from blocks.inbox import InboxSource
from blocks.list_source import ListSource
from talaria.service.sources import _wrong_with
from tasks.sources import checks

Place = Callable[[str], str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    for name in ("in", "in/below", "sent", "shelf", "home"):
        (tmp_path / name).mkdir()
    return lambda name: str(tmp_path / name)


def targets(place: Place) -> list[Target]:
    return [
        FolderTarget(folder=place("shelf")).named("shelf"),
        DicomTarget(host="h", aet_target="A", direction="query").named("asked"),
    ]


def inbox(place: Place, name: str = "box", **fields: Any) -> InboxSource:
    return InboxSource(**{"folder": place("in"), "targets": ["shelf"], **fields}).named(name)


def wrong(place: Place, *sources: Source, more: tuple[Target, ...] = (), mount: str = "") -> list[str]:
    found = checks.problems(sources[0], sources, [*targets(place), *more], mount)
    return [one.replace(f"{place('x')[:-1]}", "") for one in found]


def test_a_good_one(place: Place) -> None:
    assert wrong(place, inbox(place), inbox(place, "other", folder=place("sent"))) == []
    assert wrong(place, inbox(place, after="move", move_to=place("sent"))) == []


def test_targets_that_are_not_there_or_not_for_this(place: Place) -> None:
    assert wrong(place, inbox(place, targets=["shelf", "pacs"])) == ["no target named pacs; there are: asked, shelf"]
    assert wrong(place, inbox(place, targets=["dicom/shelf"])) == [
        "no target named dicom/shelf; there are: asked, shelf"
    ]
    (words,) = wrong(place, inbox(place, targets=["asked"]))
    assert words.startswith("target asked has direction query")


def test_targets_that_must_know_where_a_study_comes_from(place: Place) -> None:
    node = DicomTarget(host="sender", aet_target="A", pass_sender_aet=True, pass_receiver_aet=True).named("node")
    assert wrong(place, inbox(place, targets=["node"]), more=(node,)) == [
        f"target node: {why}, but nobody knows where files come from: give the source {field}"
        for field, why in (
            ("sender_host", "host is sender"),
            ("sender_aet", "pass_sender_aet is on"),
            ("receiver_aet", "pass_receiver_aet is on"),
        )
    ]
    origin = {"sender_host": "h", "sender_aet": "CT1", "receiver_aet": "ROUTER"}
    assert wrong(place, inbox(place, targets=["node"], **origin), more=(node,)) == []
    with pytest.raises(ValueError, match="16 characters"):
        inbox(place, sender_aet="A" * 17)


def test_off_peak_hours_in_which_a_target_takes_nothing(place: Place) -> None:
    daily = DicomTarget(host="daily", aet_target="A", direction="both", window="08:00-20:00").named("daily")
    never = (
        "target daily has the window 08:00-20:00, which has no time in common with the off-peak hours, 22:00-06:00 UTC"
    )
    assert wrong(place, inbox(place, targets=["daily"]), more=(daily,)) == []
    (words,) = wrong(place, inbox(place, targets=["daily"], priority="offpeak"), more=(daily,))
    assert words.startswith(never)
    Path(place("todo.csv")).write_text("A1\n")
    # What is fetched by night is sent when its target takes it.
    by_night = ListSource(file=place("todo.csv"), query="asked", targets=["daily"], priority="offpeak").named("night")
    assert wrong(place, by_night, more=(daily,)) == []
    of_day = ListSource(file=place("todo.csv"), query="daily", targets=["shelf"], priority="offpeak").named("of-day")
    (words,) = wrong(place, of_day, more=(daily,))
    assert words.startswith(never)


def test_of_what_is_fetched_the_target_that_is_asked_is_the_origin(place: Place) -> None:
    Path(place("todo.csv")).write_text("A1\n")
    pacs = DicomTarget(host="pacs", aet_target="PACS", direction="both").named("pacs")
    files = DicomWebTarget(url=f"file://{place('shelf')}/x", direction="query").named("files")

    def found(query: str, **fields: Any) -> list[str]:
        node = DicomTarget(host="node", aet_target="A", **fields).named("node")
        source = ListSource(file=place("todo.csv"), query=query, targets=["node"]).named("todo")
        return wrong(place, source, more=(node, pacs, files))

    assert found("pacs", pass_sender_aet=True) == []
    unknown = "but a retrieval does not know it of what it fetches"
    assert found("pacs", pass_receiver_aet=True) == [f"target node: pass_receiver_aet is on, {unknown}: receiver_aet"]
    assert f"target node: pass_sender_aet is on, {unknown}: sender_aet" in found("files", pass_sender_aet=True)
    assert found("nobody", pass_sender_aet=True) == ["no target named nobody"]


@pytest.mark.parametrize(
    ("folder", "words"),
    [("nowhere", "nowhere: no such file or folder"), ("file", "file: is not a folder"), ("home", "state directory")],
)
def test_a_folder_that_is_none(place: Place, folder: str, words: str) -> None:
    Path(place("file")).write_text("a file")
    found = wrong(place, inbox(place, folder=place(folder)))
    assert words in found[0]


@pytest.mark.parametrize("unit", ["folder", "study"])
@pytest.mark.parametrize("folder", ["home/received/ct", "home/failed/1/files", "home/uploads/1/files", ""])
def test_what_others_have_not_delivered_yet_is_nobody_s_inbox(place: Place, folder: str, unit: str) -> None:
    Path(place(folder)).mkdir(parents=True, exist_ok=True)
    os.symlink(place(folder) or "/", place("link"))
    for way in (place(folder), place("link")):
        found = wrong(place, inbox(place, folder=way, unit=unit, after="delete"))
        assert any("state directory" in one for one in found), found


@pytest.mark.parametrize("move_to", ["home/received/ct", "home/failed/1/files", "home", ""])
def test_nothing_is_moved_among_what_others_have_not_delivered_yet(place: Place, move_to: str) -> None:
    Path(place(move_to)).mkdir(parents=True, exist_ok=True)
    found = wrong(place, inbox(place, after="move", move_to=place(move_to)))
    assert any(one.startswith("move_to: ") and "state directory" in one for one in found), found


def test_a_folder_that_may_not_be_sent_from(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_SOURCES", place("sent"))
    monkeypatch.setenv("TALARIA_PLACES", place("shelf"))
    assert wrong(place, inbox(place)) == ["in: lies below no folder of TALARIA_SOURCES"]
    moving = inbox(place, folder=place("sent"), after="move", move_to=place("in"))
    assert wrong(place, moving) == ["move_to: in: lies below no folder of TALARIA_PLACES"]


def test_a_folder_that_can_not_be_written_to(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) != place("in") and access(path, mode)
    )  # also of root
    assert wrong(place, inbox(place)) == []
    (words,) = wrong(place, inbox(place, after="delete"))
    assert words == "in: can't be written to by this user, so that nothing can be moved or deleted"


@pytest.mark.parametrize("move_to", ["nothing", "file"])
def test_a_place_to_move_to_that_is_no_folder(place: Place, move_to: str) -> None:
    Path(place("file")).write_text("a file")
    assert wrong(place, inbox(place, after="move", move_to=place(move_to))) == [f"move_to: {move_to}: is not a folder"]


@pytest.mark.parametrize("way", ["", "link/"])
def test_loops(place: Place, way: str) -> None:
    if way:
        os.symlink(place(""), place("link"))
    (two,) = wrong(place, inbox(place), inbox(place, "other", folder=place(f"{way}in/below")))
    assert two == f"in and {way}in/below of source other overlap: each file must have one source"
    shelf = FolderTarget(folder=place(f"{way}in/below")).named("inside")
    (loop,) = wrong(place, inbox(place), more=(shelf,))
    assert loop == f"in and {way}in/below of target inside overlap: what is delivered would come again"
    web = DicomWebTarget(url=f"file://{place(f'{way}in')}").named("web")
    (loop,) = wrong(place, inbox(place, folder=place("in/below")), more=(web,))
    assert "of target web overlap" in loop
    (back,) = wrong(place, inbox(place, after="move", move_to=place(f"{way}in/below")))
    assert back == f"move_to: {way}in/below and in of source box overlap: what is moved would come again"
    other = inbox(place, "other", folder=place("sent"), after="move", move_to=place(f"{way}in/below"))
    assert any("overlap" in one for one in wrong(place, inbox(place), other))


@pytest.mark.parametrize("target", ["again", "again/below"])
def test_a_folder_that_is_mounted_twice_is_one(place: Place, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """What a target had there was taken for new, delivered to where it lay, and deleted."""
    for name in ("in/below", "again/below"):
        Path(place(name)).mkdir(parents=True, exist_ok=True)
    shelf = FolderTarget(folder=place(target)).named("shelf")
    assert wrong(place, inbox(place), more=(shelf,)) == []
    table = Path(place("mountinfo"))
    table.write_text(
        f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 8:1 {place('in')} {place('again')} rw - ext4 /dev/sda1 rw\n"
    )
    monkeypatch.setattr(checks, "MOUNTS", table)
    (loop,) = wrong(place, inbox(place), more=(shelf,))
    assert loop == f"in and {target} of target shelf overlap: what is delivered would come again"


def test_two_exports_of_one_disk_of_a_file_server_are_two(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux says of both that they are the whole of one file system: no such source could be applied."""
    Path(place("again")).mkdir()
    shelf = FolderTarget(folder=place("again")).named("shelf")
    table = Path(place("mountinfo"))
    table.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"30 22 0:50 / {place('in')} rw - nfs4 server:/export/in rw\n"
        f"31 22 0:50 / {place('again')} rw - nfs4 server:/export/again rw\n"
    )
    monkeypatch.setattr(checks, "MOUNTS", table)
    assert wrong(place, inbox(place), more=(shelf,)) == []
    table.write_text(table.read_text().replace("/export/in", "/export").replace("/export/again", "/export"))  # by bind
    assert wrong(place, inbox(place), more=(shelf,)) == []
    table.write_text(table.read_text().replace("nfs4 server:/export", "cifs //server/share"))
    (loop,) = wrong(place, inbox(place), more=(shelf,))
    assert loop == "in and again of target shelf overlap: what is delivered would come again"


def test_a_folder_whose_name_has_large_and_small_letters_is_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a share of a server that does not tell them apart."""
    shelf, look = FolderTarget(folder=place("IN/deeper")).named("shelf"), os.stat
    Path(place("in/deeper")).mkdir()
    assert wrong(place, inbox(place), more=(shelf,)) == []
    there = place("IN")
    monkeypatch.setattr(
        checks.os, "stat", lambda path, *args, **more: look(str(path).replace(there, place("in")), *args, **more)
    )
    (loop,) = wrong(place, inbox(place), more=(shelf,))
    assert loop == "in and IN/deeper of target shelf overlap: what is delivered would come again"


def test_a_share_that_does_not_answer_holds_up_no_other(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: no inbox was swept any more while the share of some folder target, or of another source, was away."""
    shelf = FolderTarget(folder=place("share/shelf")).named("away")
    other = inbox(place, "other", folder=place("share/in"), after="move", move_to=place("share/sent"))
    box = inbox(place, after="move", move_to=place("sent"))
    mute = checks.places_beside(box, [box, other], [*targets(place), shelf])
    assert mute == [place(name) for name in ("share/in", "share/sent", "shelf", "share/shelf")]
    stat, lstat = os.stat, os.lstat

    def answers(path: object) -> None:
        assert not str(path).startswith(place("share")), f"{path} is looked at"

    monkeypatch.setattr(os, "stat", lambda path, *args, **more: answers(path) or stat(path, *args, **more))
    monkeypatch.setattr(os, "lstat", lambda path, *args, **more: answers(path) or lstat(path, *args, **more))
    away = [one for one in mute if one != place("shelf")]
    assert checks.problems(box, [box, other], [*targets(place), shelf], mute=away) == []
    with pytest.raises(AssertionError, match="is looked at"):
        checks.problems(box, [box, other], [*targets(place), shelf])
    shelf = FolderTarget(folder=place("share/../in/below")).named("away")
    (loop,) = checks.problems(box, [box, other], [*targets(place), shelf], mute=[*away, shelf.folder])
    assert "overlap: what is delivered would come again" in loop, "names alone say so"
    one, two = (ListSource(file=place(f"share/{name}"), targets=["shelf"]).named(name) for name in ("one", "two"))
    assert checks.places_beside(one, [one, two, box], targets(place)) == [two.file]


@pytest.mark.parametrize(
    ("there", "system", "shared", "two"),
    [(True, "ext4", "", False), (True, "overlay", "", False), (True, "nfs4", "", True), (True, "", "", True),
     (True, "ext4", "in", True), (False, "ext4", "", True)],
)  # fmt: skip
def test_a_path_of_another_host_is_another_folder_unless_both_have_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, there: bool, system: str, shared: str, two: bool
) -> None:
    """On a share, or where nobody can know, it is the same one."""
    monkeypatch.setenv("TALARIA_LEDGER", "postgresql://database/talaria")
    monkeypatch.setenv("TALARIA_HOST_NAME", "here")
    monkeypatch.setenv("TALARIA_SHARED_SOURCES", place(shared) if shared else "")
    monkeypatch.setattr(checks, "kind", lambda folder: system)
    for other in (
        inbox(place, "other"),
        inbox(place, "other", folder=place("sent"), after="move", move_to=place("in")),
    ):
        box = inbox(place)
        elsewhere = {"other": "there"} if there else {}
        assert bool(checks.problems(box, [box, other], targets(place), elsewhere=elsewhere)) is two
    box, other = inbox(place, after="move", move_to=place("sent")), inbox(place, "other", folder=place("sent"))
    assert bool(checks.problems(box, [box, other], targets(place), elsewhere=elsewhere)) is (two and not shared)


def test_a_share_that_is_not_mounted(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = place("in").replace(" ", "\\040")
    planned = tmp_path / "fstab"
    planned.write_text(f"# file systems\nserver:/export {share} nfs defaults 0 0\nUUID=1 / ext4 defaults 0 1\n")
    monkeypatch.setattr(checks, "PLANNED", planned)
    assert wrong(place, inbox(place, folder=place("in/below"))) == ["in/below: lies on in, which is not mounted"]
    assert wrong(place, inbox(place, folder=place("in/gone"))) == ["in/gone: no such file or folder: in is not mounted"]
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:9 / {share} rw shared:1 - nfs4 server:/export rw\n")
    monkeypatch.setattr(checks, "MOUNTS", mounts)
    assert wrong(place, inbox(place)) == []
    for written in (f"{share}/", f"/{share}", share.replace("/in", "//in/.")):  # mount(8) takes them all
        planned.write_text(f"  # old: /\nserver:/export {written} nfs defaults 0 0\nnone swap swap sw 0 0\n")
        assert wrong(place, inbox(place)) == []
    assert checks.mounted_at(place("in/below")) == f"nfs4 server:/export {place('in')}"
    planned.write_text("")
    mounts.write_text("1 0 8:1 / / rw - ext4 /dev/sda1 rw\n")
    (words,) = wrong(place, inbox(place), mount=f"nfs4 server:/export {place('in')}")
    assert "lies on another file system than when it was applied (ext4 /dev/sda1 /" in words


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("ext4 /dev/sdb1 /data", "ext4 /dev/sdc1 /data", True),
        ("xfs /dev/nvme1n1 /data/in box", "xfs /dev/nvme3n1 /data/in box", True),
        ("ext4 /dev/sdb1 /data", "ext4 /dev/sda1 /", False),
        ("ext4 /dev/sdb1 /data", "xfs /dev/sdb1 /data", False),
        ("nfs4 server:/export /data", "nfs4 server:/other /data", False),
        ("nfs4 server:/export /data", "ext4 /dev/sda1 /data", False),
        ("cifs //server/share /data", "cifs //server/share /data", True),
    ],
)
def test_a_disk_is_the_same_whatever_its_name_is_after_a_restart(before: str, now: str, same: bool) -> None:
    assert checks.is_same_mount(before, now) is same


def test_a_list(place: Place) -> None:
    Path(place("todo.csv")).write_text("/data/a\n")

    def listed(**fields: Any) -> ListSource:
        return ListSource(**{"file": place("todo.csv"), "targets": ["shelf"], **fields}).named("todo")

    assert wrong(place, listed()) == []
    assert wrong(place, listed(file=place("nothing.csv"))) == ["nothing.csv: no such file or folder"]
    assert wrong(place, listed(file=place("in"))) == ["in: is not a file"]
    assert wrong(place, listed(column="nope")) == ["todo.csv: none of the 1 columns of its first line is nope"]
    assert wrong(place, listed(query="asked")) == []
    assert wrong(place, listed(query="pacs")) == ["no target named pacs"]
    (words,) = wrong(place, listed(query="shelf", targets=["asked"]))[1:] or [""]
    assert "can't be queried" in words


def test_two_lists_on_one_file_have_no_report_each(place: Place) -> None:
    Path(place("todo.csv")).write_text("/data/a\n")
    os.symlink(place("in"), place("link"))
    Path(place("in/todo.csv")).write_text("/data/a\n")

    def listed(name: str, file: str, **fields: Any) -> ListSource:
        return ListSource(file=place(file), targets=["shelf"], **fields).named(name)

    one, two = listed("one", "in/todo.csv"), listed("two", "link/todo.csv", query="asked")
    assert checks.of_report(one, [one, listed("two", "todo.csv"), inbox(place)]) == []
    assert "is the list of source two, too" in checks.of_report(one, [one, two])[0]
    assert checks.of_report(inbox(place), [one, two]) == []
    (words,) = _wrong_with(two, [one, two], targets(place), {})
    assert "copy the list" in words
