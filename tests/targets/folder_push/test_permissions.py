"""Permissions, groups, links, and what a file keeps."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from pydicom.data import get_testdata_files

from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.folder import check
from tests.targets.folder_push.pushing import delivered, target, tree
from transfer.errors import Misconfigured
from transfer.outcome import Kind
from transfer.plan import scan


def test_holes_and_times_are_kept(archive: Path, study: Path) -> None:
    study.mkdir()
    with open(study / "sparse.bin", "wb") as file:
        file.write(b"begin")
        file.truncate(64 << 20)
        file.seek(40 << 20)
        file.write(b"middle")
    os.utime(study / "sparse.bin", ns=(1, 1_234_567_890_123_456_789))
    sent = delivered(attempt(target(archive, verify="proven"), study))
    there = archive / sent.plan.dispatch_id / "sparse.bin"
    assert there.stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert there.stat().st_size == 64 << 20
    assert there.stat().st_blocks * 512 < 1 << 20
    assert sent.moved == 64 << 20


def test_pydicoms_own_files_arrive_as_they_are(archive: Path, tmp_path: Path) -> None:
    """Whatever they are: a folder takes all, and the receipt equals what is there."""
    files = [Path(name) for name in get_testdata_files() if Path(name).is_file()]
    source = tmp_path / "pydicom"
    for file in files:
        relative = Path(*file.parts[file.parts.index("data") + 1 :])
        studies.write(source / relative, file.read_bytes())
    plan = scan([source])
    assert len(plan.items) > 150
    sent = delivered(attempt(target(archive, verify="proven"), plan))
    receipt = sent.require()
    there = archive / plan.dispatch_id
    assert {item.path for item in receipt.items if item.outcome is Kind.DELIVERED} == tree(there) - {".complete"}
    assert all((there / item.path).read_bytes() == plan.file(item).read_bytes() for item in plan.items)
    assert receipt.bytes == sum(path.stat().st_size for path in there.rglob("*") if path.is_file())


def test_permissions_and_group(archive: Path, study: Path) -> None:
    studies.ct(study / "sub", 2)
    group = os.getgid()
    plan = delivered(attempt(target(archive, mode="0640", dir_mode="0750", group=str(group)), study)).plan
    for path in (archive / plan.dispatch_id, *(archive / plan.dispatch_id).rglob("*")):
        wanted = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
        assert path.stat().st_gid == group
    assert stat.S_IMODE((study / "sub" / "CT0001.dcm").stat().st_mode) != 0o640


def test_without_permissions_the_umask_decides(archive: Path, study: Path) -> None:
    studies.ct(study / "sub", 1)
    before = os.umask(0o027)
    try:
        plan = delivered(attempt(target(archive), study)).plan
    finally:
        os.umask(before)
    for path in (archive / plan.dispatch_id).rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640)


def test_a_folder_that_hands_its_group_down_keeps_doing_so(archive: Path, study: Path) -> None:
    studies.ct(study / "sub", 1)
    archive.chmod(0o2775)
    plan = delivered(attempt(target(archive, dir_mode="0770"), study)).plan
    assert stat.S_IMODE((archive / plan.dispatch_id / "sub").stat().st_mode) == 0o2770


def test_a_group_that_does_not_exist(archive: Path, study: Path) -> None:
    studies.ct(study, 1)
    sent = attempt(target(archive, group="no-such-group"), study)
    assert isinstance(sent.error, Misconfigured)
    assert "no-such-group" in str(sent.error)
    assert not check(target(archive, group="no-such-group")).ok


def test_links_only_where_it_is_told_so(archive: Path, study: Path) -> None:
    (file,) = studies.ct(study, 1)
    plan = scan([study])
    there = archive / plan.dispatch_id / "CT0001.dcm"
    for fields, linked in (({}, False), ({"link": "auto"}, True), ({"link": "auto", "mode": "0600"}, False)):
        shutil.rmtree(archive / plan.dispatch_id, ignore_errors=True)
        mode = file.stat().st_mode
        delivered(attempt(target(archive, **fields), plan))
        assert (there.stat().st_ino == file.stat().st_ino) is linked
        assert there.read_bytes() == file.read_bytes()
        assert file.stat().st_mode == mode, "the source's own permissions"


def test_times_are_kept(archive: Path, study: Path) -> None:
    (file,) = studies.ct(study, 1)
    os.utime(file, ns=(1, 1_234_567_890_123_456_789))
    plan = delivered(attempt(target(archive), study)).plan
    assert (archive / plan.dispatch_id / "CT0001.dcm").stat().st_mtime_ns == 1_234_567_890_123_456_789
