"""Folder targets and DICOMweb folders beside somebody who plants links: nothing outside is read, changed or removed.

He may write to the target's folder, as others often may on a share, and knows every name that we use there.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from blocks.dicomweb import DicomWebTarget
from blocks.folder import FolderTarget
from protocols.dicomfolder.folder import DicomFolder
from protocols.files.tree import Tree
from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.dicomweb import folder as dicomweb
from tasks.folder import check
from tests.targets.folder_push import pushing
from transfer import beneath
from transfer.errors import Denied
from transfer.plan import Plan, scan
from transfer.receipt import State


@pytest.fixture(params=["openat2", "step by step"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to open without links."""
    if request.param == "step by step":
        monkeypatch.setattr(beneath, "_syscall", None)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    studies.ct(tmp_path / "study", 3)
    studies.ct(tmp_path / "study" / "sub", 1)
    return scan([tmp_path / "study"])


class Victim:
    """A folder of somebody else's, with all the names that a delivery uses."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root = root
        for folder in ("", "all/", "parts/", "files/all/", "archive/parts/", "archive/files/all/"):
            for name in ("CT0001.dcm", "sub/CT0001.dcm", ".complete", "precious"):
                studies.write(root / folder / name, b"precious")
        self.before = self.state()

    def state(self) -> dict[str, tuple[int, int, int, bytes]]:
        found = {}
        for path in sorted(self.root.rglob("*")):
            info = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            found[str(path)] = (info.st_ino, info.st_mtime_ns, info.st_mode, content)
        return found

    def assert_untouched(self) -> None:
        assert self.state() == self.before


@pytest.fixture
def victim(tmp_path: Path, plan: Plan) -> Victim:
    return Victim(tmp_path / "victim", plan)


def target(folder: Path, **fields: Any) -> FolderTarget:
    return pushing.target(folder, **{"layout": "all", "verify": "proven", "mode": "0600"} | fields)


def plant(link: Path, to: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(to)


# ---- a link that is there before


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "where",
    [
        "all",
        ".incoming-{id}",
        ".incoming-{id}/archive",
        ".incoming-{id}/archive/parts",
        ".incoming-{id}/archive/files",
        ".incoming-{id}/archive/files/all",
        ".incoming-{id}/archive/files/all/sub",
    ],
)
def test_a_link_in_the_place_of_a_folder(archive: Path, plan: Plan, victim: Victim, where: str) -> None:
    planted = archive / where.format(id=plan.dispatch_id)
    plant(planted, victim.root)
    sent = attempt(target(archive), plan)
    attempt(target(archive, link="auto", mode=None), plan)
    victim.assert_untouched()
    files = (archive / "all").is_dir() and not (archive / "all").is_symlink()
    assert not any(path.is_symlink() for path in (archive / "all").rglob("*")) or not files
    assert sent.error is None
    if sent.receipt and sent.receipt.state is not State.DELIVERED:
        assert all("symbolic link" in why for why in sent.rejected.values())


def test_a_link_in_the_place_of_a_folder_costs_its_own_place_alone(
    archive: Path, tmp_path: Path, victim: Victim
) -> None:
    for patient in ("P1", "P2"):
        studies.dicom(tmp_path / "two" / patient / "1.dcm", PatientID=patient)
    plant(archive / "P1", victim.root)
    sent = attempt(target(archive, layout="{PatientID}"), tmp_path / "two")
    assert set(sent.rejected) == {"P1/1.dcm"}
    assert sent.arrived == {"P2/1.dcm"}
    victim.assert_untouched()


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *(("CT0001.dcm", to) for to in ("a file", "a folder", "nothing", "the very file")),
        *(("sub", to) for to in ("a file", "a folder", "nothing")),
        ("sub/CT0001.dcm", "the very file"),
        *((".complete", to) for to in ("a file", "a folder", "nothing")),
    ],
)
def test_a_link_in_the_place_of_what_is_delivered(
    archive: Path, plan: Plan, victim: Victim, name: str, to: str
) -> None:
    ends = {"a file": "precious", "a folder": "all", "nothing": "none", "the very file": "CT0001.dcm"}
    plant(archive / "all" / name, victim.root / ends[to])
    sent = attempt(target(archive), plan)
    victim.assert_untouched()
    assert not (victim.root / "none").exists()
    if name == ".complete":
        assert sent.require().state is State.DELIVERED
        assert (archive / "all" / name).read_bytes() == b""
        assert not (archive / "all" / name).is_symlink()
    else:
        assert sent.rejected
        assert (archive / "all" / name).is_symlink()
        assert not (archive / "all" / ".complete").exists()


def test_links_in_a_temporary_folder_that_is_resumed(archive: Path, plan: Plan, victim: Victim) -> None:
    """An attempt was killed; before the next one, its files became links, to files of the same content, too."""
    base = archive / f".incoming-{plan.dispatch_id}" / "archive" / "files" / "all"
    same = victim.root / "same.dcm"
    shutil.copy(plan.root / "CT0002.dcm", same)
    victim.before = victim.state()
    plant(base / "CT0001.dcm", victim.root / "precious")
    plant(base / "CT0002.dcm", same)
    plant(base / "sub", victim.root / "all")
    plant(base / "extra", victim.root / "all")
    sent = attempt(target(archive), plan)
    victim.assert_untouched()
    assert sent.require().state is State.DELIVERED
    assert sorted(path.name for path in (archive / "all").iterdir()) == [
        ".complete", "CT0001.dcm", "CT0002.dcm", "CT0003.dcm", "sub",
    ]  # fmt: skip
    assert not any(path.is_symlink() for path in archive.rglob("*"))


def test_what_is_cleared_away_is_ours(archive: Path, plan: Plan, victim: Victim) -> None:
    """A delivery that is refused for good removes what it wrote: links in there, not what they lead to."""
    base = archive / f".incoming-{plan.dispatch_id}" / "archive"
    plant(base / "parts" / "link", victim.root)
    plant(base / "link", victim.root)
    with Tree(archive) as tree:
        tree.remove(f".incoming-{plan.dispatch_id}/archive")
    assert not base.exists()
    plant(base, victim.root)
    with Tree(archive) as tree:
        tree.remove(f".incoming-{plan.dispatch_id}/archive")
        tree.remove(f".incoming-{plan.dispatch_id}/archive/parts")
    victim.assert_untouched()


def test_the_check_follows_no_link(archive: Path, victim: Victim) -> None:
    plant(archive / "all", victim.root)
    health = check(target(archive))
    assert not health.ok
    assert "symbolic link" in health.probes[1].detail
    victim.assert_untouched()


# ---- a link that comes in between


STEPS = ["open", "make_folders", "rename", "move_folder", "move_file", "unlink", "flush", "stat", "remove", "files"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("swapped", ["all", ".incoming-{id}/archive"])
def test_a_folder_becomes_a_link_before_a_step(
    archive: Path, plan: Plan, victim: Victim, monkeypatch: pytest.MonkeyPatch, step: str, swapped: str
) -> None:
    """Before each call of a step, whatever was looked at before, the folder is swapped for a link."""
    studies.write(archive / "all" / "CT0001.dcm", b"older")
    studies.write(archive / "all" / ".complete", b"")
    really, path = getattr(Tree, step), archive / swapped.format(id=plan.dispatch_id)
    aside = archive / "aside"

    def meddling(*args: Any, **options: Any) -> Any:
        with suppress(OSError):
            path.rename(aside)
            path.symlink_to(victim.root)
        try:
            result = really(*args, **options)
            return list(result) if step == "files" else result
        finally:
            if path.is_symlink():
                path.unlink()
                with suppress(OSError):
                    aside.rename(path)

    with monkeypatch.context() as patch:
        patch.setattr(Tree, step, meddling)
        attempt(target(archive), plan)
    victim.assert_untouched()


@contextmanager
def swapping(*pairs: tuple[Path, Path]) -> Iterator[Callable[[], int]]:
    """Swap folders for links to others, and back, as fast as a thread can."""
    over, count = threading.Event(), 0

    def swap() -> None:
        nonlocal count
        while not over.is_set():
            for path, to in pairs:
                aside = path.with_name(f"{path.name}-aside")
                with suppress(OSError):
                    path.rename(aside)
                    path.symlink_to(to)
                    count += 1
                with suppress(OSError):
                    if path.is_symlink():
                        path.unlink()
                    aside.rename(path)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield lambda: count
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("way")
def test_folders_that_become_links_all_the_time(archive: Path, plan: Plan, victim: Victim) -> None:
    incoming = archive / f".incoming-{plan.dispatch_id}"
    (archive / "all").mkdir()
    with swapping(
        (archive / "all", victim.root), (incoming, victim.root), (incoming / "archive", victim.root / "archive")
    ) as swaps:
        rounds = 0
        while rounds < 40 or swaps() < 50:
            attempt(target(archive), plan)
            rounds += 1
    victim.assert_untouched()
    for left in (archive, incoming):
        shutil.rmtree(left, ignore_errors=True)
    archive.mkdir(exist_ok=True)
    assert attempt(target(archive), plan).require().state is State.DELIVERED


# ---- DICOMweb folders


def web(folder: Path) -> DicomWebTarget:
    made = DicomWebTarget(url=folder.as_uri(), verify="proven")
    made.named("archive")
    return made


def place_of(plan: Plan) -> tuple[str, str]:
    header = plan.items[0].header
    assert header
    return header.StudyInstanceUID, header.SeriesInstanceUID


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_link_in_a_dicomweb_folder(archive: Path, plan: Plan, victim: Victim, depth: int) -> None:
    header = plan.items[0].header
    assert header
    names = (header.StudyInstanceUID, header.SeriesInstanceUID, f"{header.SOPInstanceUID}.dcm")
    plant(archive.joinpath(*names[:depth]), victim.root if depth < 3 else victim.root / "precious")
    sent = attempt(web(archive), plan)
    victim.assert_untouched()
    assert isinstance(sent.error, Denied) if depth < 3 else len(sent.rejected) == 1


def test_dicomweb_folders_that_become_links_all_the_time(archive: Path, plan: Plan, victim: Victim) -> None:
    study, series = place_of(plan)
    incoming = archive / f".incoming-{plan.dispatch_id}"
    (archive / study / series).mkdir(parents=True)
    pairs = [(archive / study, victim.root), (archive / study / series, victim.root), (incoming, victim.root)]
    with swapping(*pairs) as swaps:
        rounds = 0
        while rounds < 25 or swaps() < 50:
            attempt(web(archive), plan)
            rounds += 1
    victim.assert_untouched()


def test_what_a_dicomweb_folder_holds_is_read_without_links(archive: Path, tmp_path: Path) -> None:
    """Neither answers nor instances come from where a folder leads that became a link after it was listed."""
    for count in range(3):
        studies.dicom(archive / "series" / f"{count}.dcm", PatientID="inside")
        studies.dicom(tmp_path / "secret" / f"{count}.dcm", PatientID="outside")
    series = archive / "series"
    with DicomFolder(archive) as folder:
        (first, *_) = list(folder.instances(dicomweb.Query()))
        series.rename(archive / "was")
        series.symlink_to(tmp_path / "secret")
        with pytest.raises(Exception, match="can't be read"):
            folder.open(first)
        series.unlink()
        (archive / "was").rename(series)
        with swapping((series, tmp_path / "secret")) as swaps:
            rounds = 0
            while rounds < 20 or swaps() < 50:
                for match in folder.find(dicomweb.Query()):
                    assert match.attributes["PatientID"] == "inside"
                rounds += 1


# ---- where targets may lie


def test_targets_lie_below_the_places(
    tmp_path: Path, plan: Plan, victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "places" / "a").mkdir(parents=True)
    (tmp_path / "places" / "out").symlink_to(victim.root)
    monkeypatch.setenv("TALARIA_PLACES", str(tmp_path / "places"))
    assert attempt(target(tmp_path / "places" / "a"), plan).require().state is State.DELIVERED
    (tmp_path / "places" / "web").mkdir()
    assert attempt(web(tmp_path / "places" / "web"), plan).require().state is State.DELIVERED
    for folder in (victim.root, tmp_path / "places" / "out", tmp_path / "places" / ".." / "victim"):
        for sent in (attempt(target(folder), plan), attempt(web(folder), plan)):
            assert isinstance(sent.error, Denied)
            assert "below no folder of TALARIA_PLACES" in str(sent.error)
        for health in (check(target(folder)), dicomweb.check(web(folder))):
            assert isinstance(health.error, Denied)
        with pytest.raises(Denied):
            list(dicomweb.find(web(folder), dicomweb.Query()))
    victim.assert_untouched()


def test_no_target_lies_in_the_state_directory(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "staging").mkdir(parents=True)
    monkeypatch.setenv("TALARIA_HOME", str(home))
    for folder in (home, home / "staging"):
        assert isinstance(attempt(target(folder), plan).error, Denied)
    assert os.listdir(home) == ["staging"]
