"""Inboxes beside a running `talaria up`: noticed, dispatched, settled, and what becomes of their files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from talaria.testing import studies as material
from tests.servers.up import Talaria


class Inboxes:
    """Sources and folder targets below one folder of the test's."""

    def __init__(self, up: Talaria, folder: Path) -> None:
        self.up, self.folder = up, folder
        self.names: list[str] = []

    def make(self, *names: str) -> list[Path]:
        found = [self.folder / name for name in names]
        for one in found:
            one.mkdir()
        return found

    def apply(self, code: int = 0, **sources: dict[str, Any]) -> str:
        path = self.folder / "sources.yaml"
        path.write_text(yaml.safe_dump({"sources": {key.replace("_", "-"): one for key, one in sources.items()}}))
        ran = self.up.here("source", "apply", str(path))
        assert ran.returncode == code, ran.stderr
        self.names += [key.replace("_", "-") for key in sources] if not code else []
        return ran.stderr

    def state(self, name: str) -> dict[str, int]:
        counts: dict[str, int] = self.up.told("source", "show", name)["units"]
        return {state: count for state, count in counts.items() if count}

    def until(self, name: str, **counts: int) -> None:
        """Wait until so many units of a source are in each state."""
        self.up.until(lambda: self.state(name) == counts)

    def runs_of(self, name: str) -> list[Any]:
        body = {"flow_runs": {"tags": {"all_": [f"source:{name}"]}}}
        found: list[Any] = self.up.api("POST", "/flow_runs/filter", **body)
        return found


@pytest.fixture
def inboxes(up: Talaria, tmp_path: Path) -> Any:
    one = Inboxes(up, tmp_path)
    yield one
    for name in one.names:
        up.here("source", "remove", name)


def put(make: Callable[[Path], Any], where: Path) -> None:
    """Put a study there as a whole, as a sender does who moves it in."""
    part = where.parent.parent / f"part-{where.name}"
    make(part)
    (part / ".complete").touch()
    part.rename(where)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".complete"}


def test_studies_of_an_inbox_are_delivered_and_deleted(inboxes: Inboxes) -> None:
    box, shelf, more = inboxes.make("box", "shelf", "more")
    inboxes.up.apply(
        shelf={"type": "folder", "folder": str(shelf), "layout": "{StudyInstanceUID}", "verify": "listed"},
        more={"type": "folder", "folder": str(more)},
    )
    inboxes.apply(
        box={"type": "inbox", "folder": str(box), "targets": ["shelf", "more"], "after": "delete", "settle_s": 3600}
    )
    for number in range(3):
        put(lambda folder: material.ct(folder, 2), box / f"s{number}")
    material.ct(box / "settling", 1)  # has no marker, and may still be written to
    inboxes.until("box", done=3)
    assert files(box) == {f"settling/{path.name}" for path in (box / "settling").iterdir()}
    assert [one.name for one in box.iterdir()] == ["settling"], "their folders are gone as well"
    assert len(files(shelf)) == 6 == len(files(more))
    runs = inboxes.runs_of("box")
    assert runs and all(run["parameters"]["each"] == "unit" and run["state_type"] == "COMPLETED" for run in runs)
    shown = inboxes.up.told("source", "show", "box")
    assert shown["waiting"] == 1 and not shown["attention"]
    (listed,) = [one for one in inboxes.up.told("source", "list")["sources"] if one["name"] == "box"]
    assert listed["units"]["done"] == 3 and listed["enabled"]
    shutil.rmtree(box / "settling")
    assert os.listdir(box) == []
