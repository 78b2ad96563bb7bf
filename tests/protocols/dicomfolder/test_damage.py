"""What may become of an index: damaged, replaced, left behind, cut off by a full disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from imaging.query import Query
from protocols.dicomfolder.folder import DicomFolder
from protocols.dicomfolder.index import NAME, Index
from talaria.testing import studies
from tests.protocols.dicomfolder.looking import look, names, series
from transfer.beneath import open_beneath


def garbage(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def holes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 : len(data) - 4096] = bytes(len(data) - 8192)
    path.write_bytes(data)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def by_sql(path: Path, statement: str) -> None:
    """Change an index as somebody does who knows how they are kept."""
    with closing(Index(path)) as index:
        index.add_folder(b"so that something has changed")
        index.db.execute(statement)
        index.save(0o600)


def older(path: Path) -> None:
    by_sql(path, "PRAGMA user_version = 0")


def one_wrong_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"Quell^A")] ^= 0xFF
    path.write_bytes(data)


def other_text(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"Quell^A", b"Qu3ll^B"))


def with_a_trigger(path: Path) -> None:
    by_sql(path, "CREATE TRIGGER evil AFTER DELETE ON files BEGIN DELETE FROM studies; END")


DAMAGES = (garbage, cut_short, empty, holes, a_folder, one_wrong_byte, other_text, older, with_a_trigger)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_is_made_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    series(tmp_path / "a", 5, PatientName="Quell^A")
    look(tmp_path)
    damage(tmp_path / NAME)
    assert names(tmp_path) == ["Quell^A"]
    expected = 5 if damage is a_folder else 0  # nothing of ours may take its place, and nothing is lost
    assert look(tmp_path).read == expected


def test_index_can_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    outside = studies.dicom(tmp_path / "outside.dcm")
    root = tmp_path / "root"
    series(root / "a", 1)
    look(root)
    by_sql(root / NAME, "UPDATE files SET name=CAST('../../outside.dcm' AS BLOB)")
    with closing(Index(root / NAME)) as index:
        assert index.is_saved
    with DicomFolder(root) as folder:
        assert outside not in {held.path.resolve() for held in folder.instances(Query())}


def test_index_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = studies.write(tmp_path / "victim", b"precious")
    root = tmp_path / "data"
    series(root, 2)
    (root / NAME).symlink_to(victim)
    assert look(root).read == 2
    assert victim.read_bytes() == b"precious"
    assert look(root).read == 0


def test_full_disk_changes_no_answer(tmp_path: Path) -> None:
    series(tmp_path, 2, PatientName="Quell^A")
    with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")):
        report = look(tmp_path)
        assert (report.read, report.saved) == (2, False)
        assert names(tmp_path) == ["Quell^A"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(NAME)]
    assert look(tmp_path).saved


def test_parts_of_an_index_that_were_left_behind_are_removed(tmp_path: Path) -> None:
    series(tmp_path, 1)
    old, new = (studies.write(tmp_path / f"{NAME}.{which}.part", b"x") for which in ("old", "new"))
    os.utime(old, (0, 0))
    look(tmp_path)
    assert not old.exists()
    assert new.exists()  # another process may be writing it


def test_share_that_goes_away_is_an_error_and_takes_nothing_out_of_the_index(tmp_path: Path) -> None:
    series(tmp_path / "a", 3)
    series(tmp_path / "b", 3)
    look(tmp_path)

    def stale(folder: int, path: str, *args: Any) -> Any:
        if path == "b":
            raise OSError(116, "Stale file handle")
        return open_beneath(folder, path, *args)

    with mock.patch("protocols.files.tree.open_beneath", stale), pytest.raises(OSError, match="Stale"):
        look(tmp_path)
    assert look(tmp_path).unchanged == 6


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        look(tmp_path / "missing")
    with pytest.raises(NotADirectoryError):
        look(studies.write(tmp_path / "file", b""))


def test_nothing_is_left_of_what_is_gone(tmp_path: Path) -> None:
    series(tmp_path / "a", 3)
    look(tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert look(tmp_path).removed == 3
    index = Index(tmp_path / NAME)
    for table in ("studies", "series", "headers", "files"):
        assert index.db.execute(f"SELECT COUNT(*) FROM {table}").fetchone() == (0,), table
    index.close()
