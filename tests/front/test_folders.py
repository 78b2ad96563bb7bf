"""Folders that are looked into: below allowed roots, however those are written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from talaria.service.folders import listing
from transfer.errors import Denied
from transfer.roots import places


@pytest.mark.parametrize("end", ["", "/", "/.", "//"])
def test_above_an_only_root_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    (tmp_path / "data" / "day").mkdir(parents=True)
    monkeypatch.setenv("TALARIA_PLACES", f"{tmp_path}/data{end}")
    top = listing(places(), "")
    assert (top.path, top.up) == (f"{tmp_path}/data", None)
    assert [one.path for one in top.entries] == [f"{tmp_path}/data/day"]
    assert listing(places(), f"{tmp_path}/data/day").up == f"{tmp_path}/data"
    monkeypatch.setenv("TALARIA_PLACES", f"{tmp_path}/data{end}:{os.sep}{tmp_path}/data/day{end}")
    assert listing(places(), f"{tmp_path}/data").up == listing(places(), f"{tmp_path}/data/day").up == ""


def test_where_all_roots_are_ours_nothing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path))
    monkeypatch.setenv("TALARIA_PLACES", f"{tmp_path}/received")
    with pytest.raises(Denied, match="TALARIA_PLACES names no folder"):
        listing(places(), "")
