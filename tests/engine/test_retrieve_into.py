"""Where retrievals bring studies: below the allowed folders, and never through a link."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from tasks.retrieve.moving import check_into, move_into
from transfer.errors import Denied, Misconfigured
from transfer.nearby import spool_in


@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    studies.dicom(tmp_path / "spool" / "1.dcm")
    return tmp_path / "spool"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_has_its_final_name_survives_a_power_cut(
    tmp_path: Path, fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,), flushed, flush = fetched.glob("*.dcm"), list[int](), os.fdatasync

    def noted(one: Any) -> None:
        flushed.append(os.fstat(one.fileno()).st_ino)
        assert file.exists()
        flush(one)

    monkeypatch.setattr(os, "fdatasync", noted)
    content = file.stat().st_ino
    move_into(fetched, tmp_path / "into", "ACC")
    assert flushed == [content]


def test_a_study_is_brought(tmp_path: Path, fetched: Path) -> None:
    into = tmp_path / "into"
    check_into(into)
    assert move_into(fetched, into, "ACC") == 1
    (file,) = files(into)
    assert file.startswith("ACC/") and file.endswith("/1.dcm")
    assert not list(fetched.glob("*.dcm"))


def test_onto_another_file_system(fetched: Path) -> None:
    into = Path(f"/dev/shm/talaria-{os.getpid()}-into")
    try:
        assert move_into(fetched, into, "ACC") == 1
        assert len(files(into)) == 1
    finally:
        for path in sorted(into.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        into.rmdir()


@pytest.mark.parametrize("depth", [1, 2])
def test_no_link_is_followed(tmp_path: Path, fetched: Path, depth: int) -> None:
    into, victim = tmp_path / "into", tmp_path / "victim"
    again = tmp_path / "again" / "1.dcm"
    studies.write(again, (fetched / "1.dcm").read_bytes())
    move_into(fetched, into, "ACC")
    (series,) = (into / "ACC").iterdir()
    victim.mkdir()
    swapped = series if depth == 2 else series.parent
    swapped.rename(tmp_path / "was")
    swapped.symlink_to(victim)
    with pytest.raises(Misconfigured, match=r"/ACC.*: .*symbolic link where a folder is expected"):
        move_into(again.parent, into, "ACC")
    assert not any(victim.iterdir())


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, fetched: Path) -> None:
    into = tmp_path / "into"
    studies.write(into / "ACC", b"a file")
    with pytest.raises(Misconfigured, match=r"into/ACC: .*: there is a file where a folder is expected"):
        move_into(fetched, into, "ACC")


def test_only_below_the_places(tmp_path: Path, fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = tmp_path / "places"
    places.mkdir()
    (places / "out").symlink_to(tmp_path)
    monkeypatch.setenv("TALARIA_PLACES", str(places))
    for into in (tmp_path / "elsewhere", places / "out" / "new", places / ".." / "new"):
        with pytest.raises(Denied, match="below no folder of TALARIA_PLACES"):
            check_into(into)
        with pytest.raises(Denied):
            move_into(fetched, into, "ACC")
    check_into(places / "new")
    assert move_into(fetched, places / "new", "ACC") == 1


def test_studies_are_fetched_beside_their_place_only_if_nobody_can_swap_the_folder(tmp_path: Path) -> None:
    into = tmp_path / "into"
    assert spool_in(into, ".talaria-x") == into / ".talaria-x"
    into.mkdir()
    assert spool_in(into, ".talaria-x") == into / ".talaria-x"
    (into / ".talaria-x").symlink_to(tmp_path)
    assert spool_in(into, ".talaria-x") is None
    into.chmod(0o777)
    assert spool_in(into, ".talaria-y") is None
    into.chmod(0o1777)
    assert spool_in(into, ".talaria-y") == into / ".talaria-y"
