"""Runs that can't do anything now: who is looked at without a place, and who hears of a pause before they rest."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun

from blocks.folder import FolderTarget
from talaria.engine.aside import Aside
from talaria.testing import studies
from tasks.dispatch import line, running, waiting
from tasks.dispatch.run import Dispatch, Paused
from tests.engine.material import later
from transfer.home import Home
from transfer.ledger import Ledger


def test_what_did_not_come_to_rest_takes_a_place_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not be looked at, or belongs to another worker: looked at again and again, it would stop the others."""
    monkeypatch.setattr(waiting, "may_wait", lambda ledger, found: found)
    found = [FlowRun(id=uuid4(), flow_id=uuid4()) for _ in range(2)]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        aside = Aside(cast(Any, None), Home(tmp_path), ledger)

        def chosen() -> set[UUID]:
            return asyncio.run(aside.chosen(found))

        aside.runs = chosen()
        assert aside.runs == {one.id for one in found}
        aside.leaves(found[0].id, rests=True)
        aside.leaves(found[1].id, rests=False)
        assert not aside.runs and chosen() == {found[0].id}
        aside.leaves(found[1].id, rests=False)  # it has had its place
        assert chosen() == {one.id for one in found}


@pytest.mark.parametrize("names", [[""], ["pacs", " "], ["dicom/"]])
def test_a_run_to_a_target_without_a_name_begins_and_is_refused(tmp_path: Path, names: list[str]) -> None:
    """A worker that ended of it would find it again, as would all others."""
    found = [FlowRun(id=uuid4(), flow_id=uuid4(), parameters={"targets": names, "paths": ["/study"]})]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.waits.join("pacs", str(uuid4()), 0, ledger.now() + 60)
        assert asyncio.run(Aside(cast(Any, None), Home(tmp_path), ledger).chosen(found)) == set()


@pytest.mark.parametrize("flag", ["paused", "cancelled"])
def test_a_run_hears_of_it_before_it_rests_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setattr(line, "may_rest", lambda: True)
    studies.ct(tmp_path / "study", 1)
    target = FolderTarget(folder=str(tmp_path), window=later(2)).named("archive")
    run_id = str(uuid4())
    (running.pause if flag == "paused" else running.flag)(run_id).set()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        none = cast(Any, SimpleNamespace())
        dispatch = Dispatch(run_id, [target], Home(tmp_path), ledger, none, none, "normal")
        with pytest.raises(Exception, match=f"was {flag} while it waited") as caught:
            asyncio.run(dispatch.goes_on([str(tmp_path / "study")], "", ""))
    assert isinstance(caught.value, Paused) is (flag == "paused")
    running.forget(run_id)
