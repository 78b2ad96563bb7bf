"""What `jobs send` makes of a source's list of units: a list of its own, of what stays."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from blocks import SOURCES
from talaria.testing import studies
from tasks.sources import elsewhere
from tasks.sources.elsewhere import lent_studies, lent_units
from transfer import unitlist
from transfer.deadletters import clear, read_by
from transfer.errors import NotFound, Rejected
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.plan import Origin
from transfer.studies import Each, listed
from transfer.unitlist import ListedUnit


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    return Home.current()


def lent(home: Home, path: Path, *keys: str) -> list[str]:
    return asyncio.run(lent_units(cast(Any, None), home, [str(path)], keys))


def test_what_was_received_is_there_when_the_source_has_done_with_it(home: Home, tmp_path: Path) -> None:
    """It waited for the night, while another target had the study, and the source removed it."""
    received, beside = home.root / "received" / "ct" / "1.2.3", tmp_path / "box" / "s"
    for folder in (received, beside):
        studies.ct(folder, 2)
    writer = unitlist.Writer(unitlist.place(home, "ct", "mark"))
    writer.add(ListedUnit("1.2.3", (str(received),), str(received.parent.resolve())))
    writer.add(ListedUnit("s", (str(beside),), str(beside.parent)))
    writer.close()
    before = {one.name: one.read((), Origin()).items for one in listed([writer.path], Each.UNIT)}
    paths = lent(home, writer.path)
    unitlist.remove(writer.path)
    shutil.rmtree(received)
    found = {one.name: one for one in listed(paths, Each.UNIT)}
    assert found["s"].paths == (str(beside),) and found["1.2.3"].paths != (str(received),)
    for name, items in before.items():
        plan = found[name].read((), Origin())
        assert [(item.path, item.size) for item in plan.items] == [(item.path, item.size) for item in items]
    assert clear(home, 9e9, read_by(paths)) == 0 and clear(home, 9e9) == 1  # with the retention, when it has ended


def test_units_whose_list_is_gone_are_those_of_the_source_now(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = tmp_path / "box"
    for name in ("a", "b", "later"):
        studies.ct(box / name, 1)
    source = SOURCES["inbox"](folder=str(box), targets=["archive"]).named("box")

    async def load(*_: Any, **__: Any) -> list[Any]:
        return [source]

    monkeypatch.setattr(elsewhere.KEPT, "load", load)
    with Ledger(home.ledger):
        pass
    gone = unitlist.place(home, "box", "mark")
    found = {one.name: one for one in listed(lent(home, gone, "a", "b", "c"), Each.UNIT)}
    assert [*found] == ["a", "b", "c"] and found["b"].paths == (str(box / "b"),)
    with pytest.raises(NotFound):  # as the dispatch says of this one
        found["c"].read((), Origin())
    with pytest.raises(NotFound, match="nothing of it is in the source box any more"):
        lent(home, gone, "c", "d")
    (mine,) = lent(home, gone, "a")
    shutil.rmtree(Path(mine).parents[1])
    with pytest.raises(NotFound, match="send the dispatch that it was sent from"):
        lent(home, Path(mine), "a")


def test_studies_of_a_flood_are_those_that_it_had(home: Home, tmp_path: Path) -> None:
    """Seen: one that had gone was left out in silence, and those that had come since were sent, too."""
    many = tmp_path / "many"
    for name in ("a", "gone", "later"):
        studies.ct(many / name, 1)
    studies.ct(many, 1)
    studies.ct(tmp_path / "elsewhere", 1)
    (many / "link").symlink_to(tmp_path / "elsewhere")
    before = {one.name: one for one in listed([many], Each.FOLDER)}
    names = [name for name in before if name != "later"]
    shutil.rmtree(many / "gone")
    paths = lent_studies(home, "run", [str(many)], Each.FOLDER, "", names)
    found = {one.name: one for one in listed(paths, Each.UNIT)}
    assert list(found) == names and names[-1] == "many/*"
    for name in ("a", "many/*"):
        assert found[name].read((), Origin()).dispatch_id == before[name].read((), Origin()).dispatch_id
    with pytest.raises(NotFound, match="no such file or folder"):
        found["gone"].read((), Origin())
    with pytest.raises(Rejected, match="leads out"):
        found["link"].read((), Origin())
